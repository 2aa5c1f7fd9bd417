"""Train T5, hard or soft, to translate, summarise, or map any text to another.

    python scripts/train_t5.py --model_name_or_path google-t5/t5-small --train_file train.csv --validation_file val.csv \
        --source_column en --target_column fr --sites encoder.inputs --budget 0.5 --output_dir outputs/t5-hard
    python scripts/train_t5.py --config scripts/configs/t5.yaml --budget 0.3
    accelerate launch --num_processes 2 scripts/train_t5.py --config scripts/configs/t5.yaml      # two GPUs
    torchrun --nproc_per_node 2 scripts/train_t5.py --config scripts/configs/t5.yaml --cpu       # two CPU processes

Text comes from the Hub (--dataset_name) or from a csv or json file, as two columns or as one `translation` column of dicts by language
(--source_lang en --target_lang fr). Without --sites, --budget or --hard_attention the model trains soft, for comparison.
"""

from __future__ import annotations

import sys
from typing import Any

from hf_hardattn.training.finetuning import choose
from hf_hardattn.training.loop import start, train
from hf_hardattn.training.parsing import expand, parse, run


def main(argv: list[str] | None = None) -> dict[str, Any]:
    words = expand(sys.argv[1:] if argv is None else argv)
    task = choose(words, "t5")
    args = parse(task.Arguments, words)
    accelerator = start(args)
    return train(accelerator, args, task(args, accelerator).setup(), argv)


if __name__ == "__main__":
    run(main)
