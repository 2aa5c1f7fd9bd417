"""Check the guarantees of every model family, once for each kind of site, and record which hold and why others do not.

    python scripts/research/families.py                      # quick checks of all families
    python scripts/research/families.py --slow --only bert   # compiled models and flex attention, up to a minute a site

The checks are those of ``tests/laws/family_checks.py`` and ``decoder_checks.py``, on tiny models with random weights. Their results are
added to results/families.json line by line; the table in docs/families.md shows them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_hardattn

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "results" / "families.json"
sys.path.insert(0, str(ROOT / "tests" / "laws"))

import decoder_checks  # noqa: E402
import family_checks  # noqa: E402


def lines(slow: bool) -> Iterator[tuple[Any, dict[str, Callable[[Any], None]]]]:
    """Yield every site to check, with the checks that apply to it."""
    checks = family_checks.SLOW if slow else family_checks.CHECKS
    for subject in family_checks.subjects():
        yield subject, {n: check for n, check in checks.items() if family_checks.applies(n, subject)}
    checks = decoder_checks.SLOW if slow else decoder_checks.CHECKS
    for decoder in decoder_checks.subjects():
        yield decoder, {n: check for n, check in checks.items() if decoder_checks.applies(n, decoder)}


def outcome(check: Callable[[Any], None], subject: Any) -> str:
    """Return ``"holds"``, or the first line of the error of the check."""
    try:
        check(subject)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {reason[0]}"
    return "holds"


def add(subject: Any, found: dict[str, str]) -> None:
    """Add the results of a site's checks to its earlier results in the file."""
    tower, kind = subject.site.split(".")[:2]
    results = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"rows": []}
    results["machine"] = {
        "processor": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_hardattn": hf_hardattn.__version__,
    }
    key = {"family": subject.family, "tower": tower, "kind": kind}
    row = next((row for row in results["rows"] if key.items() <= row.items()), None)
    if row is None:
        row = {**key, "head": subject.head, "checks": {}}
        results["rows"].append(row)
    row["checks"].update(found)
    OUTPUT.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument(
        "--slow", action="store_true", help="compiled models and flex attention instead of the other checks"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    only = [name for name in arguments.only.split(",") if name]
    for subject, checks in lines(arguments.slow):
        if not only or subject.family in only:
            found = {name: outcome(check, subject) for name, check in checks.items()}
            failed = [f"{name}: {text}" for name, text in found.items() if text != "holds"]
            print(subject.family, subject.site, *failed, sep="  ", flush=True)
            add(subject, found)


if __name__ == "__main__":
    main()
