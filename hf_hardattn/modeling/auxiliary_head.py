"""The auxiliary head of ``cropr``, which predicts the class from positions weighted by their scores."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

_NAME = r"selector\.head\."  # in the names of a head's tensors


class AuxiliaryHead(nn.Module):
    """Predict the class from positions, each weighted by its probability of being kept according to the scores:
    ``logits = Wc norm(sum_n a_n V(x_n)) + bc`` with ``V(x) = W2 gelu(W1 norm(x) + b1)``.

    It is used only in training and is not part of a saved model.

    Args:
        hidden_size: D of the candidates. classes: C, number of classes.

    Source: Bergner, Lippert & Mahendran 2024, "Token Cropr", arXiv:2412.00965, section 3.
    """

    def __init__(self, hidden_size: int, classes: int, size: int = 128) -> None:
        super().__init__()
        self.hidden_size, self.size = hidden_size, size
        self.weight_in = nn.Parameter(torch.empty(size, hidden_size))
        self.bias_in = nn.Parameter(torch.empty(size))
        self.weight_out = nn.Parameter(torch.empty(size, size))
        self.class_weight = nn.Parameter(torch.empty(classes, size))
        self.class_bias = nn.Parameter(torch.empty(classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_in, std=self.hidden_size**-0.5)
        nn.init.zeros_(self.bias_in)
        nn.init.normal_(self.weight_out, std=self.size**-0.5)
        nn.init.normal_(self.class_weight, std=0.02)
        nn.init.zeros_(self.class_bias)

    def values(self, states: Tensor) -> Tensor:
        """Map states ``[B, N, D]`` to values, fp32 ``[B, N, d]``; the states get no gradient."""
        states = functional.rms_norm(states.detach().float(), (self.hidden_size,))
        hidden = functional.gelu(functional.linear(states, self.weight_in.float(), self.bias_in.float()))
        return functional.linear(hidden, self.weight_out.float())

    def forward(self, values: Tensor, weights: Tensor, classes: Tensor) -> Tensor:
        """Return the cross-entropy of the class, fp32 ``[B, H, Q]``; 0 where the class is -100.

        Args:
            values: ``[B, N, d]``. weights: fp32 ``[B, H, Q, N]``, summing to 1 over N. classes: int64 ``[B]``.
        """
        read = functional.rms_norm(torch.einsum("bhqn,bnd->bhqd", weights, values), (self.size,))
        logits = functional.linear(read, self.class_weight.float(), self.class_bias.float())
        wanted = classes[:, None, None].expand(logits.shape[:-1])
        losses = functional.cross_entropy(logits.flatten(0, -2), wanted.flatten(), ignore_index=-100, reduction="none")
        return losses.view(wanted.shape)


def leave_heads_out(model: nn.Module) -> None:
    """Exclude the heads of ``model`` from ``save_pretrained``, and let ``from_pretrained`` create new ones."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        own = {
            f"{name}.{parameter}"
            for name, module in part.named_modules()
            if isinstance(module, AuxiliaryHead)
            for parameter, _ in module.named_parameters()
        }
        others = {name for name in part._keys_to_ignore_on_save or () if not re.search(_NAME, name)}
        if own or len(others) < len(part._keys_to_ignore_on_save or ()):
            part._keys_to_ignore_on_save = others | own
            missing = set(part._keys_to_ignore_on_load_missing or ()) - {_NAME}
            part._keys_to_ignore_on_load_missing = missing | {_NAME} if own else missing
