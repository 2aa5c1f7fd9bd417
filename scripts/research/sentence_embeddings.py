"""Search by sentence embeddings with a MiniLM that reads part of each document: train it from its own embeddings, and measure.

    python scripts/data/prepare_summarisation.py --output outputs/data/descriptions --fewest 40 --most 120 --held-out 2000
    python scripts/research/sentence_embeddings.py --model PATH/TO/all-MiniLM-L6-v2 --data outputs/data/descriptions

The documents are long descriptions of packages, the queries their one-line synopses; training and test share no source package. The
hard model drops tokens of the documents behind one layer, and learns from the embeddings that the original model makes of whole documents, with a
ratio drawn anew in each step; queries are read whole. Beside it stand random tokens, the first tokens, and documents that were cut to as many
tokens before the first layer. Nothing is chosen on the test rows. Results are added to --output, one line a variant.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

import hf_hardattn
from hf_hardattn.devices import device_name
from hf_hardattn.functional.pooling import mean_rows
from hf_hardattn.training.fine_tune import fine_tune
from hf_hardattn.training.finetuning.sentence_embeddings import search

BATCH = 32


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Encoder:
    """Texts to unit vectors: the mean of the rows that a model leaves, as MiniLM pools."""

    def __init__(self, model: nn.Module, tokenizer: Any, share: float = 1.0, longest: int = 254):
        self.model, self.tokenizer, self.share, self.longest = model, tokenizer, share, longest

    def batch(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids; each text cut to ``longest`` tokens, and to ``share`` of them."""
        rows = self.tokenizer(texts, truncation=True, max_length=self.longest, add_special_tokens=False)["input_ids"]
        rows = [row[: math.ceil(self.share * len(row))] for row in rows]
        ends = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return dict(self.tokenizer.pad({"input_ids": [[ends[0], *row, ends[1]] for row in rows]}, return_tensors="pt"))

    def __call__(self, texts: list[str]) -> Tensor:
        """fp32 ``[B, D]``."""
        batch = self.batch(texts)
        hidden = self.model(**batch).last_hidden_state
        return nn.functional.normalize(mean_rows(hidden, batch["attention_mask"]), dim=-1)

    def all(self, texts: list[str]) -> Tensor:
        """``__call__`` over batches of like lengths, without gradient."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.model.config.hidden_size)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                found[chosen] = self([texts[i] for i in chosen])
        return found


def train(arguments: Any, folder: Path) -> None:
    """Train the hard model as ``hf-hardattn train encoder --task sentence_embeddings`` does, a ratio drawn anew in each step."""
    sampled = {"sample": [min(arguments.shares) * 0.8, min(1.0, max(arguments.shares) * 1.4)]}
    flags = {
        "task": "sentence_embeddings",
        "model_name_or_path": arguments.model,
        "train_file": arguments.data / "train.jsonl",
        "text_column": "document",
        "max_source_length": arguments.train_tokens,
        "sites": arguments.site,
        "budget": json.dumps(sampled),
        "scorer": "mlp",
        "estimator": "simple",
        "learning_rate": 3e-5,
        "selector_learning_rate": 2e-3,
        "weight_decay": 0.01,
        "num_warmup_steps": arguments.steps // 10,
        "max_train_steps": arguments.steps,
        "per_device_train_batch_size": arguments.train_batch,
        "seed": arguments.seed,
        "output_dir": folder,
    }
    fine_tune("encoder", [word for name, value in flags.items() for word in (f"--{name}", str(value))] + ["--cpu"])


def variants(soft: nn.Module, tokenizer: Any, hard: nn.Module, arguments: Any) -> Iterator[tuple[str, float, Encoder]]:
    """Name, kept share and encoder of everything that is measured."""
    yield "full attention", 1.0, Encoder(soft, tokenizer)
    for share in arguments.shares:
        hf_hardattn.set_budget(hard, share)
        yield "learned", share, Encoder(hard, tokenizer)
        for scorer in ("random", "first"):
            control = BertModel.from_pretrained(arguments.model, add_pooling_layer=False)
            config = {"sites": [arguments.site], "scorer": scorer, "budget": share}
            yield scorer, share, Encoder(hf_hardattn.apply(control.eval(), config), tokenizer)
        yield "cut text", share, Encoder(soft, tokenizer, share)


def seconds(encoders: dict[str, Encoder], texts: list[str], rounds: int) -> dict[str, float]:
    """Median seconds for all texts, in interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encoder in encoders.items():
            started = time.perf_counter()
            encoder.all(texts)
            found[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_summarisation.py wrote")
    parser.add_argument("--site", default="text.tokens.0", help="where tokens leave (default: text.tokens.0)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3], help="kept (default: 0.5 0.3)")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: 300)")
    parser.add_argument("--train-batch", type=int, default=16, help="documents a step (default: 16)")
    parser.add_argument("--train-tokens", type=int, default=96, help="of a document in training (default: 96)")
    parser.add_argument("--test", type=int, default=1500, help="test documents at most (default: 1500)")
    parser.add_argument("--timed", type=int, default=320, help="documents that are timed (default: 320)")
    parser.add_argument("--rounds", type=int, default=3, help="of timing (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/sentence_embeddings.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    soft = BertModel.from_pretrained(arguments.model, add_pooling_layer=False).eval()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(arguments, Path(folder))
        hard = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    trained = time.perf_counter() - started

    rows = read_rows(arguments.data / "test.jsonl")[: arguments.test]
    documents = [row["document"] for row in rows]
    queries = Encoder(soft, tokenizer).all([row["summary"] for row in rows])
    results: dict[str, Any] = {
        "model": "all-MiniLM-L6-v2",
        "site": arguments.site,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "training_seconds": round(trained, 1),
        "documents": len(rows),
        "tokens": statistics.mean(
            len(ids) for ids in tokenizer(documents, truncation=True, max_length=256)["input_ids"]
        ),
        "threads": arguments.threads,
        "processor": device_name(),
        "hf_hardattn": hf_hardattn.__version__,
        "variants": [],
    }
    for name, share, encoder in variants(soft, tokenizer, hard, arguments):
        line: dict[str, Any] = {"name": name, "share": share, **search(queries, encoder.all(documents))}
        if name in ("learned", "cut text"):
            timed = seconds(
                {"soft": Encoder(soft, tokenizer), name: encoder}, documents[: arguments.timed], arguments.rounds
            )
            line["speed_up"] = timed["soft"] / timed[name]
        results["variants"].append(line)
        print(line, flush=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
