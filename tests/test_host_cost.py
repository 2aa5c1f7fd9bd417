"""Law 18: how many kernels a site may add to stock. Times are a benchmark (``hf-hardattn bench --suite host``), counts are a test."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from hf_hardattn.efficiency import host

ROWS = [(workload, row) for workload in host.WORKLOADS for row in workload.rows if row.most_kernels is not None]


@functools.cache
def added(workload: str) -> dict[str, Counter[str]]:
    return host.added_kernels(next(known for known in host.WORKLOADS if known.name == workload))


@pytest.mark.parametrize(("workload", "row"), ROWS, ids=[f"{workload.name}: {row.name}" for workload, row in ROWS])
def test_a_site_adds_no_more_kernels_than_its_limit(workload: host.HostWorkload, row: host.HostRow) -> None:
    found = added(workload.name)[row.name]
    assert found.total() <= row.most_kernels, f"{found.total():+} kernels: {dict(found.most_common())}"
