"""Build the model that the arguments describe: pretrained or from scratch, hard or soft, with or without LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..api import status
from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from ..overrides import read_sites
from .arguments import HardAttentionArguments, ScriptArguments
from .selector_rate import selector_parameters, selector_rate

logger = get_logger(__name__)
SELECTORS = ("selector", "input_selector")  # attributes that hold selectors, for PEFT's modules_to_save
SHORT_FLAGS = ("recipe", "budget", "scorer", "estimator", "baseline", "temperature")


def load_config(args: ScriptArguments, model_class: type[PreTrainedModel], **changes: Any) -> PreTrainedConfig:
    """Load the configuration of a model of ``model_class`` and apply ``changes`` and the arguments to it."""
    name = args.config_name or args.model_name_or_path
    if name is None:
        raise HardAttentionError(
            "no model is given; pass --model_name_or_path, or --config_name to train from scratch."
        )
    config = AutoConfig.from_pretrained(name, revision=args.model_revision, cache_dir=args.cache_dir, **changes)
    expected = getattr(model_class.config_class, "model_type", None)
    if config.model_type != expected:
        raise HardAttentionError(
            f"{name} is a {config.model_type!r} model; this script trains {expected!r} ({model_class.__name__}). "
            "Use the script of its family: train_vit.py, train_t5.py or train_blip.py."
        )
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    wanted = hard_attention(args, config.hard_attention)
    if wanted is not None:
        config.hard_attention = wanted or None
    return config


def processor_source(args: ScriptArguments) -> str:
    """Return the source of the tokenizer or image processor."""
    name = args.processor_name or args.model_name_or_path
    if name is None:
        raise HardAttentionError(
            "no tokenizer or image processor is given; --config_name does not provide one. Pass --processor_name."
        )
    return name


def hard_attention(args: HardAttentionArguments, saved: dict[str, Any] | None) -> HardAttentionConfig | str | None:
    """Return the hard attention that the flags specify: a configuration, "" for soft, or None for that of the checkpoint.

    Args:
        saved: the dict of the checkpoint, which short flags change if they are given alone.
    """
    short = {name: getattr(args, name) for name in SHORT_FLAGS if getattr(args, name) is not None}
    if args.hard_attention == "none":
        if short or args.sites:
            raise HardAttentionError(
                f"--hard_attention none trains soft; --{[*short, 'sites'][0]} has no effect then. Remove one of them."
            )
        return ""
    if args.hard_attention is None and not short and not args.sites:
        return None
    data = dict(saved or {}) if args.hard_attention is None else _read(args.hard_attention)
    if args.sites:
        data["sites"] = {pattern: {} for pattern in args.sites}
    values = {name: yaml.safe_load(text) for name, text in short.items()}
    sites = read_sites(data.get("sites"))
    if sites is not None:
        data["sites"] = {
            pattern: {k: v for k, v in overrides.items() if k.removesuffix("_options") not in values}
            for pattern, overrides in sites.items()
        }
    for name in values:  # options are only valid for the member they were written for
        if name in ("scorer", "estimator", "baseline") and values[name] != data.get(name):
            data.pop(f"{name}_options", None)
    return HardAttentionConfig.from_dict({**data, **values})


def _read(source: str) -> dict[str, Any]:
    text, where = source, "--hard_attention"
    if not source.lstrip().startswith("{"):
        path = Path(source)
        if not path.is_file():
            raise HardAttentionError(
                f"--hard_attention {source!r} is not a file; use inline JSON, a .json or .yaml file, or 'none'."
            )
        text, where = path.read_text(encoding="utf-8"), source
    try:
        data = yaml.safe_load(text)  # JSON is a subset of YAML
    except yaml.YAMLError as error:
        raise HardAttentionError(f"{where} is not valid JSON or YAML; {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise HardAttentionError(f"{where} holds a {type(data).__name__}; a HardAttentionConfig must be a mapping.")
    return data.get("hard_attention", data)


def load_model(
    args: ScriptArguments, model_class: type[PreTrainedModel], config: PreTrainedConfig, heads: Iterable[str] = ()
) -> nn.Module:
    """Load or build the model, and log the source of its weights and its sites.

    Args:
        heads: modules of the task, such as a classifier: initialised anew if the checkpoint has another shape, and trained in
            full under LoRA, like the selectors.
    """
    name = args.model_name_or_path
    directory = Path(name) if name is not None and Path(name).is_dir() else None
    extra = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    extra |= {"dtype": args.dtype} if args.dtype else {}
    model: Any
    has_weights = directory is None or any(f.suffix in (".safetensors", ".bin") for f in directory.iterdir())
    if directory is not None and (directory / "adapter_config.json").is_file():
        model = _load_adapter(model_class, config, directory, heads, **extra)
        logger.info("weights: LoRA adapter %s", name)
    elif name is None or not has_weights:
        if args.attn_implementation:
            config._attn_implementation = args.attn_implementation
        model = model_class(config)
        model = model.to(getattr(torch, args.dtype)) if args.dtype else model
        logger.info("weights: NONE in %s: training %s from scratch", name or args.config_name, model_class.__name__)
    else:
        hub = {"revision": args.model_revision, "cache_dir": args.cache_dir}
        model = _load_weights(model_class, name, config, heads, **hub, **extra)
        logger.info("weights: %s", name)
    logger.info("%s", status(model))
    if args.use_peft and not hasattr(model, "peft_config"):
        model = _add_lora(model, args, heads)
    if args.train_selectors_only:
        _freeze_all_but_selectors(model)
    if args.gradient_checkpointing:  # after PEFT, which would turn embeddings that BLIP changes in place into leaves
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _freeze_all_but_selectors(model: nn.Module) -> None:
    chosen = selector_parameters(model)
    if not chosen:
        raise HardAttentionError(
            f"--train_selectors_only leaves nothing to train; {type(model).__name__} has no selector with parameters. Pass "
            "--sites and a scorer with parameters ('linear', 'mlp', 'query_key')."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "selectors only: %s parameters are trained; --output_dir gets the whole model, as from_pretrained needs it. To save only the selectors: "
        "hf_hardattn.save(model, FOLDER, selectors_only=True, base_model=...)",
        f"{trained:,}",
    )


def _add_lora(model: nn.Module, args: ScriptArguments, heads: Iterable[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    whole = {name.rpartition(".")[2] for name, _ in model.named_modules()} & {*SELECTORS, *heads}
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        modules_to_save=sorted(whole | set(args.lora_modules_to_save or ())),
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )
    model = get_peft_model(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "LoRA: %s of %s parameters are trained", f"{trained:,}", f"{sum(p.numel() for p in model.parameters()):,}"
    )
    return model


def _load_adapter(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, directory: Path, heads: Iterable[str], **extra: Any
) -> nn.Module:
    from peft import PeftModel

    base = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if config.hard_attention is not None:  # the base model has no selectors: the adapter contains them
        config.hard_attention = HardAttentionConfig.parse(config.hard_attention)
    model = _load_weights(model_class, base, config, heads, **extra)
    return PeftModel.from_pretrained(model, str(directory), is_trainable=True)


def _load_weights(
    model_class: type[PreTrainedModel], name: str, config: PreTrainedConfig, heads: Iterable[str], **extra: Any
) -> PreTrainedModel:
    loaded: Any = model_class.from_pretrained(
        name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **extra
    )
    model, info = loaded
    keys = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    wrong = [key for key in keys if key.split(".")[0] not in heads]
    if wrong:
        raise HardAttentionError(
            f"{len(wrong)} weights of {name} do not fit the configuration (first: '{wrong[0]}'); the sizes of a trained model cannot change. "
            "Leave --config_name and --config_overrides out, or train from scratch from a directory without weights."
        )
    return model


def parameter_groups(model: nn.Module, args: Any) -> list[dict[str, Any]]:
    """Return optimizer groups: selectors have their own learning rate; biases and norms have no weight decay."""
    chosen = selector_parameters(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in chosen, parameter.ndim > 1), []).append(parameter)
    rate = selector_rate(args.learning_rate, args.selector_learning_rate)
    return [
        {"params": group, "lr": rate if of_selector else args.learning_rate, "weight_decay": args.weight_decay * decays}
        for (of_selector, decays), group in groups.items()
    ]
