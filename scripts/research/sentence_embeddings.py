"""Search by sentence embeddings with a MiniLM that reads part of each document: train it on its own embeddings, and measure it.

    python scripts/data/prepare_summarisation.py --output outputs/data/descriptions --fewest 40 --most 120 --held-out 2000
    python scripts/research/sentence_embeddings.py quality --model PATH/TO/all-MiniLM-L6-v2 --data outputs/data/descriptions
    python scripts/research/sentence_embeddings.py words --model ... --data ... --wordnet wordnet/usr/share/wordnet
    python scripts/research/sentence_embeddings.py timing --model ... --data ...      # on a quiet machine

The documents are long descriptions of packages, the queries their one-line synopses; training and test share no source package. The hard
model drops tokens of the documents after one layer and learns the original model's embeddings of whole documents, with a ratio drawn in
each step; queries are read whole. It is compared with random tokens, the first tokens, and documents that are cut to the same number of
tokens before the first layer, each trained in the same way for the same number of steps, and with the hard model as a LoRA adapter. No
setting is chosen on the test rows. ``quality`` trains and tests with one seed, ``words`` counts the words that the learned model of that
seed kept, and ``timing`` times the encoding. Each adds its part to --output; results of a seed that are already there are not measured
again.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

import hf_hardattn
from hf_hardattn.devices import device_name
from hf_hardattn.functional.pooling import mean_rows
from hf_hardattn.training.fine_tune import fine_tune
from hf_hardattn.training.finetuning.sentence_embeddings import search

BATCH, LONGEST = 32, 256
# name: site, scorer; keeping the first tokens before the first layer is the same as cutting the text
VARIANTS = {
    "learned": ("text.tokens.0", "mlp"),
    "learned, LoRA": ("text.tokens.0", "mlp"),
    "random": ("text.tokens.0", "random"),
    "first": ("text.tokens.0", "first"),
    "cut text": ("text.inputs", "first"),
}
# an adapter is small enough to be stored with its card; like other adapters it uses a higher learning rate
LORA = {"use_peft": True, "lora_target_modules": ("query", "key", "value", "dense"), "learning_rate": 5e-4}
CLASSES = {"1": "nouns", "2": "verbs", "3": "adjectives", "4": "adverbs", "5": "adjectives"}
FUNCTION_WORDS = frozenset(
    """a about above after against all also an and any are as at be because been before being below between both but by can could did do does
    each either for from had has have he her here his how i if in into is it its itself may me might must my neither no nor not of off on or
    other our out over own same shall she should so some such than that the their them then there these they this those through to too under
    until up upon us was we were what when where whether which while who whose will with within without would you your""".split()
)


class Encoder:
    """Maps texts to unit vectors: the mean of the rows that a model keeps, which is the pooling of MiniLM."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def batch(self, texts: list[str]) -> Any:
        """Return padded token ids of texts."""
        return self.tokenizer(texts, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")

    def __call__(self, texts: list[str]) -> Tensor:
        """Return embeddings fp32 ``[B, D]``."""
        batch = self.batch(texts)
        hidden = self.model(**batch).last_hidden_state
        return nn.functional.normalize(mean_rows(hidden, batch["attention_mask"]), dim=-1)

    def all(self, texts: list[str], like_lengths: bool = True) -> Tensor:
        """Embed texts in batches of similar lengths, or in the given order, without gradients."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]) if like_lengths else i)
        found = torch.empty(len(texts), self.model.config.hidden_size)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                found[chosen] = self([texts[i] for i in chosen])
        return found


def test_rows(arguments: Any) -> tuple[list[str], list[str]]:
    """Return the documents and their queries."""
    lines = (arguments.data / "test.jsonl").read_text(encoding="utf-8").splitlines()[: arguments.test]
    rows = [json.loads(line) for line in lines]
    return [row["document"] for row in rows], [row["summary"] for row in rows]


def place(arguments: Any, name: str) -> Path:
    """Return the folder of a variant's trained model."""
    return Path(arguments.models) / f"{name.replace(',', '').replace(' ', '_')}-{arguments.seed}"


def train(arguments: Any, name: str) -> None:
    """Train a variant like ``hf-hardattn train encoder --task sentence_embeddings``, with a ratio drawn in each step."""
    site, scorer = VARIANTS[name]
    flags = {
        "task": "sentence_embeddings",
        "model_name_or_path": arguments.model,
        "train_file": arguments.data / "train.jsonl",
        "text_column": "document",
        "max_source_length": arguments.train_tokens,
        "sites": site,
        "budget": json.dumps({"sample": arguments.sampled}),
        "scorer": scorer,
        "estimator": "simple",
        "learning_rate": 3e-5,
        "selector_learning_rate": 2e-3,
        "weight_decay": 0.01,
        "num_warmup_steps": arguments.steps // 10,
        "max_train_steps": arguments.steps,
        "per_device_train_batch_size": arguments.train_batch,
        "seed": arguments.seed,
        "output_dir": place(arguments, name),
        **(LORA if "LoRA" in name else {}),
    }
    values = {flag: value if isinstance(value, tuple) else (value,) for flag, value in flags.items()}
    words = [word for flag, value in values.items() for word in (f"--{flag}", *map(str, value))]
    fine_tune("encoder", [*words, "--cpu"])


def load(arguments: Any, name: str, share: float) -> nn.Module:
    """Return the trained model of a variant at a share of the tokens, or the original model for full attention."""
    folder = arguments.model if name == "full attention" else place(arguments, name)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    if name != "full attention":
        hf_hardattn.set_budget(model, share)
    return model


def quality(arguments: Any, results: dict[str, Any]) -> None:
    """Train every variant with one seed and measure its search quality."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    documents, questions = test_rows(arguments)
    lengths = [len(ids) for ids in tokenizer(documents, truncation=True, max_length=LONGEST)["input_ids"]]
    results |= {"model": "all-MiniLM-L6-v2", "documents": len(documents)}
    results |= {"steps": arguments.steps, "train_batch": arguments.train_batch}
    results |= {
        "site": VARIANTS["learned"][0],
        "tokens": statistics.mean(lengths),
        "hf_hardattn": hf_hardattn.__version__,
    }
    queries = Encoder(load(arguments, "full attention", 1.0), tokenizer).all(questions)
    for name in ("full attention", *arguments.variants):
        if name in VARIANTS and not (place(arguments, name) / "results.json").exists():
            train(arguments, name)
        for share in arguments.shares if name in VARIANTS else [1.0]:
            if not measured(arguments, results, name, share):
                encoder = Encoder(load(arguments, name, share), tokenizer)
                add(arguments, results, name, share, search(queries, encoder.all(documents)))


def measured(arguments: Any, results: dict[str, Any], name: str, share: float) -> bool:
    """Whether an earlier run of this seed measured a variant; the original model has no seed."""
    key = {"name": name, "share": share} | ({"seed": arguments.seed} if name in VARIANTS else {})
    return any(key.items() <= line.items() for line in results.get("variants", []))


def add(arguments: Any, results: dict[str, Any], name: str, share: float, found: dict[str, float]) -> None:
    """Add the results of a variant to the file."""
    line = {"name": name, "share": share, "seed": arguments.seed} | found
    results.setdefault("variants", []).append(line)
    print(line, flush=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def timing(arguments: Any, results: dict[str, Any]) -> None:
    """Speed-up of encoding over the original model, in interleaved rounds, for batches of similar lengths and of mixed lengths.

    If lengths differ within a batch, the kept tokens are packed end to end. The scorers are untrained, because time does not depend on
    what they learned.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    documents = test_rows(arguments)[0][: arguments.timed]
    encoders = {("full attention", 1.0): Encoder(BertModel.from_pretrained(arguments.model).eval(), tokenizer)}
    for name, share in itertools.product(("learned", "cut text"), arguments.shares):
        site, scorer = VARIANTS[name]
        hard = {"sites": [site], "budget": share, "scorer": scorer, "pack": True}
        model = BertModel.from_pretrained(arguments.model, hard_attention=hard).eval()
        encoders[name, share] = Encoder(model, tokenizer)
    cases = [(*case, like) for like in (True, False) for case in encoders]
    seconds: dict[tuple[str, float, bool], list[float]] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for name, share, like in cases:
            started = time.perf_counter()
            encoders[name, share].all(documents, like)
            seconds[name, share, like].append(time.perf_counter() - started)
    median = {case: statistics.median(times) for case, times in seconds.items()}
    lines = [
        {
            "name": name,
            "share": share,
            "like_lengths": like,
            "per_second": len(documents) / time,
            "speed_up": median["full attention", 1.0, like] / time,
        }
        for (name, share, like), time in median.items()
    ]
    measured = {"documents": len(documents), "rounds": arguments.rounds, "threads": arguments.threads, "batch": BATCH}
    results["timing"] = {**measured, "processor": device_name(), "lines": lines}
    print(json.dumps(results["timing"], indent=1))


def word_classes(folder: Path) -> dict[str, str]:
    """Map each word to its most frequent class in WordNet's counts; without counts, to the first class that lists it."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        sense, _, count = line.split()
        word, _, rest = sense.partition("%")
        counts[word][CLASSES[rest[0]]] += int(count)
    for number, part in enumerate(("noun", "verb", "adj", "adv"), start=1):
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                counts[line.split()[0]].setdefault(CLASSES[str(number)], 0)
    return {word: found.most_common(1)[0][0] for word, found in counts.items()}


def words(arguments: Any, results: dict[str, Any]) -> None:
    """Share of word pieces that the learned model kept, by the class of their word and by its frequency in the training texts."""
    tokenizer, classes = AutoTokenizer.from_pretrained(arguments.model), word_classes(arguments.wordnet)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    frequency: collections.Counter[str] = collections.Counter()
    for line in (arguments.data / "train.jsonl").read_text(encoding="utf-8").splitlines():
        frequency.update(word for word, _ in split(json.loads(line)["document"].lower()))

    def class_of(word: str) -> str:
        if not any(letter.isalnum() for letter in word):
            return "punctuation"
        if word in FUNCTION_WORDS:
            return "function words"
        stems = (
            word,
            word.removesuffix("s"),
            word.removesuffix("ed"),
            word.removesuffix("ing"),
            word.removesuffix("d"),
        )
        return next((classes[stem] for stem in stems if stem in classes), "names and others")

    def band(word: str) -> str:
        count = frequency[word]
        return "10 times at most" if count <= 10 else "11 to 1,000 times" if count <= 1000 else "more than 1,000 times"

    documents = test_rows(arguments)[0]
    found: dict[str, dict[str, list[int]]] = {"class": {}, "frequency": {}}
    model = load(arguments, "learned", arguments.shares[0])
    for start in range(0, len(documents), BATCH):
        texts = [text.lower() for text in documents[start : start + BATCH]]
        batch = Encoder(model, tokenizer).batch(texts)
        with torch.inference_mode(), hf_hardattn.record(model) as recording:
            model(**batch)
        for row, (text, mask) in enumerate(zip(texts, recording[0].mask[:, 0, 0].tolist(), strict=True)):
            for place, kept in enumerate(mask):
                number = batch.token_to_word(row, place)
                if number is None:
                    continue
                span = batch.word_to_chars(row, number)
                word = text[span.start : span.end]
                for kind, value in (("class", class_of(word)), ("frequency", band(word))):
                    found[kind].setdefault(value, []).append(int(kept))
    results["words"] = {"share": arguments.shares[0], "seed": arguments.seed} | {
        kind: {value: {"pieces": len(kept), "kept": statistics.mean(kept)} for value, kept in sorted(parts.items())}
        for kind, parts in found.items()
    }
    print(json.dumps(results["words"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "words", "timing"))
    parser.add_argument("--model", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_summarisation.py wrote")
    parser.add_argument(
        "--models", type=Path, default=Path("outputs/sentence_embeddings"), help="folder for the trained models"
    )
    parser.add_argument("--wordnet", type=Path, help="words: folder with WordNet's index files and cntlist.rev")
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="variants to train"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3], help="kept shares (default: 0.5 0.3)")
    parser.add_argument(
        "--sampled", type=float, nargs=2, default=[0.25, 0.7], help="range of the kept share in training"
    )
    parser.add_argument("--steps", type=int, default=120, help="training steps (default: 120)")
    parser.add_argument("--train-batch", type=int, default=16, help="documents per step (default: 16)")
    parser.add_argument("--train-tokens", type=int, default=96, help="tokens per document in training (default: 96)")
    parser.add_argument("--test", type=int, default=1500, help="maximum number of test documents (default: 1500)")
    parser.add_argument("--timed", type=int, default=320, help="number of timed documents (default: 320)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/sentence_embeddings.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    {"quality": quality, "words": words, "timing": timing}[arguments.part](arguments, results)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
