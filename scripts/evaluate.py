"""Evaluate a trained ViT, T5 or BLIP, hard and soft, with the flags of its training script.

    python scripts/evaluate.py --model_name_or_path outputs/vit-hard --validation_dir photos/test --output_dir outputs/vit-test
    python scripts/evaluate.py --config scripts/configs/evaluate.yaml --num_beams 4
    accelerate launch --num_processes 2 scripts/evaluate.py --config scripts/configs/evaluate.yaml

The model decides the task, unless --task names it. `results.json` holds the metrics and, for each site, the share that was kept.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoConfig

from hf_hardattn.errors import HardAttentionError, unknown
from hf_hardattn.training.finetuning import choose
from hf_hardattn.training.loop import evaluate, start
from hf_hardattn.training.parsing import expand, parse, peek, run

FAMILIES = ("vit", "t5", "blip")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    words = expand(sys.argv[1:] if argv is None else argv)
    name = peek(words, "model_name_or_path")
    if name is None:
        raise HardAttentionError("no model is named; give --model_name_or_path, a directory or a Hub name.")
    config = AutoConfig.from_pretrained(name, revision=peek(words, "model_revision") or "main")
    if config.model_type not in FAMILIES:
        raise unknown("model family", config.model_type, FAMILIES, name)
    task = choose(words, config.model_type, next(iter(config.architectures or []), None))
    args = parse(task.Arguments, words)
    accelerator = start(args)
    return evaluate(accelerator, args, task(args, accelerator).setup(), argv)


if __name__ == "__main__":
    run(main)
