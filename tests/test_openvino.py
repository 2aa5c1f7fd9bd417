"""Hard models in OpenVINO, by Transformers' own exporter: the tower that is the whole model, and one inside it."""

from __future__ import annotations

import pytest
import torch
from examples import build
from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

import hf_hardattn

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize(
    ("family", "head", "site"),
    [
        ("vit", "ViTForImageClassification", "vision.tokens.0"),
        ("dinov2", "Dinov2Model", "vision.inputs"),
        ("bert", "BertModel", "text.tokens.1"),
        ("t5", "T5EncoderModel", "encoder.tokens.0"),
    ],
)
def test_the_exported_model_says_the_same(family, head, site):
    example = build(family, head)
    model = hf_hardattn.apply(example.model.eval(), {"sites": [site], "budget": 3})
    batch = {
        name: example.batch[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in example.batch
    }
    with torch.no_grad():
        expected = model(**batch)[0]
    exported = OpenVINOExporter().export(model, dict(batch), config=OpenVINOConfig())
    # on a processor with matrix units OpenVINO computes in bfloat16 unless it is told not to
    compiled = openvino.compile_model(exported.program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled({name: value.numpy() for name, value in batch.items()})[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
