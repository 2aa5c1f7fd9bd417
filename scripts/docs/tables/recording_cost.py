"""What a recording costs."""

from __future__ import annotations

from . import read


def table() -> str:
    r = read("recording_cost.json")
    costs, noise = ([row[key] for row in r["rows"]] for key in ("cost", "cost_of_nothing"))
    return (
        f"Recording {sum(row['selections'] for row in r['rows'])} selections of ViT-B and T5-base, in forward passes and in `generate()`, changes the time by {min(costs):+.1%} to "
        f"{max(costs):+.1%}; two measurements without recording differ by {min(noise):+.1%} to {max(noise):+.1%} (`python scripts/research/recording_cost.py`)."
    )
