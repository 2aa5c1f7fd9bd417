"""Create document-summary pairs from Debian's package descriptions (long text and one-line synopsis), and a small T5 to start from.

python scripts/data/prepare_summarisation.py --output outputs/data/summarisation

Downloads the package lists with apt-get like prepare_translation.py, or reads those in --lists. The data are split by source package, and
no held-out document has a near-duplicate in training. The lists state no licence of the texts: use them, but do not redistribute them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prepare_translation import fetch, records, source_packages, split, start, train_tokenizer


def pairs(lists: Path, fewest: int, most: int) -> list[tuple[str, str, str]]:
    """Return (package, description, synopsis) for descriptions of ``fewest`` to ``most`` words, one for each distinct first paragraph."""
    found: dict[str, tuple[str, str, str]] = {}
    for fields in records(lists, "i18n_Translation-en"):
        synopsis, _, long = fields["Description-en"].partition("\n")
        document = " ".join(word for word in long.split() if word != ".")
        if fewest <= len(document.split()) <= most and len(synopsis.split()) >= 3:
            paragraph = long.split("\n .\n")[0]
            found.setdefault(paragraph, (fields["Package"], document, synopsis.strip()))
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/data/summarisation"), help="folder")
    parser.add_argument("--lists", type=Path, help="folder with apt's lists; by default they are fetched")
    parser.add_argument("--fewest", type=int, default=20, help="minimum words of a description (default: 20)")
    parser.add_argument("--most", type=int, default=50, help="maximum words of a description (default: 50)")
    parser.add_argument("--vocabulary", type=int, default=4000, help="tokens of the tokenizer (default: 4000)")
    parser.add_argument("--held-out", type=int, default=400, help="pairs of test and of validation (default: 400)")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    lists = arguments.lists
    if lists is None:
        lists = output / "lists"
        fetch(lists, "en")
    parts = split(pairs(lists, arguments.fewest, arguments.most), source_packages(lists), arguments.held_out)
    for name, rows in parts.items():
        lines = (
            json.dumps({"document": row["source"], "summary": row["target"]}, ensure_ascii=False) + "\n" for row in rows
        )
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [text for row in parts["train"] for text in row.values()]
    train_tokenizer(texts, arguments.vocabulary).save(str(output / "tokenizer.json"))
    start(output)
    print(f"{output}: " + ", ".join(f"{len(rows):,} {name}" for name, rows in parts.items()) + " pairs")


if __name__ == "__main__":
    main()
