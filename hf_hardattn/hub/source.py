"""The source of a model: a folder, or a repository on the Hub at a fixed commit."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .. import sample
from ..errors import HardAttentionError
from .secrets import is_secret, redact
from .untrusted import check_name

# The only files that loading reads. Code, pickles and all other files are ignored.
_NAMES = ("config", "generation_config", "adapter_config", "hard_attention", "model.safetensors.index")
_WEIGHTS = ("model", "adapter_model", "selectors", f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}")
PATTERNS = [*(f"{name}.json" for name in _NAMES), *(f"{name}.safetensors" for name in _WEIGHTS)]


@dataclass(frozen=True)
class Source:
    """Files to load from.

    Attributes:
        folder: location of the files. name: the name that the user gave, for errors and configs. revision: commit; None for a folder.
    """

    folder: Path
    name: str
    revision: str | None = None

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()


def fetch(
    name: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    remote_only: bool = False,
) -> Source:
    """Find a folder, or download the files that loading needs from a repository.

    Args:
        name: folder, ``user/name``, or ``sample`` for the model in the package. revision: branch, tag or commit.
        token, cache_dir, local_files_only: as in huggingface_hub.
        remote_only: never use a local folder (for a base model named by an untrusted repository).

    Raises:
        HardAttentionError: ``name`` is neither a folder nor the name of a repository, the repository holds an invalid file name, the Hub
            does not answer, or the repository is not in the cache when offline.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or is private or gated.
    """
    if name == sample.NAME and revision is None and not (remote_only or is_folder(name)):
        return Source(sample.folder(), sample.NAME)
    if not remote_only and is_folder(name):
        if revision is not None:
            raise HardAttentionError(
                f"revision={revision!r} of the folder {name}; only repositories on the Hub have revisions. Leave it out."
            )
        return Source(Path(name), str(name))
    for word, given in (("name", name), ("revision", revision)):
        if given is not None and is_secret(str(given), token):  # errors and logs would show it
            raise HardAttentionError(
                f"the {word} of the repository ({redact(str(given), token)[:200]}) holds an access token or a password. Pass token=..., "
                "log in with 'hf auth login', or set HF_TOKEN."
            )
    try:
        validate_repo_id(str(name))
    except HFValidationError:  # its message repeats the name, which may be a misplaced token
        raise HardAttentionError(
            f"{redact(str(name), token)[:200]!r} is neither a folder nor the name of a repository; a name is 'user/name'."
        ) from None
    offline = local_files_only or constants.HF_HUB_OFFLINE
    try:
        return _download(str(name), revision, token, cache_dir, offline)
    except LocalEntryNotFoundError as error:
        if not offline:
            raise _unanswered(name, token, error) from error
        at = "" if revision is None else f" at revision {revision!r}"
        raise HardAttentionError(
            f"{name}{at} is not in the cache, and nothing is downloaded offline. Load it once with a connection, or name a folder."
        ) from error
    except (HardAttentionError, HfHubHTTPError):
        raise
    except Exception as error:  # noqa: BLE001 - the transport of the client raises many types of errors if the Hub does not answer
        raise _unanswered(name, token, error) from error


def is_folder(name: str | Path) -> bool:
    """Whether ``name`` is a folder; False for a string that is not a valid path."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # too long or not permitted; invalid characters
        return False


def _unanswered(name: str | Path, token: str | bool | None, error: Exception) -> HardAttentionError:
    text = redact(" ".join(str(error).split()), token)[:300]
    return HardAttentionError(
        f"{name} cannot be fetched ({type(error).__name__}: {text}); the Hub did not answer. "
        "Try again, or pass local_files_only=True to use the cache."
    )


def _download(
    name: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None, offline: bool
) -> Source:
    where: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
    if offline:
        # without patterns the client requires the whole repository, but loading only downloads these files
        found = Path(
            snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=PATTERNS, **where)
        )
        return Source(found, name, found.name)
    info = HfApi(token=token).model_info(name, revision=revision)
    files = [check_name(sibling.rfilename, name) for sibling in info.siblings or []]
    wanted = [file for file in files if any(fnmatchcase(file, pattern) for pattern in PATTERNS)]
    if not wanted:
        raise HardAttentionError(
            f"{name} holds nothing to load ({len(files)} other files); a model needs config.json, adapter_config.json or "
            "hard_attention.json, and .safetensors weights."
        )
    # use the requested revision, so that the cache can resolve it offline
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, **where))
    if (
        info.sha and folder.name != info.sha
    ):  # somebody pushed meanwhile: load the commit whose files were checked, not the newest one
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted, **where))
    return Source(folder, name, folder.name)
