"""Time two versions of the library on this machine, each in its own process, in turn.

    python scripts/research/compare_speed.py --old 761c521                      # the working tree against that commit
    python scripts/research/compare_speed.py --old ../other --rounds 21         # or against a checkout

Both processes build the same models. In each round one process runs the stock and the hard model while the other waits, and then the other
one does. Writes results/bench/versions.json. `--quick` uses models of two layers; its numbers are meaningless.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ViT-B/16 384 px, vision.tokens.0 keep .25": ({"model": "vit", "size": 384}, {"sites": ["vision.tokens.0"]}),
    "ViT-B/16 384 px, vision.self.* keep .25": ({"model": "vit", "size": 384}, {"sites": ["vision.self.*"]}),
    "ViT-B/16 384 px, vision.self.* keep all": (
        {"model": "vit", "size": 384},
        {"sites": ["vision.self.*"], "budget": 1.0},
    ),
    "T5-base encoder 1024 tokens, encoder.tokens.0 keep .25": (
        {"model": "t5_encoder", "size": 1024},
        {"sites": ["encoder.tokens.0"]},
    ),
    "T5-base encoder 1024 tokens, encoder.self.* keep .25": (
        {"model": "t5_encoder", "size": 1024},
        {"sites": ["encoder.self.*"]},
    ),
    "T5-base decoding 16 tokens over 4096, decoder.cross.* keep .25": (
        {"model": "t5_decode", "size": 4096, "new_tokens": 16},
        {"sites": ["decoder.cross.*"]},
    ),
    "BLIP vision 384 px, vision.tokens.0 keep .25": (
        {"model": "blip_vision", "size": 384},
        {"sites": ["vision.tokens.0"]},
    ),
    "BLIP vision 384 px, vision.self.* keep .25": ({"model": "blip_vision", "size": 384}, {"sites": ["vision.self.*"]}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", help="folder of a checkout, or a commit of this repository")
    parser.add_argument("--new", default=".", help="the same (default: the working tree)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each row (default: 15)")
    parser.add_argument("--quick", action="store_true", help="two layers and three rounds")
    parser.add_argument("--output", type=Path, default=Path("results/bench/versions.json"))
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)  # one of the two processes
    args = parser.parse_args()
    if args.answer:
        answer()
        return
    if args.old is None:
        parser.error("--old is missing: the version to compare with")
    compare(args)


def compare(args: argparse.Namespace) -> None:
    """Start both processes, run their measurements in turn, and write the results."""
    from compare_versions import checkout, environment_of

    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        peers = {}
        for name, version in (("old", args.old), ("new", args.new)):
            package = checkout(version, Path(scratch) / name)
            environment = {**environment_of(package), "OMP_NUM_THREADS": str(threads)}
            peers[name] = subprocess.Popen(
                [sys.executable, __file__, "--answer"],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        versions = {name: ask(peer, {"ask": "version"}) for name, peer in peers.items()}
        rows = []
        for name, (workload, hard) in ROWS.items():
            workload = {**workload, "layers": 2} if args.quick else workload
            for peer in peers.values():
                ask(peer, {"ask": "build", "workload": workload, "hard": {"budget": 0.25, "scorer": "linear", **hard}})
            found = [
                {side: ask(peer, {"ask": "time"}) for side, peer in peers.items()}
                for _ in range(3 if args.quick else args.rounds)
            ]
            rows.append({"name": name, "workload": workload, "hard": hard, **summary(found)})
            print(
                f"{name:66} {rows[-1]['new_by_old']:.3f} x the old time; {rows[-1]['speedup']:.2f} x stock", flush=True
            )
        for peer in peers.values():
            peer.communicate("")
    result = {
        "old": args.old,
        "new": args.new,
        "rounds": args.rounds,
        "threads": threads,
        "machine": versions["new"],
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def summary(found: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return medians over the rounds: seconds, the ratio of the hard models' times (new by old), and each version's speed-up over stock."""
    by_old = [one["new"]["hard"] / one["old"]["hard"] for one in found]
    quartiles = statistics.quantiles(by_old, n=4) if len(by_old) > 1 else by_old * 3
    return {
        "new_by_old": statistics.median(by_old),
        "new_by_old_quartiles": [quartiles[0], quartiles[2]],
        "speedup": statistics.median(one["new"]["stock"] / one["new"]["hard"] for one in found),
        "speedup_old": statistics.median(one["old"]["stock"] / one["old"]["hard"] for one in found),
        **{
            f"{side}_{what}_seconds": statistics.median(one[side][what] for one in found)
            for side in ("old", "new")
            for what in ("stock", "hard")
        },
    }


def ask(peer: subprocess.Popen[str], question: dict[str, Any]) -> Any:
    """Send a request to a process and return its answer."""
    assert peer.stdin is not None and peer.stdout is not None
    peer.stdin.write(json.dumps(question) + "\n")
    peer.stdin.flush()
    line = peer.stdout.readline()
    if not line:
        raise SystemExit(f"a version ended while it was asked {question}")
    return json.loads(line)


def answer() -> None:
    """Run one of the two processes, which builds and times models with the version that it imports."""
    import platform

    import torch
    import transformers

    import hf_hardattn
    from hf_hardattn.efficiency.workloads import Workload

    torch.set_num_threads(os.cpu_count() or 1)
    calls: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        said: Any = None
        if question["ask"] == "version":
            said = {
                "package": getattr(hf_hardattn, "__version__", "0.1.0"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "platform": platform.machine(),
            }
        elif question["ask"] == "build":
            workload = Workload(**question["workload"])
            stock, hard = workload.build(), hf_hardattn.apply(workload.build(), question["hard"])
            inputs = workload.inputs(stock)
            calls = {name: partial(workload.call, model, inputs) for name, model in (("stock", stock), ("hard", hard))}
            for call in calls.values():
                call()
                call()
        else:
            said = {}
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                said[name] = time.perf_counter() - start
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
