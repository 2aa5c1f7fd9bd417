"""Write results of version 1 for tests/test_version1.py: outputs and gradients of some cases, and three checkpoints with their logits.

    python scripts/research/make_version1_fixtures.py                  # runs commit 761c521 in a process of its own

The weights of the cases are drawn by name (version_cases.py), so the fixtures contain only results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare_versions import checkout, environment_of

VERSION1 = "761c521"
FOLDER = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "version1"
# every kind of budget that a file of schema 1 can contain
HARD: dict[str, Any] = {
    "sites": {
        "vision.inputs": {"budget": 12, "scorer": "mlp"},
        "vision.self.0": {"budget": 1.0},
        "vision.tokens.0": {"budget": {"start": 1.0, "end": 0.7, "steps": 10}},
        "vision.self.1": {"budget": "threshold:0.5"},
    },
    "estimator": "straight_through",
}
SELECTOR_HARD: dict[str, Any] = {"sites": ["vision.inputs", "vision.tokens.0"], "budget": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=VERSION1)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--in-this-process", action="store_true", help="use the hf_hardattn that can be imported")
    args = parser.parse_args()
    if args.in_this_process:
        write_cases(args.output)
        write_checkpoints(args.output / "checkpoints")
        return
    with tempfile.TemporaryDirectory() as folder:
        package = checkout(args.commit, Path(folder))
        command = [sys.executable, __file__, "--in-this-process", "--output", str(args.output.resolve())]
        subprocess.run(command, env=environment_of(package), check=True)


def write_cases(folder: Path) -> None:
    """Write one file per family, whose metadata holds the names of the gradients of each case."""
    import torch
    from safetensors.torch import save_file
    from version_cases import families, fixture_cases, run_case, summarise

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for family in families():
        tensors: dict[str, torch.Tensor] = {}
        metadata: dict[str, str] = {}
        for case in fixture_cases():
            if case.family == family:
                summary, names = summarise(run_case(case))
                tensors |= {f"{case.name}|{name}": value.contiguous() for name, value in summary.items()}
                if names:
                    metadata[case.name] = json.dumps(names)
        save_file(tensors, folder / f"{family}.safetensors", metadata=metadata)


def write_checkpoints(folder: Path) -> None:
    """Write a soft base model, a full hard model, selectors only, a LoRA adapter with its selectors, and the logits of each.

    Selectors and adapter refer to their base model as ``base``, the folder next to them.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import ViTForImageClassification
    from version_cases import MODELS, initialise_backbone, initialise_selectors, uniform, vit_config

    import hf_hardattn

    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    pixels = MODELS["vit"][1](True)["pixel_values"]

    def soft() -> Any:
        model = ViTForImageClassification(vit_config(hidden_size=12, num_hidden_layers=2, intermediate_size=17))
        initialise_backbone(model)
        return model.eval()

    def hard(config: dict[str, Any]) -> Any:
        model = hf_hardattn.apply(soft(), config)
        initialise_selectors(model)
        return model

    base, whole, selectors, inner = soft(), hard(HARD), hard(SELECTOR_HARD), hard(SELECTOR_HARD)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["selector", "input_selector"])
    adapter = get_peft_model(inner, lora).eval()
    with torch.no_grad():  # a new adapter changes nothing
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(uniform(name, parameter.shape, 0.5))
    base.save_pretrained(folder / "base")
    hf_hardattn.save(whole, folder / "whole")
    hf_hardattn.save(selectors, folder / "selectors", selectors_only=True, base_model="base")
    hf_hardattn.save(adapter, folder / "adapter", base_model="base")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    models = {"base": base, "whole": whole, "selectors": selectors, "adapter": adapter}
    with torch.no_grad():
        logits = {name: model(pixel_values=pixels).logits for name, model in models.items()}
    save_file(logits, folder / "logits.safetensors")


if __name__ == "__main__":
    main()
