"""What a selection of the prompt saves a decoder."""

from __future__ import annotations

from . import read


def table() -> str:
    r = read("prefill.json")
    if r is None:
        return "Not measured yet: `python scripts/research/prefill.py`."
    shape, rounds = r["shape"], {row["length"]: row["rounds"] for row in r["rows"]}
    fewer = [f"{length:,}" for length, number in rounds.items() if number < max(rounds.values())]
    once = f", one round at {' and '.join(fewer)} tokens" if fewer else ""
    lines = [
        f"A decoder of Llama's shape with random weights ({shape['num_hidden_layers']} layers, width {shape['hidden_size']}), {r['dtype']}, "
        f"{r['clock']}; every method keeps {r['kept']:.0%} of the prompt. Key norm and SnapKV evict keys and values from the cache, separately for each head. "
        f"Times are medians of {max(rounds.values())} rounds{once} "
        "(`python scripts/research/prefill.py`).",
        "",
        "| prompt | method | prefill, s | against stock | per token, ms | against stock | keys and values, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in r["rows"]:
        name = f"`{row['method']}`" if row["method"].startswith("decoder.") else row["method"]
        lines.append(
            f"| {row['length']:,} | {name} | {row['prefill_seconds']:.2f} | {row['prefill_speedup']:.2f} × | {1e3 * row['token_seconds']:.1f} "
            f"| {row['token_speedup']:.2f} × | {row['kv_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines)
