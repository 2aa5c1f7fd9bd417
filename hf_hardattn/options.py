"""Options of scorers, estimators and baselines, checked against the declarations in their constructors.

A constructor declares its options by annotations::

    def __init__(self, draws: Annotated[int, Range(2, 1000)] = 100, noise: Literal["gumbel", "normal"] = "gumbel"): ...

They determine which options exist, which types and numbers these accept, and the error for any other value. Supported types are bool,
int, float (which includes int), str, list, dict, None, ``Literal``, and unions of them. An option with another annotation accepts any
JSON.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from .errors import HardAttentionError, shown, unknown

MOST_CHARACTERS, MOST_ITEMS, MOST_DEPTH = 1000, 10_000, 8  # of an option
_NAMES = {
    "list": "a list",
    "dict": "a dict",
    "bool": "True or False",
    "int": "an int",
    "float": "a number",
    "str": "a string",
    "none": "None",
    "json": "JSON",
}
# A bool is also an int, so it is tested first.
_KINDS: dict[type, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    list: "list",
    tuple: "list",
    dict: "dict",
    type(None): "none",
}


@dataclass(frozen=True)
class Range:
    """The range of numbers that an option accepts, for use inside ``Annotated``.

    Attributes:
        low, high: smallest and largest number.
        note: a sentence for the error message: the reason, or what to use instead.
        open_low, open_high: ``low`` or ``high`` itself is excluded.
    """

    low: float
    high: float
    note: str = ""
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{end:g}" if isinstance(end, float) else str(end) for end in (self.low, self.high))
        return f"{'>' if self.open_low else '>='} {low} and {'<' if self.open_high else '<='} {high}"


Width = Annotated[int, Range(1, 8192, "It is the width of a layer.")]
Weight = Annotated[float, Range(0, 1e6, "A loss weight is >= 0.")]
Positive = Annotated[float, Range(1e-6, 1e6, "It is > 0.")]
_DEFAULT_RANGES = {"int": Range(-(2**53), 2**53), "float": Range(-1e30, 1e30)}  # exact in JSON; finite in float32


@dataclass(frozen=True)
class Rule:
    """The values that one option accepts.

    Attributes:
        kinds: any of ``bool``, ``int``, ``float``, ``str``, ``list``, ``dict``, ``none``, ``json``.
        choices: values that are listed one by one.
        range: range of its numbers; None accepts numbers that are exact in JSON and finite in float32.
        required: the option has no default.
    """

    kinds: frozenset[str] = frozenset()
    choices: tuple[Any, ...] = ()
    range: Range | None = None
    required: bool = False

    @classmethod
    def of(cls, annotation: Any) -> Rule:
        """Create the rule from an annotation."""
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            ranges = [extra for extra in parts[1:] if isinstance(extra, Range)]
            return replace(cls.of(parts[0]), range=ranges[0]) if ranges else cls.of(parts[0])
        if origin is Literal:
            return cls(choices=parts)
        if origin in (Union, types.UnionType):
            rules = [cls.of(part) for part in parts]
            kinds = frozenset(kind for rule in rules for kind in rule.kinds)
            choices = tuple(choice for rule in rules for choice in rule.choices)
            return cls(kinds, choices, next((rule.range for rule in rules if rule.range), None))
        plain = origin or annotation  # list for list[int]
        return cls(frozenset({_KINDS.get(plain, "json") if isinstance(plain, type) else "json"}))

    def __str__(self) -> str:
        names = []
        for kind in sorted(self.kinds):
            numbers = f" {self.range}" if self.range and kind in ("int", "float") else ""
            names.append(_NAMES[kind] + numbers)
        return " or ".join([*map(shown, self.choices), *names])

    def check(self, name: str, value: Any, where: str) -> None:
        """Raise ``HardAttentionError`` unless the option ``name`` accepts ``value``; ``where`` is the place for the message."""
        if any(type(value) is type(choice) and value == choice for choice in self.choices):
            return
        kind = self._accepted_as(value)
        if kind is None and self.choices and isinstance(value, str):
            raise unknown(name, value, [choice for choice in self.choices if isinstance(choice, str)], where)
        if kind is None:
            raise HardAttentionError(f"{name}={shown(value)} has the wrong type at {where}; it must be {self}.")
        if kind in _DEFAULT_RANGES:
            numbers = self.range or _DEFAULT_RANGES[kind]
            if value not in numbers:
                rule, note = replace(self, range=numbers), f" {numbers.note}" if numbers.note else ""
                raise HardAttentionError(f"{name}={shown(value)} is out of range at {where}; it must be {rule}.{note}")
        else:
            check_json(name, value, where)

    def _accepted_as(self, value: Any) -> str | None:
        """Return the kind under which the option accepts ``value``; None if it does not."""
        own = next((kind for known, kind in _KINDS.items() if isinstance(value, known)), "json")
        if own == "int" and "int" not in self.kinds and "float" in self.kinds:
            return "float"
        return own if own in self.kinds else "json" if "json" in self.kinds else None


def check_json(name: str, value: Any, where: str) -> None:
    """Raise ``HardAttentionError`` unless ``value`` is JSON of a reasonable size with finite numbers only."""
    pending, seen = [(value, 0)], 0
    while pending:
        item, depth = pending.pop()
        seen += 1
        problem = _json_problem(item, depth) or (f"holds more than {MOST_ITEMS:,} items" if seen > MOST_ITEMS else "")
        if problem:
            raise HardAttentionError(
                f"{name}={shown(value)} at {where} {problem}; an option is JSON: names, finite numbers, lists and objects of them."
            )
        if isinstance(item, (dict, list)):
            inner = item.values() if isinstance(item, dict) else item
            pending += [(child, depth + 1) for child in list(inner)[: MOST_ITEMS + 1]]


def _json_problem(item: Any, depth: int) -> str:
    """Return why a single item is not acceptable JSON, as the end of a sentence; empty if it is."""
    if depth > MOST_DEPTH:
        return f"nests deeper than {MOST_DEPTH} levels"
    if isinstance(item, str):
        return f"has {len(item):,} characters, more than {MOST_CHARACTERS:,}" if len(item) > MOST_CHARACTERS else ""
    if isinstance(item, dict):
        return "" if all(isinstance(key, str) for key in item) else "has a key that is not a string"
    if isinstance(item, float):
        return "" if math.isfinite(item) else "holds a number that is not finite"
    if isinstance(item, int):
        return "" if abs(item) <= 2**53 else "holds an int beyond 2**53, which JSON cannot represent exactly"
    return "" if item is None or isinstance(item, list) else f"holds a {type(item).__name__}"


class Configurable:
    """Mixin for classes whose constructor takes options from a configuration; it checks them before ``__init__`` runs.

    Class attributes:
        kind: ``scorer``, ``estimator`` or ``baseline``.
        built_with: arguments of the constructor that are not options, because the model supplies them.
    """

    kind: ClassVar[str] = ""
    built_with: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Copying and unpickling pass no arguments, so there is nothing to check.
        names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"] if args else []
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        options = {name: value for name, value in given.items() if name in option_rules(cls)}
        module = cls.__module__
        own = module.rpartition(".")[2] if module.startswith(f"{__package__}.") else cls.__name__
        _check_values(cls, options, f"{cls.kind} {own}")
        return super().__new__(cls)

    @classmethod
    def check_together(cls, options: Mapping[str, Any], where: str) -> None:
        """Raise ``HardAttentionError`` if options are valid by themselves but incompatible. Subclasses override this if needed.

        Args:
            options: the given options. where: the place, for the error message.
        """


_known_rules: WeakKeyDictionary[type, dict[str, Rule]] = WeakKeyDictionary()


def option_rules(member: type[Configurable]) -> dict[str, Rule]:
    """Return the options of a class by name; ``*args`` and ``**kwargs`` are not options.

    A constructor with ``**kwargs`` passes them on, so the options of the class it derives from are its options too.
    """
    if member not in _known_rules:
        _known_rules[member] = _read_rules(member)
    return _known_rules[member]


def _read_rules(member: type[Configurable]) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for cls in member.__mro__:
        if not issubclass(cls, Configurable) or "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        hints = _hints(cls)
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                rule = Rule.of(hints.get(parameter.name, Any))
                rules.setdefault(parameter.name, replace(rule, required=parameter.default is parameter.empty))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return {name: rule for name, rule in rules.items() if name not in member.built_with}


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(vars(cls)["__init__"], include_extras=True)
    except Exception:  # noqa: BLE001 - a plug-in's annotations may name what exists for type checkers only
        return {}


def check_options(member: type[Configurable], name: str, options: Mapping[str, Any], where: str) -> None:
    """Raise ``HardAttentionError`` unless the constructor of ``member`` accepts ``options``.

    Args:
        member: a scorer, estimator or baseline. name: its registered name.
        options: by name, from a configuration.
        where: the site or pattern, for the error message.
    """
    rules = option_rules(member)
    for option in options:
        if option not in rules:
            what = f"option of {member.kind} '{name}':"
            raise unknown(what, option, rules, f"{where}, {member.kind}_options")
    place = f"{member.kind} {name} ({member.kind}_options of {shown(where)})"
    for option, rule in rules.items():
        if rule.required and option not in options:
            raise HardAttentionError(f"option {option!r} is missing at {place}; it has no default. Set it to {rule}.")
    _check_values(member, options, place)


def _check_values(member: type[Configurable], options: Mapping[str, Any], place: str) -> None:
    rules = option_rules(member)
    for option, value in options.items():
        rules[option].check(option, value, place)
    member.check_together(options, place)
