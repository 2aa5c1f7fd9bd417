"""``hf-hardattn env``."""

from __future__ import annotations

import json

import typer


def command() -> None:
    """Print versions and devices, for a bug report."""
    import importlib.metadata
    import platform

    import torch

    packages = ("hf-hardattn", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "huggingface_hub")
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": torch.get_num_threads(),
    }
    facts |= {name: importlib.metadata.version(name) for name in packages}
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    typer.echo(json.dumps(facts, indent=2))
