"""Which files of a model's folder may be pushed, and which are left out."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import HardAttentionError
from ..recording import selectors
from . import adapters, selector_only, tensors
from .building import blueprint, read_model_config
from .remote_code import STUB, stub_is_ours
from .secrets import holds_token, is_secret, redact
from .source import Source
from .untrusted import check_name, read_json

# Files of a model, its processor and its card. Other files must be excluded by name, so that nothing becomes public by accident.
EXPECTED = re.compile(
    r"(config|generation_config|adapter_config|hard_attention|model\.safetensors\.index|results|card)\.json"
    r"|(model|adapter_model|selectors)\.safetensors|model-\d{5}-of-\d{5}\.safetensors"
    r"|(preprocessor_config|processor_config|video_preprocessor_config|image_processor_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|vocab\.txt|merges\.txt"
    r"|(spiece|sentencepiece\.bpe|tokenizer)\.model|chat_template\.jinja"
    r"|README\.md|LICENSE(\.\w+)?|NOTICE(\.\w+)?|CITATION\.cff|\.gitattributes"
    r"|log\.jsonl|([\w-]+/)?[\w.-]+\.(png|jpg|jpeg)|\.eval_results/[\w-]+\.yaml"
)
# Files that training leaves in the folder and that are never part of the model.
LEFT_OUT = (
    "checkpoints/*",
    "checkpoint-*/*",
    "runs/*",
    "logs/*",
    ".git/*",
    ".cache/*",
    "__pycache__/*",
    "source.json",  # source of the card, which points to results on this machine; card.json is the record
    "training_args.bin",
    "trainer_state.json",
    "optimizer.*",
    "scheduler.*",
    "scaler.pt",
    "rng_state*.pth",
    "random_states_*.pkl",
    "custom_checkpoint_*.pkl",
    "files.json",
    ".DS_Store",
)
# Files of an earlier push that the new one replaces; if they remained, they could be loaded instead.
STALE = re.compile(
    r"(model|adapter_model|selectors)\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
    r"|(adapter_config|hard_attention)\.json|(pytorch|adapter)_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?"
)
# The files that make up a model. None is left out of a push: the rest could not be loaded.
PARTS = re.compile(
    r"(model|adapter_model|selectors)\.safetensors|model-\d{5}-of-\d{5}\.safetensors"
    r"|(model\.safetensors\.index|config|adapter_config|hard_attention)\.json"
)


def list_files(
    folder: Path, exclude: tuple[str, ...] = (), lenient: bool = False, token: str | None = None
) -> tuple[list[str], list[str]]:
    """Return the names of the files to push, and of those left out.

    Args:
        exclude: additional globs to leave out; each must match a file.
        lenient: leave unexpected and unsafe files out instead of refusing them. token: token that no file may contain.

    Raises:
        HardAttentionError: a file is unsafe or unexpected, links out of the folder, or holds an access token; a glob matches no file.
    """
    if isinstance(exclude, str):
        raise HardAttentionError(
            f"exclude={exclude!r} is a string; it is a tuple of globs. Use exclude=({exclude!r},)."
        )
    if not folder.is_dir():
        raise HardAttentionError(f"{folder} is not a folder; save the model first: hf_hardattn.save(model, folder).")
    kept, left, problems = [], [], list[str]()
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if any(fnmatchcase(name, pattern) for pattern in (*LEFT_OUT, *exclude)) or (
            lenient and not EXPECTED.fullmatch(name)
        ):
            left.append(name)
            continue
        try:
            _check_place(path, name, folder, root, token)
            _check_file(path, name, token)
        except HardAttentionError as error:
            problems.append(str(error))
        kept.append(name)
    if problems:
        raise HardAttentionError(
            problems[0]
            if len(problems) == 1
            else f"{len(problems)} files of {folder} cannot be pushed: {' '.join(problems)}"
        )
    _check_links(folder, kept)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in left):
            raise HardAttentionError(
                f"--exclude {pattern!r} matches no file of {folder}; what it was to leave out would be pushed. It holds: {', '.join(kept)}."
            )
    return kept, left


def _check_place(path: Path, name: str, folder: Path, root: Path, token: str | None) -> None:
    """Raise for a name that holds a secret, a link out of the folder, or a path that is not a file."""
    if is_secret(name, token):
        raise HardAttentionError(
            f"the name of a file in {folder} ({redact(name, token)}) holds an access token or a password; names are public with the "
            "repository. Rename the file."
        )
    if not path.resolve().is_relative_to(root):
        raise HardAttentionError(
            f"{name} is a link to a place outside {folder}; copy the file into it, or leave it out: --exclude {name!r}."
        )
    if not path.is_file():  # a link to a folder or to nothing, a pipe, a device
        raise HardAttentionError(
            f"{name} is not a file; only files are pushed. Remove it, or leave it out: --exclude {name!r}."
        )


def _check_links(folder: Path, kept: list[str]) -> None:
    """Refuse symbolic and hard links to a file that is left out."""
    names = set(kept)
    hidden = {
        _identity(path)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.relative_to(folder).as_posix() not in names
    }
    for name in kept:
        if _identity(folder / name) in hidden:
            raise HardAttentionError(
                f"{name} is a link to a file of {folder} that is left out; a push must not send it under another name. Copy what "
                f"belongs in the repository, or leave it out: --exclude {name!r}."
            )


def _identity(path: Path) -> tuple[int, int]:
    """Return device and inode, which all links to one file share."""
    found = path.stat()
    return found.st_dev, found.st_ino


def check_hard(folder: Path, files: list[str], soft_too: bool = False) -> str:
    """Check that the files are a hard model that others can load.

    Returns:
        The form of the model: ``full``, ``selectors`` or ``adapter``; ``soft`` for a soft model if ``soft_too`` allows it.

    Raises:
        HardAttentionError: the model is soft, its weights are missing or damaged, or its base model is only on this machine.
    """
    source = Source(folder, str(folder))
    _check_weights(folder, files)
    if selector_only.CONFIG in files:
        content = selector_only.read_selector_file(source)
        tensors.read_header(folder / selector_only.WEIGHTS, source.name)
        _check_base(content.base_model, source.name)
        return "selectors"
    if adapters.CONFIG in files:
        header = tensors.read_header(folder / adapters.WEIGHTS, source.name)
        _check_base(read_json(folder / adapters.CONFIG, source.name).get("base_model_name_or_path"), source.name)
        form = "adapter"
    else:
        header, form = tensors.read_headers(folder, source.name), "full"
    hard = read_json(folder / "config.json", source.name).get("hard_attention") if "config.json" in files else None
    if hard is None and soft_too:
        return "soft"
    if hard is None:
        raise HardAttentionError(
            f"{folder} has no hard_attention in a config.json: others would load it soft. Save it with hf_hardattn.save(model, folder); "
            "upload a soft model with 'hf upload'."
        )
    if form == "full":
        config, cls = read_model_config(source, header)
        sites = selectors(blueprint(config, cls, header, source.name)).values()
        wanted, found = (
            sum(len(site.state_dict()) for site in sites),
            sum("selector." in name for name in header.shapes),
        )
        if wanted != found:
            raise HardAttentionError(
                f"{folder} has {wanted} selector tensors according to its config.json, but {found} in its weights; others could not load it. "
                "Save it with hf_hardattn.save(model, folder)."
            )
    return form


def _check_weights(folder: Path, files: list[str]) -> None:
    """Raise if the folder holds a configuration, weights or shards that are left out: others would get a part of a model."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    missing = [name for name in names if PARTS.fullmatch(name) and name not in files]
    if missing:
        raise HardAttentionError(
            f"{', '.join(missing)} of {folder} is left out, and the repository would hold no whole model; weights are pushed with their "
            "configuration. Push without that --exclude, or remove the file from the folder if it is not part of the model."
        )


def _check_base(base: object, where: str) -> None:
    if not isinstance(base, str) or Path(base).is_absolute() or Path(base).is_dir() or base.count("/") > 1:
        raise HardAttentionError(
            f"{where} uses the base model {str(base)!r}, which exists only on this machine; others need one on the Hub. "
            "Save it again with base_model='user/name' and base_revision=<commit>."
        )


def _check_file(path: Path, name: str, token: str | None) -> None:
    check_name(name, "the folder")
    if name == STUB:
        if stub_is_ours(path):
            return
        raise HardAttentionError(
            f"{name} is not the file that hf_hardattn writes; a repository must not contain other code. Remove it."
        )
    if path.suffix in tensors.UNSAFE or path.suffix == ".py":
        raise HardAttentionError(
            f"{name} is unsafe: a pickle or code runs on the machine that loads it; only safetensors and JSON are pushed. Remove it, or leave it "
            f"out: --exclude {name!r}."
        )
    if not EXPECTED.fullmatch(name):
        raise HardAttentionError(
            f"{name} is not a file of a model or its card; other files are not pushed. Leave it out: --exclude {name!r}."
        )
    if holds_token(path, token):
        raise HardAttentionError(
            f"{name} holds an access token; it must not leave this machine, nor must a password or key. Remove it, and revoke it. If it is "
            f"a false alarm, leave the file out: --exclude {name!r}."
        )
