"""Law 11: in bf16 and fp16 scores, gates and log-probabilities are fp32, and nothing is NaN at temperature 0.1."""

from __future__ import annotations

import pytest
import torch
from cases import ESTIMATORS, Example, cases, hard, run, train_loss

import hf_hardattn


def cast(example, dtype):
    batch = {n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in example.batch.items()}
    return Example(example.model.to(dtype), batch)


CASES = cases(("linear", "query_key"), ESTIMATORS, (2, 0.5, "top_p:0.6", 1.0))
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("case", "dtype"), [(case, DTYPES[n % 2]) for n, case in enumerate(CASES)], ids=str)
def test_half_precision_trains_and_evaluates(case, dtype):
    example = cast(hard(case, temperature=0.1, entropy_weight=0.1), dtype)
    for mode in ("gathered", "masked"):
        with hf_hardattn.execution(example.model, mode):
            assert all(v.isfinite().all() for v in run(example).values())
    with hf_hardattn.record(example.model) as selections:
        loss = train_loss(example)
    (loss * 2**-10).backward()  # as a gradient scaler keeps fp16 in range
    assert loss.isfinite() and (selections or case.estimator == "soft")  # which selects nothing
    for selection in selections:
        for value in (selection.scores, selection.gates, selection.log_prob, selection.entropy):
            assert value is None or (value.dtype == torch.float32 and value.isfinite().all())
    for name, parameter in example.model.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
