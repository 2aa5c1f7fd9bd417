"""The attention of the CLS token, without parameters."""

from __future__ import annotations

from torch import Tensor

from . import Projections, Scorer


class ClsAttention(Scorer):
    """Score each position by the attention CLS pays to it in this layer: ``s_n = log mean_h softmax_n(q_cls . k_n)``.

    It needs no training. Cost: the key projection of the layer, a second time. Source: EViT (Liang et al., 2022), section 3.2.
    """

    needs_positions = False
    needs_cls = True
    needs_projections = True

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        if projections is None:
            raise TypeError("ClsAttention.keys needs the host attention's projections.")
        logits = projections.query(states[:, :1]).float() @ projections.key(states).float().transpose(-1, -2)
        if projections.valid is not None:
            # CLS pays no attention to positions that are not valid, in masked execution as in gathered.
            logits = logits.masked_fill(~projections.valid[:, None, None], float("-inf"))
        attention = logits.softmax(-1).transpose(-1, -2)
        attention = attention if self.heads > 1 else attention.mean(1, keepdim=True)
        return attention.clamp(min=1e-12).log()
