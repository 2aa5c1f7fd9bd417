"""What ``hf-hardattn predict`` wrote when it was killed, and how fast it is."""

from __future__ import annotations

from . import read


def table() -> str:
    found = read("predict.json")
    kills = found["kills"]
    runs = ", and ".join(
        f"a run with {run['processes']} process{'es' * (run['processes'] > 1)} was killed at random moments after "
        f"{', '.join(map(str, run['chunks_at_kills']))} chunks"
        for run in kills["runs"]
    )
    same = all(run["same_file"] for run in kills["runs"])
    lines = [
        f"With MiniLM and {kills['rows']:,} definitions of WordNet, {runs}. Started again each time, every run wrote "
        f"{'the same file as an uninterrupted run' if same else 'OTHER FILES'}, apart from the seconds (`scripts/research/predict.py`)."
    ]
    if "timing" in found:
        lines += [
            "",
            "| model | processes | sentences per second, calls | sentences per second, whole command |",
            "|---|--:|--:|--:|",
        ]
        lines += [
            f"| {row['model']} | {row['processes']} | {row['calls']:,.0f} | {row['command']:,.0f} |"
            for row in found["timing"]["rates"]
        ]
        lines += [
            "",
            f"{found['timing']['sentences']:,} sentences, one thread per process on {found['timing']['processor']}; medians of "
            f"{found['timing']['rounds']} interleaved runs.",
        ]
    return "\n".join(lines)
