"""Versions of the saved configuration, and the defaults that older versions had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import registry
from .errors import HardAttentionError, shown

SCHEMA_VERSION = 3  # 1 wrote counts and ratios as bare numbers, 2 had no "auto" scorer; both are still read
# The defaults of schemas 1 and 2, where they differ from the present ones.
_FORMER_DEFAULTS: dict[str, Any] = {"scorer": "linear", "anneal": 0}


def with_former_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults that fields and estimators had in the schema of a saved configuration, so that it keeps its meaning."""
    version = data.get("schema_version", SCHEMA_VERSION)
    if version == SCHEMA_VERSION:
        return dict(data)
    # a recipe sets the fields that have the present default
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
    # invalid names and options are refused later, with the name of the field
    if not isinstance(name, str) or not isinstance(options, Mapping) or name not in registry.names("estimators"):
        return dict(fields)
    completed = registry.load("estimators", name).saved_options(options, version)
    return {**fields, "estimator_options": completed} if completed or "estimator_options" in fields else dict(fields)


def check_schema_version(version: Any) -> None:
    """Raise ``HardAttentionError`` unless ``version`` is one that this release reads."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise HardAttentionError(
            f"schema_version={shown(version)} is not a valid version; it must be an int from 1 to {SCHEMA_VERSION}. Leave it out."
        )
    if version > SCHEMA_VERSION:
        raise HardAttentionError(
            f"schema_version={shown(version)} is newer than this hf_hardattn supports ({SCHEMA_VERSION}); "
            "a newer release wrote this configuration. Upgrade with: pip install -U hf-hardattn"
        )
