"""``--help`` of the training commands: the flags in groups, with their choices and defaults.

It reads the files of the tasks without importing them, because they import PyTorch, which would make ``--help`` slow.
"""

from __future__ import annotations

import ast
import pkgutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from . import arguments

PACKAGE = Path(__file__).parents[1]
TASKS = PACKAGE / "training" / "finetuning"
GROUPS = (
    arguments.ModelArguments,
    arguments.HardAttentionArguments,
    arguments.DataArguments,
    arguments.OptimizationArguments,
    arguments.EvaluationArguments,
    arguments.OutputArguments,
    arguments.TrackingArguments,
)
WIDTH = 110


@dataclass
class Flag:
    """A flag as ``--help`` shows it."""

    name: str
    kind: str
    default: Any
    text: str
    choices: tuple[str, ...] = ()

    def lines(self) -> str:
        shown = f"--no_{self.name}" if self.default is True else f"--{self.name}"
        shown += "" if self.kind == "bool" else f" {self.kind.upper()}"
        text = self.text
        if self.choices:
            text += f" One of: {', '.join(self.choices)}."
        if self.default not in (None, "") and not isinstance(self.default, bool):
            default = " ".join(self.default) if isinstance(self.default, list) else self.default
            text = f"{text}{'' if text.endswith('.') else '.'} Default: {default}."
        if self.default is True:
            text = f"Do not: {text[:1].lower()}{text[1:]}" if not text.startswith("Make the repository") else text
        body = textwrap.wrap(text, WIDTH - 36)
        first, *rest = body or [""]
        head = f"  {shown:<32}  {first}" if len(shown) <= 32 else f"  {shown}\n{'':36}{first}"
        return "\n".join([head, *(f"{'':36}{line}" for line in rest)])


def show(family: str | None, task: str | None = None, usage: str = "hf-hardattn train") -> str:
    """Return the help text for a model family, or for the shared flags if ``family`` is None.

    Args:
        task: task named by the user; otherwise the flags of the family's first task are shown.
    """
    found = tasks()
    of_family = {name: each for name, each in found.items() if family is None or family in each.families}
    chosen = (
        task if task in of_family else next((name for name, each in of_family.items() if each.first == family), None)
    )
    lines = [
        f"usage: {usage} {family or 'vit|t5|blip|encoder|decoder'} [--config FILE.yaml] [--flag VALUE ...]".replace(
            "  ", " "
        ),
        "",
    ]
    lines += ["Flags come from the command line and from --config FILE.yaml; the command line wins.", ""]
    lines += ["Task:", Flag("task", "name", None, "What the model learns.", tuple(sorted(of_family))).lines()]
    lines += [
        Flag(
            "freeze", "names", None, "Modules to freeze, e.g. vision_model; selectors in them are still trained."
        ).lines()
    ]
    own = {flag.name: flag for flag in task_flags(chosen)} if family and chosen else {}
    shared = {field.name for group in GROUPS for field in fields(group)}
    lines += [flag.lines() for name, flag in own.items() if name not in shared | {"task", "freeze"}]
    if family and len(of_family) > 1:
        lines += [f"  (flags of --task {chosen}; for another task: --task NAME --help)"]
    for group in GROUPS:
        heading = (group.__doc__ or "").strip().partition("``")[0].rstrip(" .")
        lines += ["", f"{heading.splitlines()[0]}:" if heading else ""]
        lines += [own.get(flag.name, flag).lines() for flag in group_flags(group)]
    return "\n".join(lines)


def group_flags(group: type) -> Iterator[Flag]:
    """Yield the flags of a dataclass of ``arguments``."""
    hints = get_type_hints(group)
    for field in fields(group):
        default = field.default_factory() if callable(field.default_factory) else field.default
        choices = _choices(field.name) or tuple(
            str(value)
            for part in (hints[field.name], *get_args(hints[field.name]))
            for value in get_args(part)
            if isinstance(value, str)
        )
        yield Flag(field.name, _kind(str(field.type)), default, field.metadata["help"], choices)


def _choices(name: str) -> tuple[str, ...]:
    """Names that a flag accepts, from the files in its folder."""
    if name not in ("scorer", "estimator", "baseline"):
        return ()
    found = pkgutil.iter_modules([str(PACKAGE / f"{name}s")])
    return tuple(sorted(module.name for module in found if not module.name.startswith("_")))


def _kind(annotation: str) -> str:
    words = annotation.replace(" | None", "")
    return (
        "bool"
        if words == "bool"
        else "names"
        if words.startswith("list")
        else {"int": "n", "float": "x"}.get(words, "text")
    )


@dataclass
class TaskFile:
    """Facts about a task from its source."""

    families: tuple[str, ...]
    first: str | None
    arguments: str


def tasks() -> dict[str, TaskFile]:
    """Map the name of each task to the facts of its file, without importing it."""
    classes = _classes()
    found = {}
    for path in sorted(TASKS.glob("[a-z]*.py")):
        own = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        task = next((node.name for node in reversed(own) if _value(classes, node.name, "families")), None)
        if task is not None:
            families, first = _value(classes, task, "families"), _value(classes, task, "first")
            found[path.stem] = TaskFile(families, first, _value(classes, task, "Arguments") or "TaskArguments")
    return found


def task_flags(task: str) -> Iterator[Flag]:
    """Yield the flags that a task adds to the shared ones or changes."""
    classes, seen = _classes(), dict[str, Flag]()
    for name in reversed(list(_ancestors(classes, tasks()[task].arguments))):
        for node in classes[name].body:
            call = node.value if isinstance(node, ast.AnnAssign) else None
            if isinstance(node, ast.AnnAssign) and isinstance(call, ast.Call) and isinstance(node.target, ast.Name):
                default, text = (ast.literal_eval(part) for part in call.args)
                seen[node.target.id] = Flag(node.target.id, _kind(ast.unparse(node.annotation)), default, text)
    yield from seen.values()


def _classes() -> dict[str, ast.ClassDef]:
    """All classes in the folder of the tasks, by name."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in sorted(TASKS.glob("*.py")))
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _ancestors(classes: dict[str, ast.ClassDef], name: str) -> Iterator[str]:
    """Yield a class and its bases in this folder, nearest first."""
    if name in classes:
        yield name
        for base in classes[name].bases:
            yield from _ancestors(classes, ast.unparse(base).rpartition(".")[2])


def _value(classes: dict[str, ast.ClassDef], name: str, wanted: str) -> Any:
    """Value of the attribute ``wanted`` in a class or its bases: a constant, a tuple of constants, or the name of a class."""
    for each in _ancestors(classes, name):
        for node in classes[each].body:
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AnnAssign):
                targets = [node.target]
            else:
                continue
            if any(isinstance(target, ast.Name) and target.id == wanted for target in targets):
                value = node.value
                if isinstance(value, ast.Constant):
                    return value.value
                if isinstance(value, ast.Name):
                    return value.id
                if isinstance(value, ast.Tuple) and all(isinstance(element, ast.Constant) for element in value.elts):
                    return ast.literal_eval(value)
    return None
