"""Estimators and tasks of `hf-hardattn compare`."""

from __future__ import annotations

from typing import Any

from . import read, spread

TASKS = {  # results file to what the README calls it
    "cluttered_digits_recommended": "cluttered digits 64x64, 14 %",
    "cluttered_digits_60": "cluttered digits 60x60, 25 %",
    "cluttered_digits_100": "cluttered digits 100x100, 12 %",
    "cluttered_fashion": "cluttered Fashion-MNIST 84x84, 25 %",
}

BARE = {  # results file to its column
    "defaults_digits": "cluttered digits",
    "defaults_fashion": "cluttered Fashion-MNIST",
    "defaults_text": "planted rationale (T5)",
}


def table() -> str:
    lines = [
        '| task, patches kept | full attention | hard, `recipe="robust"` | difference | `static` | `random` | failed runs |',
        "|---" * 7 + "|",
    ]
    for name, title in TASKS.items():
        r = read(f"compare/{name}.json")
        rows = r["summary"]

        def show(row: dict[str, Any], metric: str = r["metric"]) -> str:
            return f"{row['metrics'][metric]['mean']:.1%} ± {100 * row['metrics'][metric]['sd']:.1f}"

        robust = rows["robust"]
        lines.append(
            f"| {title} | {show(rows['soft'])} | {show(robust)} | {robust['to_soft']['mean']:+.1f} ± {robust['to_soft']['sd']:.1f} | "
            f"{show(rows['static'])} | {show(rows['random'])} | {robust['failed']} of {robust['runs']} |"
        )
    every = read("compare/cluttered_digits.json")
    ranked = sorted(
        (
            (name, row)
            for name, row in every["summary"].items()
            if name not in ("soft", "random", "static", "first", "cls_attention")
        ),
        key=lambda item: -item[1]["metrics"][every["metric"]]["mean"],
    )
    shown = [f"`{name}` {row['metrics'][every['metric']]['mean']:.1%}" for name, row in ranked]
    failed = [f"`{name}` {row['failed']} of {row['runs']}" for name, row in ranked if row["failed"]]
    lines += [
        "",
        f"Means ± standard deviations over 5 seeds; *difference* is hard minus full attention. On the first task, all estimators were trained with {len(every['seeds'])} "
        f"seeds and equal budget, steps and data. They reach, best first: {', '.join(shown)}; full attention reaches {every['summary']['soft']['metrics'][every['metric']]['mean']:.1%}. "
        f"Failed runs (raised an error, diverged, or ended within 2 points of random): {', '.join(failed) or 'none'}.",
    ]
    return "\n".join(lines)


def bare_names() -> str:
    """Every estimator by its name alone: what a user gets who sets nothing else."""
    found = {title: r for name, title in BARE.items() if (r := read(f"compare/{name}.json")) is not None}
    first = next(iter(found.values()))["summary"]
    names = sorted(first, key=lambda name: -first[name]["metrics"]["accuracy"]["mean"])

    def cell(r: dict[str, Any], name: str) -> str:
        row = r["summary"].get(name)
        if row is None:
            return ""
        if name == "soft":
            return spread(row["metrics"]["accuracy"], 100)
        difference = row["to_soft"]
        failed = f", {row['failed']} of {row['runs']} failed" if row["failed"] else ""
        sd = "" if difference["sd"] is None else f" ± {difference['sd']:.1f}"
        mean = round(difference["mean"], 1) or 0.0  # no -0.0
        return f"{mean:+.1f}{sd}{failed}"

    lines = [f"| estimator | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    lines += [
        f"| `{name}` | {' | '.join(cell(r, name) for r in found.values())} |"
        for name in ("soft", *(name for name in names if name != "soft"))
    ]
    seeds = ", ".join(f"{len(r['seeds'])} on {title}" for title, r in found.items())
    lines += [
        "",
        "Difference from full attention in points of accuracy; the first row gives the accuracy of full attention itself. Means ± standard deviations over the seeds "
        f"({seeds}). Each estimator is used with the default scorer of the site, the default annealing and its default options; `robust` is "
        '`recipe="robust"`. `gumbel_decoupled` equals `gumbel` as long as its two temperatures are the same, as they are by default. `downsampled` is full attention on a smaller image of equal cost; `random` and `static` select without reading the input.',
    ]
    return "\n".join(lines)


def unseen() -> str:
    """The test of the recipe on images that nothing was chosen on."""
    r = read("unseen_images.json")
    lines = [
        '| unseen images, 20 % kept | seed | full attention | hard, `recipe="robust"` | difference | selectors at the same rate | `random` |',
        "|---" * 7 + "|",
    ]
    found = {(row["learning_rate"], row["seed"], row["model"]): 100 * row["accuracy"] for row in r["rows"]}
    for rate, seed in sorted({key[:2] for key in found}, key=lambda key: (-key[0], key[1])):
        soft, hard, random = (found[rate, seed, name] for name in ("soft", "robust", "random"))
        slow = found.get((rate, seed, "one rate"), hard)
        lines.append(
            f"| learning rate {rate:g} | {seed} | {soft:.1f} | {hard:.1f} | {hard - soft:+.1f} | {slow:.1f} | {random:.1f} |"
        )
    steps, test = r["settings"]["steps"], r["settings"]["scenes"][1]
    lines += [
        "",
        f"Accuracy in % on {test:,} test scenes of 112x112 pixels, with MNIST digits among fragments of drawings. The stock Trainer trained for {steps:,} steps, starting from a small "
        "ViT that was trained with full attention, at the learning rate of that training and at the Trainer's default, where selectors learn at 1e-3 unless set otherwise. Only `budget=0.2` and the recipe are "
        "set; no setting of the library was chosen on these images (`scripts/research/unseen_images.py`).",
    ]
    return "\n".join(lines)


def translation() -> str:
    """The table of the translations: every hard model beside full attention, at three kinds of site."""
    lines = [
        "| English to Italian | BLEU | difference | chrF | difference | source kept |",
        "|---" * 6 + "|",
    ]
    notes, soft_shown = [], False
    for name in ("translation", "translation_one", "translation_tokens"):
        r = read(f"compare/{name}.json")
        if r is None:
            continue
        soft = r["summary"]["soft"]["metrics"]
        for variant, row in r["summary"].items():
            found = row["metrics"]
            if variant == "soft" and soft_shown:
                continue
            soft_shown = True
            title = f"k = 1, {variant}" if name == "translation_one" and variant != "soft" else variant
            cells = [
                cell
                for metric in ("bleu", "chrf")
                for cell in (
                    spread(found[metric]),
                    "" if variant == "soft" else f"{found[metric]['mean'] - soft[metric]['mean']:+.1f}",
                )
            ]
            kept = "100%" if "kept" not in found else f"{found['kept']['mean']:.0%}"
            lines.append(f"| {title} | {' | '.join(cells)} | {kept} |")
        recipe = r["recipe"]
        notes.append(f"`{name}` {len(r['seeds'])} x {recipe['branch_steps']} steps")
    note = (
        "The model is a T5 of 2 + 1 layers, trained from scratch on pairs of Debian's package descriptions; decoding is greedy. All models start from one checkpoint "
        f"trained with full attention for {recipe['trunk_steps']:,} steps and are then trained for the same number of steps; seeds x steps are {', '.join(notes)}."
    )
    return "\n".join([*lines, "", note])


def known_positions() -> str:
    """The table of the tasks whose informative positions are known."""
    lines = [
        "| task whose informative positions are known | accuracy, full attention | accuracy, hard | precision | recall | accuracy, random | seeds | failed |",
        "|---" * 8 + "|",
    ]
    for name in ("planted_rationale", "associative_recall"):
        r = read(f"compare/{name}.json")
        if r is None:
            continue
        rows = r["summary"]
        for variant, row in rows.items():
            if "precision" not in row["metrics"] or variant in ("random", "first", "static"):
                continue
            metrics = row["metrics"]
            lines.append(
                f"| {name}, `{variant}` | {spread(rows['soft']['metrics']['accuracy'], 100)} | {spread(metrics['accuracy'], 100)} | "
                f"{spread(metrics['precision'], 100)} | {spread(metrics['recall'], 100)} | "
                f"{spread(rows['random']['metrics']['accuracy'], 100)} | {row['runs']} | {row['failed']} |"
            )
    return "\n".join(lines)
