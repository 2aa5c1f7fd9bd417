"""Summarise a finished run: a table of its measurements, and what to do next."""

from __future__ import annotations

import shlex
from typing import Any


def summarise(results: dict[str, Any], folder: str) -> str:
    """Return the text that is printed at the end of a run.

    Args:
        results: content of ``results.json``. folder: folder of that file.
    """
    metrics: dict[str, dict[str, Any]] = results.get("metrics") or {}
    lines = []
    if not metrics:
        lines.append(
            "no validation data: nothing was measured. Specify it with --validation_dir, --validation_file or --validation_fraction."
        )
    else:
        names = [key for key, value in next(iter(metrics.values())).items() if isinstance(value, (int, float))]
        width = max(map(len, names))
        lines.append(f"{'':{width}}" + "".join(f"{mode:>12}" for mode in metrics))
        for name in names:
            lines.append(
                f"{name:{width}}" + "".join(f"{metrics[mode].get(name, float('nan')):>12.6g}" for mode in metrics)
            )
        for site, ratio in (metrics.get("hard", {}).get("kept_ratio") or {}).items():
            lines.append(f"kept at {site}: {ratio:.1%}")
    quoted = shlex.quote(folder)
    lines += [f"results: {folder}/results.json"]
    if results.get("hard_attention") and "train" in results:
        lines.append("next:")
        if "video" not in results["task"]:  # reports do not show videos
            lines.append(f"  hf-hardattn explain {quoted} --input FILE   (what it keeps)")
        lines += [
            f"  hf-hardattn card {quoted}   (its model card)",
            "  the same command with --scorer random and another --output_dir: what random selection reaches",
        ]
    return "\n".join(lines)
