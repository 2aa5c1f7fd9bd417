"""Access tokens, keys and passwords: they are detected before they leave the machine, and redacted from all messages.

The rules are those of detect-secrets, and the documented prefixes of tokens that its newest release does not detect.
"""

from __future__ import annotations

import base64
import binascii
import functools
import html
import logging
import re
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

# Tokens that are long enough, with prefixes that are rare enough, to search for them in weights and pictures as well.
_TOKEN = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))(?:"  # an escaped line break in JSON ends in a letter
    r"(?P<letters>hf_|hf_oauth_|api_org_|gh[pousr]_|sk-|npm_|pypi-|[rsp]k_(?:live|test)_|whsec_|gsk_|xai-|pplx-|r8_|wandb_v1_)[A-Za-z0-9]{16,}"
    r"|(?P<capitals>AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{16}"
    r"|(?P<words>github_pat_|sk-(?:proj|svcacct|admin|ant|or|lf|None)-|AIza|GOCSPX-|ya29\.|gl(?:pat|dt|ft|soat|rt|cbt|ptt|imt|agent|oas)-"
    r"|pypi-Ag|hvs\.|nvapi-|sntrys_|lin_api_|glsa_|AGE-SECRET-KEY-1|SG\.|EAA)[A-Za-z0-9_.-]{16,}"
    r"|(?P<slack>xox[abceoprs]-|xapp-)[A-Za-z0-9-]{10,}"
    r"|(?P<hexadecimal>do[opr]_v1_|shp(?:at|ca|pa|ss)_|dapi)[a-fA-F0-9]{32,}"
    r"|(?P<jwt>eyJ)[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r")|(?P<key>-----BEGIN )[A-Z0-9 ]{0,40}PRIVATE KEY"
)
# Searched for only in text.
_PASSWORD = re.compile(
    r"(?P<url>\b[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s/:@\"'<>]{1,200}:)[^\s/@\"'<>]{1,200}(?=@)|(?P<bearer>[Bb]earer )[A-Za-z0-9._~+/-]{20,}"
)
# Rules that match addresses, long words and random strings, all of which are common in the files of a model.
_LEFT_OUT = ("IPPublicDetector", "HexHighEntropyString", "Base64HighEntropyString", "KeywordDetector")
# The content of these files looks random: only strings with the prefix of a token count.
_BINARY = (".safetensors", ".png", ".jpg", ".jpeg", ".model")
_VOCABULARY = re.compile(r"(vocab|tokenizer|added_tokens)\.json|(vocab|merges)\.txt")  # 'password' is a normal word
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{20,}={0,2}")
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})")
_BLOCK = 1 << 20
_OVERLAP = 4096
_PIECE = 4096


def redact(text: str, token: str | bool | None = None) -> str:
    """Replace every secret in ``text`` by its prefix and stars, and also ``token`` and the token in use, whatever their format."""
    for own in _own(token):
        text = text.replace(own, "***")
    for pattern in (_TOKEN, _PASSWORD):
        text = pattern.sub(lambda match: f"{match[match.lastgroup or 0]}***", text)
    for found in list(_by_rules(text)):
        text = text.replace(found, "***")
    return text


def holds_token(path: Path, token: str | bool | None = None) -> bool:
    """Whether a file holds a secret, ``token`` or the token in use, plain or encoded (JSON, URL, HTML, base64, UTF-16). Reads in blocks."""
    own, tail = _own(token), ""
    is_text = path.suffix not in _BINARY and not _VOCABULARY.fullmatch(path.name)
    if path.suffix == ".safetensors" and _is_secret(_header(path), own, keywords=True):
        return True
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            text = tail + block.decode("latin-1").replace("\0", "")
            if _holds_token(text, own) or (is_text and _is_secret(text, own, keywords=True)):
                return True
            tail = text[-_OVERLAP:]
    return False


def is_secret(text: str, token: str | bool | None = None) -> bool:
    """Whether a name, address or message holds a secret."""
    return _is_secret(text, _own(token), keywords=False)


def _is_secret(text: str, own: list[str], keywords: bool) -> bool:
    return any(
        _holds_token(view, own)
        or _PASSWORD.search(view)
        or next(_by_rules(view), None)
        or (keywords and any(map(_assigns_password, view.splitlines())))
        for view in _views(text)
    )


def _by_rules(text: str) -> Iterator[str]:
    """Yield the findings of detect-secrets; the text is split, because the time of some rules is quadratic in its length."""
    for start in range(0, len(text), _PIECE - _OVERLAP // 4):
        for rule in _rules():
            yield from filter(None, rule.analyze_string(text[start : start + _PIECE]))


def _holds_token(text: str, own: list[str]) -> bool:
    return bool(_TOKEN.search(text)) or any(known in text for known in own)


def _views(text: str, depth: int = 2) -> Iterator[str]:
    """Yield ``text`` and its decoded forms."""
    yield text
    escaped = [word for word in text.split() if "\\" in word or "%" in word or "&" in word]
    if escaped:
        yield "\n".join(
            other for word in escaped for other in (_unescaped(word), urllib.parse.unquote(word), html.unescape(word))
        )
    if depth:
        decoded = "\n".join(filter(None, map(_decoded, _BASE64.findall(text))))
        if decoded:
            yield from _views(decoded, depth - 1)


def _unescaped(word: str) -> str:
    """Decode a word as a string of JSON or Python."""
    return _ESCAPE.sub(lambda match: chr(int(match[1] or match[2], 16)), word).replace("\\/", "/")


def _decoded(word: str) -> str | None:
    """Decode a word as base64; None if the result is not text."""
    bare = word.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True).replace(b"\0", b"").decode("ascii")
    except (binascii.Error, ValueError):
        return None


def _assigns_password(line: str) -> bool:
    """Whether a line assigns a quoted value to a name such as ``password`` or ``api_key``."""
    values = _keyword_rule().analyze_string(line) if len(line) < 2000 else ()
    return any(len(value) >= 6 and not re.search(r"\s|^(.)\1*$|[<>{}$]", value) for value in values)


def _header(path: Path) -> str:
    """Return the JSON header of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, _BLOCK)).decode("latin-1")


@functools.cache
def _rules() -> tuple[Any, ...]:
    classes = [rule for rule in _detectors() if rule.__name__ not in _LEFT_OUT]
    return tuple(rule() for rule in sorted(classes, key=lambda rule: rule.__name__))


@functools.cache
def _keyword_rule() -> Any:
    return next(rule for rule in _detectors() if rule.__name__ == "KeywordDetector")()


def _detectors() -> list[Any]:
    """Return the rules of detect-secrets as classes."""
    before = warnings.showwarning
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    if warnings.showwarning is not before:  # its import redirects the warnings of the whole process to a log
        logging.captureWarnings(False)
    return list(get_mapping_from_secret_type_to_class().values())


def _own(token: str | bool | None) -> list[str]:
    """Return the known tokens: the given one, and the one that huggingface_hub would use."""
    return [known for known in (token, get_token()) if isinstance(known, str) and known]
