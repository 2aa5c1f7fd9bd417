"""Optional code file of a repository, whose only purpose is a clear error if this library is not installed.

With ``trust_remote_code=True`` and without ``hf_hardattn``, loading the model raises an error that names the package, instead of running
soft. With the library installed, the class is that of Transformers under another module name. ``load`` never reads the file.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import HardAttentionError
from .untrusted import read_json

STUB = "modeling_hf_hardattn.py"
AUTO_CLASSES = {
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "BlipForConditionalGeneration": "AutoModelForImageTextToText",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Model": "AutoModel",
}
_TEXT = '''"""This model chooses the positions it computes on; the package hf-hardattn makes it do so."""

try:
    import hf_hardattn
except ImportError as error:
    raise ImportError(
        "this checkpoint has hard attention, which needs the package 'hf-hardattn'; install it with: pip install hf-hardattn"
    ) from error
import transformers


class {name}(transformers.{name}):
    """Transformers' own; hf_hardattn, imported above, reads where it looks from its configuration."""
'''


def add_stub(folder: Path) -> Path:
    """Write the file to the folder of a full checkpoint and register it in config.json.

    Raises:
        HardAttentionError: the class of the model has no auto class that loads remote code.
    """
    data = read_json(folder / "config.json", str(folder))
    name = (data.get("architectures") or [""])[0]
    auto = auto_class(name)
    if auto is None:
        raise HardAttentionError(
            f"{name!r} has no auto class to attach the file to; leave it out (remote_code_stub=False)."
        )
    (folder / STUB).write_text(_TEXT.format(name=name), encoding="utf-8")
    data["auto_map"] = {auto: f"{STUB.removesuffix('.py')}.{name}"}
    (folder / "config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder / STUB


def auto_class(name: str) -> str | None:
    """Return the auto class that loads a model class, or None."""
    return next((auto for ending, auto in AUTO_CLASSES.items() if name.endswith(ending)), None)


def stub_is_ours(path: Path) -> bool:
    """Whether the file equals that of ``add_stub``, apart from the name of the class."""
    text = path.read_text(encoding="utf-8", errors="replace")
    name = text.rpartition("\nclass ")[2].partition("(")[0]
    return name.isidentifier() and text == _TEXT.format(name=name)
