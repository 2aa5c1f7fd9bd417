"""When selection pays and when it does not: rows of the benchmarks on a CPU and on a GPU, losses among them."""

from __future__ import annotations

from typing import Any

from . import read, version

# results file -> (group, row) pairs, as the benchmark names them
SHOWN = {
    "bench/targets.json": [
        ("ViT-B/16 384 px, float32", "vision.tokens.0 keep .25"),
        ("ViT-B/16 384 px, float32", "vision.tokens.2/5/8 keep .7 each"),
        ("T5-base encoder 2048 tokens, float32", "encoder.tokens.0 keep .25"),
        ("T5-base decoding 64 tokens over 8192, float32", "decoder.cross.* keep .1"),
    ],
    "bench/gpu.json": [
        ("ViT-B/16 384 px batch 64, float32", "vision.tokens.0 keep .25"),
        ("T5-base encoder 2048 tokens batch 16, bfloat16", "encoder.tokens.0 keep .25"),
        ("ViT-B/16 384 px batch 1, bfloat16", "vision.tokens.0 keep .25"),
        ("ViT-B/16 384 px batch 64, bfloat16", "vision.self.* keep .25"),
    ],
}


def table() -> str:
    lines = ["| device | model and input | selection | time, original → hard | speed-up |", "|---|---|---|---|---|"]
    places = []
    for name, shown in SHOWN.items():
        results = read(name)
        machine = results["machine"]
        place = "GPU" if machine["device"] == "cuda" else "CPU"
        threads = f", {machine['threads']} threads" if place == "CPU" else ""
        places.append(f"{place}: {machine['processor']}{threads}, {version(results)}")
        lines += [_row(place, results, group, row) for group, row in shown]
    return "\n".join([*lines, "", f"Random weights, medians of interleaved rounds. {'; '.join(places)}."])


def _row(place: str, results: dict[str, Any], group_name: str, name: str) -> str:
    group = next((group for group in results["groups"] if group["name"] == group_name), {"rows": {}})
    if name not in group["rows"]:
        return f"| {place} | {group_name} | `{name}` | not measured | |"
    row, original = group["rows"][name], group["rows"]["stock"]
    before, after = (1e3 * found["seconds"]["median"] for found in (original, row))
    speed = row["against_stock"]["median"]
    verdict = f"**{speed:.2f} ×**" if speed >= 1.05 else f"{speed:.2f} × (slower)" if speed < 0.95 else f"{speed:.2f} ×"
    digits = 0 if before >= 100 else 1
    return f"| {place} | {group_name} | `{name}` | {before:,.{digits}f} → {after:,.{digits}f} ms | {verdict} |"
