"""Train BLIP, hard or soft, to caption images and videos, answer questions about them, or find them.

    python scripts/train_blip.py --model_name_or_path Salesforce/blip-image-captioning-base --train_dir photos/train \
        --validation_dir photos/val --sites vision.tokens.3 vision.tokens.6 --budget 0.5 --output_dir outputs/blip-hard
    python scripts/train_blip.py --config scripts/configs/blip.yaml --budget 0.3
    accelerate launch --num_processes 2 scripts/train_blip.py --config scripts/configs/blip.yaml      # two GPUs
    torchrun --nproc_per_node 2 scripts/train_blip.py --config scripts/configs/blip.yaml --cpu       # two CPU processes

--task names the task: captioning (the default), visual_question_answering, image_text_retrieval, video_captioning or
video_text_retrieval. Images or videos and texts come from the Hub (--dataset_name), from a folder with a metadata.jsonl or metadata.csv
(--train_dir), or from a csv or json file of paths and texts (--train_file), where a video is a file, a folder of images or a list of them.
Without --sites, --budget or --hard_attention the model trains soft, for comparison.
"""

from __future__ import annotations

from typing import Any

from hf_hardattn.training.fine_tune import fine_tune
from hf_hardattn.training.parsing import run


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return fine_tune("blip", argv)


if __name__ == "__main__":
    run(main)
