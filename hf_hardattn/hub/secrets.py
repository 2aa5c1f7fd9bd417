"""Access tokens: found before they leave the machine, blanked out of every message."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import get_token

# Hugging Face, GitHub, AWS and OpenAI access tokens, by their documented prefixes.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf_|hf_oauth_|api_org_|gh[pousr]_|AKIA|sk-)[A-Za-z0-9]{16,}")
_BLOCK = 1 << 20
_LONGEST = 4096


def redact(text: str, token: str | bool | None = None) -> str:
    """``text`` with every token in it replaced by its prefix and stars; ``token`` and the one in use too, whatever they look like."""
    for own in _own(token):
        text = text.replace(own, "***")
    return _TOKEN.sub(lambda match: f"{match[1]}***", text)


def holds_token(path: Path, token: str | bool | None = None) -> bool:
    """Whether a file holds an access token: one that looks like it, ``token``, or the one in use. Reads it block by block."""
    own, tail = _own(token), ""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            text = tail + block.decode("latin-1")
            if _TOKEN.search(text) or any(known in text for known in own):
                return True
            tail = text[-_LONGEST:]
    return False


def _own(token: str | bool | None) -> list[str]:
    """Tokens that are known: the one given, and the one that huggingface_hub would use."""
    return [known for known in (token, get_token()) if isinstance(known, str) and known]
