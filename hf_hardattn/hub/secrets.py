"""Access tokens: found before they leave the machine, blanked out of every message."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import get_token

# Hugging Face, GitHub, AWS and OpenAI access tokens, by their documented prefixes.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf_|hf_oauth_|api_org_|gh[pousr]_|AKIA|sk-)[A-Za-z0-9]{16,}")
_BLOCK = 1 << 20
_LONGEST = 4096


def redact(text: str) -> str:
    """``text`` with every token in it replaced by its prefix and stars; the token in use too, whatever it looks like."""
    own = get_token()
    if own:
        text = text.replace(own, "***")
    return _TOKEN.sub(lambda match: f"{match[1]}***", text)


def holds_token(path: Path) -> bool:
    """Whether a file holds an access token, or the one in use. Reads it block by block."""
    own, tail = get_token(), ""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            text = tail + block.decode("latin-1")
            if _TOKEN.search(text) or (own and own in text):
                return True
            tail = text[-_LONGEST:]
    return False
