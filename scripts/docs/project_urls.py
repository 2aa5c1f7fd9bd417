"""Build hook: the addresses of the project, in the metadata of a wheel and an sdist.

    PROJECT_URL=https://github.com/OWNER/REPOSITORY python -m build

The address is that of the repository which a release is built in, as the release workflow gives it; without one, none is claimed.
"""

from __future__ import annotations

import os
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ProjectUrls(MetadataHookInterface):
    """Called by hatchling, as pyproject.toml says."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add ``urls`` to the project's metadata."""
        metadata["urls"] = project_urls(os.environ.get("PROJECT_URL", ""))


def project_urls(address: str) -> dict[str, str]:
    """The addresses by their names on PyPI; none without ``address``."""
    address = address.rstrip("/")
    if not address:
        return {}
    return {
        "Repository": address,
        "Documentation": f"{address}/tree/main/docs",
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
    }
