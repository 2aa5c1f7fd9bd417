"""Evaluate a trained ViT, T5, BLIP or decoder, hard and soft, with the flags of its training script.

    python scripts/evaluate.py --model_name_or_path outputs/vit-hard --validation_dir photos/test --output_dir outputs/vit-test
    python scripts/evaluate.py --config scripts/configs/evaluate.yaml --num_beams 4
    accelerate launch --num_processes 2 scripts/evaluate.py --config scripts/configs/evaluate.yaml

The model determines the task unless --task names it. `results.json` holds the metrics and the kept share of each site. It is written to
outputs/evaluation/MODEL, or to --output_dir, and never replaces the record of a training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_hardattn.errors import HardAttentionError, unknown
from hf_hardattn.training.evaluation import folder_of_evaluation
from hf_hardattn.training.finetuning import choose
from hf_hardattn.training.finetuning._encoders import encoders
from hf_hardattn.training.finetuning.causal_lm import decoders
from hf_hardattn.training.flag_help import show
from hf_hardattn.training.parsing import expand, parse, peek, run
from hf_hardattn.training.running import evaluate, start

FAMILIES = ("vit", "t5", "blip", "encoder", "decoder")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    words = expand(sys.argv[1:] if argv is None else argv)
    if any(word in ("--help", "-h") for word in words):
        print(show(None, usage="evaluate.py"))
        raise SystemExit(0)
    name = peek(words, "model_name_or_path")
    if name is None:
        raise HardAttentionError("no model is given; pass --model_name_or_path, a directory or a Hub name.")
    config = AutoConfig.from_pretrained(name, revision=peek(words, "model_revision") or "main")
    kinds = {**dict.fromkeys(encoders(), "encoder"), **dict.fromkeys(decoders(), "decoder")}
    family = kinds.get(config.model_type, config.model_type)
    if family not in FAMILIES:
        raise unknown("model family", family, FAMILIES, name)
    task = choose(words, family, next(iter(config.architectures or []), None))
    args = parse(task.Arguments, words)
    args.output_dir = str(
        folder_of_evaluation(Path(args.output_dir), name, peek(words, "output_dir") is None, args.overwrite)
    )
    accelerator = start(args)
    return evaluate(accelerator, args, task(args, accelerator).setup(), argv)


if __name__ == "__main__":
    run(main)
