"""What a recording costs."""

from __future__ import annotations

from . import read


def table() -> str:
    r = read("recording_cost.json")
    costs, noise = ([row[key] for row in r["rows"]] for key in ("cost", "cost_of_nothing"))
    return (
        f"Recording {sum(row['selections'] for row in r['rows'])} selections of ViT-B and T5-base, in forwards and in `generate()`, costs {min(costs):+.1%} to {max(costs):+.1%} "
        f"of the time without; the same thing measured twice differs by {min(noise):+.1%} to {max(noise):+.1%} (`python scripts/research/recording_cost.py`)."
    )
