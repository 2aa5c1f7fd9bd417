"""The common row of BERT and its successors."""

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

# heads that predict for every row
ALIGNED = (
    "ForCausalLM",
    "ForMaskedLM",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForTokenClassification",
    "LMHeadModel",
)


def bert_like(name: str, classes: str) -> ModelSpec:
    """Return the row of a family whose classes start with ``classes`` and are otherwise BERT's."""
    attention = AttentionSpec("query", "key", "value", output=None, head_size="attention_head_size", dropout="dropout")
    tower = TowerSpec(
        "text",
        module=f"{classes}Model",
        layers="encoder.layer",
        attention="attention.self",
        attention_spec=attention,
        protect_first=1,
    )
    return ModelSpec(
        name=name,
        family=f"transformers.models.{name}.",
        towers=(tower,),
        recommended=("text.tokens.25%",),
        heads=(f"{classes}ForSequenceClassification", f"{classes}Model"),
        restored_heads=tuple(f"{classes}{head}" for head in ALIGNED),
        functions={"labels": heads.next_labels},
    )
