"""This version of the library beside the one before it, in the same run."""

from __future__ import annotations

from . import read


def table() -> str:
    """One row a workload: both speed-ups over the original model, and the time of the new version by that of the old one."""
    r = read("bench/versions.json")
    lines = [
        "| workload | × original, before | × original, now | time, now / before (quartiles) |",
        "|---|---|---|---|",
    ]
    for row in r["rows"]:
        low, high = row["new_by_old_quartiles"]
        lines.append(
            f"| {row['name']} | {row['speedup_old']:.2f} | {row['speedup']:.2f} | {row['new_by_old']:.3f} ({low:.3f} to {high:.3f}) |"
        )
    machine = r["machine"]
    lines += [
        "",
        f"Commit {r['old']} (0.1.0) compared with {machine['package']}: each ran in its own process with {r['threads']} threads, and they were timed in turn; medians of "
        f"{r['rounds']} rounds, float32, batch 1, the scorer `linear`, torch {machine['torch']} ({machine['cpu_capability']}) "
        f"(`python scripts/research/compare_speed.py --old {r['old']} --rounds {r['rounds']}`).",
    ]
    return "\n".join(lines)
