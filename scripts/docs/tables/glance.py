"""Six results of trained models: full attention, hard, random selection of equal cost."""

from __future__ import annotations

import statistics

from . import read

COMPARED = (  # results file, title, factor, and the variants that are hard and random
    ("cluttered_digits_recommended", "ViT, digits among clutter (accuracy)", 100, "robust", "random"),
    ("cluttered_fashion", "ViT, clothes among clutter (accuracy)", 100, "robust", "random"),
    ("translation", "T5, English to Italian (BLEU)", 1, "cross 25%", "cross 25%, random"),
)
FINETUNED = (
    ("vit_stamps", "ViT-S/14, classes of drawings (accuracy)"),
    ("video_captioning", "BLIP, captions of videos (exact match)"),
)


def table() -> str:
    lines = [
        "| task | kept | full attention | hard | random selection | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, title, scale, hard, control in COMPARED:
        r = read(f"compare/{name}.json")
        rows, metric = r["summary"], r["metric"]
        shown = [f"{scale * rows[variant]['metrics'][metric]['mean']:.1f}" for variant in ("soft", hard, control)]
        kept = rows[hard]["metrics"]["kept"]["mean"]
        lines.append(f"| {title} | {kept:.0%} | {' | '.join(shown)} | {rows[hard]['runs']} |")
    for name, title in FINETUNED:
        r = read(f"finetuning/{name}.json")
        variants, metric, scale = r["arms"], r["metric"], r["points_per_unit"]
        shown = [f"{scale * variants[variant][metric]['mean']:.1f}" for variant in ("soft", "hard", "random")]
        lines.append(
            f"| {title} | {variants['hard']['kept']['mean']:.0%} | {' | '.join(shown)} | {len(r['seeds']['hard'])} |"
        )
    return "\n".join([*lines, search()])


def search() -> str:
    """MiniLM as a search engine's encoder, at half of the tokens."""
    found = read("sentence_embeddings.json")["variants"]
    by_name = {
        name: [row["recall@10"] for row in found if (row["name"], row["share"]) == (name, share)]
        for name, share in (("full attention", 1.0), ("learned", 0.5), ("random", 0.5))
    }
    shown = " | ".join(f"{statistics.mean(values):.1f}" for values in by_name.values())
    return f"| MiniLM, search in descriptions (recall@10) | 50% | {shown} | {len(by_name['learned'])} |"
