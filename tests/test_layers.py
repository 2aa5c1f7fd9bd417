"""The dependency rules, read from the source with ``ast``: nothing imports upward, siblings never import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_hardattn
from hf_hardattn import registry

PACKAGE = Path(hf_hardattn.__file__).parent

# One entry per file or folder directly under hf_hardattn/. A module may import its own layer and those below.
LAYERS = {
    "errors": 0,
    "version": 0,
    "sample": 1,
    "devices": 0,
    "functional": 0,
    "backbones": 6,  # models in Transformers' form
    "options": 1,
    "amounts": 1,
    "registry": 1,
    "budget": 1,
    "schedules": 1,
    "distributions": 1,
    "recipes": 1,
    "fields": 2,
    "schemas": 2,
    "overrides": 2,
    "config": 2,
    "scorers": 3,
    "estimators": 4,
    "baselines": 4,
    "modeling": 5,
    "models": 6,
    "unwrapping": 6,
    "modes": 6,
    "recording": 7,
    "losses": 8,
    "api": 10,
    "integrations": 10,
    "compiling": 10,
    "hub": 11,  # reads what training wrote, never its code; training's scripts push through it, inspection loads through it
    "inspection": 11,
    "inference": 12,
    "metrics": 11,
    "efficiency": 11,
    "training": 12,
    "cli": 13,
    "__main__": 13,
    "__init__": 13,  # the package itself: it gathers the public names, so nothing below imports from it
}
# Stricter than "its own layer and below".
ALSO_FORBIDDEN = {
    "functional": {"errors"},  # pure functions of tensors
    "scorers": {"config"},
    "estimators": {"config", "scorers"},
    "baselines": {"config", "scorers"},
    "modeling": {"models"},
    "hub": {"training", "efficiency", "inspection", "cli"},
}
FOLDERS = {
    *registry.KINDS,
    "models",
}  # members (their files) are siblings; a file `_name.py` and `__init__.py` are no members
TRANSFORMERS_FROM = 5  # the lowest layer that may import transformers
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_scripts" not in path.parts)


def module_of(path: Path) -> tuple[str, ...]:
    """``scorers/linear.py`` -> ``("scorers", "linear")``; a folder's ``__init__.py`` -> ``("scorers",)``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def exists(parts: tuple[str, ...]) -> bool:
    """Whether ``parts`` is a module of the package."""
    return bool(parts) and (PACKAGE.joinpath(*parts).is_dir() or PACKAGE.joinpath(*parts).with_suffix(".py").is_file())


def imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield ``(line, dotted name)`` of every import, at any depth of the file, relative ones made absolute.

    ``package`` is the package that holds the file, from ``"hf_hardattn"`` on.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = (*start, *(node.module or "").split(".")) if node.module else start
            for alias in node.names:
                yield node.lineno, (*base, alias.name)


def private(parts: tuple[str, ...]) -> bool:
    """Whether ``parts`` is a registry folder itself or a private file in it, rather than one of its members."""
    return len(parts) < 2 or parts[1].startswith("_")


def violations(source: str, module: tuple[str, ...], is_package: bool = False) -> list[str]:
    """Return the broken rules of one file, each as ``line: what``; ``module`` as ``module_of`` gives it."""
    top, layer = module[0], LAYERS[module[0]]
    inside = () if module == ("__init__",) else module if is_package else module[:-1]
    found = []
    for line, name in imports(source, ("hf_hardattn", *inside)):
        if name[0] == "transformers" and layer < TRANSFORMERS_FROM and top != "backbones":
            found.append(f"{line}: layer {layer} imports transformers; only layer {TRANSFORMERS_FROM} and above may")
        if name[0] != "hf_hardattn":
            continue
        parts = name[1:]
        while parts and not exists(parts):  # `from .config import X`: drop X
            parts = parts[:-1]
        parts = parts or ("__init__",)
        target = parts[0]
        if target not in LAYERS:
            found.append(f"{line}: imports hf_hardattn.{target}, which is not in the layer map")
        elif LAYERS[target] > layer or target in ALSO_FORBIDDEN.get(top, ()):
            found.append(f"{line}: {top} (layer {layer}) imports {target} (layer {LAYERS[target]})")
        elif top in FOLDERS and target == top and parts != module and not private(parts):
            found.append(f"{line}: {'.'.join(module)} imports its sibling {'.'.join(parts)}")
        elif top in FOLDERS and target != top and LAYERS[target] == layer and not private(parts):
            found.append(
                f"{line}: {'.'.join(module)} imports {'.'.join(parts)}; take it from the registry or an argument"
            )
        elif top in ("api", "modeling") and target in FOLDERS and not private(parts):
            found.append(f"{line}: {top} imports {'.'.join(parts)}; go through hf_hardattn.registry")
    return found


def label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=label)
def test_file_obeys_the_layers(path: Path) -> None:
    module = module_of(path)
    assert module[0] in LAYERS, f"{label(path)} has no layer: place it in the layer map of tests/test_layers.py"
    found = violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, f"{label(path)}: " + "; ".join(found)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_file_has_no_assert_and_a_telling_name(path: Path) -> None:
    """``python -O`` strips asserts, and an AssertionError tells a user nothing: raise a HardAttentionError."""
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)]
    assert not lines, f"{label(path)} has assert statements on lines {lines}"
    vague = {part.strip("_") for part in module_of(path)} & VAGUE_NAMES
    assert not vague, f"{label(path)}: name the file after what it does, not {vague}"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in registry.KINDS for name in registry.names(kind)])
def test_registered_name_loads(kind: str, name: str) -> None:
    assert isinstance(registry.load(kind, name), type)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        (("devices",), "from .config import HardAttentionConfig", "imports config"),
        (("devices",), "def f():\n    import hf_hardattn.config", "2: devices (layer 0) imports config"),
        (("budget",), "from hf_hardattn import HardAttentionConfig", "imports __init__"),
        (("budget",), "from . import nowhere", "imports __init__"),
        (("scorers", "linear"), "from .mlp import Mlp", "imports its sibling scorers.mlp"),
        (("scorers", "linear"), "from . import mlp", "imports its sibling scorers.mlp"),
        (("scorers", "linear"), "from transformers import ViTModel", "imports transformers"),
        (("scorers", "linear"), "from ..config import HardAttentionConfig", "imports config"),
        (("estimators", "simple"), "from ..scorers import Scorer", "imports scorers"),
        (("estimators", "simple"), "from .gumbel import Gumbel", "imports its sibling estimators.gumbel"),
        (("estimators", "simple"), "from ..baselines.none import NoBaseline", "take it from the registry"),
        (("models", "vit"), "import hf_hardattn.models.t5", "imports its sibling models.t5"),
        (("api",), "from .models import vit", "go through hf_hardattn.registry"),
        (("hub", "card"), "from ..training.results import write_json", "imports training"),
    ],
)
def test_violation_is_found(
    module: tuple[str, ...], source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = {(name,) for name in LAYERS} | {
        *(("scorers", name) for name in ("linear", "mlp")),
        *(("estimators", name) for name in ("simple", "gumbel")),
        *(("models", name) for name in ("vit", "t5")),
        ("baselines", "none"),
    }
    monkeypatch.setattr(f"{__name__}.exists", everything.__contains__)
    found = violations(source, module)
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            ("scorers", "linear"),
            "import torch\nfrom torch import nn\nfrom . import Scorer\nfrom ..errors import unknown",
        ),
        (("estimators", "simple"), "from . import Estimator\nfrom .. import errors\nfrom ..registry import load"),
        (("models", "vit"), "from transformers import ViTModel\nfrom ..errors import HardAttentionError"),
        (("cli",), "import hf_hardattn\nfrom hf_hardattn import registry"),
    ],
)
def test_downward_import_is_allowed(module: tuple[str, ...], source: str) -> None:
    assert violations(source, module) == []
