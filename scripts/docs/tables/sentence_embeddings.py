"""Search by the embeddings of a MiniLM that reads part of each document."""

from __future__ import annotations

import statistics
from typing import Any

from . import read

NAMES = {
    "full attention": "all tokens",
    "learned": "hard, learned",
    "learned, LoRA": "hard, learned, as a LoRA adapter",
    "random": "random tokens",
    "first": "first tokens",
    "cut text": "text cut before the model",
}
METRICS = ("recall@1", "recall@10", "ndcg@10")


def table() -> str:
    """One row a variant, the mean over its seeds; under it how they were measured, and which words were kept."""
    results = read("sentence_embeddings.json")
    if results is None:
        return "Not measured yet: `python scripts/research/sentence_embeddings.py`."
    timing = results.get("timing", {"lines": []})
    speed = {(line["name"], line["share"], line["like_lengths"]): line["speed_up"] for line in timing["lines"]}
    lines = [
        "| read | kept | recall@1 | recall@10 | nDCG@10 | encoding, batches of similar lengths | encoding, batches in the given order |",
        "|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in results["variants"]:
        rows.setdefault((line["name"], line["share"]), []).append(line)
    for (name, share), found in rows.items():
        numbers = " | ".join(f"{statistics.mean(line[metric] for line in found):.1f}" for metric in METRICS)
        ratios = (speed.get((name, share, like)) if name != "full attention" else None for like in (True, False))
        shown = " | ".join("" if ratio is None else f"{ratio:.2f} ×" for ratio in ratios)
        lines.append(f"| {NAMES[name]} | {share:.0%} | {numbers} | {shown} |")
    seeds = {line["seed"] for line in results["variants"] if line["name"] == "learned"}
    lines += [
        "",
        f"{results['documents']:,} descriptions of {results['tokens']:.0f} tokens on average, each to be found among all others by its synopsis; "
        f"`{results['site']}`, {results['steps']} training steps of {results['train_batch']} documents, {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}. The rows below the first were trained in the same way.",
    ]
    if timing["lines"]:
        lines[-1] += f" Encoding: {timing['threads']} thread of {timing['processor']}, batches of {timing['batch']}."
    lines[-1] += f" (`scripts/research/sentence_embeddings.py`, hf_hardattn {results['hf_hardattn']})"
    if "words" in results:
        lines += ["", *words(results["words"])]
    return "\n".join(lines)


def words(found: dict[str, Any]) -> list[str]:
    """The kept share of word pieces, by the class of the word and by how often it stands in the training texts."""
    parts = [
        ", ".join(
            f"{name} {value['kept']:.0%}" for name, value in sorted(found[kind].items(), key=lambda i: -i[1]["kept"])
        )
        for kind in ("class", "frequency")
    ]
    return [
        f"At {found['share']:.0%}, the learned selection kept these shares by class of word (classes of WordNet): {parts[0]}; and by the number of times that a word "
        f"occurs in the training texts: {parts[1]}."
    ]
