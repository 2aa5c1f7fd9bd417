"""What ``hf-hardattn predict`` wrote when it was killed, and how fast it is."""

from __future__ import annotations

from . import read


def table() -> str:
    found = read("predict.json")
    kills = found["kills"]
    runs = " and ".join(
        f"a run by {run['processes']} process{'es' * (run['processes'] > 1)}, killed at random moments after "
        f"{', '.join(map(str, run['chunks_at_kills']))} chunks,"
        for run in kills["runs"]
    )
    same = all(run["same_file"] for run in kills["runs"])
    lines = [
        f"With MiniLM and {kills['rows']:,} definitions of WordNet, {runs} each time started again, wrote "
        f"{'the file of an uninterrupted run' if same else 'OTHER FILES'}, but for the seconds (`scripts/research/predict.py`)."
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
            f"{found['timing']['sentences']:,} sentences, one thread a process of {found['timing']['processor']}, median of "
            f"{found['timing']['rounds']} runs in turn.",
        ]
    return "\n".join(lines)
