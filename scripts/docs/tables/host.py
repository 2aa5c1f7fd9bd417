"""What selection costs the host, which a GPU waits for."""

from __future__ import annotations

from . import read


def table() -> str:
    """One row a selection, and under them how they were measured."""
    r = read("bench/host.json")
    lines = [
        "| workload | selection | kernels added | aim | host time, × original | aim |",
        "|---|---|---|---|---|---|",
    ]
    for group in r["groups"]:
        for row in group["rows"]:
            kernels, host = row["kernels_added"], row["host"]["median"]
            aim = "" if row["most_host"] is None else f"{row['most_host']:.2f}"
            lines.append(
                f"| {group['name']} | `{row['name']}` | {kernels} | {row['most_kernels']} | {host:.2f} | {aim} |"
            )
    machine = r["machine"]
    lines += [
        "",
        f"{machine['processor']}, one thread, torch {machine['torch']}, hf_hardattn {machine.get('hf_hardattn', '0.1.0')}; the models have 12 layers and are so narrow "
        "that only Python and dispatch take time. Times are processor times, medians of interleaved rounds (`hf-hardattn bench --suite host`). Where a "
        "host time is above its aim, the aim is not reached.",
    ]
    return "\n".join(lines)
