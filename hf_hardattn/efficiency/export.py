"""Export of hard models with a fixed number of kept positions by ``torch.export`` and to ONNX, and calls in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import HardAttentionError, missing_extra
from ..recording import selectors


def export_onnx(model: PreTrainedModel, batch: Mapping[str, Tensor], path: Path) -> Path:
    """Write ``path`` with Transformers' own exporter, at the shapes of ``batch``.

    Raises:
        HardAttentionError: the number of kept positions depends on the scores, so there is no fixed shape.
        ImportError: the extra ``export`` is not installed.
    """
    check(model)
    try:
        import onnx_ir
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    except ImportError:
        raise missing_extra("onnxscript", "export", "ONNX export") from None
    exported = OnnxExporter().export(model.eval(), dict(batch), config=OnnxConfig())
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(exported.program, str(path))
    return path


def export_program(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """Export a model by ``torch.export`` at the shapes of ``batch``, with Transformers' own exporter; raises like ``export_onnx``."""
    check(model)
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    program: torch.export.ExportedProgram = (
        DynamoExporter().export(model.eval(), dict(batch), config=DynamoConfig()).program
    )
    return program


def onnx_call(path: Path, batch: Mapping[str, Tensor], threads: int = 0) -> partial[list[Any]]:
    """Return a call of the exported model in onnxruntime, which returns its outputs as arrays."""
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "export", "running an ONNX model") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {node.name: batch[node.name].numpy() for node in session.get_inputs()}
    return partial(session.run, None, feed)


def check(model: PreTrainedModel) -> None:
    """Raise if the number of kept positions depends on the scores."""
    for site, selector in selectors(model).items():
        if selector.data_dependent:
            raise HardAttentionError(
                f"budget={selector.config.budget!r} at '{site}' lets the scores decide how many positions are kept; an exported model has fixed shapes. "
                "Use an int or a ratio."
            )
