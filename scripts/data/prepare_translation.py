"""Create sentence pairs from Debian's translated package descriptions, and a small T5 to start from.

python scripts/data/prepare_translation.py --language it --output outputs/data/translation-it                 # for hf-hardattn compare
python scripts/data/prepare_translation.py --language de --longest 12 --output outputs/data/translation-de    # for train_t5.py

Downloads the package lists (30 MB) with apt-get to a separate folder, which leaves those of the system unchanged, or reads those in
--lists. The lists state no licence of the texts: use them, but do not redistribute them. Requires Debian's apt-get and the package
`tokenizers`, which is installed with transformers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hf_hardattn.training.tasks.translation import Translation

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÀ-Þ])")
HELD_OUT = ("test", "validation")


def fetch(folder: Path, language: str) -> None:
    """Download the lists of the configured suites, with English and ``language`` descriptions."""
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::Lists": str(folder.resolve()),
        "Acquire::Languages": f"en,{language}",
        "Acquire::GzipIndexes": "false",
    }
    subprocess.run(["apt-get", *(f"-o{key}={value}" for key, value in options.items()), "update"], check=True)


def records(folder: Path, ending: str) -> Iterator[dict[str, str]]:
    """Yield the records of every list in ``folder`` whose name ends with ``ending``."""
    paths = sorted(folder.glob(f"*_{ending}"))
    if not paths:
        raise SystemExit(f"no list *_{ending} in {folder}; leave --lists out to fetch them, or fetch that language")
    for path in paths:
        for text in path.read_text(encoding="utf-8").split("\n\n"):
            fields: dict[str, str] = {}
            name = ""
            for line in text.splitlines():
                if line.startswith(" "):
                    fields[name] += "\n" + line[1:]
                else:
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()
            if fields:
                yield fields


def descriptions(folder: Path, language: str) -> dict[tuple[str, str], list[str]]:
    """Return the paragraphs of each description, without the synopsis, by package and checksum of the English text."""
    found = {}
    for fields in records(folder, f"i18n_Translation-{language}"):
        if "Description-md5" in fields:
            long = fields[f"Description-{language}"].partition("\n")[2]
            paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\.\s*\n", long)]
            found[fields["Package"], fields["Description-md5"]] = paragraphs
    return found


def sentence_pairs(folder: Path, language: str, longest: int) -> Iterator[tuple[str, str, str]]:
    """Yield (package, English, translation) of sentences of 4 to ``longest`` words, from paragraphs with equally many sentences in both."""
    english, other = descriptions(folder, "en"), descriptions(folder, language)
    for key in sorted(english.keys() & other.keys()):
        if len(english[key]) != len(other[key]):
            continue
        for here, there in zip(english[key], other[key], strict=True):
            sources, targets = SENTENCE_END.split(here), SENTENCE_END.split(there)
            if len(sources) != len(targets):
                continue
            for source, target in zip(sources, targets, strict=True):
                sizes = len(source.split()), len(target.split())
                # pairs of other lengths are lists, headings, or sentences that are not translations of each other
                if source != target and 4 <= min(sizes) and max(sizes) <= longest and max(sizes) <= 2 * min(sizes):
                    yield key[0], source, target


def template(sentence: str, names: set[str]) -> str:
    """Normalise a sentence so that near-duplicates are equal: lower case, no punctuation, a mark for numbers, versions and packages."""
    words = re.findall(r"[^\s()\[\],;:!?\"']+", sentence.lower())
    return " ".join("#" if re.search(r"\d", word) or word.strip(".") in names else word.strip(".") for word in words)


def split(
    pairs: list[tuple[str, str, str]], source_of: dict[str, str], held_out: int
) -> dict[str, list[dict[str, str]]]:
    """Split by source package; a held-out sentence has no near-duplicate in training or among the held-out ones."""
    names = {*source_of, *source_of.values()}
    parts: dict[str, dict[str, dict[str, str]]] = {"train": {}, "test": {}, "validation": {}}
    seen: set[str] = set()
    rows = []
    for package, source, target in pairs:
        bucket = zlib.crc32(source_of.get(package, package).encode()) % 1000
        rows.append((bucket, template(source, names), {"source": source, "target": target}))
    for bucket, key, row in rows:
        if bucket >= 100:
            parts["train"][row["source"]] = row  # keep one translation per sentence
            seen.add(key)
    for bucket, key, row in sorted(rows, key=lambda row: row[0]):
        part = HELD_OUT[bucket % 2]
        if bucket < 100 and key not in seen and len(parts[part]) < held_out:
            parts[part][row["source"]] = row
            seen.add(key)
    return {name: list(part.values()) for name, part in parts.items()}


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Train a byte-pair tokenizer with T5's special tokens: ``<pad>`` 0, ``</s>`` 1 (appended), ``<unk>`` 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def start(folder: Path, **changes: int) -> None:
    """Save configuration and tokenizer of the small T5 that ``compare`` trains from scratch in ``folder/t5``; ``changes`` are for the
    configuration."""
    task = Translation(str(folder))
    config = task.config()
    config.update({**changes, "pad_token_id": 0, "eos_token_id": 1})
    config.save_pretrained(folder / "t5")
    task.processor().save_pretrained(folder / "t5")


def source_packages(lists: Path) -> dict[str, str]:
    """Map each package to its source package."""
    return {
        fields["Package"]: fields.get("Source", fields["Package"]).split()[0]
        for fields in records(lists, "Packages")
        if "Package" in fields
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--language", default="it", help="language of the translations: it, fr, de, es ... (default: it)"
    )
    parser.add_argument("--output", type=Path, help="folder to write; outputs/data/translation-LANGUAGE by default")
    parser.add_argument("--lists", type=Path, help="folder with apt's lists; by default they are fetched")
    parser.add_argument("--longest", type=int, default=9, help="maximum words of a sentence (default: 9)")
    parser.add_argument("--vocabulary", type=int, default=2000, help="tokens of the tokenizer (default: 2000)")
    parser.add_argument("--held-out", type=int, default=500, help="sentences of test and of validation (default: 500)")
    arguments = parser.parse_args()
    output = arguments.output or Path(f"outputs/data/translation-{arguments.language}")
    output.mkdir(parents=True, exist_ok=True)
    lists = arguments.lists
    if lists is None:
        lists = output / "lists"
        fetch(lists, arguments.language)
    pairs = list(dict.fromkeys(sentence_pairs(lists, arguments.language, arguments.longest)))
    parts = split(pairs, source_packages(lists), arguments.held_out)
    for name, rows in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    texts = [text for row in parts["train"] for text in row.values()]
    train_tokenizer(texts, arguments.vocabulary).save(str(output / "tokenizer.json"))
    start(output)
    print(f"{output}: " + ", ".join(f"{len(rows):,} {name}" for name, rows in parts.items()) + " sentence pairs")


if __name__ == "__main__":
    main()
