"""Law 15: eager, sdpa, flex_attention and a registered function give the same output; what cannot is refused when attached."""

from __future__ import annotations

import pytest
import torch
from cases import PLACES, Case, close, harden, run, stock, train_loss
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import hf_hardattn
from hf_hardattn import HardAttentionError, models

CALLS: list[str] = []


def mine(module, *args, **kwargs):
    CALLS.append(type(module).__name__)
    return sdpa_attention_forward(module, *args, **kwargs)


AttentionInterface.register("mine", mine)
AttentionMaskInterface.register("mine", sdpa_mask)
AttentionInterface.register("unmasked", mine)  # and no function that makes its masks

# BLIP and the GRU compute attention in their own way, whatever the configuration says
SERVED = [place for place in PLACES if place.architecture not in ("blip", "gru")]
ATTENTIONS = [place for place in SERVED if place.kind in ("self", "cross")]
named = {"ids": lambda place: f"{place.architecture}-{place.group}"}
BUDGETS = (3, 0.5, "threshold:0.5")


def example_of(place, implementation, budget=3, **config):
    averaging = models.load(place.architecture).spec.averaging_heads  # these take fixed budgets only
    head = next(head for head in place.heads if not isinstance(budget, str) or head not in averaging)
    example = stock(place.architecture, head, attn_implementation=implementation)
    harden(example.model, Case(place, head, budget=budget).config(**config))
    return example


def attentions(place) -> int:
    """How often stock calls its attention function."""
    CALLS.clear()
    run(stock(place.architecture, place.heads[0], attn_implementation="mine"))
    return len(CALLS)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("place", SERVED, **named)
def test_every_implementation_gives_the_same(place, budget):
    expected = run(example_of(place, "sdpa", budget))
    for implementation in ("eager",) if place.causal else ("eager", "mine"):
        close(run(example_of(place, implementation, budget)), expected)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("place", SERVED, **named)
def test_a_registered_function_is_called_in_every_layer(place, budget):
    expected = attentions(place)
    if place.causal:
        return  # refused, see below
    example = example_of(place, "mine", budget)
    CALLS.clear()
    run(example)
    assert len(CALLS) == expected


@pytest.mark.parametrize("place", SERVED, **named)
def test_sites_in_all_places_at_once(place):
    example, expected = (
        stock(place.architecture, place.heads[0], attn_implementation=implementation)
        for implementation in ("eager", "sdpa")
    )
    for each in (example, expected):
        harden(each.model, {"sites": ["*"], "budget": 0.6})
    close(run(example), run(expected))


@pytest.mark.parametrize("implementation", ["mine", "flex_attention", "unmasked"])
@pytest.mark.parametrize("place", ATTENTIONS, **named)
def test_a_choice_of_each_query_is_refused_when_attached(place, implementation):
    example = stock(place.architecture, place.heads[0], attn_implementation=implementation)
    scorers = ("query_key", "attention", "linear") if place.causal else ("query_key", "attention")
    for scorer in scorers:
        with pytest.raises(
            HardAttentionError, match=f"{implementation}' at '{place.group}.*each query chooses its own keys"
        ):
            hf_hardattn.apply(example.model, {"sites": [place.pattern], "scorer": scorer})
    assert not hf_hardattn.selectors(example.model)


@pytest.mark.parametrize("place", ATTENTIONS, **named)
def test_a_choice_of_each_query_is_refused_when_the_implementation_changes_behind_it(place):
    example = example_of(place, "sdpa", scorer="query_key")
    example.model.set_attn_implementation("mine")
    with pytest.raises(HardAttentionError, match="'mine' at '.*each query chooses its own keys"):
        run(example)


@pytest.mark.parametrize("place", [place for place in SERVED if not place.causal], **named)
def test_rows_of_different_length_need_a_function_that_makes_masks(place):
    """Unused slots would be attended to."""
    example = example_of(place, "unmasked", "threshold:0.5")
    with pytest.raises(HardAttentionError, match="'unmasked'.*makes no masks"):
        run(example)


@pytest.mark.parametrize("place", [place for place in SERVED if not place.causal and place.kind != "cross"], **named)
def test_masked_training_says_that_it_does_not_call_a_registered_function(place):
    with pytest.warns(UserWarning, match="'mine' is not called .* masked training"):
        train_loss(example_of(place, "mine"))


@pytest.mark.parametrize("place", [place for place in SERVED if not place.causal], **named)
def test_gathered_training_calls_a_registered_function(place, recwarn):
    expected = attentions(place)
    example = example_of(place, "mine", estimator="reinforce", baseline="none")
    CALLS.clear()
    train_loss(example)
    assert len(CALLS) == expected
    assert not [warning for warning in recwarn if "is not called" in str(warning.message)]


# Flex attention's heads are 16 wide at least, and a power of two.
WIDE = {"hidden_size": 48, "intermediate_size": 37}
FLEX = [place for place in SERVED if not place.causal]


def assert_flex_is_sdpa(place, budget):
    found, expected = (
        stock(place.architecture, place.heads[0], attn_implementation=name, **WIDE)
        for name in ("flex_attention", "sdpa")
    )
    for each in (found, expected):
        harden(each.model, Case(place, place.heads[0], budget=budget).config())
        # Transformers' flex attention takes T5's bias, which all texts share, for one text alone
        if place.architecture == "t5":
            each.batch = {name: x[:1] for name, x in each.batch.items()}
    close(run(found), run(expected))


@pytest.mark.parametrize("budget", [3, "threshold:0.5"])
@pytest.mark.parametrize("place", FLEX, **named)
def test_flex_attention_gives_what_sdpa_gives(place, budget):
    """By PyTorch's reference for flex attention, which the compiled kernel follows: compiling takes ten seconds a shape."""
    with torch.compiler.set_stance("force_eager"):
        assert_flex_is_sdpa(place, budget)


@pytest.mark.slow
def test_compiled_flex_attention_gives_what_sdpa_gives():
    assert_flex_is_sdpa(next(place for place in FLEX if place.group == "text.self"), "threshold:0.5")
