"""Train T5, hard or soft, to translate, summarise, classify, answer questions, or generate any other text from a text.

    python scripts/train_t5.py --model_name_or_path google-t5/t5-small --train_file train.csv --validation_file val.csv \
        --source_column en --target_column fr --sites encoder.inputs --budget 0.5 --output_dir outputs/t5-hard
    python scripts/train_t5.py --config scripts/configs/t5.yaml --budget 0.3
    accelerate launch --num_processes 2 scripts/train_t5.py --config scripts/configs/t5.yaml      # two GPUs
    torchrun --nproc_per_node 2 scripts/train_t5.py --config scripts/configs/t5.yaml --cpu       # two CPU processes

--task names the task: translation (the default), summarisation, text_classification, extractive_question_answering or
generative_question_answering. Text comes from the Hub (--dataset_name) or from a csv or json file, as two columns or as one
`translation` column of dicts by language (--source_lang en --target_lang fr). Without --sites, --budget or --hard_attention the model
trains soft, for comparison.
"""

from __future__ import annotations

from typing import Any

from hf_hardattn.training.fine_tune import fine_tune
from hf_hardattn.training.parsing import run


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return fine_tune("t5", argv)


if __name__ == "__main__":
    run(main)
