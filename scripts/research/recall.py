"""A small decoder that answers questions about its prompt: soft, and with a quarter of the prompt.

    python scripts/research/recall.py                          # train and test everything; --steps, --adapt, --prompts: of smaller runs

A prompt is noise in which eight facts are hidden, each a token that stands for a key and its value; behind it stand questions, a key each,
whose value is to be written. A decoder of Llama's shape is trained here on prompts that grow to 512 tokens. Each variant then goes on
from it for the same number of steps: rows of the prompt dropped before the first layer (``decoder.inputs``), keys left out of every
cache (``decoder.self.*``), and the same amounts chosen at random. Exact match is the share of prompts whose answers are all right.

Writes results/recall.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_hardattn
from hf_hardattn.efficiency.bench import machine
from hf_hardattn.training.results import write_json

RESULTS = Path("results/recall.json")
KINDS = 12  # keys, and values
KEYS, VALUES, NOISE = range(4, 4 + KINDS), range(4 + KINDS, 4 + 2 * KINDS), range(28, 92)
FACTS = range(92, 92 + KINDS**2)
HIDDEN, BUDGET = 8, 0.25
SHAPE: dict[str, Any] = dict(
    vocab_size=FACTS.stop,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=3,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "soft": {},
    "decoder.inputs": {"sites": ["decoder.inputs"], "scorer": "linear"},
    "decoder.inputs, random": {"sites": ["decoder.inputs"], "scorer": "random"},
    "decoder.self.*": {"sites": ["decoder.self.*"], "scorer": "linear"},
    "decoder.self.*, random": {"sites": ["decoder.self.*"], "scorer": "random"},
}


def draw(batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Prompts of ``length`` tokens with their questions and answers; the labels are the answers alone."""

    def pick(what: range, *size: int) -> Tensor:
        return torch.randint(what.start, what.stop, size, generator=generator)

    def some(of: int) -> Tensor:
        return torch.rand(batch, of, generator=generator).argsort(1)[:, :HIDDEN]

    ids, keys, values = pick(NOISE, batch, length), some(KINDS), pick(range(KINDS), batch, HIDDEN)
    ids.scatter_(1, some(length), FACTS.start + keys * KINDS + values)
    questions = torch.stack((KEYS.start + keys, VALUES.start + values), -1).flatten(1)
    answers = questions.masked_fill(torch.arange(2 * HIDDEN) % 2 == 0, -100)
    return {
        "input_ids": torch.cat((ids, questions), 1),
        "labels": torch.cat((torch.full_like(ids, -100), answers), 1),
        "attention_mask": torch.ones(batch, length + 2 * HIDDEN, dtype=torch.long),
    }


def train(model: Any, lengths: list[int], tokens: int, rate: float, seed: int) -> None:
    """One step for each of ``lengths``, on as many prompts as ``tokens`` hold."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(lengths) + 1, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed)
    model.train()
    for step, length in enumerate(lengths):
        hf_hardattn.set_step(model, step, len(lengths))
        loss = model(**draw(max(4, tokens // length), length, generator), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"  step {step + 1}, length {length}: loss {statistics.mean(losses[-20:]):.3f}", flush=True)


@torch.no_grad()
def test(model: Any, length: int, prompts: int) -> dict[str, float]:
    """Exact match, answers right one by one, kept share of the prompt, and the processor time of a prefill."""
    model.eval()
    generator = torch.Generator().manual_seed(10_000)
    right, kept, seconds = [], [], []
    for _ in range(prompts // 10):
        batch = draw(10, length, generator)
        with hf_hardattn.record(model) if hf_hardattn.selectors(model) else nullcontext([]) as recording:
            predicted = model(**batch).logits.argmax(-1)[:, :-1]
        known = batch["labels"][:, 1:]
        right.append((predicted == known)[known != -100].view(10, HIDDEN))
        kept += [float(selection.kept_ratio.mean()) for selection in recording]
        start = time.thread_time()
        model(input_ids=batch["input_ids"][:1, :length], use_cache=True, logits_to_keep=1)
        seconds.append(time.thread_time() - start)
    answers = torch.cat(right)
    return {
        "exact_match": float(answers.all(1).float().mean()),
        "answers_right": float(answers.float().mean()),
        "kept_ratio": statistics.mean(kept) if kept else 1.0,
        "prefill_seconds": statistics.median(seconds),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=3, default=[200, 60, 70], help="at lengths of 48, 256 and --length")
    parser.add_argument("--adapt", type=int, default=40, help="steps of each variant")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt, in the end")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    lengths = [length for length, steps in zip((48, 256, args.length), args.steps, strict=True) for _ in range(steps)]
    train(base, lengths, 3072, 3e-3, seed=0)
    facts = {
        "shape": SHAPE,
        "budget": BUDGET,
        "facts": HIDDEN,
        **vars(args),
        "output": str(args.output),
    }
    rows: list[dict[str, Any]] = []
    for name, config in VARIANTS.items():
        model = copy.deepcopy(base)
        if config:
            hf_hardattn.apply(model, {**config, "budget": BUDGET, "estimator": "straight_through"})
        train(model, [args.length] * args.adapt, 3072, 1e-3, seed=1)
        rows.append({"variant": name, **test(model, args.length, args.prompts)})
        print(rows[-1], flush=True)
        write_json(args.output, {"machine": machine(1), **facts, "rows": rows})


if __name__ == "__main__":
    main()
