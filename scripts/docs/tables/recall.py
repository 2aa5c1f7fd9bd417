"""A small decoder trained to answer questions about its prompt."""

from __future__ import annotations

from . import read


def table() -> str:
    r = read("recall.json")
    if r is None:
        return "Not measured yet: `python scripts/research/recall.py`."
    lines = [
        f"A prompt of {r['length']:,} tokens of noise contains {r['facts']} facts and is followed by {r['facts']} questions; {r['prompts']} prompts, one seed. The "
        f"decoder's first layer reads a window of {r['shape']['sliding_window']} tokens, so the later layers must find the facts. Each "
        f"variant was trained further for {sum(r['adapt'])} steps, from the same trained decoder (`python scripts/research/recall.py`).",
        "",
        "| variant | kept | all answers right | answers right | prefill, ms |",
        "|---|---|---|---|---|",
    ]
    for row in r["rows"]:
        prefill = f"{1e3 * row['prefill_seconds']:.1f}" if "prefill_seconds" in row else ""
        lines.append(
            f"| {row['variant']} | {row['kept_ratio']:.0%} | {100 * row['exact_match']:.1f} % | {100 * row['answers_right']:.1f} % "
            f"| {prefill} |"
        )
    if r["rows"][0]["exact_match"] < 0.95:
        lines += [
            "",
            "The training was short, and the model with full attention had not converged either: the table shows what a trained selection is worth, "
            "not what it costs after full training.",
        ]
    return "\n".join(lines)
