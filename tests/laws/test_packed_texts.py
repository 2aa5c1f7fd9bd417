"""Several documents in one row of a decoder: none reads another, whatever a site drops."""

from __future__ import annotations

import pytest
import torch
from decoders import harden, stock
from rounding import SOME, assert_rounded
from torch.nn.attention.flex_attention import create_block_mask

from hf_hardattn import HardAttentionError

ROWS, CUT = 12, 6
IDS = torch.randint(3, 53, (2, ROWS), generator=torch.Generator().manual_seed(4))
PLACES = torch.arange(ROWS)
POSITIONS = PLACES.remainder(CUT).expand(2, -1)
ALLOWED = (PLACES[:, None] >= PLACES) & (PLACES[:, None] // CUT == PLACES // CUT)
SITES = ("decoder.tokens.0", "decoder.inputs", "decoder.self.1")


def inputs(kind, implementation):
    """Two documents a row, told by their positions or by the caller's own mask; the first document holds the prompt."""
    labels = IDS.clone()
    labels[:, :4] = -100
    batch = {"input_ids": IDS, "labels": labels, "position_ids": POSITIONS, "use_cache": False}
    if kind == "mask":
        mask = ALLOWED.expand(2, 1, -1, -1)
        hidden = torch.finfo(torch.float32).min
        batch["attention_mask"] = (
            mask if implementation == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, hidden)
        )
    return batch


def check(model, plain, batch):
    """The second document stands behind the first label, so that nothing of it is dropped."""
    with torch.no_grad():
        found = model(**batch).logits[:, CUT:]
        expected = plain(input_ids=IDS[:, CUT:]).logits
    assert_rounded(found, expected, SOME)


# without Mistral's own masks, which replace the window of the stock model, and without the keys of its layers, which are not selected
PACKED = [
    (name, site, kind)
    for name in ("llama", "qwen3", "gemma", "mistral")
    for site in SITES
    for kind in ("positions", "mask")
    if name != "mistral" or (site != "decoder.self.1" and kind == "positions")
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "site", "kind"), PACKED)
def test_a_document_reads_no_other(name, site, kind, implementation):
    plain = stock(name, implementation=implementation)
    for estimator, training in (("simple", False), ("simple", True), ("reinforce", True)):
        model = harden(
            stock(name, implementation=implementation),
            {"sites": [site], "budget": 0.5, "scorer": "linear", "estimator": estimator, "anneal": 0},
        ).train(training)
        torch.manual_seed(4)
        check(model, plain, inputs(kind, implementation))


@pytest.mark.parametrize(("site", "kind"), [("decoder.tokens.0", "mask"), ("decoder.inputs", "positions")])
def test_a_document_reads_no_other_in_flex_attention(site, kind):
    model = harden(
        stock("llama", implementation="flex_attention"), {"sites": [site], "budget": 0.5, "scorer": "linear"}
    )
    batch = inputs("positions", "flex_attention")
    with torch.compiler.set_stance("force_eager"):
        if kind == "mask":
            batch["attention_mask"] = create_block_mask(
                lambda b, h, q, k: (q >= k) & (q // CUT == k // CUT), 2, None, ROWS, ROWS, device="cpu"
            )
        check(model, stock("llama"), batch)


@pytest.mark.parametrize("site", ["decoder.inputs", "decoder.self.0"])
def test_flash_attention_is_refused_for_packed_texts(site):
    model = harden(stock("llama"), {"sites": [site], "budget": 0.5, "scorer": "linear"})
    model.config._attn_implementation_internal = "flash_attention_2"  # its setter asks for the package
    batch = {name: value[:1] if torch.is_tensor(value) else value for name, value in inputs("positions", "").items()}
    for told in ({}, {"cu_seq_lens_q": torch.tensor([0, CUT, ROWS], dtype=torch.int32), "position_ids": None}):
        with pytest.raises(HardAttentionError, match=f"position_ids start again within the row at '{site}'"):
            model(**{**batch, **told})
