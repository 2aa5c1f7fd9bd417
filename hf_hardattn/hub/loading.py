"""``load``: load a hard model from a folder or the Hub, in any of the forms it can be saved in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import set_budget
from ..budget import BudgetLike
from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from . import adapters, selector_only
from .building import build, check_complete, headers, read_model_config
from .source import Source, fetch
from .untrusted import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Arguments that load() sets itself, because safety or strictness depends on them.
DECIDED = (
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
    "config",
    "state_dict",
    "ignore_mismatched_sizes",
    "subfolder",
)


def load(
    repo_or_path: str | Path,
    *,
    budget: BudgetLike | None = None,
    hard_attention: HardAttentionConfig | dict[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    verify_base: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a hard model: a full checkpoint, selectors on top of a base model, or a PEFT adapter with selectors.

    Only safetensors files are read, no code of a repository is executed, and every tensor must be present and fit.

    Args:
        repo_or_path: folder, ``user/name`` on the Hub, or ``"sample"`` for the trained model inside the package.
        budget: budget of every site, which replaces the saved ones; the model's config records it.
        hard_attention: configuration that replaces the saved one; required for an adapter that was saved by PEFT alone.
        revision: branch, tag or commit; resolved to a commit once, before anything is downloaded.
        token: as in huggingface_hub. It is also used for the base model and is not stored.
        cache_dir: as in huggingface_hub.
        local_files_only: as in huggingface_hub.
        verify_base: refuse a base model whose weights are not those that the selectors were trained on.
        kwargs: arguments of ``from_pretrained`` (dtype, device_map, attn_implementation ...).

    Returns:
        The model in evaluation mode; ``hf_hardattn.status(model)`` shows its sites. For an adapter it is a PEFT model.

    Raises:
        HardAttentionError: the repository is soft, incomplete, damaged or hostile; the message says what is wrong and where.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or is private or gated.

    Examples:
        >>> model = hf_hardattn.load("me/vit-hard", budget=0.25, revision="v1")    # doctest: +SKIP
    """
    for name in DECIDED:
        if name in kwargs:
            raise HardAttentionError(
                f"load() does not accept {name}; it sets this itself, for safety. Use from_pretrained instead."
            )
    given = None if hard_attention is None else HardAttentionConfig.parse(hard_attention)
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    model = _load(fetch(repo_or_path, revision, **hub), hub, given, verify_base, **kwargs)
    return model if budget is None else set_budget(model, budget)


def _load(
    source: Source, hub: dict[str, Any], given: HardAttentionConfig | None, verify_base: bool, **kwargs: Any
) -> Any:
    if source.has(selector_only.CONFIG):
        return selector_only.load_selectors(source, hub, given, verify_base, **kwargs)
    if source.has(adapters.CONFIG):
        return adapters.load_adapter(source, hub, given, **kwargs)
    if source.has("config.json"):
        return _load_full(source, given, **kwargs)
    raise HardAttentionError(
        f"{source.name} holds no model; it needs config.json, {selector_only.CONFIG} or {adapters.CONFIG}."
    )


def _load_full(source: Source, given: HardAttentionConfig | None, **kwargs: Any) -> Any:
    header = headers(source)
    config, cls = read_model_config(source, header)
    saved = config.hard_attention
    if saved is None and given is None:
        raise HardAttentionError(
            f"{source.name} has no hard_attention in its config.json: it is a soft model. Load it with from_pretrained, or make it hard "
            "with from_pretrained(..., hard_attention=HardAttentionConfig(...))."
        )
    config.hard_attention = (given or read_config(saved, source.name)).to_dict()
    model, missing = build(source, config, cls, header, **kwargs)
    check_complete(missing, source.name)
    return model.eval()
