"""BLIP: attention without an attention function, text towers that differ by head, and a ``generate`` that calls its towers separately."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, PatchSpec, TowerSpec
from . import _generate

VISION = TowerSpec(
    "vision",
    inputs="pixel_values",
    module="BlipVisionModel",
    layers="encoder.layers",
    attention_spec=AttentionSpec(
        fused="qkv", output="projection", scale="scale", dropout="dropout", interface=False, eager_only=True
    ),
    norm="layer_norm1",
    protect_first=1,
    patches=PatchSpec(
        "BlipVisionEmbeddings",
        projection="patch_embedding",
        positions="position_embedding",
        cls="class_embedding",
        fixed_size=False,
    ),
)
WORDS = AttentionSpec(
    "query",
    "key",
    "value",
    output=None,
    head_size="attention_head_size",
    scale=None,
    dropout="dropout",
    interface=False,
    eager_only=True,
)
TEXT = TowerSpec(
    "text",
    module="BlipTextModel",
    layers="encoder.layer",
    attention="attention.self",
    attention_spec=WORDS,
    # its module reads the source's mask from the argument of its own mask
    cross="crossattention.self",
    cross_spec=replace(WORDS, source="encoder_hidden_states"),
    protect_first=1,
    reads="vision",
    source_size="encoder_hidden_size",
    source_protected=(1, False),
)
CAPTION = replace(TEXT, causal=True)
ANSWER = replace(TEXT, name="answer", causal=True, reads="text")


def find_towers(model: Any) -> dict[str, tuple[TowerSpec, nn.Module]]:
    """Return the towers; which text tower is which depends on the head."""
    classes = {cls.__name__ for cls in type(model).__mro__}
    found: dict[str, tuple[TowerSpec, nn.Module]] = {}
    vision = model if "BlipVisionModel" in classes else getattr(model, "vision_model", None)
    if vision is not None and type(vision).__module__.startswith(BLIP.family):
        found["vision"] = VISION, vision
    if "BlipForQuestionAnswering" in classes:
        found |= {"text": (TEXT, model.text_encoder), "answer": (ANSWER, model.text_decoder.bert)}
    elif "BlipForConditionalGeneration" in classes:
        found["text"] = CAPTION, model.text_decoder.bert
    elif "BlipForImageTextRetrieval" in classes:
        found["text"] = TEXT, model.text_encoder
    elif "BlipModel" in classes:
        found["text"] = replace(TEXT, cross=None, reads=None), model.text_model
    elif "BlipTextLMHeadModel" in classes:
        found["text"] = CAPTION, model.bert
    elif "BlipTextModel" in classes:
        found["text"] = TEXT, model
    return found


def labels(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """Return the next word for each row: the decoder predicts it, and the model's labels are not shifted."""
    given = inputs.get("labels")
    return None if given is None else nn.functional.pad(given[:, 1:], (0, 1), value=-100)


def target_table(model: Any) -> Tensor | None:
    """Return the embeddings of the words that a label can be."""
    decoder = getattr(model, "text_decoder", None)
    return None if decoder is None else decoder.bert.embeddings.word_embeddings.weight


BLIP = ModelSpec(
    name="blip",
    family="transformers.models.blip.",
    towers=(VISION, TEXT, ANSWER),
    recommended=("vision.tokens.25%",),
    heads=("BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering", "BlipModel"),
    find_towers=find_towers,
    functions={
        "labels": labels,
        "target_table": target_table,
        "token_loss": heads.pair_loss,
        "prepare": _generate.prepare,
        "release": _generate.release,
    },
)
