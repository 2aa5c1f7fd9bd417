"""The fields of a site's configuration: their valid values and their JSON form.

``read_field`` converts a value from a user or a file to the form that a configuration stores, or refuses it. ``write_field`` converts
that form to JSON, in which a count and a ratio cannot be mistaken for each other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from .amounts import is_number
from .budget import read_budget, write_budget
from .errors import HardAttentionError, shown, unknown
from .options import Range, check_json
from .schedules import read_schedule, write_schedule

EXECUTIONS = ("auto", "gathered", "masked")
# Outside 1e-6 to 1e6, float32 can no longer sum scores divided by a temperature, or losses multiplied by a weight.
TEMPERATURE, PROBABILITY, WEIGHT = Range(1e-6, 1e6), Range(0, 1), Range(0, 1e6)
Reader = Callable[[str, Any, str], Any]


def _name(name: str, value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise HardAttentionError(
            f"{name}={shown(value)} is not a name at {shown(where)}; use a string of at most 200 characters. "
            "`hf-hardattn list` shows the names."
        )
    return value


def _options(name: str, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise HardAttentionError(
            f"{name}={shown(value)} is not a dict at {shown(where)}; use a dict of keyword options."
        )
    for option, setting in value.items():
        if not isinstance(option, str):
            raise HardAttentionError(
                f"{name} has the key {shown(option)} at {shown(where)}; the names of options are strings."
            )
        check_json(option, setting, f"{name} of {shown(where)}")
    return copy.deepcopy(dict(value))


def _budget(name: str, value: Any, where: str) -> Any:
    return read_budget(value, where)


def _scheduled(numbers: Range, rule: str) -> Reader:
    """Return a reader of a number or a schedule within ``numbers``; ``rule`` describes that range in the error message."""

    def read(name: str, value: Any, where: str) -> Any:
        value = read_schedule(value, f"{where}, {name}")
        for number in (value["start"], value["end"]) if isinstance(value, dict) else (value,):
            if number not in numbers:
                raise HardAttentionError(f"{name}={shown(value)} is out of range at {shown(where)}; {rule}, {numbers}.")
        return value

    return read


def _backward_temperature(name: str, value: Any, where: str) -> Any:
    if value is None or isinstance(value, str) and value == "adaptive":
        return value
    if isinstance(value, str):
        raise HardAttentionError(
            f"{name}={shown(value)} is not a temperature at {shown(where)}; use a number, a schedule, 'adaptive', or None "
            "for that of the selection."
        )
    return _scheduled(TEMPERATURE, "it must stay > 0")(name, value, where)


def _anneal(name: str, value: Any, where: str) -> Any:
    if value is not None and (not is_number(value) or value not in PROBABILITY):
        raise HardAttentionError(
            f"{name}={shown(value)} is out of range at {shown(where)}; it is a share of the training, {PROBABILITY}, or None for the "
            "estimator's default."
        )
    return value


def _weight(name: str, value: Any, where: str) -> Any:
    if not is_number(value) or value not in WEIGHT:
        raise HardAttentionError(
            f"{name}={shown(value)} is out of range at {shown(where)}; a loss weight is a number >= 0, {WEIGHT}."
        )
    return value


def choice(options: Mapping[bool | None, str]) -> Reader:
    """Return a reader of True, False or None, as far as ``options`` contains them; its values explain what they mean."""

    def read(name: str, value: Any, where: str) -> Any:
        # compare by identity: 1 == True, and "no" is truthy
        if not any(value is option for option in options):
            meanings = [f"{option} ({meaning})" for option, meaning in options.items()]
            raise HardAttentionError(
                f"{name}={shown(value)} is not a valid value at {shown(where)}; use {', '.join(meanings[:-1])} or {meanings[-1]}."
            )
        return value

    return read


def _execution(name: str, value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in EXECUTIONS:
        raise unknown(name, value, EXECUTIONS, where)
    return value


temperature = _scheduled(TEMPERATURE, "it must stay > 0")
probability = _scheduled(PROBABILITY, "it is a probability, in [0, 1]")
scheduled_weight = _scheduled(WEIGHT, "a loss weight is a number >= 0")

READERS: dict[str, Reader] = {
    "budget": _budget,
    "anneal": _anneal,
    "scorer": _name,
    "scorer_options": _options,
    "estimator": _name,
    "estimator_options": _options,
    "baseline": _name,
    "baseline_options": _options,
    "temperature": temperature,
    "backward_temperature": _backward_temperature,
    "exploration": probability,
    "soft_rate": probability,
    "entropy_weight": scheduled_weight,
    "score_function_weight": _weight,
    "per_head": choice({True: "each head selects", False: "heads share one selection"}),
    "share_selection": choice({True: "layers share one selection", False: "each layer selects"}),
    "execution": _execution,
    "pack": choice({None: "where the host knows the counts", True: "always", False: "never"}),
}


def read_field(name: str, value: Any, where: str) -> Any:
    """Return the value of a site's field in the form that a configuration stores.

    Args:
        name: a key of ``READERS``. value: from Python or JSON. where: site or pattern, for the error message.

    Raises:
        HardAttentionError: if the field does not exist, or the value has a wrong type or is out of range.
    """
    if name not in READERS:
        raise unknown("site field", name, READERS, where)
    return READERS[name](name, value, where)


def write_field(name: str, value: Any) -> Any:
    """Return the JSON form of a field; containers are copied."""
    if name == "budget":
        return write_budget(value)
    if name.endswith("_options"):
        return copy.deepcopy(value)
    return write_schedule(value)


def is_configuration(value: Any) -> bool:
    """Return whether ``value`` is a ``HardAttentionConfig``, even one from another copy of this package."""
    if value is None or isinstance(
        value, dict
    ):  # needed for the compiler as well, which cannot inspect the bases of a class
        return False
    return any(cls.__name__ == "HardAttentionConfig" for cls in type(value).__mro__) and hasattr(value, "to_dict")
