"""Run two versions of the library on this machine, and compare every output and gradient bit by bit.

    python scripts/research/compare_versions.py --old 761c521                      # the working tree against that commit
    python scripts/research/compare_versions.py --old ../other --only vit,t5       # or against a checkout

Both versions run the same cases (version_cases.yaml) in separate processes, on one thread. The table has one row per block of cases. Cases
outside their tolerance are listed below it, and all cases are in the JSON. Exits with 1 if any case is outside its tolerance.

A difference is the largest absolute difference of a tensor, divided by its largest entry or by 1, whichever is larger. A gradient that is
None in one version counts as zeros.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).resolve().parent
CASES, DATA = HERE / "version_cases.py", HERE / "version_cases.yaml"
KINDS = ("loss", "outputs", "gradients")  # columns of the table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="folder of a checkout, or a commit of this repository")
    parser.add_argument("--new", default=".", help="the same (default: the working tree)")
    parser.add_argument("--only", help="families, separated by commas (default: all)")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare_versions.json"))
    args = parser.parse_args()
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    families = args.only.split(",") if args.only else list(data["families"])
    known: dict[str, str] = data["known"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs = {}
        for name, version in (("old", args.old), ("new", args.new)):
            package = checkout(version, folder / f"{name}_package")
            print(f"running the {name} version ({version})", file=sys.stderr, flush=True)
            runs[name] = run_version(package, families, folder / name)
        rows = [
            {**row, "known": reason_of(row["case"], known)}
            for family in families
            for row in compare_family(
                folder / "old", folder / "new", family, runs, float(data["families"][family]["tolerance"])
            )
        ]
    failed = [row for row in rows if not row["within"] and row["known"] is None]
    print(table(rows))
    print_cases("outside their tolerance", failed)
    print_cases("differ as intended", [row for row in rows if not row["within"] and row["known"] is not None])
    results = {
        "old": args.old,
        "new": args.new,
        "seconds": {name: run["seconds"] for name, run in runs.items()},
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} cases, {len(failed)} outside their tolerance; all of them: {args.output}")
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------------- running a version


def checkout(version: str, folder: Path) -> Path:
    """Return the folder with the package ``hf_hardattn`` of a version; a commit is unpacked to ``folder``."""
    if (Path(version) / "hf_hardattn").is_dir():
        return Path(version).resolve()
    archive = subprocess.run(["git", "archive", version, "hf_hardattn"], cwd=HERE.parents[1], capture_output=True)
    if archive.returncode:
        raise SystemExit(
            f"{version!r} is neither a folder with hf_hardattn/ nor a commit: {archive.stderr.decode().strip()}"
        )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as packed:
        packed.extractall(folder, filter="data")
    return folder


def environment_of(package: Path) -> dict[str, str]:
    """Return the environment of a process that imports the version in ``package``, on one thread and without a network."""
    own = {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **own}


def run_version(package: Path, families: list[str], output: Path) -> dict[str, Any]:
    """Run the cases of ``families`` with the version in ``package``; return the record of the process."""
    command = [sys.executable, str(CASES), "--output", str(output), "--only", ",".join(families)]
    subprocess.run(command, env=environment_of(package), check=True)
    run: dict[str, Any] = json.loads((output / "run.json").read_text(encoding="utf-8"))
    # otherwise an installed copy that comes first on the path would be compared with itself
    if Path(run["package"]).resolve() != (package / "hf_hardattn").resolve():
        raise SystemExit(f"the process imported {run['package']}, not the version in {package}.")
    return run


# ------------------------------------------------------------------------------------------------------------------- comparing


def compare_family(
    old: Path, new: Path, family: str, runs: dict[str, dict[str, Any]], tolerance: float
) -> Iterator[dict[str, Any]]:
    """Yield one row per case of a family, from the files that both versions wrote."""
    before, after = (tensors_by_case(folder / f"{family}.safetensors") for folder in (old, new))
    errors = {
        name: {k: v for k, v in run["errors"].items() if k.startswith(f"{family}/")} for name, run in runs.items()
    }
    for case in sorted({*before, *after, *errors["old"], *errors["new"]}):
        if case in before and case in after:
            yield {"case": case, "tolerance": tolerance, **compare_case(before[case], after[case], tolerance)}
        else:
            raised = {name: found[case] for name, found in errors.items() if case in found}
            same = len(set(raised.values())) == 1 and len(raised) == 2
            yield {"case": case, "tolerance": tolerance, "raised": raised, "within": same, "bit_equal": same}


def tensors_by_case(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read the output of ``version_cases.py``: case to result to tensor."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            case, _, name = key.rpartition("|")
            found[case][name] = file.get_tensor(key)
    return dict(found)


def compare_case(before: dict[str, Tensor], after: dict[str, Tensor], tolerance: float) -> dict[str, Any]:
    """Return the differences of one case, the largest for each kind of result, and the location of the largest of all."""
    differences = {name: difference(before.get(name), after.get(name)) for name in sorted({*before, *after})}
    largest: dict[str, float] = {}
    for name, value in differences.items():
        largest[kind_of(name)] = max(largest.get(kind_of(name), 0.0), value)
    worst = max(differences, key=differences.__getitem__)
    return {
        "difference": largest,
        "worst": worst,
        "bit_equal": all(value == 0 for value in differences.values()),
        "within": differences[worst] <= tolerance,
    }


def reason_of(case: str, known: dict[str, str]) -> str | None:
    """Return why a case differs intentionally; None if the versions must agree."""
    return next((reason for pattern, reason in known.items() if fnmatchcase(case, pattern)), None)


def difference(before: Tensor | None, after: Tensor | None) -> float:
    """Largest absolute difference divided by the largest entry or 1; infinite if shapes, tokens or finiteness differ."""
    if before is None or after is None:
        present = before if before is not None else after
        assert present is not None
        before, after = (torch.zeros_like(present) if value is None else value for value in (before, after))
    if before.shape != after.shape or before.dtype != after.dtype:
        return math.inf
    if torch.equal(before, after):
        return 0.0
    if not before.is_floating_point() or not (before.isfinite().all() and after.isfinite().all()):
        return math.inf
    return float((before - after).abs().max() / before.abs().max().clamp(min=1.0))


def kind_of(name: str) -> str:
    """Return the column that a result belongs to."""
    return "gradients" if name.startswith("gradient/") else "loss" if name == "loss" else "outputs"


# -------------------------------------------------------------------------------------------------------------------- printing


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return a table with one row per block: the number of cases, the number of bit-equal cases, and the largest differences."""
    blocks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        blocks["/".join(row["case"].split("/")[:2])].append(row)
    lines = [["block", "cases", "bit-equal", "raise in both", *KINDS, "tolerance", "outside"]]
    for block, members in blocks.items():
        compared = [row for row in members if "difference" in row]
        cells = [block, str(len(members)), str(sum(row["bit_equal"] for row in compared))]
        cells.append(str(sum(row["within"] for row in members if "raised" in row)))
        for kind in KINDS:
            values = [row["difference"][kind] for row in compared if kind in row["difference"]]
            cells.append(f"{max(values):.1e}" if values else "-")
        outside = sum(not row["within"] for row in members)
        lines.append([*cells, f"{members[0]['tolerance']:.0e}", str(outside)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def print_cases(title: str, rows: list[dict[str, Any]]) -> None:
    """Print cases with their largest difference or their exception."""
    if rows:
        print(f"\n{title}:")
    for row in rows:
        if "raised" in row:
            raised = "; ".join(f"{name} raises {error}" for name, error in row["raised"].items())
            print(f"  {row['case']}: {raised or 'run by one version only'}")
        else:
            print(f"  {row['case']}: {max(row['difference'].values()):.1e} at {row['worst']}")
        if row["known"]:
            print(f"    {row['known']}")


if __name__ == "__main__":
    sys.exit(main())
