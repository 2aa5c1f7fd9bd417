"""T5: `encoder.inputs`, `encoder.self.L`, `encoder.tokens.L`, `decoder.self.L`, `decoder.cross.L`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)
from transformers.models.t5.modeling_t5 import T5Attention, T5Block

from . import Base, Example, Tower
from ._t5_layers import HardT5Attention, HardT5Block, HardT5Layers


class T5(Base):
    family = "transformers.models.t5."
    all_towers = ("encoder", "decoder")
    recommended = ("encoder.tokens.*",)

    @classmethod
    def towers(cls, model: nn.Module) -> dict[str, Tower]:
        if isinstance(model, (T5ForSequenceClassification, T5ForTokenClassification)):
            model = model.transformer
        if not isinstance(model, (T5Model, T5ForConditionalGeneration, T5ForQuestionAnswering, T5EncoderModel)):
            return {}
        config = model.config
        common = dict(
            hard_layers=HardT5Layers,
            classes={T5Attention: HardT5Attention, T5Block: HardT5Block},
            hidden_size=config.d_model,
            heads=config.num_heads,
        )
        towers = {
            "encoder": Tower(
                root=model.encoder,
                layers=model.encoder.block,
                kinds=("inputs", "self", "tokens"),
                attention=lambda block, kind: block.layer[0].SelfAttention,
                always="last",
                restore=True,
                **common,
            )
        }
        if hasattr(model, "decoder"):
            towers["decoder"] = Tower(
                root=model.decoder,
                layers=model.decoder.block,
                kinds=("self", "cross"),
                attention=lambda block, kind: (
                    block.layer[0].SelfAttention if kind == "self" else block.layer[1].EncDecAttention
                ),
                always=None,
                causal=True,
                source="encoder",
                source_size=config.d_model,
                source_always="last",
                **common,
            )
        return towers

    @classmethod
    def target_table(cls, model: nn.Module) -> Tensor | None:
        if isinstance(model, T5ForSequenceClassification):
            return model.classification_head.out_proj.weight
        return model.shared.weight if isinstance(model, T5ForConditionalGeneration) else None

    @classmethod
    def token_loss(cls, model: nn.Module, inputs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor] | None:
        if inputs.get("start_positions") is None or inputs.get("end_positions") is None:
            return super().token_loss(model, inputs, output)
        ends = [(output.start_logits, inputs["start_positions"]), (output.end_logits, inputs["end_positions"])]
        losses = [
            nn.functional.cross_entropy(x.float(), y.view(-1).clamp(0, x.shape[1] - 1), reduction="none")
            for x, y in ends
        ]
        loss = (losses[0] + losses[1]).unsqueeze(-1) / 2
        return loss, torch.ones_like(loss, dtype=torch.bool)

    @classmethod
    def other_reader(cls, model: nn.Module, batch: dict[str, Any]) -> str | None:
        copies = isinstance(model, (T5ForQuestionAnswering, T5ForSequenceClassification))
        given = batch.get("decoder_input_ids") is not None or batch.get("decoder_inputs_embeds") is not None
        return "the decoder, which this head feeds with the shifted input_ids" if copies and not given else None

    @classmethod
    def replace_inputs(
        cls, model: nn.Module, batch: dict[str, Any], dropped: dict[str, Tensor], how: str, seed: int
    ) -> dict[str, Any]:
        return {**batch, "input_ids": replace_tokens(batch["input_ids"], dropped["encoder"], model.config, how, seed)}

    @classmethod
    def heads(cls) -> dict[str, Callable[..., Example]]:
        return {head.__name__: lambda head=head, **config: _example(head, **config) for head in _HEADS}


def replace_tokens(ids: Tensor, dropped: Tensor, config: Any, how: str, seed: int) -> Tensor:
    """Replace the dropped tokens ``[B, N]`` by random ones, the unknown token, or their neighbour; never by ``</s>`` or padding."""
    lowest = max(config.pad_token_id or 0, config.eos_token_id or 0) + 1
    generator = torch.Generator().manual_seed(seed)
    if how == "noise":
        other = torch.randint(lowest, config.vocab_size, ids.shape, generator=generator).to(ids)
    elif how == "zero":
        other = torch.full_like(ids, lowest)
    else:
        other = ids.roll(1, 1).clamp(min=lowest)
    return torch.where(dropped, other, ids)


_HEADS = (
    T5ForConditionalGeneration,
    T5EncoderModel,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)


def _example(head: type, **changes: Any) -> Example:
    sizes = dict(
        vocab_size=53,
        d_model=26,
        d_kv=6,
        d_ff=39,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=10,
        relative_attention_max_distance=17,
        dropout_rate=0.0,
        classifier_dropout=0.0,
        num_labels=2 if head is T5ForQuestionAnswering else 5,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    config = T5Config(**{**sizes, **changes})
    ids = torch.randint(2, 53, (3, 11))
    ids[:, -1] = 1
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 6], ids[1, 7:] = 1, 0
    mask[2, 9:] = 0
    ids[2, 8], ids[2, 9:] = 1, 0
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if head in (T5Model, T5ForConditionalGeneration):
        batch["decoder_input_ids"] = torch.randint(2, 53, (3, 7))
    if head is T5ForConditionalGeneration:
        batch["labels"] = torch.randint(2, 53, (3, 7))
        batch["labels"][0, 5:] = -100
    if head is T5ForSequenceClassification:
        batch["labels"] = torch.tensor([3, 0, 4])
    if head is T5ForTokenClassification:
        batch["labels"] = torch.randint(0, 5, (3, 11))
    if head is T5ForQuestionAnswering:
        batch |= {"start_positions": torch.tensor([2, 1, 4]), "end_positions": torch.tensor([3, 5, 6])}
    return Example(head(config), batch)
