"""Real data: the scripts' runs."""

from __future__ import annotations

from typing import Any

from . import read, signed, spread

RUNS = {  # of results/finetuning, to their titles
    "vit_stamps": "ViT-S/14, classes of stamps",
    "vit_fashion": "ViT-S/14, Fashion-MNIST on clutter",
    "translation_de": "T5 from scratch, English to German",
    "translation_fr": "T5 from scratch, English to French",
    "summarisation": "T5 from scratch, descriptions to synopses",
    "captioning": "BLIP, captions of stamps",
    "retrieval": "BLIP, retrieval between stamps and captions",
    "video_captioning": "tiny BLIP, captions of videos",
    "video_retrieval": "tiny BLIP, retrieval between videos and captions",
}
METRICS = {
    "accuracy": "accuracy",
    "bleu": "BLEU",
    "rougeL": "ROUGE-L",
    "cider_regex_tokens": "CIDEr / 10",
    "exact_match": "exact match",
    "mean_recall": "mean recall",
}


BESIDE = {"bleu4_regex_tokens": ("BLEU-4", 1), "chrf": ("chrF", 1), "frame_recall": ("planted frames kept, %", 100)}
BESIDE |= {"image_to_text_recall@1": ("image to text R@1", 1), "image_to_text_recall@5": ("R@5", 1)}
BESIDE |= {"text_to_image_recall@1": ("text to image R@1", 1), "text_to_image_recall@5": ("R@5", 1)}
BESIDE |= {"embedding_image_to_text_recall@1": ("by the embeddings alone, image to text R@1", 1)}
BESIDE |= {"embedding_text_to_image_recall@1": ("text to image R@1", 1)}


def table() -> str:
    """The table of the scripts' runs on real data: hard beside soft, with what it loses in points and what it saves in time."""
    runs = {name: found for name in RUNS if (found := read(f"finetuning/{name}.json")) is not None}
    lines = [
        "| run | metric | full attention | hard | difference | loses at most 0.5 | random | kept | × original (measured) | seeds |",
        "|---" * 10 + "|",
    ]
    for name, r in runs.items():
        variants, metric, scale, lost = r["arms"], r["metric"], r["points_per_unit"], r["hard_minus_soft"]
        soft, hard, chance = (
            spread(variants[variant][metric], scale) if variant in variants else ""
            for variant in ("soft", "hard", "random")
        )
        works = {} if r["timing"] is None else r["timing"]["works"]
        speed = "; ".join(f"{work} {row['stock_over_hard']:.2f}" for work, row in works.items()) or "not measured"
        held = "" if lost is None else "yes" if r["target"]["held"] else "no"
        lines.append(
            f"| {RUNS[name]} | {METRICS[metric]} | {soft} | {hard} | {'' if lost is None else signed(lost)} | {held} | {chance} | "
            f"{variants['hard']['kept']['mean']:.0%} | {speed} | {len(r['seeds']['hard'])} |"
        )
    on_gpu = [RUNS[n] for n, r in runs.items() if r.get("device", "cpu") == "cuda"]
    timed = sorted({(t["threads"], t["rounds"]) for r in runs.values() if (t := r["timing"]) is not None})
    how = " or ".join(f"{threads} threads, {rounds} interleaved rounds" for threads, rounds in timed)
    lines += [
        "",
        f"Speed was measured on a CPU in float32 with rows of the test set (medians; {how})." if timed else "",
    ]
    if on_gpu:
        lines[-1] += (
            f" Trained on a GPU: {'; '.join(on_gpu)}. The starting weights of the ViT were in half precision there, and the speed "
            "was measured with other weights of the same shapes."
        )
    lines += [
        "For each task, one checkpoint was trained with full attention, and the compared models were trained from it for the same number of steps. The steps of both trainings, and other metrics (full attention / hard):",
        "",
    ]
    for name, r in runs.items():
        steps = f"{r['steps']['trunk']:,} + {r['steps']['branch']:,} steps"
        lines.append(f"- {'; '.join([f'{RUNS[name]}: {steps}', *_beside(r['arms'])])}")
    return "\n".join(lines)


def _beside(variants: dict[str, Any]) -> list[str]:
    """The other metrics of a run, soft and hard."""
    return [
        f"{name} {spread(variants['soft'][metric], scale)} / {spread(variants['hard'][metric], scale)}"
        for metric, (name, scale) in BESIDE.items()
        if "soft" in variants and metric in variants["hard"]
    ]
