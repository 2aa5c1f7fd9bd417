"""Transformers' own common model tests, on stock and on hard models."""

from __future__ import annotations

from . import read


def table() -> str:
    found = read("common_tests.json")
    lines = ["| models | classes | tests passed, stock | tests passed, hard | failed by stock | failed by hard only |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for name, suite in found["suites"].items():
        classes = ", ".join(f"`{head}`" for head in suite["classes"])
        lost = ", ".join(f"`{test}`" for test in suite["failed_hard_only"]) or "none"
        lines.append(
            f"| {name} | {classes} | {suite['passed']} | {suite['passed_hard']} | {len(suite['failed'])} | {lost} |"
        )
    return "\n".join([*lines, "", f"Transformers {found['transformers']}, PyTorch {found['torch']}."])
