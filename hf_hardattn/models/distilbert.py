"""DistilBERT."""

from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec
from ._bert import ALIGNED

DISTILBERT = ModelSpec(
    name="distilbert",
    family="transformers.models.distilbert.",
    towers=(
        TowerSpec(
            "text",
            module="DistilBertModel",
            layers="transformer.layer",
            attention="attention",
            attention_spec=AttentionSpec(
                "q_lin", "k_lin", "v_lin", output="out_lin", head_size="attention_head_size", dropout="dropout"
            ),
            protect_first=1,
        ),
    ),
    recommended=("text.tokens.25%",),
    heads=("DistilBertForSequenceClassification", "DistilBertModel"),
    restored_heads=tuple(f"DistilBert{head}" for head in ALIGNED),
    tiny={"hidden_dim": 37, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
)
