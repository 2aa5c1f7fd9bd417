"""Output of a benchmark: Markdown, and the same as a table in the terminal. Losses are shown as losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import HardAttentionError

HEAD = (
    "workload",
    "model",
    "ms",
    "a second",
    "× stock",
    "× exact",
    "limit",
    "of limit",
    "target",
    "GFLOPs executed",
    "nominal",
    "peak MiB",
    "RSS MiB",
    "cross cache MiB",
    "J",
)

HOW = {
    "eager": "",
    "compiled": " All but the last row of a workload are compiled, by `torch.compile` with frozen weights, which are packed "
    "beforehand; T5 writes into a static cache, and of BLIP's caption the vision tower is compiled.",
    "cuda_graphs": " Calls are replayed as CUDA graphs; `generate()` is not.",
}


def cells(group: dict[str, Any]) -> Iterator[list[str]]:
    """Yield one row of strings per model, with the columns of ``HEAD``."""
    for name, row in group["rows"].items():
        exact = speedup(group, name, "exact")
        target = row["targets"].get("stock")
        unlimited = name.startswith("stock") or is_control(group, name)
        yield [
            group["name"],
            name,
            f"{1e3 * row['seconds']['median']:,.1f}",
            f"{row['throughput']:,.2f}",
            speedup(group, name, "stock"),
            exact,
            "" if row["limit"] is None or unlimited else f"{row['limit']:.2f}",
            "" if row["share_of_limit"] is None or unlimited else f"{row['share_of_limit']:.0%}",
            "" if target is None else f"{target} {'met' if row['against_stock']['median'] >= target else 'missed'}",
            _amount(row["flops"]["executed"] / 1e9, 1),
            _amount(row["flops"]["nominal"] / 1e9, 1),
            _amount(row["peak_bytes"] / 2**20, 0),
            "not measured" if row["peak_resident_bytes"] is None else f"{row['peak_resident_bytes'] / 2**20:,.0f}",
            f"{row['cross_cache_bytes'] / 2**20:,.1f}" if row.get("cross_cache_bytes") else "",
            "not measured" if row["joules"] is None else f"{row['joules']:.2f}",
        ]


def is_control(group: dict[str, Any], name: str) -> bool:
    """Whether a row keeps the first positions without scores."""
    return group.get("hard", {}).get(name, {}).get("scorer") == "first"


def speedup(group: dict[str, Any], name: str, baseline: str) -> str:
    """Return a speed-up over ``baseline`` with its quartiles as text; empty if the group was deliberately run without ``baseline``.

    Raises:
        HardAttentionError: there is a ratio, but ``baseline`` is not among the rows.
    """
    ratio = group["rows"][name][f"against_{baseline}"]
    if ratio is None:
        return ""
    if baseline not in group["rows"]:
        raise HardAttentionError(
            f"{name!r} of {group['name']!r} has a speed-up against {baseline!r}, which is not among its rows "
            f"({', '.join(map(repr, group['rows']))}); a speed-up needs its baseline. Run the group again."
        )
    low, _, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f}-{high:.2f})"


def _amount(value: float, decimals: int) -> str:
    """Format a number with ``decimals`` decimals, or with two significant digits if it would be rounded to zero."""
    return f"{value:.2g}" if 0 < value < 10.0**-decimals / 2 else f"{value:,.{decimals}f}"


def markdown(results: dict[str, Any]) -> str:
    """Return the report of a suite."""
    m = results["machine"]
    lines = [
        f"# {results['title']}",
        "",
        f"`{results['command']}`",
        "",
        conditions(m, results.get("weights", "Random weights")) + HOW[results.get("mode", "eager")],
        "",
    ]
    if results["picture"] == "break_even":
        for table in break_even(results["groups"]):
            lines += [*table, ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(row) + " |" for group in results["groups"] for row in cells(group)]
    overheads = [(g["name"], n, o) for g in results["groups"] for n, o in g["selection_overhead"].items()]
    if overheads:
        lines += ["", "| scorer, top-k and gather of | ms | ms of a stock layer | share |", "|---|---|---|---|"]
        lines += [
            f"| {group}: {name} | {1e3 * o['selection']:.2f} | {1e3 * o['layer']:.1f} | {o['share']:.1%} |"
            for group, name, o in overheads
        ]
    lines += beside(results["groups"])
    if results.get("import"):
        i = results["import"]
        lines += [
            "",
            f"A stock ViT with the library imported runs at {1 / i['relative_time']:.3f} × its speed without (two processes, forward by forward, "
            f"{i['rounds']} rounds), outputs {'bit-identical' if i['identical_outputs'] else 'DIFFERENT'}.",
        ]
    return "\n".join(lines) + "\n"


def beside(groups: list[dict[str, Any]]) -> list[str]:
    """Return the table of rows that compute the same as another row in another way; empty if there are none."""
    lines = []
    for group in groups:
        for name, row in group["rows"].items():
            if "beside" in row:
                other, speed, target = row["beside"], row["beside"]["speed"]["median"], row["targets"].get("beside")
                held = "" if target is None else f"{target} {'met' if speed >= target else 'missed'}"
                lines.append(
                    f"| {group['name']} | {name} | {other['row']} | {_ratio(other['speed'])} | {held} | {other['largest_difference']:.1g} |"
                )
    head = ["", "| workload | row | beside | × | target | largest difference of the outputs |", "|---" * 6 + "|"]
    return [*head, *lines] if lines else []


def conditions(machine: dict[str, Any], weights: str = "Random weights") -> str:
    """Describe the machine and the meaning of its numbers."""
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    if machine["device"] == "cuda":
        place = f"{machine['processor']}, {versions}"
    else:
        emulated = "; this processor has no bfloat16 arithmetic, matrix products in it are emulated"
        bf16 = "" if machine["native_bfloat16"] else emulated
        fixed = all(machine["allocator"].values())
        kept = "glibc's allocator keeps freed pages" if fixed else "the system's default allocator"
        place = f"{machine['processor']} ({machine['cpu_capability']}{bf16}), {machine['threads']} threads, {versions}, {kept}"
    return (
        f"{place}. {weights}; medians of interleaved rounds, quartiles in brackets. `stock` is Transformers' own path "
        "(SDPA; BLIP has eager attention only), `exact` is this library's at budget 1.0. The limit is Amdahl's, from a profile of `stock` and the "
        "work left (reading weights, which few rows wait for, is no less); in decoding with a control that keeps 1, between stock's time and that control's. FLOPs count matrix products; peak MiB is the allocator's, RSS MiB the process's, both beyond the weights."
    )


def break_even(groups: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield tables of speed-up over stock by length and budget, one per kind of row; values below 1 are marked as losses."""
    kinds: dict[str, dict[float, dict[int, float]]] = {}
    for group in groups:
        for name, hard in group["hard"].items():
            budget = hard["budget"]
            found = kinds.setdefault(name.replace(str(budget), "r"), {}).setdefault(budget, {})
            found[group["workload"]["size"]] = group["rows"][name]["against_stock"]["median"]
    for kind, rows in kinds.items():
        sizes = sorted({size for row in rows.values() for size in row})
        yield [
            f"**{kind}**, × stock by length (columns) and budget r (rows):",
            "",
            "| r | " + " | ".join(f"{size:,}" for size in sizes) + " |",
            "|---" * (len(sizes) + 1) + "|",
            *(
                f"| {budget} | "
                + " | ".join(f"{row[size]:.2f}{' (loss)' if row[size] < 1 else ''}" for size in sizes)
                + " |"
                for budget, row in sorted(rows.items(), reverse=True)
            ),
        ]


def exported(results: dict[str, Any]) -> str:
    """Return the table of the exported models, with the speed-up of the same rows in PyTorch."""
    lines = [
        f"# {results['title']}",
        "",
        f"`{results['command']}`",
        "",
        conditions(results["machine"]).split(" Random weights")[0]
        + f", onnxruntime {results['groups'][0]['onnxruntime']}. Random weights; medians of interleaved rounds of both runtimes, quartiles in brackets. "
        "Each runtime has its own stock as baseline.",
        "",
        "| workload | model | ms | × stock, exported | × exact, exported | ms in PyTorch | × stock, PyTorch | GFLOPs | largest difference to PyTorch |",
        "|---" * 9 + "|",
    ]
    for group in results["groups"]:
        for name, row in group["rows"].items():
            (low, _, high), (low_torch, _, high_torch) = (
                row[f"{k}against_stock"]["quartiles"] for k in ("", "pytorch_")
            )
            lines.append(
                f"| {group['name']} | {name} | {1e3 * row['seconds']['median']:,.1f} | {row['against_stock']['median']:.2f} ({low:.2f}-{high:.2f}) | "
                f"{row['against_exact']['median']:.2f} | {1e3 * row['pytorch_seconds']:,.1f} | {row['pytorch_against_stock']['median']:.2f} "
                f"({low_torch:.2f}-{high_torch:.2f}) | {row['flops'] / 1e9:,.1f} | {row['largest_difference']:.1g} |"
            )
    return "\n".join(lines) + "\n"


def competing(results: dict[str, Any]) -> str:
    """Return the table of the comparison with other methods, the fastest first."""
    lines = [
        f"# {results['title']}",
        "",
        f"`{results['command']}`: {results['images']:,} test images, timed in batches of {results['batch']}. "
        "Methods on the soft model's weights are used as they are, without training; ours is trained from the same base checkpoint for as long as the soft model.",
        "",
        conditions(results["machine"]).split(" Random weights")[0]
        + " Medians of interleaved rounds, quartiles in brackets.",
        "",
        "| method | weights | accuracy | images/s | × soft | MFLOPs an image, executed | nominal | peak MiB |",
        "|---" * 8 + "|",
    ]
    for name, row in sorted(results["methods"].items(), key=lambda item: -item[1]["images_per_second"]):
        low, _, high = row["against_soft"]["quartiles"]
        lines.append(
            f"| {name} | {row['weights']} | {row['accuracy']:.1%} | {row['images_per_second']:,.0f} | {row['against_soft']['median']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{row['flops']['executed'] / 1e6:.2f} | {row['flops']['nominal'] / 1e6:.2f} | {row['peak_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines) + "\n"


def host(results: dict[str, Any]) -> str:
    """Return the table of the host cost of selection, with one row per configuration."""
    lines = [
        f"# {results['title']}",
        "",
        f"`{results['command']}`",
        "",
        conditions(results["machine"]).split(" Random weights")[0]
        + " Models of 12 layers, so narrow that nothing but Python and dispatch takes time; processor time of the calling thread, medians of "
        "interleaved rounds, quartiles in brackets.",
        "",
        "| workload | sites | kernels added | at most | time by stock's | at most | aims |",
        "|---" * 7 + "|",
    ]
    for group in results["groups"]:
        name = f"{group['name']} ({1e3 * group['stock_seconds']:.2f} ms)"
        lines.append(f"| {name} | stock, timed again | | | {_ratio(group['again'])} | | |")
        for row in group["rows"]:
            kernels, time = (_limit(row["most_kernels"]), _limit(row["most_host"]))
            held = "met" if row["held"] else "missed"
            lines.append(
                f"| {name} | `{row['name']}` | {row['kernels_added']:+,} | {kernels} | {_ratio(row['host'])} | {time} | {held} |"
            )
    return "\n".join(lines) + "\n"


def _ratio(spread: dict[str, Any]) -> str:
    low, _, high = spread["quartiles"]
    return f"{spread['median']:.2f} ({low:.2f}-{high:.2f})"


def _limit(limit: float | None) -> str:
    return "" if limit is None else f"{limit:,}"
