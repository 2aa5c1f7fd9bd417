"""Wrap methods of other libraries once per process, even if several copies of this package are imported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

WRAPPERS = "_hard_attention_wrappers"  # attribute of the class: maps a method name to its wrapper


def wrap_method(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(method, self, *args, **kwargs)`` in place of a method or class method.

    A second copy of this package (vendored, or imported again by a notebook) replaces the first. Otherwise both would act on each
    other's configurations.
    """
    wrappers: dict[str, Any] = owner.__dict__.get(WRAPPERS, {})
    if name in wrappers:
        wrappers[name].around = around
        return
    held = owner.__dict__[name]
    method = held.__func__ if isinstance(held, classmethod) else held

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        function: Any = wrapper
        return function.around(method, *args, **kwargs)

    function: Any = wrapper
    function.around = around
    setattr(owner, WRAPPERS, {**wrappers, name: wrapper})
    setattr(owner, name, classmethod(wrapper) if isinstance(held, classmethod) else wrapper)
