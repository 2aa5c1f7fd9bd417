"""Fine-tune ViT, hard or soft, to classify images.

    python scripts/train_vit.py --model_name_or_path google/vit-base-patch16-224-in21k --train_dir photos/train \
        --validation_dir photos/val --sites vision.tokens.3 vision.tokens.6 --budget 0.5 --output_dir outputs/vit-hard
    python scripts/train_vit.py --config scripts/configs/vit.yaml --budget 0.3
    accelerate launch --num_processes 2 scripts/train_vit.py --config scripts/configs/vit.yaml      # two GPUs
    torchrun --nproc_per_node 2 scripts/train_vit.py --config scripts/configs/vit.yaml --cpu       # two CPU processes

Images come from the Hub (--dataset_name), from folders named after their class (--train_dir), or from a csv or json file of paths and
labels (--train_file). Without --sites, --budget or --hard_attention the model trains soft, for comparison.
"""

from __future__ import annotations

from typing import Any

from hf_hardattn.training.fine_tune import fine_tune
from hf_hardattn.training.parsing import run


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return fine_tune("vit", argv)


if __name__ == "__main__":
    run(main)
