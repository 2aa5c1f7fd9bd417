"""``hf-hardattn list``."""

from __future__ import annotations

import typer


def command() -> None:
    """List what is registered: scorers, estimators, baselines, architectures."""
    from .. import registry

    for kind in registry.KINDS:
        typer.echo(f"{kind}:")
        for name in registry.names(kind):
            lines = (registry.load(kind, name).__doc__ or "").strip().splitlines()
            typer.echo(f"  {name:<18}{lines[0] if lines else ''}")
