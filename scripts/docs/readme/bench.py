"""What selection saves, measured."""

from __future__ import annotations

from typing import Any

from hf_hardattn.efficiency.bench import UNCOMPILED
from hf_hardattn.efficiency.report import is_control

from . import read

COMPETING = {
    "competing": "the demo's trained ViT",
    "competing_cluttered_fashion": "the ViT trained on cluttered Fashion-MNIST",
}


ELSEWHERE = {"avx512": "nothing beside it", "amx": "other work beside it", "avx2": "other work beside it"}


def table() -> str:
    """The Speed section: every row of the suite `targets` beside its two baselines, eager and compiled, held or not."""
    found, compiled = read("bench/targets.json"), read("bench/targets_compiled.json")
    beside = {group["name"]: group for group in compiled["groups"]}
    lines = [
        "| workload | selection | ms, stock | ms | × stock | limit | × exact | compiled: ms, stock | ms | × stock | limit | × exact | × stock as it is | asked of × stock | peak memory of stock's |",
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
        f"{processor(found)} Two threads, batch 1 unless said, random weights, little else on the machine, medians of interleaved rounds, glibc's "
        "allocator fixed (`bench` restarts itself with the settings). The targets were set on a processor with bfloat16 matrix units, which this one has "
        "not. The limit is Amdahl's, from a profile of stock, and in decoding between stock and the floor, one position kept; a control takes the first "
        f"positions and scores nothing. Scorer, top-k and gather take {min(shares):.1%} to {max(shares):.1%} of a stock layer's time. Compiled "
        "([table](results/bench/targets_compiled.md)): every row and both baselines; T5 decodes into a static cache then, and of BLIP's caption the vision "
        "tower is compiled. ✓ compiled: reached by compiled models against a compiled stock model; `× stock as it is` is a compiled model's speed-up against stock that is not, in "
        "the same rounds: not selection's alone (BLIP's eager attention is turned into SDPA by the compiler).",
    ]
    if found.get("import"):
        i = found["import"]
        lines[-1] += (
            f" A stock ViT with the library imported runs at {1 / i['relative_time']:.3f} × its speed without, outputs "
            f"{'bit-identical' if i['identical_outputs'] else 'DIFFERENT'}."
        )
    others = " ".join(filter(None, (break_even(), growth(), exported(), *map(competing, COMPETING))))
    return "\n".join([*lines, "", *elsewhere(), "", *gpu(), "", others])


def selection(group: dict[str, Any], name: str) -> str:
    """A row's name, with the share of stock's cross-attention cache that it holds."""
    cache = group["rows"][name].get("cross_cache_bytes")
    held = f", cross cache {cache / group['rows']['stock']['cross_cache_bytes']:.1%}" if cache else ""
    name = name.replace("peer: ", "competing: ")  # as results made before the word was changed call it
    return "none (exact)" if name == "exact" else name + held


def measured(group: dict[str, Any], name: str) -> list[str]:
    """Milliseconds of stock and of a row, its speed-up against stock, the limit of that, and its speed-up against exact."""
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
    """Speed-up of a compiled row against stock as it is, timed in the same rounds."""
    seconds = {row: compiled["rows"][row]["seconds"]["median"] for row in (UNCOMPILED, name)}
    return seconds[UNCOMPILED] / seconds[name]


def required(group: dict[str, Any], compiled: dict[str, Any] | None, name: str) -> str:
    """The target of a row against stock, and the first of its measurements that holds it."""
    row = group["rows"][name]
    exact = next(filter(None, (row["targets"].get("exact_against_stock") for row in group["rows"].values())), None)
    target = exact if name == "exact" else row["targets"].get("stock")
    if target is None:
        return ""
    if row["against_stock"]["median"] >= target:
        return f"{target} ✓"
    held = compiled is not None and compiled["rows"][name]["against_stock"]["median"] >= target
    return f"{target} {'✓ compiled' if held else '✗'}"


def version(found: dict[str, Any]) -> str:
    """The library that was measured; before 0.2.0, which replaced the way selection is put into a model, results did not name it."""
    return f"hf_hardattn {found['machine'].get('hf_hardattn', '0.1.0')}"


def processor(found: dict[str, Any]) -> str:
    m = found["machine"]
    units = "bfloat16 arithmetic" if m["native_bfloat16"] else "no bfloat16 arithmetic"
    return f"{m['processor']} ({m['cpu_capability']}, {units}), torch {m['torch']}, {version(found)}."


def elsewhere() -> list[str]:
    """The same rows on other processors: a table of their speed-up against stock."""
    results = {place: read(f"bench/{place}/targets.json") for place in ELSEWHERE}
    shown: dict[tuple[str, str], dict[str, str]] = {}
    for place, found in results.items():
        for group in found["groups"]:
            for name in group["hard"]:
                speed = group["rows"][name]["against_stock"]["median"]
                shown.setdefault((group["name"], name), {})[place] = f"{speed:.2f}"
    heads = [
        f"{processor(found)[:-1]}, {ELSEWHERE[place]} ([table](results/bench/{place}/targets.md))"
        for place, found in results.items()
    ]
    return [
        f"| × stock on | selection | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
        *(
            f"| {workload} | {name} | {' | '.join(speeds.get(place, '') for place in ELSEWHERE)} |"
            for (workload, name), speeds in shown.items()
        ),
        "",
        "Beside other work quartiles are wide, and a row can stand above its limit: the tables say how wide.",
    ]


def gpu() -> list[str]:
    """What a GPU makes of it: a table and what it says."""
    r = read("bench/gpu.json")
    lines = [
        "| on a GPU | selection | ms, stock | ms | × stock | limit | × exact | joules, stock | joules | peak memory of stock's |",
        "|---" * 10 + "|",
    ]
    for group in r["groups"]:
        stock = group["rows"]["stock"]
        for name, row in group["rows"].items():
            if name == "stock":
                continue
            limit = "" if name == "exact" or is_control(group, name) else f"{row['limit']:.2f}"
            lines.append(
                f"| {group['name']} | {'none (exact)' if name == 'exact' else name} | {1e3 * stock['seconds']['median']:.1f} | "
                f"{1e3 * row['seconds']['median']:.1f} | {row['against_stock']['median']:.2f} | {limit} | {row['against_exact']['median']:.2f} | "
                f"{stock['joules']:.1f} | {row['joules']:.1f} | {row['peak_bytes'] / stock['peak_bytes']:.0%} |"
            )
    m = r["machine"]
    return [
        *lines,
        "",
        f"{m['processor']}, torch {m['torch']}, {version(r)}; a call's joules from the card's own counter. Where the GPU computes for long (float32) the saving is "
        "there. In bfloat16 energy falls more than time, as where a GPU waits for the host's next kernel. A single image gets slower, and a choice of keys "
        "in every layer is a loss. `bench --mode cuda_graphs` is there to time the GPU without the host; no figure here is its.",
    ]


def competing(trained: str) -> str:
    """The fastest ToMe beside ours; empty where it was not run."""
    found = read(f"bench/{trained}.json")
    if found is None:
        return ""
    methods = found["methods"]
    best = max(
        (name for name in methods if name.startswith("ToMe")), key=lambda name: methods[name]["images_per_second"]
    )
    ours = next(name for name in methods if name.startswith("ours, "))
    shown = [
        f"{name}: {methods[name]['accuracy']:.1%} at {methods[name]['against_soft']['median']:.2f} ×"
        for name in (ours, best)
    ]
    return f"On {COMPETING[trained]} (soft {methods['soft']['accuracy']:.1%}; {processor(found)[:-1]}), the fastest ToMe in the same run: {'; '.join(shown)} the soft model's speed."


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
    return f"Break-even against stock, four layers of T5-base ([table](results/bench/break_even.md), losses included): {'; '.join(shown)}."


def growth() -> str:
    """What a fixed number of kept positions costs from the shortest to the longest input, in a sentence."""
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
            f"`{name}` from {sizes[0]:,} to {sizes[-1]:,} {unit}: {min(later):,.0f} to {max(later):,.0f} ms behind the choice, "
            f"{whole[0]:,.0f} to {whole[-1]:,.0f} ms in all (stock {stock[0]:,.0f} to {stock[-1]:,.0f}{at})"
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
        for group in suite("export")
        for name, row in group["rows"].items()
        if name not in ("stock", "exact")
    ]
    if not shown:
        return ""
    place = processor(read("bench/export.json"))[:-1]
    return f"Exported to ONNX, against the exported stock model in onnxruntime, on {place}: {'; '.join(shown)}."
