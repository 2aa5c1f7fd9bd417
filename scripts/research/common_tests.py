"""Run Transformers' common model tests on stock models and on hard models that keep everything, and compare the failures.

    pip install parameterized
    pip download --no-binary transformers --no-deps transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    python scripts/research/common_tests.py transformers-5.23.0

The source distribution holds ``tests/test_modeling_common.py``, but not the tests of single models. Models and batches are therefore the
tiny ones of this repository's tests. A few tests that the file of a single model would have skipped fail for the stock model as well.
Writes results/common_tests.json.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import sys
import unittest
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

import hf_hardattn

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "results" / "common_tests.json"
sys.path.insert(0, str(ROOT / "tests"))

import examples  # noqa: E402

HARD = {"sites": ["*"], "budget": 1.0}
# name: family, classes of one configuration, further attributes that the tests need
SUITES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "dinov2": ("dinov2", ("Dinov2Model", "Dinov2ForImageClassification"), {"test_resize_embeddings": False}),
    "clip (images)": (
        "clip",
        ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        {"test_resize_embeddings": False},
    ),
    "clip (texts)": ("clip", ("CLIPTextModelWithProjection", "CLIPTextModel"), {}),
    "clip": (
        "clip",
        ("CLIPModel",),
        {"_is_composite": True, "test_resize_embeddings": False, "additional_model_inputs": ["pixel_values"]},
    ),
    "bert": (
        "bert",
        (
            "BertModel",
            "BertForMaskedLM",
            "BertForMultipleChoice",
            "BertForNextSentencePrediction",
            "BertForQuestionAnswering",
            "BertForSequenceClassification",
            "BertForTokenClassification",
        ),
        {},
    ),
    "bart": (
        "bart",
        (
            "BartModel",
            "BartForConditionalGeneration",
            "BartForSequenceClassification",
            "BartForQuestionAnswering",
        ),
        {"is_encoder_decoder": True},
    ),
    "llama": (
        "llama",
        (
            "LlamaModel",
            "LlamaForCausalLM",
            "LlamaForSequenceClassification",
            "LlamaForQuestionAnswering",
            "LlamaForTokenClassification",
        ),
        {},
    ),
}
LABELS = ("labels", "start_positions", "end_positions", "return_loss")


class Tester:
    """The tester of a model, with the attributes that the common tests need.

    Args:
        family: model family. head: the class whose configuration and batch are used. hard: whether the model has sites.
    """

    is_training, num_choices, num_masks, mask_length = True, 2, 3, 9

    def __init__(self, family: str, head: str, hard: bool):
        bart: Any = {"encoder_layers": 2, "decoder_attention_heads": 3}
        built = examples.build(family, head, **(bart if family == "bart" else {"num_hidden_layers": 2}))
        self.config: Any = type(built.model.config).from_dict(
            built.model.config.to_dict()
        )  # without fields added by a model
        # repeat the batch three times, because some tests fill a batch of fewer than seven rows with random ones
        self.batch = {name: torch.cat([value] * 3) for name, value in built.batch.items() if name not in LABELS}
        if family == "bart":  # one </s> in each row, and labels as long as the input
            self.batch["input_ids"][:, :-1].clamp_(min=2)
            self.batch["input_ids"][:, -1] = 1
            self.batch["decoder_input_ids"] = self.batch["input_ids"].clone()
        if hard:
            self.config.hard_attention = HARD
        if head == "CLIPModel":
            self.config.vision_config.num_hidden_layers = 2
        # start and end, for question answering heads; BART's head sets this in the configuration itself, and has three classes
        self.config.num_labels = 3 if family == "bart" else 2
        sizes = getattr(self.config, "text_config", self.config)
        self.hidden_size, self.num_hidden_layers = sizes.hidden_size, sizes.num_hidden_layers
        self.num_attention_heads = sizes.num_attention_heads
        self.batch_size = 9
        self.seq_length = self.encoder_seq_length = self.key_length = self._rows()
        if "decoder_input_ids" in self.batch:
            self.decoder_seq_length = self.decoder_key_length = self.batch["decoder_input_ids"].shape[1]
        if "pixel_values" in self.batch:
            images = getattr(self.config, "vision_config", self.config)
            self.image_size, self.patch_size = images.image_size, images.patch_size
        if head == "CLIPModel":
            self.vision_config, self.text_config = self.config.vision_config, self.config.text_config
            self.text_model_tester = Tester("clip", "CLIPTextModel", False)
            self.vision_model_tester = Tester("clip", "CLIPVisionModel", False)

    def _rows(self) -> int:
        ids = self.batch.get("input_ids")
        return 10 if ids is None else ids.shape[1]  # 3 x 3 patches and CLS

    def get_config(self) -> Any:
        """Return a copy of the configuration, which may be changed."""
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """Return copies of the configuration and a batch, which may be changed."""
        return self.get_config(), copy.deepcopy(self.batch)


def common_tests(folder: Path) -> type:
    """Import ``ModelTesterMixin`` of a source distribution, with stubs for the test folders that it does not contain."""
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = ModuleType(f"tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[f"tests.{name.split('.')[0]}"] = ModuleType(f"tests.{name.split('.')[0]}")
        sys.modules[module.__name__] = module
    sys.path.insert(0, str(folder))
    from tests.test_modeling_common import ModelTesterMixin  # type: ignore[import-not-found]

    return ModelTesterMixin  # type: ignore[no-any-return]


def outcomes(mixin: type, name: str, hard: bool, only: str) -> dict[str, str]:
    """Return for each test of a suite ``"passed"``, ``"skipped"`` or the last line of its error."""
    family, heads, facts = SUITES[name]

    def set_up(self: Any) -> None:
        torch.manual_seed(0)
        self.model_tester = Tester(family, heads[0], hard)

    classes = tuple(getattr(transformers, head) for head in heads)
    suite = type(f"{name}Test", (mixin, unittest.TestCase), {"setUp": set_up, "all_model_classes": classes, **facts})
    tests = [test for test in unittest.TestLoader().loadTestsFromTestCase(suite) if only in test.id()]
    found = {}
    for test in tests:
        result = unittest.TextTestRunner(io.StringIO()).run(test)
        failed = [text for _, text in (*result.failures, *result.errors)]
        outcome = "skipped" if result.skipped else "passed"
        if failed:
            outcome = failed[0].strip().splitlines()[-1]
            outcome = "skipped" if outcome.startswith("Skipped:") else outcome
        found[test.id().rpartition(".")[2]] = outcome
    return found


def compare(stock: dict[str, str], hard: dict[str, str]) -> dict[str, Any]:
    """Return how many tests pass, and which of them fail only for the hard model."""
    failed = {name for name, outcome in stock.items() if outcome not in ("passed", "skipped")}
    return {
        "passed": sum(outcome == "passed" for outcome in stock.values()),
        "passed_hard": sum(outcome == "passed" for outcome in hard.values()),
        "skipped": sum(outcome == "skipped" for outcome in stock.values()),
        "failed": {name: stock[name] for name in sorted(failed)},
        "failed_hard_only": {
            name: outcome
            for name, outcome in sorted(hard.items())
            if outcome not in ("passed", "skipped") and name not in failed
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an unpacked source distribution of Transformers")
    parser.add_argument("--only", default="", help="suites, separated by commas")
    parser.add_argument("--test", default="", help="only tests whose name contains this; nothing is written")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()  # logging stays on, because tests read it
    mixin = common_tests(arguments.folder.resolve())
    results = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"suites": {}}
    results |= {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "hf_hardattn": hf_hardattn.__version__,
    }
    for name in arguments.only.split(",") if arguments.only else SUITES:
        found = compare(*(outcomes(mixin, name, hard, arguments.test) for hard in (False, True)))
        print(name, json.dumps(found, indent=1), flush=True)
        results["suites"][name] = {"classes": SUITES[name][1], **found}
        if not arguments.test:
            OUTPUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
