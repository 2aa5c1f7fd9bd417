"""A model together with its processor: from images and texts to predictions, with all selections recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from .. import sample
from ..api import set_budget
from ..config import SiteConfig
from ..errors import HardAttentionError
from ..hub.loading import load
from ..modeling.context import is_soft_now
from ..modeling.heads import class_scores
from ..modeling.selector import Selector
from ..recording import Recording, record, selectors
from .perturbation import refuse_regression


@dataclass
class Prediction:
    """The prediction of a model for one input.

    Attributes:
        text: name of the class, or the generated text. probability: of the class; None for a text.
        recording: the selections of the forward pass or ``generate()``. tokens: ids of a generated text without its prompt, or empty.
    """

    text: str
    probability: float | None
    recording: Recording
    tokens: list[int]


@dataclass
class ModelWithProcessor:
    """A model in evaluation mode and its processor.

    Attributes:
        model: with any head. processor: tokenizer, image processor or both; None scales images to the model's size and to [-1, 1].
        name: shown in titles.
    """

    model: Any
    processor: Any
    name: str

    @classmethod
    def load(cls, path: str) -> ModelWithProcessor:
        """Load a hard checkpoint of any form, with its saved head and processor; ``hf_hardattn.load`` documents the safety checks.

        Raises:
            HardAttentionError: a soft, incomplete, damaged or hostile checkpoint.
        """
        model: Any = load(path)
        model = model.get_base_model() if hasattr(model, "peft_config") else model  # the adapter's layers stay in it
        places = (sample.folder() if path == sample.NAME else path, model.name_or_path)
        processor = next((found for place in places if (found := _processor(str(place)))), None)
        return cls(model, processor, Path(path).name if Path(path).exists() else path)

    @classmethod
    def load_any(cls, path: str, budget: Any = None) -> ModelWithProcessor:
        """Load a checkpoint, hard or stock, with the head it was saved with.

        Args:
            budget: used at every site of a hard checkpoint, instead of the saved budgets.

        Raises:
            HardAttentionError: a damaged or hostile checkpoint, a budget for a stock one, or a class that Transformers does not have.
        """
        config = _stock_config(path)
        if config is None:
            bundle = cls.load(path)
            if budget is not None:
                set_budget(bundle.model, budget)
            return bundle
        if budget is not None:
            raise HardAttentionError(f"{path} is an original model, which has no budget to set. Leave --budget out.")
        name = (config.architectures or ["AutoModel"])[0]
        if not hasattr(transformers, name):
            raise HardAttentionError(
                f"{path} is a {name}, which Transformers {transformers.__version__} does not have."
            )
        model = getattr(transformers, name).from_pretrained(path, use_safetensors=True).eval()
        return cls(model, _processor(path), Path(path).name if Path(path).exists() else path)

    @property
    def takes_images(self) -> bool:
        """True if the model takes images."""
        return hasattr(self.model.config, "vision_config") or hasattr(self.model.config, "patch_size")

    @property
    def goes_on(self) -> bool:
        """True if the model generates text after its input, so that its output repeats the input."""
        return not self.takes_images and self.model.can_generate() and not self.model.config.is_encoder_decoder

    @property
    def hard(self) -> bool:
        """True if the model has sites."""
        return bool(selectors(self.model))

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return getattr(self.model.config, "vision_config", self.model.config).patch_size

    def grid(self, pixels: Any) -> tuple[int, int]:
        """Return the number of patches down and across of images ``[..., height, width]``."""
        return pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size

    def encode(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Encode images (PIL) or texts as a batch of the model's inputs.

        Raises:
            HardAttentionError: an empty text; no tokenizer.
        """
        if not self.takes_images:
            for index, text in enumerate(inputs):
                if not isinstance(text, str) or not text.strip():
                    problem = "is empty" if isinstance(text, str) else f"is not a text ({type(text).__name__})"
                    raise HardAttentionError(
                        f"input {index + 1} of {len(inputs)} {problem}; {self.name} reads texts. Leave it out, or name another column."
                    )
            if self.processor is None:
                raise HardAttentionError(f"{self.name} holds no tokenizer; save one with the model to explain a text.")
            padding: dict[str, Any] = {"padding": True}
            if self.goes_on:  # padding on the left keeps the last token of a prompt at the end
                padding = {"padding": len(inputs) > 1, "padding_side": "left"}
            rows = self.processor(list(inputs), truncation=True, return_tensors="pt", **padding)
            return {name: rows[name] for name in ("input_ids", "attention_mask")}
        for index, image in enumerate(inputs):
            if not hasattr(image, "convert"):
                raise HardAttentionError(
                    f"input {index + 1} of {len(inputs)} is not an image ({type(image).__name__}); {self.name} reads images. Name an image "
                    "file, a folder of images, or a column of images."
                )
        config = getattr(self.model.config, "vision_config", self.model.config)
        channels = getattr(config, "num_channels", 3)  # BLIP's configuration does not have it
        images = [image.convert("L" if channels == 1 else "RGB") for image in inputs]  # no alpha, no palette
        if self.processor is not None:
            return {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        side = config.image_size
        pixels = [
            torch.frombuffer(bytearray(image.resize((side, side)).tobytes()), dtype=torch.uint8) for image in images
        ]
        stacked = torch.stack(pixels).view(len(inputs), side, side, channels)
        return {"pixel_values": stacked.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1}

    @torch.no_grad()
    def predict(self, batch: dict[str, Any], max_new_tokens: int = 40) -> Prediction:
        """Run the model on one input, as a batch of one row, and record all selections."""
        recording = Recording()
        if self.hard and any(not is_soft_now(selector) for selector in selectors(self.model).values()):
            with record(self.model) as recording:
                output = self._run(batch, max_new_tokens)
        else:
            output = self._run(batch, max_new_tokens)
        if isinstance(output, Tensor):
            written = output[0, batch["input_ids"].shape[1] if self.goes_on else 0 :]
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            return Prediction(text, None, recording, written[0 if self.goes_on else 1 :].tolist())
        if output.get("logits") is None or output.logits.dim() != 2:
            raise HardAttentionError(
                f"{type(self.model).__name__} neither classifies nor generates text, so there is no answer to explain. Save the model with such a head; "
                "record() shows what any model keeps."
            )
        refuse_regression(self.model)
        probabilities = class_scores(self.model.config, output.logits[0])
        best = int(probabilities.argmax())
        return Prediction(str(self.model.config.id2label[best]), float(probabilities[best]), recording, [])

    def _run(self, batch: dict[str, Any], max_new_tokens: int) -> Any:
        if self.model.can_generate():
            return self.model.generate(
                **batch, max_new_tokens=max_new_tokens, max_length=None, num_beams=1, do_sample=False
            )
        return self.model(**batch)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer alone."""
        return getattr(self.processor, "tokenizer", self.processor)

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return tokens as a person reads them."""
        return [self.tokenizer.decode([token]).strip() or "␣" for token in ids]

    @contextmanager
    def at_budget(self, budget: float | int | None) -> Iterator[ModelWithProcessor]:
        """Use ``budget`` at every site inside the block; None keeps the model's own budgets."""
        found = [] if budget is None else [m for m in self.model.modules() if isinstance(m, Selector)]
        before = [selector.config for selector in found]
        for selector in found:
            config = SiteConfig(**{**vars(selector.config), "budget": budget})
            config.validate(selector.site)
            selector.config = config
        try:
            yield self
        finally:
            for selector, config in zip(found, before, strict=True):
                selector.config = config


def _stock_config(path: str) -> Any:
    """Return the configuration of a checkpoint without hard attention, or None for a hard checkpoint of any form."""
    folder = Path(path)
    if path == sample.NAME or (folder.is_dir() and not (folder / "config.json").is_file()):
        return None
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return None  # selectors only, or an adapter; load() raises for anything else
    return None if getattr(config, "hard_attention", None) is not None else config


def _processor(place: str) -> Any:
    """Load the processor from a folder or repository; None if it has none (selectors saved alone leave it to their base)."""
    folder = Path(place)
    if folder.is_dir() and not [*folder.glob("*token*.json"), *folder.glob("*processor*.json")]:
        return None
    error: Exception | None = None
    # A model of one tower, such as SigLIP's classifier, is saved with only a part of its family's processor.
    for auto in (AutoProcessor, AutoImageProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as failure:
            error = error or failure
    if folder.is_dir() and error is not None:
        raise error
    return None
