"""The recurrent attention model, in Transformers' form: it sees only a few glimpses of an image, and chooses where each of them is.

Hard attention is part of the model itself, so nothing is applied to it or removed from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

POLICIES = ("gaussian", "random")
STARTS = ("centre", "learned")
ESTIMATORS = ("reinforce", "rloo")
REWARDS = ("right", "loss")


class RamConfig(PreTrainedConfig):
    """Sizes of a ``RamForImageClassification``, and how it is trained.

    Args:
        image_size: pixels per side. num_channels: channels of the image.
        glimpses: T >= 1. patch: pixels per side of a window as it is seen; even. scales: number of windows per glimpse, which cover
            ``patch``, 2 ``patch``, 4 ``patch``, ... pixels of the image per side.
        step: pixels from one possible centre of a glimpse to the next.
        background: value of the pixels outside the image.
        hidden_size: size of the state and of a glimpse. part_size: size of the features of content and location, before they are
            combined.
        policy: ``"gaussian"`` chooses centres near a point that the state predicts, by the normal density; ``"random"`` always draws any
            centre (the control).
        sigma: > 0, standard deviation of ``"gaussian"``, in units of half a side of the image.
        start: place of the first glimpse: ``"centre"``, or ``"learned"``, chosen by the policy from the first state.
        estimator: ``"reinforce"`` with a learned baseline, or ``"rloo"`` with ``samples`` >= 2 draws per image, which serve as each
            other's baseline.
        reward: ``"right"`` is 1 if the class is right, else 0; ``"loss"`` is minus the cross-entropy.
        policy_weight: >= 0, weight of the score-function term in the loss. The policy's own layer learns from this term alone, and Adam
            ignores its size. The weight determines how much the state learns from it; at first, the state learns fastest from the
            classes.
    """

    model_type = "hardattn_ram"

    def __init__(
        self,
        image_size: int = 60,
        num_channels: int = 1,
        glimpses: int = 8,
        patch: int = 12,
        scales: int = 3,
        step: int = 2,
        background: float = -1.0,
        hidden_size: int = 128,
        part_size: int = 128,
        policy: str = "gaussian",
        sigma: float = 0.15,
        start: str = "centre",
        estimator: str = "reinforce",
        samples: int = 4,
        reward: str = "right",
        policy_weight: float = 0.02,
        **kwargs: Any,
    ):
        if min(glimpses, scales, step) < 1 or patch < 2 or patch % 2 or sigma <= 0 or samples < 2:
            raise ValueError(
                f"glimpses={glimpses}, scales={scales}, step={step}, patch={patch}, sigma={sigma}, samples={samples} is out of range. Use "
                "glimpses, scales and step >= 1, an even patch, sigma > 0 and samples >= 2."
            )
        for name, value, known in (
            ("policy", policy, POLICIES),
            ("start", start, STARTS),
            ("estimator", estimator, ESTIMATORS),
            ("reward", reward, REWARDS),
        ):
            if value not in known:
                raise ValueError(f"{name}='{value}' is unknown. Use one of: {', '.join(known)}.")
        self.image_size, self.num_channels = image_size, num_channels
        self.glimpses, self.patch, self.scales, self.step = glimpses, patch, scales, step
        self.background, self.hidden_size, self.part_size = background, hidden_size, part_size
        self.policy, self.sigma, self.start = policy, sigma, start
        self.estimator, self.samples, self.reward, self.policy_weight = estimator, samples, reward, policy_weight
        super().__init__(**kwargs)


@dataclass
class RamOutput(ModelOutput):
    """The output of the model; with ``"rloo"`` in training, it belongs to the first draw of each image.

    Attributes:
        loss: scalar, if labels were given. logits: ``[B, C]``.
        locations: int64 ``[B, T, 2]``, the pixel (row, column) whose upper left corner is the centre of each window.
        log_prob: ``[B]``, of all choices together; None if none was drawn.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    locations: Tensor | None = None
    log_prob: Tensor | None = None


class Retina(nn.Module):
    """Square windows of ``patch``, 2 ``patch``, 4 ``patch``, ... pixels around a location, each averaged to ``patch`` x ``patch``."""

    def __init__(self, config: RamConfig):
        super().__init__()
        self.patch, self.scales, self.step = config.patch, config.scales, config.step
        self.background = config.background

    def pyramid(self, pixels: Tensor) -> list[Tensor]:
        """Map images ``[B, C, S, S]`` to the means of the squares of 1, 2, 4, ... pixels per side, ``[B, C, M, M]`` each.

        The background is subtracted: most of an image is background, and zeros contribute nothing to the first linear layer. The squares
        begin at every pixel where a window may need one, so that a window is a gather wherever it is.
        """
        level, levels, margin, apart = pixels - self.background, [], 0, 1
        for scale in range(self.scales):
            reach = self.patch * 2**scale // 2  # extent of a window beyond its centre
            level = nn.functional.pad(level, ((reach - margin) // apart,) * 4)
            if scale:
                half = 2 ** (scale - 1) // apart  # squares from one half of a larger square to the other
                thin = math.gcd(self.step, 2**scale) // apart
                level = (level[..., :-half, :] + level[..., half:, :])[..., ::thin, :]
                level = (level[..., :-half] + level[..., half:])[..., ::thin] * 0.25
                apart *= thin
            margin = reach
            levels.append(level)
        return levels

    def forward(self, levels: list[Tensor], locations: Tensor) -> Tensor:
        """Map a pyramid and int64 locations ``[B, 2]``, multiples of ``step`` in 0 ... S, to ``[B, scales * C * patch * patch]``."""
        seen = []
        for scale, level in enumerate(levels):
            side, width = 2**scale, level.shape[-1]
            apart = math.gcd(self.step, side)
            corner = locations // apart
            inside = torch.arange(self.patch, device=locations.device) * (side // apart)
            inside = (inside[:, None] * width + inside).view(-1)
            index = (corner[:, :1] * width + corner[:, 1:]) + inside
            seen.append(level.flatten(2).gather(2, index[:, None].expand(-1, level.shape[1], -1)).flatten(1))
        return torch.cat(seen, 1)


class RamForImageClassification(PreTrainedModel):
    """Classifies an image from T glimpses.

    The model makes a discrete choice among the centres of a grid. The choice reads only the state, so that the model never sees anything
    outside its glimpses. The published policy is a normal distribution; ``"gaussian"`` is the same on the points of the grid.

    Source: Mnih et al. 2014, "Recurrent Models of Visual Attention", arXiv:1406.6247; with a GRU as the core.
    """

    config_class = RamConfig
    base_model_prefix = "ram"
    main_input_name = "pixel_values"

    def __init__(self, config: RamConfig):
        super().__init__(config)
        size, part = config.hidden_size, config.part_size
        self.retina = Retina(config)
        self.what = nn.Linear(config.scales * config.num_channels * config.patch**2, part)
        self.where = nn.Linear(2, part)
        self.glimpse = nn.Linear(2 * part, size)  # of both concatenated: the sum of the two published maps
        self.core = nn.GRUCell(size, size)
        self.initial = nn.Parameter(torch.zeros(size))
        self.side = config.image_size // config.step + 1
        if config.policy != "random":
            self.locate = nn.Linear(size, 2)
        self.baseline = nn.Linear(size, 1)
        self.classifier = nn.Linear(size, config.num_labels or 2)  # two is the default of Transformers
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=1.0)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GRUCell):
            nn.init.xavier_uniform_(module.weight_ih)
            nn.init.orthogonal_(module.weight_hh)
            nn.init.zeros_(module.bias_ih)
            nn.init.zeros_(module.bias_hh)
        elif isinstance(module, RamForImageClassification):
            nn.init.zeros_(module.initial)
            if module.config.policy != "random":
                module.locate.weight.mul_(0.1)  # starts near the centre

    def places(self) -> Tensor:
        """Return the pixels that the row or column of a centre can be, int64 ``[side]``."""
        return torch.arange(self.side, device=self.device) * self.config.step

    def scaled(self, locations: Tensor) -> Tensor:
        """Scale pixels to the interval from -1 to 1."""
        return (locations * (2 / self.config.image_size) - 1).to(self.dtype)

    def law(self, state: Tensor) -> Tensor:
        """Return the log-probability of each row and each column, ``[B, 2, side]``; that of a centre is their sum."""
        apart = (self.locate(state).tanh()[..., None] - self.scaled(self.places())) / self.config.sigma
        return (-0.5 * apart.square()).log_softmax(-1)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        sample: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Take the glimpses and classify the image.

        Args:
            pixel_values: ``[B, C, S, S]``. labels: int64 ``[B]``.
            sample: draw the choices instead of taking the most likely ones; None draws in training only.

        Returns:
            ``RamOutput``. In training, the loss includes the terms of the policy and the baseline; otherwise it is the cross-entropy.
        """
        config = self.config
        if pixel_values.shape[1:] != (config.num_channels, config.image_size, config.image_size):
            raise ValueError(
                f"pixel_values has the shape {list(pixel_values.shape)}; the config needs [B, {config.num_channels}, {config.image_size}, "
                f"{config.image_size}]."
            )
        sample = self.training if sample is None else sample
        count = len(pixel_values)
        learns = self.training and labels is not None
        samples = config.samples if learns and config.estimator == "rloo" else 1
        levels = self.retina.pyramid(pixel_values.to(self.dtype).repeat(samples, 1, 1, 1))
        state = self.initial.expand(count * samples, -1)
        middle = self.places()[(self.side - 1) // 2].expand(len(state), 2)
        locations, log_probs, values = [], [], []
        for turn in range(config.glimpses):
            if config.policy == "random":
                location = torch.randint(self.side, (len(state), 2), device=self.device) * config.step
            elif turn == 0 and config.start == "centre":
                location = middle
            else:
                law = self.law(state)
                index = _draw(law) if sample else law.argmax(-1)
                location = index * config.step
                log_probs.append(law.gather(2, index[..., None]).sum((1, 2)))
                values.append(self.baseline(state.detach())[:, 0])
            locations.append(location)
            what, where = self.what(self.retina(levels, location)), self.where(self.scaled(location))
            state = self.core(self.glimpse(torch.cat((what, where), 1).relu()).relu(), state)
        logits = self.classifier(state)
        log_prob = torch.stack(log_probs, 1) if log_probs else None  # [B, choices]
        loss = None
        if labels is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = nn.functional.cross_entropy(wide, labels.repeat(samples), reduction="none")
            loss = losses.mean()
            if learns and log_prob is not None:
                right = (logits.argmax(-1) == labels.repeat(samples)).to(losses)
                reward = right if config.reward == "right" else -losses.detach()
                loss = loss + self._policy_loss(reward, log_prob, torch.stack(values, 1), samples)
        output = RamOutput(
            loss=loss,
            logits=logits[:count],
            locations=torch.stack(locations, 1)[:count],
            log_prob=log_prob.sum(1)[:count] if log_prob is not None and sample else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _policy_loss(self, reward: Tensor, log_prob: Tensor, values: Tensor, samples: int) -> Tensor:
        """Return minus the surrogate of the expected reward, plus the baseline's error; shapes: ``[B]``, ``[B, choices]`` twice."""
        if samples > 1:
            drawn = reward.view(samples, -1)
            advantage = ((drawn - drawn.mean(0)) * samples / (samples - 1)).view(-1, 1)
            baseline_loss = (
                0.0 * values.sum()
            )  # a gradient of zero instead of none, since distributed training waits for every parameter
        else:
            advantage = reward[:, None] - values.detach()
            baseline_loss = (values - reward[:, None]).square().mean()
        return baseline_loss - self.config.policy_weight * (advantage * log_prob).sum(1).mean()


def _draw(scores: Tensor) -> Tensor:
    """Draw an index for each row of logits ``[..., N]`` by the Gumbel-max trick, int64 ``[...]``."""
    return (scores - torch.empty_like(scores).exponential_().log()).argmax(-1)


AutoConfig.register("hardattn_ram", RamConfig)
AutoModelForImageClassification.register(RamConfig, RamForImageClassification)
