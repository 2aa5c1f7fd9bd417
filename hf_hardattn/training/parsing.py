"""Parser for flags from a YAML file and the command line; the command line wins, and unknown names are refused."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from ..errors import HardAttentionError
from .arguments import ScriptArguments, validate

Arguments = TypeVar("Arguments", bound=ScriptArguments)
SECRETS = ("hub_token", "token", "use_auth_token", "hf_token", "auth_token")


def expand(argv: Sequence[str]) -> list[str]:
    """Replace ``--config file.yaml`` by the flags in the file, placed before the others, so that the others win; set the environment
    variables under its key ``env``."""
    rest, files = [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            files.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return [flag for file in files for flag in _from_file(file)] + rest


def peek(argv: Sequence[str], name: str) -> str | None:
    """Return the last value of the flag ``name`` in expanded arguments, before they are parsed."""
    found = None
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag.removeprefix("--").replace("-", "_") == name and flag.startswith("--"):
            found = value if equals else following
    return found


def parse(arguments: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Parse ``argv`` (the command line by default) into the dataclass ``arguments``.

    Raises:
        HardAttentionError: a flag or YAML key does not exist, or a token is on the command line.
        SystemExit: a value has the wrong type, as argparse reports it.
    """
    words = expand(sys.argv[1:] if argv is None else argv)
    names = [f.name for f in fields(arguments)]
    known = {*names, *(f"no_{name}" for name in names), "help", "config"}
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name in known:
            continue
        if name in SECRETS:
            raise HardAttentionError(
                f"--{name} is refused on the command line and in YAML; a token there ends up in shell history, logs and cards. "
                "Log in once with 'hf auth login', or set the environment variable HF_TOKEN."
            )
        near = difflib.get_close_matches(name, names, n=1)  # the names are too many to list
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise HardAttentionError(
            f"unknown argument '{name}'; no flag or YAML key has this name. {hint}--help lists all."
        )
    dataclass: Any = arguments
    parser = HfArgumentParser(dataclass, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="Flags from a YAML file; the command line overrides it.")
    args = parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]
    validate(args)
    return args


def run(main: Callable[[], Any]) -> None:
    """Call a script's ``main``; errors that the user can fix are printed in one line, without a traceback."""
    try:
        main()
    except HardAttentionError as error:
        sys.exit(f"error: {error}")


def shipped(path: Path) -> Path:
    """Return ``path``, or the file of the installed library if ``path`` is under ``scripts/`` and does not exist here."""
    inside = Path(__file__).parents[1] / "_scripts" / Path(*path.parts[1:])
    return inside if path.parts[:1] == ("scripts",) and not path.exists() and inside.is_file() else path


def _from_file(file: str) -> list[str]:
    path = shipped(Path(file))
    if not path.is_file():
        raise HardAttentionError(
            f"--config {file!r} is not a file; use a YAML file of flags, with one 'name: value' per line."
        )
    data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(data, dict):
        raise HardAttentionError(
            f"{file} holds a {type(data).__name__}; a config must be a mapping with one 'name: value' per line."
        )
    environment = data.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise HardAttentionError(
            f"env in {file} is not a mapping; it must set environment variables, with one 'NAME: value' per line."
        )
    os.environ.update({name: str(value) for name, value in environment.items()})
    words = []
    for name, value in data.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(_text, value)]
        elif value is not None:
            words.append(f"--{name}={_text(value)}")
    return words


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
