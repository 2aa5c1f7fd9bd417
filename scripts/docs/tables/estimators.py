"""Every estimator: what it declares, what it reached on cluttered digits, and where it comes from."""

from __future__ import annotations

from hf_hardattn import registry

from . import read, spread

VERDICTS = {
    "simple": 'the default; the first choice with `recipe="robust"`',
    "gumbel": "a good second opinion",
    "straight_through": "with its default surrogate, `balanced`",
    "reinforce": "with a baseline; noisy",
    "distil": "to warm up a scorer",
    "log_gate": "after a warm-up: dropped positions get no gradient",
    "cropr": "for classes, when training must be cheap",
    "rloo": "when the objective has no gradient",
    "grpo": "like `rloo`, with normalised rewards",
    "marginal": "exact; tiny problems only",
    "soft": "full attention, for comparison",
}


def table() -> str:
    every = read("compare/defaults_digits.json")
    found = {name: row["metrics"][every["metric"]] for name, row in every["summary"].items()}
    lines = [
        "| estimator | gradient | needs | training runs | measured | use | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in registry.names("estimators"):
        member = registry.load("estimators", name)
        needs = ", ".join(member.needs) or "nothing more"
        measured = spread(found[name], 100) if name in found else "not run"
        cells = [
            "biased" if member.biased else "unbiased",
            needs,
            "gathered" if member.trains_gathered else "masked",
            measured,
        ]
        cells += [VERDICTS.get(name, ""), member.source]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)
