"""BERT."""

from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

BERT = ModelSpec(
    name="bert",
    family="transformers.models.bert.",
    towers=(
        TowerSpec(
            "text",
            module="BertModel",
            layers="encoder.layer",
            attention="attention.self",
            attention_spec=AttentionSpec(
                "query", "key", "value", output=None, head_size="attention_head_size", dropout="dropout"
            ),
            protect_first=1,
        ),
    ),
    recommended=("text.tokens.25%",),
    heads=("BertForSequenceClassification", "BertModel"),
)
