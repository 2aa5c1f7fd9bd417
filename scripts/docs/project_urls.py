"""Build hook that adds the URLs of the project to the metadata of a wheel and an sdist.

    PROJECT_URL=https://github.com/OWNER/REPOSITORY python -m build

The URL is that of the repository that a release is built in, set by the release workflow; without it, the metadata contains no URLs.
"""

from __future__ import annotations

import os
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ProjectUrls(MetadataHookInterface):
    """Metadata hook that hatchling calls, as configured in pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add ``urls`` to the project's metadata."""
        metadata["urls"] = project_urls(os.environ.get("PROJECT_URL", ""))


def project_urls(address: str) -> dict[str, str]:
    """Return the URLs by their names on PyPI; empty without ``address``."""
    address = address.rstrip("/")
    if not address:
        return {}
    return {
        "Repository": address,
        "Documentation": f"{address}/tree/main/docs",
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
    }
