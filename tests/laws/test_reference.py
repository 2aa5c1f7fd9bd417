"""The obvious loop-and-if version of each kind of site, as an oracle."""

from __future__ import annotations

import math

import pytest
import torch
from cases import PLACES, Case, hard, run
from rounding import MANY, assert_rounded

import hf_hardattn
from hf_hardattn.modeling.attention import AttentionCall


def keep(scores, valid, always, k):
    """Highest first, ties to the lower index; what is always kept comes on top and is not counted."""
    free = sorted((n for n in range(len(scores)) if valid[n] and not always[n]), key=lambda n: (-scores[n], n))
    return sorted(free[:k] + [n for n in range(len(scores)) if always[n] and valid[n]])


def naive_attention(call, source, mask, selection, selector, k):
    """Row by row, head by head, query by query: choose the keys, then the softmax over them, one number after the other."""
    view, bias = call.view, call.bias
    query, key, value = view.query(call.hidden), view.key(source), view.value(source)
    batch, heads, queries, size = query.shape
    n = key.shape[2]
    output = torch.zeros(batch, queries, heads * size)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                row, head = min(b, selection.scores.shape[0] - 1), min(h, selection.scores.shape[1] - 1)
                line = min(q, selection.scores.shape[2] - 1)
                valid = [True] * n
                if mask is not None:
                    seen = mask[min(b, mask.shape[0] - 1), 0, min(q, mask.shape[2] - 1)]
                    valid = [bool(seen[i]) if mask.dtype == torch.bool else bool(seen[i] > -1e30) for i in range(n)]
                elif selector.causal:
                    valid = [i <= q for i in range(n)]
                first, last = selector.protected
                end = max((i for i in range(n) if valid[i]), default=0)
                always = [i < first or (last and i == end) for i in range(n)]
                kept = keep(selection.scores[row, head, line].tolist(), valid, always, k)
                logits = []
                for i in kept:
                    logit = float(query[b, h, q] @ key[b, h, i]) * view.scale
                    if bias is not None and bias.dim() == 2:  # a table of distances
                        logit += float(bias[h, i - q + n - 1])
                    elif bias is not None:
                        logit += float(bias[min(b, bias.shape[0] - 1), h, q, i])
                    logits.append(logit)
                weights = [math.exp(x - max(logits)) for x in logits]
                for i, weight in zip(kept, weights, strict=True):
                    output[b, q, h * size : (h + 1) * size] += weight / sum(weights) * value[b, h, i]
    return output


@pytest.mark.parametrize("mode", ["gathered", "masked"])
@pytest.mark.parametrize(("scorer", "per_head"), [("linear", False), ("linear", True), ("query_key", False)])
@pytest.mark.parametrize(
    "place", [p for p in PLACES if p.kind in ("self", "cross")], ids=lambda p: f"{p.architecture}-{p.group}-{p.causal}"
)
def test_attention_is_the_naive_one(place, scorer, per_head, mode, monkeypatch):
    example = hard(Case(place, place.heads[0], scorer, "reinforce", 2), per_head=per_head, execution=mode)
    finish, calls = AttentionCall.finish, []

    def note(self, attended, weights):
        if "selector" in self.module._modules:
            calls.append((self, attended))
        return finish(self, attended, weights)

    monkeypatch.setattr(AttentionCall, "finish", note)
    with hf_hardattn.record(example.model) as selections:
        run(example)
    assert len(calls) == len(selections) == len(hf_hardattn.selectors(example.model))
    with torch.no_grad():
        for (call, found), selection in list(zip(calls, selections, strict=True))[:2]:
            expected = naive_attention(call, call.source, call.mask, selection, call.module.selector, 2)
            assert_rounded(found, expected, MANY)


@pytest.mark.parametrize("site", ["vision.inputs", "vision.tokens.0", "vision.tokens.1"])
def test_dropping_tokens_is_running_a_shorter_sequence(site):
    place = next(p for p in PLACES if p.architecture == "vit" and p.group in (site, site.rsplit(".", 1)[0]))
    example = hard(Case(place, "ViTForImageClassification", "mlp", budget=3), sites=[site])
    with hf_hardattn.record(example.model) as selections:
        found = run(example)["logits"]
    hf_hardattn.remove(example.model)
    vit = example.model.vit
    with torch.no_grad():
        for row, pixels in enumerate(example.batch["pixel_values"]):
            states = vit.embeddings(pixels[None])
            scores = selections[0].scores[row, 0, 0].tolist()
            kept = keep(scores, [True] * len(scores), [n == 0 for n in range(len(scores))], 3)
            if site == "vision.inputs":
                states = states[:, kept]
            for index, layer in enumerate(vit.layers):
                states = layer(states)
                if site == f"vision.tokens.{index}":
                    states = states[:, kept]
            expected = example.model.classifier(vit.layernorm(states)[0, 0])
            assert_rounded(found[row], expected)
