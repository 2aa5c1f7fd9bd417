"""``hf-hardattn env``."""

from __future__ import annotations

import json
from typing import Any

import typer


def command() -> None:
    """Print versions, extras and devices, for a bug report."""
    import importlib.metadata
    import os
    import platform

    import torch

    packages = ("hf-hardattn", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "huggingface_hub")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor() or platform.machine(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    facts |= {name: _version(name) for name in packages}
    facts["cuda"] = torch.version.cuda
    facts["devices"] = [
        f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ] or ["cpu"]
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("hf-hardattn") or ():
        requirement, _, extra = line.partition("; extra == ")
        if extra and "hf-hardattn" not in requirement:
            name = requirement.split(">")[0].split("=")[0].split("[")[0].strip()
            extras.setdefault(extra.strip("'\" "), []).extend([] if _version(name) else [name])
    facts["extras"] = {
        extra: "installed" if not missing else f"missing: {', '.join(missing)}"
        for extra, missing in sorted(extras.items())
    }
    typer.echo(json.dumps(facts, indent=2))


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    """Return the name of the processor on Linux, or None."""
    from pathlib import Path

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
