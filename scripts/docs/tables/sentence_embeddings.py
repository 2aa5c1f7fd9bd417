"""Search by the embeddings of a MiniLM that reads part of each document."""

from __future__ import annotations

from . import read

NAMES = {
    "full attention": "all tokens",
    "learned": "hard, learned",
    "random": "random tokens",
    "first": "first tokens",
    "cut text": "text cut before the model",
}


def table() -> str:
    """One row a variant, and under them how they were measured."""
    results = read("sentence_embeddings.json")
    if results is None:
        return "Not measured yet: `python scripts/research/sentence_embeddings.py`."
    lines = ["| read | kept | recall@1 | recall@10 | nDCG@10 | encoding, speed-up |", "|---|---|---|---|---|---|"]
    for row in results["variants"]:
        speed = f"{row['speed_up']:.2f} ×" if "speed_up" in row else ""
        numbers = " | ".join(f"{row[name]:.1f}" for name in ("recall@1", "recall@10", "ndcg@10"))
        lines.append(f"| {NAMES[row['name']]} | {row['share']:.0%} | {numbers} | {speed} |")
    lines += [
        "",
        f"{results['documents']:,} descriptions of {results['tokens']:.0f} tokens on average, each found by its synopsis among all others; "
        f"`{results['site']}`, {results['steps']} steps of training (seed {results['seed']}), {results['threads']} thread of {results['processor']}, "
        f"batches of 32. Only the learned model was trained; the others have the original's weights (`scripts/research/sentence_embeddings.py`, hf_hardattn {results['hf_hardattn']}).",
    ]
    return "\n".join(lines)
