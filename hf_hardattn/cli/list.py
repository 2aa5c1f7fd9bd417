"""``hf-hardattn list``."""

from __future__ import annotations

import typer


def command() -> None:
    """List what is registered: scorers, estimators (with what they need), baselines, families of models."""
    from .. import models, registry

    for kind in registry.KINDS:
        typer.echo(f"{kind}:")
        for name in registry.names(kind):
            member = registry.load(kind, name)
            lines = (member.__doc__ or "").strip().splitlines()
            facts = ""
            if kind == "estimators":
                needs = ", ".join(member.needs) or "nothing more"
                facts = f" [{'biased' if member.biased else 'unbiased'}; needs {needs}]"
            typer.echo(f"  {name:<18}{lines[0] if lines else ''}{facts}")
            for option, warning in getattr(member, "caution", {}).items():
                typer.echo(f"  {'':<18}caution, {option}: {warning}")
    typer.echo("models:")
    for name in models.names():
        towers = ", ".join(f"{t.name} ({', '.join(t.kinds)})" for t in models.load(name).spec.towers)
        typer.echo(f"  {name:<24}{towers}")
