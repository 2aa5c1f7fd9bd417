"""Saving of prompt selection in a decoder: prefill, time per token and bytes of keys and values, compared with stock and two evictions.

    python scripts/research/prefill.py                         # 1,024 to 16,384 tokens; --lengths, --rounds for a part

The decoder has the shape of Llama and random weights, so the numbers are costs, not accuracies. Time is the processor time of one thread,
which does not include other work of the machine. The evictions prune the cache of every layer after the prefill, head by head, as in their
papers: they keep the keys of the smallest norm (Devoto et al., 2024), or those that the last 32 queries attend to (SnapKV, Li et al.,
2024).

Writes results/prefill.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hf_hardattn
from hf_hardattn.efficiency.bench import machine
from hf_hardattn.training.results import write_json

RESULTS = Path("results/prefill.json")
SHAPE: dict[str, Any] = dict(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=16384,
    eos_token_id=None,
)
KEEP, STEPS, WINDOW, POOL = 0.25, 16, 32, 5
Scores = Callable[[Any, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]


def smallest_norm(attention: Any, hidden: Tensor, keys: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Scores ``[B, G, N]``: the negative norm of each key."""
    return -keys.norm(dim=-1)


def attended_last(attention: Any, hidden: Tensor, keys: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Scores ``[B, G, N]``: the attention of the last queries, smoothed over neighbours; the last keys themselves are kept."""
    last = hidden[:, -WINDOW:]
    query = attention.q_proj(last).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    query, _ = apply_rotary_pos_emb(query, query, tables[0][:, -WINDOW:], tables[1][:, -WINDOW:])
    query = query.unflatten(1, (keys.shape[1], -1))
    weights = (query @ keys.unsqueeze(2).transpose(-1, -2) * attention.scaling).softmax(-1).mean((2, 3))
    weights = nn.functional.avg_pool1d(weights, POOL, 1, POOL // 2)
    weights[..., -WINDOW:] = torch.inf
    return weights


def evict(model: Any, score: Scores) -> nn.Module:
    """Prune the cache of every layer after the prefill, by ``score``."""

    def hook(attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden = kwargs["hidden_states"]
        if hidden.shape[1] == 1:
            return
        store = kwargs["past_key_values"].layers[attention.layer_idx]
        scores = score(attention, hidden, store.keys, kwargs["position_embeddings"])
        best = scores.topk(int(KEEP * scores.shape[-1]), dim=-1).indices.sort(-1).values.unsqueeze(-1)
        best = best.expand(-1, -1, -1, store.keys.shape[-1])
        store.keys, store.values = store.keys.gather(2, best), store.values.gather(2, best)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook, with_kwargs=True)
    return model


def methods() -> dict[str, nn.Module]:
    """Return the same model with each method."""
    torch.manual_seed(0)
    stock = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="sdpa").eval()

    def hard(*sites: str) -> Any:
        return hf_hardattn.apply(copy.deepcopy(stock), {"sites": list(sites), "budget": KEEP, "scorer": "linear"})

    return {
        "stock": stock,
        "decoder.tokens.2": hard("decoder.tokens.2"),
        "decoder.self.*": hard("decoder.self.*"),
        "key norm": evict(copy.deepcopy(stock), smallest_norm),
        "SnapKV": evict(copy.deepcopy(stock), attended_last),
    }


@torch.inference_mode()
def measure(model: Any, ids: Tensor) -> tuple[float, float, int]:
    """Return the seconds of the prefill, the seconds per later token, and the bytes of keys and values after the prefill."""
    start = time.thread_time()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill, cache = time.thread_time() - start, output.past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    token, start = output.logits[:, -1:].argmax(-1), time.thread_time()
    for step in range(STEPS):
        position = torch.tensor([[ids.shape[1] + step]])
        logits = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    return prefill, (time.thread_time() - start) / STEPS, size


def compare(length: int, rounds: int) -> list[dict[str, Any]]:
    """Measure all methods at one length of the prompt, in turn; return one row for each."""
    ids = torch.randint(0, SHAPE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    models, found = methods(), {}
    for turn in range(rounds + 1):  # the first turn warms up
        for name, model in models.items():
            row = measure(model, ids)
            found.setdefault(name, []).extend([row] if turn else [])
    rows = []
    for name, runs in found.items():
        prefill, step = (statistics.median(run[i] for run in runs) for i in (0, 1))
        against = statistics.median(one[0] / run[0] for one, run in zip(found["stock"], runs, strict=True))
        faster = statistics.median(one[1] / run[1] for one, run in zip(found["stock"], runs, strict=True))
        row = {
            "length": length,
            "method": name,
            "prefill_seconds": prefill,
            "token_seconds": step,
            "kv_bytes": runs[0][2],
        }
        rows.append({**row, "prefill_speedup": against, "token_speedup": faster, "rounds": rounds})
        print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for length in args.lengths for row in compare(length, args.rounds)]
    facts = {"shape": SHAPE, "kept": KEEP, "steps": STEPS, "dtype": "float32", "clock": "processor time of one thread"}
    write_json(args.output, {"machine": machine(1), **facts, "rows": rows})


if __name__ == "__main__":
    main()
