"""Embed 20,000 sentences with ``hf-hardattn predict``: uninterrupted, and killed at random moments and resumed, with one and two processes.

    apt-get download wordnet-base && dpkg -x wordnet-base*.deb wordnet
    python scripts/research/predict.py kills --model PATH/TO/all-MiniLM-L6-v2 --wordnet wordnet/usr/share/wordnet
    python scripts/research/predict.py timing --model PATH/TO/all-MiniLM-L6-v2 --wordnet wordnet/usr/share/wordnet   # on a quiet machine

The sentences are definitions from WordNet. The hard model is an untrained MiniLM that keeps half of the tokens after its first layer;
neither result depends on what it learned. ``kills`` compares the files apart from the seconds; ``timing`` runs hard and stock in turn. Each
adds its part to results/predict.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from pyarrow import parquet
from transformers import AutoTokenizer, BertModel

import hf_hardattn
from hf_hardattn.devices import device_name

OUTPUT = Path(__file__).resolve().parents[2] / "results" / "predict.json"
SITES = {"text.tokens.0": {"budget": 0.5}}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def glosses(folder: Path, count: int) -> list[str]:
    """Return the definitions of WordNet's nouns, verbs and adjectives, without examples, in a random order."""
    found: dict[str, None] = {}
    for part in ("noun", "verb", "adj"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            words = line.partition("| ")[2].partition('; "')[0].strip()
            if not line.startswith(" ") and len(words.split()) >= 3:
                found.setdefault(words)
    return random.Random(0).sample(list(found), count)


def prepare(folder: Path, arguments: Any) -> None:
    """Write the two checkpoints and the sentences."""
    torch.manual_seed(0)
    model = BertModel.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    for name in ("stock", "hard"):
        if name == "hard":
            hf_hardattn.apply(model, {"sites": SITES, "scorer": "mlp"})
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with (folder / "sentences.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([text] for text in glosses(arguments.wordnet, arguments.count))


def command(folder: Path, model: str, output: Path, processes: int) -> list[str]:
    """Return the command of ``hf-hardattn predict`` with ``processes`` processes."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    words = [
        sys.executable,
        *launcher,
        "-m",
        "hf_hardattn",
        "predict",
        folder / model,
        "--data",
        folder / "sentences.csv",
    ]
    return [str(word) for word in [*words, "--column", "text", "--output", output]]


def killed(words: list[str], kills: int, draw: random.Random, latest: float, parts: Path) -> list[int]:
    """Run a command to its end, and kill it and its children at most ``kills`` times; return the number of chunks at each kill."""
    found: list[int] = []
    for _ in range(kills):
        process = psutil.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(0, latest / 3))
            return found
        except psutil.TimeoutExpired:
            for one in (
                *process.children(recursive=True),
                process,
            ):  # the processes of the launcher have no common group
                one.kill()
            process.wait()
            found.append(len([*parts.glob("*.parquet")]))
    subprocess.run(words, env=ENVIRONMENT, check=True, stderr=subprocess.DEVNULL)
    return found


def kills(folder: Path, arguments: Any) -> dict[str, Any]:
    """Check that interrupted runs write the same file as an uninterrupted one."""
    whole, draw = folder / "whole.parquet", random.Random(arguments.seed)
    started = time.perf_counter()
    subprocess.run(command(folder, "hard", whole, 1), env=ENVIRONMENT, check=True, stderr=subprocess.DEVNULL)
    latest = time.perf_counter() - started
    expected = parquet.read_table(whole).drop_columns(["seconds"])
    found: dict[str, Any] = {"rows": len(expected), "columns": expected.column_names, "runs": []}
    for processes in (1, 2):
        output = folder / f"by{processes}.parquet"
        parts = output.with_name(f"{output.name}.parts")
        chunks = killed(command(folder, "hard", output, processes), arguments.kills, draw, latest, parts)
        same = parquet.read_table(output).drop_columns(["seconds"]).equals(expected)
        found["runs"].append({"processes": processes, "chunks_at_kills": chunks, "same_file": same})
    return found


def timing(folder: Path, arguments: Any) -> dict[str, Any]:
    """Return sentences per second, hard and stock, for the model's calls alone and for the whole command with its imports."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for model in ("stock", "hard"):
            for processes in (1, 2):
                output = folder / "timed.parquet"
                output.unlink(missing_ok=True)
                started = time.perf_counter()
                words = command(folder, model, output, processes)
                subprocess.run(words, env=ENVIRONMENT, check=True, stderr=subprocess.DEVNULL)
                wall = time.perf_counter() - started
                calls = sum(parquet.read_table(output)["seconds"].to_pylist())
                rates = arguments.count * processes / calls, arguments.count / wall
                found.setdefault((model, processes), []).append(rates)
                print(model, processes, rates, flush=True)
    lines = [
        {"model": model, "processes": processes, "calls": statistics.median(c for c, _ in rates)}
        | {"command": statistics.median(w for _, w in rates)}
        for (model, processes), rates in found.items()
    ]
    return {"sentences": arguments.count, "rounds": arguments.rounds, "processor": device_name(), "rates": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kills", "timing"))
    parser.add_argument("--model", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with WordNet's data.noun and others")
    parser.add_argument("--count", type=int, default=20_000, help="number of sentences (default: 20,000)")
    parser.add_argument("--kills", type=int, default=5, help="maximum number of kills per run (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), arguments)
        found = (kills if arguments.part == "kills" else timing)(Path(name), arguments)
    results |= {"model": "all-MiniLM-L6-v2", "sites": SITES, arguments.part: found}
    results["hf_hardattn"] = hf_hardattn.__version__
    OUTPUT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
