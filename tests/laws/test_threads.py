"""Law 14: modes and recordings belong to the thread, or the asyncio task, and the call that opened them."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import HEADS, Example, close, harden, run, stock

import hf_hardattn

SCRIPT = Path(__file__).parents[2] / "scripts/research/threads_check.py"
FIRST_HEADS = list(dict(reversed(HEADS)).items())


@pytest.fixture(scope="module")
def threads_check():
    spec = importlib.util.spec_from_file_location("threads_check", SCRIPT)
    module = sys.modules["threads_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hard_example(architecture, head, **changes):
    example = stock(architecture, head)
    harden(example.model, {"sites": ["*"], "budget": 2, **changes})
    return example


def test_eight_threads_in_eight_modes_get_their_own_results(threads_check):
    computed, wrong = threads_check.count_wrong(160)
    assert computed.total() == 160 and not wrong, wrong


@pytest.mark.parametrize(("architecture", "head"), FIRST_HEADS)
def test_a_thread_in_another_mode_changes_nothing(architecture, head):
    """In every family: one thread is soft in the middle of its call, while another makes all of its own."""
    example = hard_example(architecture, head)
    plain = run(example)
    with hf_hardattn.soft(example.model):
        soft = run(example)
    results, inside, done = {}, threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        done.wait(60)

    def other():
        with hf_hardattn.soft(example.model):
            results["soft"] = run(example)

    thread = threading.Thread(target=other)
    first = next(module for module in example.model.modules() if isinstance(module, torch.nn.Linear))
    hook = first.register_forward_pre_hook(wait)
    thread.start()
    inside.wait(60)
    hook.remove()  # the other thread holds it already
    with hf_hardattn.record(example.model) as selections:
        results["plain"] = run(example)
    done.set()
    thread.join()
    close(results["plain"], plain, 0)
    close(results["soft"], soft, 0)
    assert len(selections) == len(hf_hardattn.selectors(example.model))


def test_threads_that_train_get_the_gradients_they_get_alone():
    """Four threads, four models that share nothing but the library; the schedule of each stands where it was set."""
    examples = [
        hard_example("vit", "ViTForImageClassification", estimator_options={"sample": False}, budget=budget)
        for budget in range(2, 6)
    ]
    alone = [_gradients(example) for example in examples]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(_gradients, examples))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def _gradients(example):
    example.model.train()
    for _ in range(3):
        example.model.zero_grad()
        example.model(**example.batch).loss.backward()
    return {name: p.grad for name, p in example.model.named_parameters() if p.grad is not None}


def test_a_new_thread_starts_plain():
    example = hard_example("vit", "ViTForImageClassification")
    plain = run(example)
    with hf_hardattn.soft(example.model), ThreadPoolExecutor(1) as pool:
        close(pool.submit(run, example).result(), plain, 0)
        # a thread that is given this one's context follows its modes
        close(pool.submit(contextvars.copy_context().run, run, example).result(), run(example), 0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_of_two_models_end_in_any_order(order):
    examples = [hard_example("vit", "ViTForImageClassification"), hard_example("bert", "BertModel")]
    plain = [run(example) for example in examples]
    blocks = [hf_hardattn.soft(example.model) for example in examples]
    for block in blocks:
        block.__enter__()
    for number in order:
        blocks[number].__exit__(None, None, None)
        close(run(examples[number]), plain[number], 0)


@pytest.mark.parametrize("mode", [hf_hardattn.record, hf_hardattn.soft])
def test_a_copy_made_inside_a_block_is_plain(mode):
    """A deep copy neither writes into the recording for ever, nor stays soft."""
    example = hard_example("vit", "ViTForImageClassification")
    expected = run(example)
    with mode(example.model) as opened:
        twin = Example(copy.deepcopy(example.model), example.batch)
    close(run(twin), expected, 0)
    assert opened is example.model or not opened


def test_an_exception_ends_a_block():
    example = hard_example("vit", "ViTForImageClassification")
    plain = run(example)
    for mode in (hf_hardattn.soft, hf_hardattn.record, hf_hardattn.sampled):
        with pytest.raises(AttributeError), mode(example.model):
            example.model()
        close(run(example), plain, 0)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [("blip", "BlipForConditionalGeneration"), ("siglip", "SiglipVisionModel"), ("t5", "T5ForConditionalGeneration")],
)
def test_a_call_that_fails_leaves_no_trace(architecture, head):
    """These keep a call's context where towers find it that are handed nothing: it must not outlive the call."""
    example = hard_example(architecture, head)
    plain = run(example)
    last = [module for module in example.model.modules() if isinstance(module, torch.nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(example)
    if example.model.can_generate():
        with pytest.raises(ZeroDivisionError):
            example.model.generate(**{k: v for k, v in example.batch.items() if k in ("input_ids", "pixel_values")})
    hook.remove()
    close(run(example), plain, 0)


def test_tasks_of_one_event_loop_keep_their_modes_apart():
    example = hard_example("vit", "ViTForImageClassification")
    plain = run(example)
    with hf_hardattn.soft(example.model):
        soft = run(example)

    async def task(number):
        found = []
        for _ in range(5):
            if number % 2:
                with hf_hardattn.soft(example.model):
                    await asyncio.sleep(0)  # the other tasks run here
                    found.append((run(example), soft))
            else:
                with hf_hardattn.record(example.model) as selections:
                    await asyncio.sleep(0)
                    found.append((run(example), plain))
                assert len(selections) == len(hf_hardattn.selectors(example.model))
            await asyncio.sleep(0)
        return found

    async def all_tasks():
        return await asyncio.gather(*(task(number) for number in range(6)))

    for found in asyncio.run(all_tasks()):
        for one, expected in found:
            close(one, expected, 0)
