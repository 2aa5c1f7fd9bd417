"""``hf-hardattn list``."""

from __future__ import annotations

import re

import typer

NEEDS = """
What an estimator needs: gates - the gradient at every position, so it trains masked and saves compute in inference only; reward -
a reward for each example, by default minus the loss; choices - the loss of every choice; passes - several forward passes per step;
teacher - the same model with full attention; target - the labels, which its posterior reads;
class - one integer label per example, which its auxiliary head predicts.
"""


def command() -> None:
    """List scorers, estimators with what they need, baselines, families of models with their sites, and tasks."""
    from .. import models, registry
    from ..training import flag_help

    for kind in registry.KINDS:
        typer.echo(f"{kind}:")
        for name in registry.names(kind):
            member = registry.load(kind, name)
            facts = ""
            if kind == "estimators":
                needs = ", ".join(member.needs) or "nothing more"
                facts = f" [{'biased' if member.biased else 'unbiased'}; needs {needs}]"
            typer.echo(f"  {name:<18}{first_sentence(member.__doc__)}{facts}")
            for option, warning in getattr(member, "caution", {}).items():
                typer.echo(f"  {'':<18}caution, {option}: {warning}")
    typer.echo("models:")
    for name in models.names():
        towers = ", ".join(f"{t.name} ({', '.join(t.kinds)})" for t in models.load(name).spec.towers)
        typer.echo(f"  {name:<24}{towers}")
    typer.echo("tasks of hf-hardattn train:")
    for name, task in sorted(flag_help.tasks().items()):
        families = ", ".join(f"{each}{' (the first)' if each == task.first else ''}" for each in task.families)
        typer.echo(f"  {name:<32}{families}")
    typer.echo(NEEDS.strip())


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a docstring without backticks."""
    paragraph = " ".join((text or "").strip().partition("\n\n")[0].split()).replace("`", "")
    return re.split(r"(?<=[.:]) (?=[A-Z])", paragraph)[0]
