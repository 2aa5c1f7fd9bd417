"""Run a frozen vision tower once per image, and train the rest of the model on the stored features."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import HardAttentionError
from ..recording import selectors

logger = get_logger(__name__)


class FrozenFeatures:
    """The outputs of a frozen vision tower for each image, stored in a safetensors file: fp32 ``[M, N, D]``.

    The tower takes ``pixel_values`` with three axes for its own output and processes images as before. A model that was trained
    on features therefore runs on images without a change.

    Args:
        path: path of the file, which is created or extended if images are missing in it. tower: the vision tower.
        model: the model that the tower is part of.

    Raises:
        HardAttentionError: the tower learns or selects, so its outputs change; or the file belongs to another tower.
    """

    def __init__(self, path: Path, model: nn.Module, tower: nn.Module) -> None:
        self.path, self.tower = path, tower
        chosen = next((site for site in selectors(model) if site.startswith("vision.")), None)
        if chosen is not None:
            raise HardAttentionError(
                f"site '{chosen}' selects inside the vision tower, so its features depend on the selection; --vision_features "
                "stores those of every patch. Use text.cross sites, or leave --vision_features out."
            )
        learning = next((name for name, p in tower.named_parameters() if p.requires_grad), None)
        if learning is not None:
            raise HardAttentionError(
                f"{learning} of the vision tower is trained, so its features change; --vision_features stores those of a frozen "
                "tower. Add --freeze vision_model, or leave --vision_features out."
            )
        digest = hashlib.blake2b(digest_size=16)
        for value in tower.state_dict().values():
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        self.owner = digest.hexdigest()
        self.keys: dict[str, int] = {}
        self.rows: Tensor | None = None
        if path.is_file():
            self._read()
        self._stock = tower.forward
        tower.forward = self._forward

    def _read(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            notes = file.metadata() or {}
            if notes.get("tower") != self.owner:
                raise HardAttentionError(
                    f"{self.path} holds the features of another vision tower; they are valid only for the weights that produced them. Use another file."
                )
            self.keys = {key: row for row, key in enumerate(json.loads(notes["images"]))}
            self.rows = file.get_tensor("features")

    def _forward(self, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        if pixel_values is None or pixel_values.dim() != 3:
            return self._stock(pixel_values=pixel_values, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=pixel_values[:, 0])

    def add(self, accelerator: Accelerator, batches: Any) -> None:
        """Run the tower on the images that are missing in the file.

        Args:
            batches: yields ``(keys, make)``: keys of some images, and a function from indices into them to ``[B, C, H, W]``.
        """
        self.tower.eval().to(accelerator.device)
        keys, parts = list(self.keys), [] if self.rows is None else [self.rows]
        with torch.no_grad():
            for names, make in tqdm(batches, desc="vision features", disable=not accelerator.is_local_main_process):
                new = [i for i, name in enumerate(names) if name not in self.keys and name not in names[:i]]
                if new:
                    pixels = make(new).to(accelerator.device)
                    parts.append(self._stock(pixel_values=pixels).last_hidden_state.float().cpu())
                    keys += [names[i] for i in new]
                    self.keys.update({names[i]: len(self.keys) + place for place, i in enumerate(new)})
        self.rows = torch.cat(parts)
        if accelerator.is_local_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": self.rows}, self.path, {"tower": self.owner, "images": json.dumps(keys)})
        logger.info("vision features: %d images in %s", len(keys), self.path)

    def of(self, names: list[str]) -> Tensor:
        """Return the features ``[B, N, D]`` of the images with these keys."""
        if self.rows is None:
            raise HardAttentionError("there are no vision features yet; add() computes them.")
        return self.rows[[self.keys[name] for name in names]]


def image_key(cell: Any) -> str:
    """Return the key of an undecoded cell, a digest of its file."""
    content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
