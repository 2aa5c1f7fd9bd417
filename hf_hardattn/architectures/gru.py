"""The recurrent backbone: `decoder.cross.0`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.gru import GruAttention, GruConfig, GruForConditionalGeneration, GruReader
from ..layers import HardLayers, TowerState
from ..sites import AttentionSite, Cache
from ..stream import Made, Stream, pack, unpack
from . import Base, Example, Tower


class HardGruAttention(AttentionSite, GruAttention):
    """``GruAttention`` over the rows its selector keeps."""

    site_dropout = 0.0

    @property
    def site_scale(self) -> float:
        return self.scaling

    def project_query(self, states: Tensor) -> Tensor:
        return self.split(self.q_proj(states))

    def project_key(self, states: Tensor) -> Tensor:
        return self.split(self.k_proj(states))

    def project_value(self, states: Tensor) -> Tensor:
        return self.split(self.v_proj(states))

    def forward(self, hidden, source, mask=None, past_key_values=None, made=None, **kwargs):
        if self.active_selector() is None:
            return super().forward(hidden, source, mask, past_key_values, **kwargs)
        cache = None
        if past_key_values is not None:
            filled = bool(past_key_values.is_updated.get(self.layer_idx))
            cache = Cache(past_key_values.cross_attention_cache, self.layer_idx, filled=filled)
        output, weights = self.site_attend(
            hidden,
            source,
            mask=mask,
            made=made,
            cache=cache,
            cross=True,
            weights=bool(kwargs.get("output_attentions")),
        )
        if past_key_values is not None:
            past_key_values.is_updated[self.layer_idx] = True
        return self.o_proj(output), weights


class HardGruReader(GruReader):
    """``GruReader`` that returns what its attention selected."""

    def forward(self, hidden, source, mask=None, **kwargs):
        made = Made()
        output, weights = super().forward(hidden, source, mask, made=made, **kwargs)
        return output, weights, *pack(Stream(), made)


class HardGruLayers(HardLayers):
    def run(
        self,
        layer: nn.Module,
        state: TowerState,
        index: int,
        hidden: Tensor,
        source: Tensor,
        mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        hidden, weights, *leaves = layer(hidden, source, mask, past_key_values=past_key_values, **kwargs)
        self.take(state, *unpack(tuple(leaves)))
        return hidden, weights


class Gru(Base):
    family = "hf_hardattn.backbones.gru"
    all_towers = ("decoder",)
    recommended = ("decoder.cross.*",)

    @classmethod
    def towers(cls, model: nn.Module) -> dict[str, Tower]:
        if not isinstance(model, GruForConditionalGeneration):
            return {}
        decoder = Tower(
            root=model.decoder,
            layers=model.decoder.layers,
            hard_layers=HardGruLayers,
            classes={GruAttention: HardGruAttention, GruReader: HardGruReader},
            kinds=("cross",),
            attention=lambda layer, kind: layer.attention,
            hidden_size=model.config.d_model,
            heads=model.config.num_attention_heads,
            always=None,
            source_size=model.config.d_model,
        )
        return {"decoder": decoder}

    @classmethod
    def target_table(cls, model: nn.Module) -> Tensor | None:
        return model.decoder.embed_tokens.weight

    @classmethod
    def heads(cls) -> dict[str, Callable[..., Example]]:
        return {"GruForConditionalGeneration": _example}


def _example(**changes: Any) -> Example:
    sizes = dict(vocab_size=53, d_model=22, num_layers=2, num_decoder_layers=2, num_attention_heads=2, dropout=0.0)
    config = GruConfig(**{**sizes, **changes})
    ids = torch.randint(2, 53, (3, 11))
    mask = torch.ones_like(ids)
    for row, length in ((0, 11), (1, 7), (2, 9)):
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 1, 0, 0
    labels = torch.randint(2, 53, (3, 7))
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(2, 53, (3, 7)),
        "labels": labels,
    }
    labels[0, 5:] = -100
    return Example(GruForConditionalGeneration(config), batch)
