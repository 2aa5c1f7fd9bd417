"""What selection saves, measured."""

from __future__ import annotations

from typing import Any

from hf_hardattn.efficiency.report import is_control

from . import read

PEERS = {"peers": "the demo's trained ViT", "peers_cluttered_fashion": "the ViT trained on cluttered Fashion-MNIST"}


def table() -> str:
    """The Speed section: every row of the suite `targets` beside its two baselines, held or not."""
    r, amx, c = (read(f"bench/{place}targets.json") for place in ("", "amx/", "avx512_bf16/"))
    lines = [
        "| on | workload | selection | ms, stock | ms | × stock | limit here | asked | × exact | peak memory of stock's |",
        "|---" * 10 + "|",
    ]
    groups = [("A", group) for group in [*r["groups"], *suite("packing")]]
    groups += [("B", group) for group in amx["groups"]]
    groups += [("C", group) for group in [*c["groups"], *suite("eviction")]]
    for place, group in groups:
        stock = group["rows"]["stock"]
        asked = [row["targets"].get("exact_against_stock") for row in group["rows"].values()]
        for name, row in group["rows"].items():
            if name == "stock":
                continue
            target = next(filter(None, asked), None) if name == "exact" else row["targets"].get("stock")
            wanted = "" if target is None else f"{target} {'✓' if row['against_stock']['median'] >= target else '✗'}"
            limit = "" if name == "exact" or is_control(group, name) else f"{row['limit']:.2f}"
            cache = row.get("cross_cache_bytes")
            cached = f", cross cache {cache / stock['cross_cache_bytes']:.1%}" if cache and name != "exact" else ""
            lines.append(
                f"| {place} | {group['name']} | {'none (exact)' if name == 'exact' else name}{cached} | {1e3 * stock['seconds']['median']:,.0f} | "
                f"{1e3 * row['seconds']['median']:,.0f} | {row['against_stock']['median']:.2f} | {limit} | {wanted} | "
                f"{row['against_exact']['median']:.2f} | {row['peak_bytes'] / stock['peak_bytes']:.0%} |"
            )
    shares = {
        place: [o["share"] for group in found["groups"] for o in group["selection_overhead"].values()]
        for place, found in (("A", r), ("B", amx))
    }
    i = r["import"]
    lines += [
        "",
        f"{' '.join(f'{place}: {processor(found)}' for place, found in (('A', r), ('B', amx), ('C', c)))} Two threads, batch 1 unless said, random "
        "weights, medians of interleaved rounds, glibc's allocator fixed (`bench` restarts itself with the settings). The targets were set on a "
        "processor with bfloat16 matrix units, as B's. B's rows were timed beside other work on the other cores of its machine, C's with nothing beside them. The limit is Amdahl's, from a profile of stock "
        "here, and in decoding between stock and the floor, one position kept. Controls take the first positions and score nothing. Scorer, top-k and gather take "
        f"{' and '.join(f'{min(each):.1%} to {max(each):.1%} ({place})' for place, each in shares.items())} of a stock layer's time.",
    ]
    if i:
        lines[-1] += (
            f" A stock ViT with the library imported runs at {1 / i['relative_time']:.3f} × its speed without, outputs "
            f"{'bit-identical' if i['identical_outputs'] else 'DIFFERENT'}."
        )
    lines += ["", *gpu()]
    others = " ".join(filter(None, (elsewhere(), break_even(), growth(), exported())))
    lines += ["", others] if others else []
    lines += [
        "",
        "A's machine was shared: quartiles, in `results/bench/targets.md`, are wide, and a row above its limit says how wide. Rows of the suite that do not "
        f"stand here were not measured. {' '.join(filter(None, map(peers, PEERS)))}",
    ]
    return "\n".join(lines)


def processor(found: dict[str, Any]) -> str:
    m = found["machine"]
    units = "bfloat16 arithmetic" if m["native_bfloat16"] else "no bfloat16 arithmetic"
    return f"{m['processor']} ({m['cpu_capability']}, {units}), torch {m['torch']}."


def elsewhere() -> str:
    """The float32 rows on one more processor, in a sentence."""
    r = read("bench/avx512/targets.json")
    shown = []
    for group in r["groups"]:
        for name in group["hard"]:
            if not is_control(group, name):
                speed = group["rows"][name]["against_stock"]["median"]
                controls = [n for n in group["hard"] if is_control(group, n) and name.split(" keep ")[-1] in n]
                beside = [f"{group['rows'][n]['against_stock']['median']:.2f} by its control" for n in controls]
                shown.append(f"{group['name']}, {name} {', '.join([f'{speed:.2f} ×', *beside])}")
    return f"With nothing else on the machine, {processor(r)[:-1]} ([table](results/bench/avx512/targets.md)): {'; '.join(shown)}."


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
        f"{m['processor']}, torch {m['torch']}; a call's joules from the card's own counter. Where the GPU computes for long (float32) the saving is "
        "there. In bfloat16 energy falls more than time, as where a GPU waits for the host's next kernel. A single image gets slower, and a choice of keys "
        "in every layer is a loss. `bench --cuda-graphs` is there to time the GPU without the host; no figure here is its.",
    ]


def peers(trained: str) -> str:
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
    return f"On {PEERS[trained]} (soft {methods['soft']['accuracy']:.1%}; {processor(found)[:-1]}), the fastest ToMe in the same run: {'; '.join(shown)} the soft model's speed."


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
    return f"Exported to ONNX, against the exported stock model in onnxruntime: {'; '.join(shown)}." if shown else ""
