"""Run the fine-tunings for `results/finetuning`: one soft base checkpoint per task, then branches with equal numbers of steps from it.

    python scripts/research/finetuning_runs.py captioning                              # the base checkpoint, then all variants of three seeds
    python scripts/research/finetuning_runs.py captioning --variants base
    python scripts/research/finetuning_runs.py captioning --variants soft hard --seeds 1
    python scripts/research/finetuning_runs.py captioning --jobs 3                     # three runs at a time, as on one GPU
    python scripts/research/finetuning_runs.py captioning --try 20                     # 20 steps of each, on 40 examples, into outputs/try

Each run is one call of a training script with the files of `scripts/research/finetuning`, and writes to `outputs/TASK-base` or
`outputs/TASK-VARIANT-SEED`; a run with a results.json is not repeated. The variants are soft, which trains the base checkpoint further,
hard, and random, which is hard with random selection. The first lines of the files name the `prepare_*.py` that creates their data and
weights.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = Path(__file__).parent / "finetuning"
FAMILIES = {  # model families of the runs; each has a TASK.yaml, or also that of its stem
    **{name: "blip" for name in ("captioning", "retrieval", "video_captioning", "video_retrieval")},
    **{name: "vit" for name in ("vit_fashion", "vit_stamps")},
    **{name: "t5" for name in ("translation_de", "translation_fr", "summarisation")},
}
VARIANTS = ("base", "soft", "hard", "random")


def folder(task: str, variant: str, seed: int, root: Path = Path("outputs")) -> Path:
    """Return the output folder of a run."""
    return root / (f"{task}-base" if variant == "base" else f"{task}-{variant}-{seed}")


def flags(task: str, variant: str, seed: int, root: Path = Path("outputs")) -> list[str]:
    """Return the command of a run, without ``python``."""
    stem = task if (CONFIGS / f"{task}_hard.yaml").is_file() else task.rpartition("_")[0]
    names = [stem] + ([task] if stem != task else [])
    names += {"base": [f"{stem}_base"], "soft": []}.get(variant, [f"{stem}_hard"])
    # Paths are as short as that of the caller, because the command is recorded with the results.
    here = Path(sys.argv[0]).parent if Path(sys.argv[0]).name == Path(__file__).name else Path(__file__).parent
    words = [os.path.normpath(here / ".." / f"train_{FAMILIES[task]}.py")]
    words += [word for name in names for word in ("--config", str(here / "finetuning" / f"{name}.yaml"))]
    if variant == "random":
        words += ["--scorer", "random", "--estimator", "straight_through"]
    if variant != "base":
        words += ["--model_name_or_path", str(folder(task, "base", 0, root))]
    return [*words, "--seed", str(seed), "--output_dir", str(folder(task, variant, seed, root))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="+", choices=sorted(FAMILIES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the variants (default: 0 1 2)"
    )
    parser.add_argument(
        "--try", dest="steps", type=int, help="run only this many steps, to check that it works and how long it takes"
    )
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    arguments = parser.parse_args(argv)
    root = Path("outputs/try") if arguments.steps else Path("outputs")
    short = ["--max_train_steps", str(arguments.steps), "--max_eval_samples", "40"] if arguments.steps else []

    def run(task: str, variant: str, seed: int) -> None:
        command = [sys.executable, *flags(task, variant, seed, root), *short]
        if (folder(task, variant, seed, root) / "results.json").is_file():
            return
        print(shlex.join(["python", *command[1:]]) + "\n", end="", flush=True)  # one write: other branches print too
        if not arguments.dry_run:
            subprocess.run(command, check=True)

    for task in arguments.task:
        if "base" in arguments.variants:
            run(task, "base", 0)
        branches = [
            (task, variant, seed) for seed in arguments.seeds for variant in arguments.variants if variant != "base"
        ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for ended in [pool.submit(run, *branch) for branch in branches]:
                ended.result()


if __name__ == "__main__":
    main()
