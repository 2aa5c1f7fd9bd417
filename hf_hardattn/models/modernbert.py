"""ModernBERT: most layers have a sliding window, and these layers rotate queries and keys by other angles."""

from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec
from ._bert import ALIGNED

MODERNBERT = ModelSpec(
    name="modernbert",
    family="transformers.models.modernbert.",
    towers=(
        TowerSpec(
            "text",
            module="ModernBertModel",
            layers="layers",
            attention="attn",
            attention_spec=AttentionSpec(
                fused="Wqkv", output="Wo", output_dropout="out_drop", scale=None, rotary="position_embeddings"
            ),
            norm="attn_norm",
            windows=True,
            protect_first=1,
        ),
    ),
    recommended=("text.tokens.25%",),
    heads=("ModernBertForSequenceClassification", "ModernBertModel"),
    restored_heads=tuple(f"ModernBert{head}" for head in ALIGNED),
    tiny={"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 1},
)
