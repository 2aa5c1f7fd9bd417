"""A small decoder that answers questions about its prompt, soft and with a quarter of the prompt.

    python scripts/research/recall.py            # train and test everything; --steps, --adapt, --prompts for smaller runs
    python scripts/research/recall.py --timing   # prefill of the models trained above, in turn

A prompt is noise with eight hidden facts, each a token that represents a key and its value. It is followed by questions, each a key whose
value must be generated. A decoder with the shape of Qwen2 is trained here on prompts that grow to 1,024 tokens. Its first layer reads a
window of 16 tokens, as in models that alternate local and global attention, so the facts are found in later layers. (If the first layer
reads the whole prompt, it finds them by itself, and dropping random rows after it loses nothing.) Each variant then continues from it for
the same number of steps: rows of the prompt are dropped after the first layer (``decoder.tokens.0``), keys are left out of every later
cache (``decoder.self``), or the same numbers are chosen at random. Exact match is the share of prompts with only correct answers. Settings
were chosen on prompts of a different seed (--test-seed) than the reported ones.

Writes results/recall.json; the models are kept in --models and are trained once.
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
from transformers import Qwen2Config, Qwen2ForCausalLM

import hf_hardattn
from hf_hardattn.efficiency.bench import machine
from hf_hardattn.training.results import read_json, write_json

RESULTS = Path("results/recall.json")
KINDS = 12  # number of keys, and of values
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
    use_sliding_window=True,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=3,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "soft": {},
    "decoder.tokens.0": {"sites": ["decoder.tokens.0"], "scorer": "linear"},
    "decoder.tokens.0, random": {"sites": ["decoder.tokens.0"], "scorer": "random"},
    "decoder.self": {"sites": ["decoder.self.1", "decoder.self.2"], "scorer": "linear"},
    "decoder.self, random": {"sites": ["decoder.self.1", "decoder.self.2"], "scorer": "random"},
}


def draw(batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw prompts of ``length`` tokens with their questions and answers; only the answers are labels."""

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


def train(model: Any, lengths: list[int], tokens: int, rate: float, selector_rate: float, seed: int) -> None:
    """Take one step for each of ``lengths``, on as many prompts as fit in ``tokens`` tokens, but at least eight."""
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups["selector" in name].append(parameter)
    rates = [rate, selector_rate] if groups[True] else [rate]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": each} for group, each in zip(groups.values(), rates, strict=False)], weight_decay=0.01
    )
    total = len(lengths)  # the rate rises over the first tenth, is constant, and falls over the last two fifths

    def level(step: int) -> float:
        return min(1.0, 10 * (step + 1) / total, 2.5 * (1 - step / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, level)
    generator, losses = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed)
    model.train()
    for step, length in enumerate(lengths):
        hf_hardattn.set_step(model, step, len(lengths))
        loss = model(**draw(max(8, tokens // length), length, generator), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"  step {step + 1}, length {length}: loss {statistics.mean(losses[-20:]):.3f}", flush=True)


@torch.no_grad()
def test(model: Any, length: int, prompts: int, seed: int) -> dict[str, float]:
    """Return exact match, the accuracy of single answers, and the kept share of the prompt."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    right, kept = [], []
    for _ in range(prompts // 10):
        batch = draw(10, length, generator)
        with hf_hardattn.record(model) if hf_hardattn.selectors(model) else nullcontext([]) as recording:
            predicted = model(**batch).logits.argmax(-1)[:, :-1]
        known = batch["labels"][:, 1:]
        right.append((predicted == known)[known != -100].view(10, HIDDEN))
        kept += [float(selection.kept_ratio.mean()) for selection in recording]
    answers = torch.cat(right)
    return {
        "exact_match": float(answers.all(1).float().mean()),
        "answers_right": float(answers.float().mean()),
        "kept_ratio": statistics.mean(kept) if kept else 1.0,
    }


@torch.no_grad()
def timing(models: dict[str, Any], length: int, rounds: int) -> dict[str, float]:
    """Return the median processor time of a prefill, in interleaved rounds."""
    ids = draw(1, length, torch.Generator().manual_seed(0))["input_ids"][:, :length]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.thread_time()
            model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def trained(place: Path, start: Any, lengths: list[int], **settings: Any) -> Any:
    """Return the model in ``place``; if there is none, train ``start`` and save it there."""
    if (place / "config.json").exists():
        return Qwen2ForCausalLM.from_pretrained(place)
    train(start, lengths, 3072, **settings)
    start.save_pretrained(place)
    return start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, nargs=3, default=[1000, 200, 300], help="training steps at lengths 48, 256 and --length"
    )
    parser.add_argument(
        "--adapt",
        type=int,
        nargs=2,
        default=[120, 20],
        help="training steps of each variant at lengths 256 and --length",
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of a variant")
    parser.add_argument("--selector-rate", type=float, default=1e-2, help="learning rate of its selectors")
    parser.add_argument("--length", type=int, default=1024, help="final number of tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--test-seed", type=int, default=10_000)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--models", type=Path, default=Path("outputs/recall"))
    parser.add_argument("--timing", action="store_true", help="time the models in --models")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = [length for length, steps in zip((48, 256, args.length), args.steps, strict=True) for _ in range(steps)]
    rates = {"rate": 3e-3, "selector_rate": 0.0, "seed": 0}
    base = trained(args.models / "base", Qwen2ForCausalLM(Qwen2Config(**SHAPE)), lengths, **rates)
    models, rows = {}, []
    settings = {"shape": SHAPE, "budget": BUDGET, "facts": HIDDEN, "estimator": "straight_through"}
    settings |= {name: getattr(args, name) for name in ("steps", "adapt", "rate", "selector_rate", "length", "prompts")}
    rates = {"rate": args.rate, "selector_rate": args.selector_rate, "seed": 1}
    for name in args.variants:
        model, config = copy.deepcopy(base), VARIANTS[name]
        if config:
            hf_hardattn.apply(model, {**config, "budget": BUDGET, "estimator": "straight_through"})
        place = args.models / name.replace(", ", "-")
        models[name] = model = trained(place, model, [256] * args.adapt[0] + [args.length] * args.adapt[1], **rates)
        if not args.timing:
            rows.append({"variant": name, **test(model, args.length, args.prompts, args.test_seed)})
            print(rows[-1], flush=True)
            write_json(args.output, {"machine": machine(1), **settings, "rows": rows})
    if args.timing:
        results, seconds = read_json(args.output), timing(models, args.length, args.rounds)
        for row in results["rows"]:
            row["prefill_seconds"] = seconds[row["variant"]]
        write_json(args.output, results)


if __name__ == "__main__":
    main()
