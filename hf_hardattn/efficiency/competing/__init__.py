"""Other methods that make a trained ViT cheaper, for comparison only: implemented from the papers' equations, on the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput


class CompetingMethod(nn.Module):
    """A soft ViT that runs with another method; subclasses implement ``layer``."""

    def __init__(self, model: ViTForImageClassification):
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
        vit = self.model.vit
        hidden = self.begin(vit.embeddings(pixel_values))
        for index, layer in enumerate(vit.layers):
            hidden = self.layer(index, layer, hidden)
        return ImageClassifierOutput(logits=self.model.classifier(vit.layernorm(hidden)[:, 0]))

    def begin(self, hidden: Tensor) -> Tensor:
        """Prepare for a new batch of images with hidden states ``[B, N, D]``."""
        return hidden

    def layer(self, index: int, layer: Any, hidden: Tensor) -> Tensor:
        """Run one layer, ``[B, N, D]`` to ``[B, M, D]`` with CLS first."""
        raise NotImplementedError

    def nominal_share(self, n: int) -> float:
        """Share of the attention's FLOPs that the method claims to need if it computes more than that; 1 otherwise."""
        return 1.0


def project(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer, each ``[B, H, N, d]``."""
    attention, normed = layer.attention, layer.layernorm_before(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    return query, key, value


def join(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    """Project the output ``[B, H, N, d]`` of an attention and add it to the residual stream."""
    return hidden + layer.attention.o_proj(mixed.transpose(1, 2).flatten(2))


def feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """Run the second half of the layer, its MLP."""
    return hidden + layer.mlp(layer.layernorm_after(hidden))
