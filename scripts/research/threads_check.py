"""Compute results of hard models in eight threads at once, each in its own modes, and count the wrong ones.

    python scripts/research/threads_check.py --results 10000

The threads share one model of each of three families. A result is a forward pass or a ``generate()`` in a random mode: plain, soft, masked,
recorded, replayed, sampled, or two blocks that end in the order in which they began. It is wrong if it differs from the result of the same
call in a single thread; a sampled result must equal that of replaying its recording.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_hardattn

SIZES: dict[str, Any] = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32)
IMAGES: dict[str, Any] = dict(image_size=16, patch_size=4)
TEXT: dict[str, Any] = dict(vocab_size=60, bos_token_id=57, eos_token_id=58, sep_token_id=58, pad_token_id=0)
TOLERANCE = 1e-4  # for logits around 10; another mode changes them by 0.1 or more


@dataclass
class Workload:
    """A hard model that the threads share, a call of it, and the expected result of the call in each mode.

    Attributes:
        replayed: a mask for one site that differs from its own selection.
    """

    name: str
    model: Any
    call: Callable[[Any], Tensor]
    replayed: dict[str, Tensor]
    expected: dict[str, list[Tensor]] = field(default_factory=dict)


def vit() -> Any:
    """A ViT of 16 patches."""
    return ViTForImageClassification(ViTConfig(**SIZES, **IMAGES, num_labels=5))


def t5() -> Any:
    """A T5 of 2 + 2 layers."""
    sizes: dict[str, Any] = dict(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def blip() -> Any:
    """A captioning BLIP of 16 patches."""
    return BlipForConditionalGeneration(
        BlipConfig(text_config={**SIZES, **TEXT, "encoder_hidden_size": 24}, vision_config={**SIZES, **IMAGES})
    )


def hardened(build: Callable[[], Any]) -> Any:
    """Return the model in evaluation mode, hard at all its sites, with weights so large that the selection affects the result."""
    torch.manual_seed(1)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    hf_hardattn.apply(model, {"sites": ["*"], "budget": 3})
    for selector in hf_hardattn.selectors(model).values():
        for parameter in selector.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def _generate(model: Any, **inputs: Any) -> Tensor:
    """Return the tokens and the scores of each step."""
    asked: dict[str, Any] = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    made = model.generate(**inputs, **asked, output_scores=True, return_dict_in_generate=True)
    scores = torch.stack(made.scores, 1)
    return torch.cat((made.sequences.float().flatten(), scores[scores.isfinite()]))


def workloads() -> list[Workload]:
    """Return a forward pass of each family, and ``generate()`` of those that generate."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    ids = torch.randint(3, 57, (2, 9), generator=generator)
    words = torch.randint(3, 57, (2, 4), generator=generator)
    image, text, caption = hardened(vit), hardened(t5), hardened(blip)
    patches, tokens = torch.arange(17).expand(2, -1) > 12, torch.arange(9).expand(2, -1) < 2
    calls: list[tuple[str, Any, Callable[[Any], Tensor], dict[str, Tensor]]] = [
        ("vit", image, lambda model: model(pixel_values=pixels).logits, {"vision.inputs": patches}),
        (
            "t5",
            text,
            lambda model: model(input_ids=ids, decoder_input_ids=words).logits,
            {"encoder.inputs": tokens},
        ),
        (
            "blip",
            caption,
            lambda model: model(pixel_values=pixels, input_ids=words).logits,
            {"vision.inputs": patches},
        ),
        ("t5 generate", text, lambda model: _generate(model, input_ids=ids), {"encoder.inputs": tokens}),
        ("blip generate", caption, lambda model: _generate(model, pixel_values=pixels), {"vision.inputs": patches}),
    ]
    return [Workload(*parts) for parts in calls]


# ------------------------------------------------------------------------------------------------------------------------ the modes


def _plain(workload: Workload) -> list[Tensor]:
    return [workload.call(workload.model)]


def _soft(workload: Workload) -> list[Tensor]:
    with hf_hardattn.soft(workload.model):
        return [workload.call(workload.model)]


def _masked(workload: Workload) -> list[Tensor]:
    with hf_hardattn.execution(workload.model, "masked"), hf_hardattn.record(workload.model) as selections:
        return [workload.call(workload.model), torch.tensor([selection.masked for selection in selections]).float()]


def _recorded(workload: Workload) -> list[Tensor]:
    with hf_hardattn.record(workload.model) as selections:
        return [workload.call(workload.model), *(selection.mask.float() for selection in selections)]


def _replayed(workload: Workload) -> list[Tensor]:
    with hf_hardattn.replay(workload.model, workload.replayed):
        return [workload.call(workload.model)]


def _overlapping(workload: Workload) -> list[Tensor]:
    """Two blocks, of which the first to begin ends first: ``soft`` ends while the recording continues."""
    soft, record = hf_hardattn.soft(workload.model), hf_hardattn.record(workload.model)
    soft.__enter__()
    selections = record.__enter__()
    first = workload.call(workload.model)
    soft.__exit__(None, None, None)
    second = workload.call(workload.model)
    record.__exit__(None, None, None)
    return [first, second, torch.tensor(float(len(selections)))]


MODES: dict[str, Callable[[Workload], list[Tensor]]] = {
    "plain": _plain,
    "soft": _soft,
    "masked": _masked,
    "recorded": _recorded,
    "replayed": _replayed,
    "overlapping": _overlapping,
}
SAMPLED = "sampled"


def sampled_is_right(workload: Workload) -> bool:
    """Whether a sampled call equals the replay of its own recording."""
    with hf_hardattn.execution(workload.model, "gathered"):  # the same execution for replaying and sampling
        with hf_hardattn.sampled(workload.model), hf_hardattn.record(workload.model) as selections:
            found = workload.call(workload.model)
        with hf_hardattn.replay(workload.model, selections):
            return equal([found], [workload.call(workload.model)])


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two results are equal up to rounding."""
    return len(found) == len(expected) and all(
        one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE)
        for one, other in zip(found, expected, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------- the threads


@torch.no_grad()
def prepare() -> list[Workload]:
    """Return the workloads with their expected results. The modes must give results other than plain, or the check would show nothing."""
    made = workloads()
    for workload in made:
        workload.expected = {name: mode(workload) for name, mode in MODES.items()}
        for name in ("soft", "replayed"):
            if equal(workload.expected[name], workload.expected["plain"]):
                raise AssertionError(f"{workload.name}: '{name}' gives what 'plain' gives")
    return made


def count_wrong(results: int, threads: int = 8) -> tuple[Counter[str], Counter[str]]:
    """Compute ``results`` results in ``threads`` threads; return how many there were of each kind, and how many were wrong."""
    made, computed, wrong, lock = prepare(), Counter[str](), Counter[str](), threading.Lock()
    start = threading.Barrier(threads)

    @torch.no_grad()
    def work(number: int) -> None:
        choose = random.Random(number)
        start.wait()
        for _ in range(results // threads + (number < results % threads)):
            workload, mode = choose.choice(made), choose.choice([*MODES, SAMPLED])
            kind = f"{workload.name}: {mode}"
            try:
                if mode == SAMPLED:
                    right = sampled_is_right(workload)
                else:
                    right = equal(MODES[mode](workload), workload.expected[mode])
            except Exception as error:
                right, kind = False, f"{kind} ({type(error).__name__}: {error})"
            with lock:
                computed[kind] += 1
                wrong[kind] += not right

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # so that threads switch inside a layer, not only between calls
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    return computed, +wrong


def main(arguments: list[str] | None = None) -> int:
    """Print how many results were wrong; the exit status is 1 if any was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    computed, wrong = count_wrong(given.results, given.threads)
    seconds = round(time.perf_counter() - began, 1)
    print(
        json.dumps({"results": computed.total(), "wrong": wrong.total(), "threads": given.threads, "seconds": seconds})
    )
    for kind, count in wrong.most_common():
        print(f"  wrong: {count} of {computed[kind]} {kind}")
    return int(wrong.total() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
