"""What is attached to a model now: its selectors, the sites that follow them, and the configuration of each site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import SiteConfig
from .family import Tower
from .plan import FOLLOWS
from .selector import running


def existing_selectors(towers: Mapping[str, Tower]) -> dict[str, Any]:
    """Return the selectors of a model by site, or PEFT's wrappers if it wrapped them."""
    found: dict[str, Any] = {}
    for tower in towers.values():
        for site, kind, layer in tower.sites():
            for pixels in (False, True) if kind == "inputs" else (False,):
                host, name = tower.host(kind, layer, pixels)
                selector = host._modules.get(name)
                if selector is not None:
                    found[site] = selector
    return found


def followed(towers: Mapping[str, Tower]) -> dict[str, str]:
    """Return a dict from each site that shares the choice of an earlier one to that site."""
    sites = ((tower, *site) for tower in towers.values() for site in tower.sites())
    found = {site: tower.host(kind, layer)[0].__dict__.get(FOLLOWS) for tower, site, kind, layer in sites}
    return {site: leader for site, leader in found.items() if leader is not None}


def site_configs(towers: Mapping[str, Tower]) -> dict[str, SiteConfig]:
    """Return the configuration of every site that selects, including those that share an earlier choice."""
    own = {site: running(selector).config for site, selector in existing_selectors(towers).items()}
    return {**own, **{site: own[leader] for site, leader in followed(towers).items()}}
