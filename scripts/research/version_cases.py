"""The cases on which two versions of the library are compared, and the code that runs a case.

This file uses only public names of the library, so that it runs with every version:

    PYTHONPATH=<the version> python scripts/research/version_cases.py --output FOLDER [--only vit,t5,blip,gru]

Models are tiny, with weights drawn by parameter name. Selectors are matched by site, because the names of their state-dict keys depend on
the version. The cases themselves are data in version_cases.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_hardattn

DATA = Path(__file__).with_suffix(".yaml")
RESULTS = ("loss", "logits", "itm_score", "logits_per_image")
MERGED = ("hard", "inputs")  # fields of a case that are dicts, to which changes are added
# so large that the selection affects the result, and that scores differ clearly
WEIGHT_STD: dict[str, float] = {"gru": 0.5}
OTHER_WEIGHT_STD, SELECTOR_STD = 0.2, 0.5
NEW_TOKENS = 6
GRADIENT_ENTRIES = 3  # entries of each gradient that a fixture keeps


@dataclass(frozen=True)
class VersionCase:
    """One model with one configuration and one call; version_cases.yaml describes the fields."""

    name: str
    tolerance: float
    model: str = ""
    run: str = "evaluate"
    hard: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    checkpointing: dict[str, Any] | None = None
    padded: bool = True
    execution: str | None = None
    step: tuple[int, int] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.name.split("/")[0]


# --------------------------------------------------------------------------------------------------------------------- cases


@functools.cache
def read_data() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return data


def families() -> list[str]:
    """Return the names of the families that have cases."""
    return list(read_data()["families"])


def load_cases(only: list[str] | None = None) -> list[VersionCase]:
    """Return every case of the given families (None: all), in the order of the file."""
    return [case for family in only or families() for case in _cases_of(family)]


def fixture_cases() -> list[VersionCase]:
    """Return the cases that have fixtures."""
    by_name = {case.name: case for case in load_cases()}
    return [by_name[name] for name in read_data()["fixtures"]]


def _cases_of(family: str) -> Iterator[VersionCase]:
    data = read_data()
    common = data["families"][family]
    axes = {**data["axes"], **common.get("axes", {})}
    shared = {name: value for name, value in common.items() if name not in ("axes", "blocks")}
    for block, content in common["blocks"].items():
        own = {name: value for name, value in content.items() if name != "times"}
        for labels in itertools.product(*(axes[axis] for axis in content["times"])):
            changes = [axes[axis][label] for axis, label in zip(content["times"], labels, strict=True)]
            yield VersionCase(name="/".join((family, block, *labels)), **_merged(shared, own, *changes))


def _merged(*changes: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for change in changes:
        for name, value in change.items():
            fields[name] = {**fields.get(name, {}), **value} if name in MERGED else value
    return fields


# -------------------------------------------------------------------------------------------------------------------- models


def uniform(key: str, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
    """Uniform numbers of mean 0 and standard deviation ``std`` that depend only on ``key`` and ``shape``.

    They are uniform because normal numbers are drawn with logarithms and cosines, whose last bits differ between processors.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return (torch.rand(shape, generator=generator) - 0.5) * (std * 12**0.5)


def integers(key: str, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    """Integers in ``[low, high)`` that depend only on ``key`` and ``shape``."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


@torch.no_grad()
def initialise_backbone(model: nn.Module, std: float = OTHER_WEIGHT_STD) -> None:
    """Draw every weight by its name; scales of normalisations are around 1."""
    for name, parameter in sorted(model.named_parameters()):
        drawn = uniform(name, parameter.shape, std)
        is_scale = "norm" in name.lower() and name.endswith("weight")
        parameter.copy_(1 + drawn if is_scale else drawn)


@torch.no_grad()
def initialise_selectors(model: nn.Module) -> None:
    """Draw every parameter of the selectors by its site and name."""
    for site, selector in sorted(hf_hardattn.selectors(model).items()):
        for name, parameter in sorted(selector.named_parameters()):
            parameter.copy_(uniform(f"{site}/{name}", parameter.shape, SELECTOR_STD))


def vit_config(**changes: Any) -> ViTConfig:
    sizes: dict[str, Any] = dict(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=37, num_labels=5
    )
    images: dict[str, Any] = dict(image_size=16, patch_size=4, num_channels=2, hidden_dropout_prob=0.0)
    return ViTConfig(**{**sizes, **images, **changes})


def _t5_config() -> T5Config:
    sizes: dict[str, Any] = dict(
        vocab_size=53, d_model=26, d_kv=6, d_ff=39, num_layers=3, num_decoder_layers=2, num_heads=3
    )
    positions: dict[str, Any] = dict(relative_attention_num_buckets=10, relative_attention_max_distance=17)
    special: dict[str, Any] = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    return T5Config(**sizes, **positions, **special, dropout_rate=0.0)


def _blip_config() -> BlipConfig:
    text: dict[str, Any] = dict(
        vocab_size=47,
        hidden_size=24,
        encoder_hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=31,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=44,
        eos_token_id=45,
        sep_token_id=45,
        pad_token_id=0,
        projection_dim=14,
    )
    vision: dict[str, Any] = dict(
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        attention_dropout=0.0,
        projection_dim=14,
    )
    return BlipConfig(text_config=text, vision_config=vision, projection_dim=14, image_text_hidden_size=13)


def _gru() -> nn.Module:
    from hf_hardattn.backbones.gru import GruConfig, GruForConditionalGeneration

    sizes: dict[str, Any] = dict(
        vocab_size=53, d_model=22, num_layers=2, num_decoder_layers=2, num_attention_heads=2, dropout=0.0
    )
    return GruForConditionalGeneration(GruConfig(**sizes))


def _vit_batch(padded: bool) -> dict[str, Tensor]:
    return {"pixel_values": uniform("pixels", (3, 2, 16, 16), 1.0), "labels": torch.tensor([4, 0, 2])}


def _text_batch(padded: bool) -> dict[str, Tensor]:
    """Source and target of an encoder-decoder, with rows of 11, 7 and 9 tokens, or all of 11."""
    ids, mask = integers("source", 2, 53, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    for row, length in enumerate((11, 7, 9) if padded else (11, 11, 11)):
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 1, 0, 0
    labels = integers("target", 2, 53, (3, 7))
    labels[0, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _blip_batch(padded: bool) -> dict[str, Tensor]:
    ids, mask = integers("text", 1, 44, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    ids[:, 0] = 44
    if padded:
        ids[1, 5:], mask[1, 5:] = 0, 0
    return {"pixel_values": uniform("pixels", (3, 3, 16, 16), 1.0), "input_ids": ids, "attention_mask": mask}


def _captioning_batch(padded: bool) -> dict[str, Tensor]:
    batch = _blip_batch(padded)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _question_batch(padded: bool) -> dict[str, Tensor]:
    return {**_blip_batch(padded), "labels": integers("answer", 1, 44, (3, 4))}


def _contrastive_batch(padded: bool) -> dict[str, Any]:
    return {**_blip_batch(padded), "return_loss": True}


# maps a name to the stock model and its batch
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[bool], dict[str, Any]]]] = {
    "vit": (lambda: ViTForImageClassification(vit_config()), _vit_batch),
    "t5": (lambda: T5ForConditionalGeneration(_t5_config()), _text_batch),
    "gru": (_gru, _text_batch),
    "blip_captioning": (lambda: BlipForConditionalGeneration(_blip_config()), _captioning_batch),
    "blip_question_answering": (lambda: BlipForQuestionAnswering(_blip_config()), _question_batch),
    "blip_retrieval": (lambda: BlipForImageTextRetrieval(_blip_config()), _blip_batch),
    "blip_contrastive": (lambda: BlipModel(_blip_config()), _contrastive_batch),
}


@functools.cache
def _stock(model: str) -> nn.Module:
    built = MODELS[model][0]()
    initialise_backbone(built, WEIGHT_STD.get(model, OTHER_WEIGHT_STD))
    return built


def build(case: VersionCase) -> Any:
    """Build the hard model of a case, in evaluation mode."""
    model: Any = copy.deepcopy(_stock(case.model))
    if case.attention is not None:
        model.set_attn_implementation(case.attention)
    hf_hardattn.apply(model, hf_hardattn.HardAttentionConfig(**{"scorer": "linear", **case.hard}))
    initialise_selectors(model)
    if case.step is not None:
        hf_hardattn.set_step(model, *case.step)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------- runs


def run_case(case: VersionCase) -> dict[str, Tensor]:
    """Return the results of a case by name: outputs, ``gradient/<parameter>``, ``gradient/<site>/<parameter>`` and ``tokens``."""
    model, batch = build(case), {**MODELS[case.model][1](case.padded), **case.inputs}
    around = contextlib.nullcontext() if case.execution is None else hf_hardattn.execution(model, case.execution)
    with around:
        torch.manual_seed(3)  # seed of the noise in a training forward pass
        return RUNS[case.run](model, batch, case)


def _evaluate(model: Any, batch: dict[str, Any], case: VersionCase) -> dict[str, Tensor]:
    with torch.no_grad():
        return _outputs(model(**batch))


def _train(model: Any, batch: dict[str, Any], case: VersionCase) -> dict[str, Tensor]:
    model.train()
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable(case.checkpointing)
    output = model(**batch)
    results = _outputs(output)
    # the head that matches images and texts returns no loss
    loss = output["loss"] if output.get("loss") is not None else output["itm_score"].square().mean()
    loss.backward()
    return {**results, **_gradients(model)}


def _generate(model: Any, batch: dict[str, Any], case: VersionCase, **options: Any) -> dict[str, Tensor]:
    given = {name: value for name, value in batch.items() if name != "labels"}
    if case.model == "blip_captioning":  # BLIP takes the prompt without its last token
        given = {name: value if name == "pixel_values" else value[:, :3] for name, value in given.items()}
    length = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return {"tokens": model.generate(**given, **length, **options, do_sample=False)}


RUNS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "evaluate": _evaluate,
    "train": _train,
    "greedy": _generate,
    "beams": functools.partial(_generate, num_beams=3),
}


def _outputs(output: Any) -> dict[str, Tensor]:
    return {name: output[name].detach() for name in RESULTS if output.get(name) is not None}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return every gradient, of the backbone by the stock name of the parameter, and of selectors by site and parameter."""
    found: dict[str, Tensor] = {}
    inside = set()
    for site, selector in hf_hardattn.selectors(model).items():
        for name, parameter in selector.named_parameters():
            inside.add(id(parameter))
            if parameter.grad is not None:
                found[f"gradient/{site}/{name}"] = parameter.grad
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside and parameter.grad is not None:
            found[f"gradient/{name}"] = parameter.grad
    return found


def summarise(results: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the results of a case, with its gradients as one small tensor, and the names of those gradients.

    A row of ``gradients`` is the norm of a gradient and its first ``GRADIENT_ENTRIES`` entries. Zero gradients are left out: whether one is
    None or zeros depends on the version, and for a bias that shifts all scores equally on the rounding of the processor.
    """
    names = sorted(name for name, value in results.items() if name.startswith("gradient/") and value.any())
    summary = {name: value for name, value in results.items() if not name.startswith("gradient/")}
    rows = []
    for name in names:
        entries = results[name].flatten()[:GRADIENT_ENTRIES]
        entries = nn.functional.pad(entries, (0, GRADIENT_ENTRIES - len(entries)))
        rows.append(torch.cat((results[name].norm().view(1), entries)))
    if rows:
        summary["gradients"] = torch.stack(rows)
    return summary, names


# ------------------------------------------------------------------------------------------------------------------- process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for FAMILY.safetensors and run.json")
    parser.add_argument("--only", default=",".join(families()), help="families, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for a fixed order of summation
    warnings.filterwarnings("ignore")
    args.output.mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    started = time.monotonic()
    for family in args.only.split(","):
        tensors: dict[str, Tensor] = {}
        for case in load_cases([family]):
            try:
                results = run_case(case)
            except Exception as error:  # noqa: BLE001 - an error of a version is a result, too
                errors[case.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                continue
            tensors |= {f"{case.name}|{name}": value.contiguous() for name, value in results.items()}
        save_file(tensors, args.output / f"{family}.safetensors")
    run = {
        "package": os.path.dirname(hf_hardattn.__file__),
        "seconds": time.monotonic() - started,
        "errors": errors,
    }
    (args.output / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
