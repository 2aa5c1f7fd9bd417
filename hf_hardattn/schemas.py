"""Versions of the saved configuration: what an older one meant by what it did not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import registry
from .errors import HardAttentionError, shown

SCHEMA_VERSION = 3  # 1 wrote counts and ratios as bare numbers, 2 knew no "auto" scorer; both are still read
# What a configuration of schema 1 or 2 meant where it named nothing.
_FORMER_DEFAULTS: dict[str, Any] = {"scorer": "linear", "anneal": 0}


def with_former_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with the defaults that fields and estimators had in its schema, so that it keeps its meaning."""
    version = data.get("schema_version", SCHEMA_VERSION)
    if version == SCHEMA_VERSION:
        return dict(data)
    # a recipe sets what stands at today's default
    former = {name: value for name, value in _FORMER_DEFAULTS.items() if name != "anneal" or data.get("recipe") is None}
    data = {**former, **data}
    completed = _completed({"estimator": "simple", **data}, version)
    sites = data.get("sites")
    if isinstance(sites, Mapping):
        named = {site: value for site, value in sites.items() if isinstance(value, Mapping)}
        inherited = completed["estimator"]
        completed["sites"] = {
            **sites,
            **{
                site: _completed({"estimator": inherited, **value}, version)
                for site, value in named.items()
                if {"estimator", "estimator_options"} & value.keys()
            },
        }
    return completed


def _completed(fields: Mapping[str, Any], version: int) -> dict[str, Any]:
    name, options = fields.get("estimator"), fields.get("estimator_options", {})
    # what is no name or no dict is refused later, by name
    if not isinstance(name, str) or not isinstance(options, Mapping) or name not in registry.names("estimators"):
        return dict(fields)
    completed = registry.load("estimators", name).saved_options(options, version)
    return {**fields, "estimator_options": completed} if completed or "estimator_options" in fields else dict(fields)


def check_schema_version(version: Any) -> None:
    """Raise ``HardAttentionError`` unless ``version`` is one that this release reads."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise HardAttentionError(
            f"schema_version={shown(version)} is no version; it is an int from 1 to {SCHEMA_VERSION}. Leave it out."
        )
    if version > SCHEMA_VERSION:
        raise HardAttentionError(
            f"schema_version={shown(version)} is newer than this hf_hardattn knows ({SCHEMA_VERSION}); "
            "a newer release wrote this configuration. Upgrade with: pip install -U hf-hardattn"
        )
