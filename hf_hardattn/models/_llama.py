"""The common row of Llama and its successors, whose sites choose rows and keys of the prompt."""

from typing import Any

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

READING = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def decoder(module: str, window: str | None = None, **attention: Any) -> TowerSpec:
    """Return the tower of a decoder.

    Args:
        module: name of its class. window: see ``TowerSpec``. attention: names inside its attention that differ from Llama's.
    """
    return TowerSpec(
        "decoder",
        module=module,
        layers="layers",
        attention_spec=AttentionSpec(rotary="position_embeddings", **attention),
        norm="input_layernorm",
        protect_last=True,
        prompt=True,
        restores=True,
        window=window,
    )


def llama_like(name: str, classes: str, **names: Any) -> ModelSpec:
    """Return the row of a family whose classes start with ``classes`` and are otherwise Llama's; ``names`` go to ``decoder``."""
    return ModelSpec(
        name=name,
        family=f"transformers.models.{name}.",
        towers=(decoder(f"{classes}Model", **names),),
        recommended=("decoder.tokens.25%",),
        heads=(f"{classes}ForCausalLM", f"{classes}ForSequenceClassification", f"{classes}Model"),
        reading_heads=tuple(f"{classes}For{head}" for head in READING),
        functions=heads.NEXT_TOKEN,
    )
