"""What selection saves, measured."""

from __future__ import annotations

from typing import Any

from hf_hardattn.efficiency.bench import UNCOMPILED
from hf_hardattn.efficiency.report import is_control

from . import read, version

COMPETING = {
    "competing": "the demo's trained ViT",
    "competing_cluttered_fashion": "the ViT trained on cluttered Fashion-MNIST",
}


ELSEWHERE = {"avx512": "no other work running", "amx": "other work running", "avx2": "other work running"}


def cpu() -> str:
    """Every row of the suite `targets` beside its two baselines, eager and compiled, with its target met or missed."""
    found, compiled = read("bench/targets.json"), read("bench/targets_compiled.json")
    beside = {group["name"]: group for group in compiled["groups"]}
    lines = [
        "| workload | selection | ms, original | ms, hard | × original | limit | × budget 1.0 | compiled: ms, original | ms, hard | × original | limit | × budget 1.0 | × uncompiled original | target | peak memory, % of original |",
        "|---" * 15 + "|",
    ]
    for group in [*found["groups"], *suite("packing"), *suite("eviction")]:
        also = beside.get(group["name"])
        for name, row in group["rows"].items():
            if name != "stock":
                lines.append(
                    f"| {group['name']} | {selection(group, name)} | {' | '.join(measured(group, name))} | "
                    f"{' | '.join([*measured(also, name), f'{beyond(also, name):.2f}'] if also else [''] * 6)} | {required(group, also, name)} | "
                    f"{row['peak_bytes'] / group['rows']['stock']['peak_bytes']:.0%} |"
                )
    shares = [o["share"] for group in found["groups"] for o in group["selection_overhead"].values()]
    lines += [
        "",
        f"{processor(found)} All rows use two threads, random weights, and batch 1 unless stated otherwise; times are medians of interleaved rounds, with glibc's "
        "allocator settings fixed. *Original* is Transformers without this library's sites, and *budget 1.0* is the hard model with a budget that keeps everything. "
        "The targets were set on a processor with bfloat16 matrix units, which this one lacks. The limit follows from Amdahl's law and a profile of the original "
        "model; for decoding, it is interpolated between the original model and a model that keeps one position. A row called *control* keeps the first positions "
        f"without scoring. Scorer, top-k and gather take {min(shares):.1%} to {max(shares):.1%} of the time of one original layer. In the compiled columns, "
        "every model is compiled (`results/bench/targets_compiled.md`); T5 then decodes into a static cache, and only the vision tower of BLIP's captioner is "
        "compiled. *✓ compiled* marks a target that compiled models reach relative to a compiled original. *× uncompiled original* is not the effect of selection "
        "alone, because the compiler also replaces BLIP's eager attention by SDPA.",
    ]
    rows = {f"rows of the suite `{name}`": read(f"bench/{name}.json") for name in ("packing", "eviction")}
    for what, other in {"compiled columns": compiled, **rows}.items():
        if other is not None and processor(other) != processor(found):
            lines[-1] += f" The {what} were measured on another machine: {processor(other)}"
    if found.get("import"):
        i = found["import"]
        lines[-1] += (
            f" An original ViT runs at {1 / i['relative_time']:.3f} × its speed when the library is imported, with outputs that are "
            f"{'bit-identical' if i['identical_outputs'] else 'DIFFERENT'}."
        )
    return "\n".join(lines)


def more() -> str:
    """Break-even lengths, growth with the length, and exported models, as a list."""
    return "\n\n".join(filter(None, (break_even(), growth(), exported())))


def competing() -> str:
    """Every method on both trained models, the fastest first."""
    return "\n\n".join(filter(None, map(_competing, COMPETING)))


def selection(group: dict[str, Any], name: str) -> str:
    """A row's name, with the share of stock's cross-attention cache that it holds."""
    cache = group["rows"][name].get("cross_cache_bytes")
    held = f", cross cache {cache / group['rows']['stock']['cross_cache_bytes']:.1%}" if cache else ""
    name = name.replace("peer: ", "competing: ")  # as results made before the word was changed call it
    return "none (budget 1.0)" if name == "exact" else name + held


def measured(group: dict[str, Any], name: str) -> list[str]:
    """Milliseconds of the original model and of a row, its speed-up, the limit of that, and its speed-up against budget 1.0."""
    row, stock = group["rows"][name], group["rows"]["stock"]
    unlimited = name == "exact" or is_control(group, name)
    return [
        f"{1e3 * stock['seconds']['median']:,.0f}",
        f"{1e3 * row['seconds']['median']:,.0f}",
        f"{row['against_stock']['median']:.2f}",
        "" if unlimited else f"{row['limit']:.2f}",
        f"{row['against_exact']['median']:.2f}",
    ]


def beyond(compiled: dict[str, Any], name: str) -> float:
    """Speed-up of a compiled row against the uncompiled original, timed in the same rounds."""
    seconds = {row: compiled["rows"][row]["seconds"]["median"] for row in (UNCOMPILED, name)}
    return seconds[UNCOMPILED] / seconds[name]


def required(group: dict[str, Any], compiled: dict[str, Any] | None, name: str) -> str:
    """The target of a row against the original, and the first of its measurements that meets it."""
    row = group["rows"][name]
    exact = next(filter(None, (row["targets"].get("exact_against_stock") for row in group["rows"].values())), None)
    target = exact if name == "exact" else row["targets"].get("stock")
    if target is None:
        return ""
    if row["against_stock"]["median"] >= target:
        return f"{target} ✓"
    held = compiled is not None and compiled["rows"][name]["against_stock"]["median"] >= target
    return f"{target} {'✓ compiled' if held else '✗'}"


def processor(found: dict[str, Any]) -> str:
    m = found["machine"]
    units = "bfloat16 arithmetic" if m["native_bfloat16"] else "no bfloat16 arithmetic"
    return f"{m['processor']} ({m['cpu_capability']}, {units}), torch {m['torch']}, {version(found)}."


def processors() -> str:
    """The same rows on other processors: a table of their speed-up against the original."""
    results = {place: read(f"bench/{place}/targets.json") for place in ELSEWHERE}
    shown: dict[tuple[str, str], dict[str, str]] = {}
    for place, found in results.items():
        for group in found["groups"]:
            for name in group["hard"]:
                speed = group["rows"][name]["against_stock"]["median"]
                shown.setdefault((group["name"], name), {})[place] = f"{speed:.2f}"
    heads = [
        f"{processor(found)[:-1]}, {ELSEWHERE[place]} (`results/bench/{place}/targets.md`)"
        for place, found in results.items()
    ]
    lines = [
        f"| × original on | selection | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
        *(
            f"| {workload} | {name} | {' | '.join(speeds.get(place, '') for place in ELSEWHERE)} |"
            for (workload, name), speeds in shown.items()
        ),
        "",
        "Where other work ran on the machine, the quartiles are wide and a row can exceed its limit; the tables in the files above give the quartiles.",
    ]
    return "\n".join(lines)


def gpu() -> str:
    """The suite `gpu`, with energy: a table and its conditions."""
    r = read("bench/gpu.json")
    lines = [
        "| workload | selection | ms, original | ms, hard | × original | limit | × budget 1.0 | joules, original | joules, hard | peak memory, % of original |",
        "|---" * 10 + "|",
    ]
    for group in r["groups"]:
        stock = group["rows"]["stock"]
        for name, row in group["rows"].items():
            if name == "stock":
                continue
            limit = "" if name == "exact" or is_control(group, name) else f"{row['limit']:.2f}"
            lines.append(
                f"| {group['name']} | {'none (budget 1.0)' if name == 'exact' else name} | {1e3 * stock['seconds']['median']:.1f} | "
                f"{1e3 * row['seconds']['median']:.1f} | {row['against_stock']['median']:.2f} | {limit} | {row['against_exact']['median']:.2f} | "
                f"{stock['joules']:.1f} | {row['joules']:.1f} | {row['peak_bytes'] / stock['peak_bytes']:.0%} |"
            )
    m = r["machine"]
    note = (
        f"{m['processor']}, torch {m['torch']}, {version(r)}; random weights; the energy per call is read from the counter of the card. *Original* is "
        "Transformers without this library's sites, and *budget 1.0* is the hard model with a budget that keeps everything."
    )
    return "\n".join([*lines, "", note])


def _competing(trained: str) -> str:
    """Accuracy and speed of every method on one trained model; empty where it was not run."""
    found = read(f"bench/{trained}.json")
    if found is None:
        return ""
    methods = sorted(found["methods"].items(), key=lambda item: -item[1]["against_soft"]["median"])
    lines = [
        f"On {COMPETING[trained]} ({processor(found)[:-1]}):",
        "",
        "| method | weights trained with | accuracy | × full attention |",
        "|---|---|---|---|",
    ]
    for name, row in methods:
        weights = {"soft": "full attention", "hard": "hard attention"}.get(row["weights"], row["weights"])
        title = "full attention" if name == "soft" else name
        lines.append(f"| {title} | {weights} | {row['accuracy']:.1%} | {row['against_soft']['median']:.2f} |")
    return "\n".join(lines)


def suite(name: str) -> list[dict[str, Any]]:
    """Groups of a suite's results; none where it was not run."""
    return (read(f"bench/{name}.json") or {"groups": []})["groups"]


def break_even() -> str:
    """From which length on each kind of selection pays, in a sentence."""
    found: dict[str, dict[int, float]] = {}
    for group in suite("break_even"):
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
    return (
        f"Lengths from which the hard model breaks even with the original model, with four layers of T5-base ({version(read('bench/break_even.json'))}; "
        f"`results/bench/break_even.md`, losses included): {'; '.join(shown)}."
    )


def growth() -> str:
    """The cost of a fixed number of kept positions from the shortest to the longest input, in a sentence."""
    groups, shown = suite("growth"), []
    for model, unit in (("t5_encoder", "tokens"), ("vit", "px")):
        held = [group for group in groups if group["workload"]["model"] == model]
        if len(held) < 2:
            continue
        (name,) = held[0]["hard"]
        sizes = [group["workload"]["size"] for group in held]
        later = [1e3 * group["rows"][name]["later_layers_seconds"] for group in held]
        whole = [1e3 * group["rows"][name]["seconds"]["median"] for group in held]
        ran = [group for group in held if "stock" in group["rows"]]
        stock = [1e3 * group["rows"]["stock"]["seconds"]["median"] for group in ran]
        last = ran[-1]["workload"]["size"]
        at = "" if last == sizes[-1] else f" at {last:,}"
        shown.append(
            f"`{name}` from {sizes[0]:,} to {sizes[-1]:,} {unit}: {min(later):,.0f} to {max(later):,.0f} ms after the selection, "
            f"{whole[0]:,.0f} to {whole[-1]:,.0f} ms in total (original {stock[0]:,.0f} to {stock[-1]:,.0f}{at})"
        )
    if not shown:
        return ""
    return (
        "With a fixed count, the layers after the selection cost the same at every length, while the cost of the embedding, the scorer and the selection "
        f"grows, because they read all positions (`results/bench/growth.md`, two layers, {version(read('bench/growth.json'))}): {'; '.join(shown)}."
    )


def exported() -> str:
    """The saving in onnxruntime, in a sentence."""
    shown = [
        f"{group['name']}, {name}: {row['against_stock']['median']:.2f} × (PyTorch {row['pytorch_against_stock']['median']:.2f} ×)"
        for group in suite("export")
        for name, row in group["rows"].items()
        if name not in ("stock", "exact")
    ]
    if not shown:
        return ""
    place = processor(read("bench/export.json"))[:-1]
    return f"Speed of models exported to ONNX and run by onnxruntime, relative to the exported original model, on {place}: {'; '.join(shown)}."
