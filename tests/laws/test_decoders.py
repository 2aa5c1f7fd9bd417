"""Decoders: what leaves a prompt at prefill is what the stock model without a cache writes when those rows are hidden from it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from decoders import DECODERS, SIZES, WINDOW, harden, kept, oracle, prompts, stock, write, written_by_oracle
from rounding import MANY, SOME, assert_rounded
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.exporters.exporter_dynamo import register_pytree_node

import hf_hardattn
from hf_hardattn import HardAttentionError

ROWS = {
    "tokens": {"sites": {"decoder.tokens.0": {"budget": 0.6}, "decoder.tokens.1": {"budget": 4}}},
    "inputs": {"sites": {"decoder.inputs": {"budget": 0.5}}},
    "ragged": {"sites": {"decoder.inputs": {"budget": 0.8}, "decoder.tokens.0": {"budget": "threshold:0.5"}}},
}
KEYS = {
    "keys": {"sites": {"decoder.self.1": {"budget": 4}}},
    "first keys": {"sites": {"decoder.self.0": {"budget": 0.4}}},
    "all keys": {"sites": {"decoder.self.*": {"budget": "top_p:0.6"}}},
    "both": {"sites": {"decoder.tokens.0": {"budget": 5}, "decoder.self.1": {"budget": 3}}},
}
CONFIGS = {**ROWS, **KEYS}
FULL = [("llama", name) for name in CONFIGS] + [("mistral", name) for name in ROWS]
QUICK = [("qwen2", "both"), ("qwen3", "first keys"), ("gemma", "tokens")]
STATIC = {"cache_implementation": "static"}


def window_of(name: str) -> int | None:
    return WINDOW if name == "mistral" else None


def without_end(logits: torch.Tensor) -> torch.Tensor:
    """Logits but that of the end of the text, which generate() forbids."""
    return torch.cat((logits[..., : SIZES["eos_token_id"]], logits[..., SIZES["eos_token_id"] + 1 :]), -1)


@pytest.mark.parametrize("name", DECODERS)
def test_keeping_all_is_the_stock_model(name):
    sites = ["decoder.inputs", "decoder.tokens.*"] + ([] if name == "mistral" else ["decoder.self.*"])
    model, expected = harden(stock(name), {"sites": sites, "budget": 1.0}), write(stock(name), prompts())
    found = write(model, prompts())
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    with hf_hardattn.soft(harden(model, {"sites": ["decoder.tokens.0"], "budget": 2})):
        assert torch.equal(write(model, prompts()).sequences, expected.sequences)


@pytest.mark.parametrize(
    ("name", "config", "implementation"),
    [(*case, kind) for case in FULL for kind in ("sdpa", "eager")] + [(*case, "sdpa") for case in QUICK],
)
def test_generation_is_that_of_the_stock_model_without_what_was_dropped(name, config, implementation):
    model = harden(stock(name, implementation=implementation), CONFIGS[config])
    for options in ({}, STATIC):
        with hf_hardattn.record(model) as recording:
            found = write(model, prompts(), **options)
        assert len(recording) == len(recording.sites)  # nothing is chosen behind the prompt
        chosen = kept(recording)
        plain = stock(name, implementation=implementation)
        text, logits = written_by_oracle(plain, prompts(), chosen, window_of(name))
        assert torch.equal(found.sequences, text)
        assert_rounded(without_end(torch.stack(found.logits, 1)), without_end(logits), SOME)
        assert all(bool(rows[:, -1].all()) for rows in chosen.values()), "the last row of the prompt is kept"
        assert any(not bool(rows[0].all()) for rows in chosen.values())


@pytest.mark.parametrize(("name", "config"), [("llama", "both"), ("llama", "first keys"), ("mistral", "ragged")])
def test_beams_are_the_same_with_every_cache_and_execution(name, config):
    model = harden(stock(name), CONFIGS[config])
    expected = write(model, prompts(), num_beams=3)
    assert torch.equal(write(model, prompts(), num_beams=3, **STATIC).sequences, expected.sequences)
    with hf_hardattn.execution(model, "masked"):
        assert torch.equal(write(model, prompts(), num_beams=3).sequences, expected.sequences)
        assert torch.equal(write(model, prompts(), **STATIC).sequences, write(model, prompts()).sequences)


@pytest.mark.parametrize(("name", "config"), [("llama", "both"), ("mistral", "inputs"), ("qwen3", "ragged")])
def test_a_padded_batch_is_its_rows_alone(name, config):
    model, batch = harden(stock(name), CONFIGS[config]), prompts()
    together = write(model, batch)
    for row, length in enumerate(batch["attention_mask"].sum(-1)):
        alone = write(model, {key: value[row : row + 1, -length:] for key, value in batch.items()})
        assert torch.equal(alone.sequences[0], together.sequences[row, -alone.sequences.shape[1] :])
        for one, other in zip(alone.logits, together.logits, strict=True):
            assert_rounded(one[0], other[row], SOME)


@pytest.mark.parametrize("config", ["inputs", "first keys"])
def test_layers_with_and_without_a_window_get_masks_of_their_own(config):
    """Behind one selection; the reference is the text in one call without steps, its labels marking what was written."""
    mixed = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(Qwen2Config(**SIZES, **mixed)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.25)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    harden(model, CONFIGS[config])
    found, static = write(model, prompts()), write(model, prompts(), **STATIC)
    assert torch.equal(found.sequences, static.sequences)
    mask = torch.nn.functional.pad(prompts()["attention_mask"], (0, found.sequences.shape[1] - 12), value=1)
    labels, positions = found.sequences.clone(), (mask.cumsum(-1) - 1).clamp(min=0)
    labels[:, :12] = -100
    with torch.no_grad():
        whole = model(input_ids=found.sequences, attention_mask=mask, position_ids=positions, labels=labels).logits
    assert_rounded(without_end(torch.stack(found.logits, 1)), without_end(whole[:, 11:-1]), SOME)


def test_caches_hold_what_was_kept():
    model = harden(stock("llama"), {"sites": {"decoder.tokens.1": {"budget": 3}, "decoder.self.0": {"budget": 5}}})
    layers = write(model, prompts(padded=False)).past_key_values.layers
    assert [layer.keys.shape[2] for layer in layers] == [6 + 5, 12 + 5, 4 + 5]  # the last row beside the budget


def steps(model, inputs, pieces, **options):
    """Logits of the last row of each piece of the text, called with one cache."""
    cache, done, found = None, 0, []
    for piece in pieces:
        mask = inputs["attention_mask"][:, : done + piece]
        call = {"input_ids": inputs["input_ids"][:, done : done + piece], "attention_mask": mask}
        with torch.no_grad():
            output = model(**call, past_key_values=cache, use_cache=True, **options)
        cache, done = output.past_key_values, done + piece
        found.append(output.logits[:, -1])
    return found


@pytest.mark.parametrize("config", ["inputs", "first keys", "both"])
def test_a_bare_call_counts_the_positions_that_were_dropped(config):
    """Without position_ids Transformers counts the rows in the first layer's cache."""
    model = harden(stock("llama"), CONFIGS[config])
    found = write(model, prompts(padded=False))
    text = {"input_ids": found.sequences, "attention_mask": torch.ones_like(found.sequences)}
    for one, other in zip(steps(model, text, [12, 1, 1, 1]), found.logits, strict=False):
        assert_rounded(one, other, SOME)


@pytest.mark.parametrize(("name", "config"), [("llama", "both"), ("llama", "first keys"), ("mistral", "inputs")])
def test_what_follows_the_prompt_is_never_dropped(name, config):
    """A later turn of several rows, padded on the left, reads the kept rows and the whole of itself."""
    model, generator = harden(stock(name), CONFIGS[config]), torch.Generator().manual_seed(5)
    more = torch.randint(3, 53, (2, 5), generator=generator)
    turn = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    text = {
        "input_ids": torch.cat((prompts()["input_ids"], more), 1),
        "attention_mask": torch.cat((prompts()["attention_mask"], turn), 1),
    }
    positions = (text["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with hf_hardattn.record(model) as recording:
        cache, found = None, []
        for piece in (slice(0, 12), slice(12, 16), slice(16, 17)):
            call = {"input_ids": text["input_ids"][:, piece], "position_ids": positions[:, piece]}
            mask = text["attention_mask"][:, : piece.stop]
            with torch.no_grad():
                output = model(**call, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    assert len(recording) == len(recording.sites)
    expected = oracle(stock(name), text, kept(recording), window_of(name), 12)
    assert_rounded(found[1][text["attention_mask"][:, 12:16].bool()], expected[:, 12:16][turn[:, :4].bool()], SOME)
    assert_rounded(found[2][:, -1], expected[:, -1], SOME)


def test_a_conversation_goes_on_with_its_cache():
    """generate() again, with the cache of the first turn; where the first layer's cache is short, Transformers would feed rows twice."""
    one = prompts(padded=False)
    for config in ("both", "first keys"):
        model = harden(stock("llama"), CONFIGS[config])
        first = write(model, one)
        more = torch.cat((first.sequences, torch.tensor([[7, 8, 9], [10, 11, 12]])), 1)
        turn = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        if config == "first keys":
            with pytest.raises(
                HardAttentionError, match=r"generate\(\) cannot continue from a cache whose first layer"
            ):
                write(model, turn, past_key_values=first.past_key_values)
            continue
        found = write(model, turn, past_key_values=first.past_key_values)
        with hf_hardattn.record(model) as recording:
            write(model, one)
        expected = oracle(stock("llama"), turn, kept(recording), None, 12)
        assert_rounded(found.logits[0], expected[:, -1], SOME)


def test_drawn_choices_follow_their_beams():
    """Under ``sampled`` each beam keeps rows of its own, so what is remembered beside the cache moves with them."""
    model = harden(
        stock("mistral"), {**CONFIGS["inputs"], "estimator": "simple"}
    )  # whose window asks where each kept row stood
    order, batch = torch.tensor([2, 0, 1]), {key: value[:1].repeat(3, 1) for key, value in prompts().items()}
    step = {"input_ids": torch.tensor([[7], [8], [9]]), "position_ids": torch.full((3, 1), 12)}
    torch.manual_seed(1)
    with hf_hardattn.sampled(model), hf_hardattn.record(model) as recording, torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        moved = copy.deepcopy(cache)
        moved.reorder_cache(order)
        expected = model(**step, past_key_values=cache).logits[order]
        found = model(**{key: value[order] for key, value in step.items()}, past_key_values=moved).logits
    assert not torch.equal(*kept(recording)["decoder.inputs"][:2])
    assert_rounded(found, expected, SOME)


def test_assisted_decoding_writes_the_same():
    model = harden(stock("llama"), CONFIGS["both"])
    one = {name: value[:1] for name, value in prompts().items()}
    expected = write(model, one).sequences
    assert torch.equal(write(model, one, assistant_model=stock("llama")).sequences, expected)
    assert torch.equal(write(model, one, prompt_lookup_num_tokens=2).sequences, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_logits_to_keep_says_nothing_of_the_prompt(name):
    """Only in assisted decoding do the rows whose logits are requested begin with a draft."""
    model, one = harden(stock(name), CONFIGS["tokens"]), prompts(padded=False)
    with torch.no_grad():
        expected = model(**one).logits
        for count in (1, 5, 12):
            assert_rounded(model(**one, logits_to_keep=count).logits, expected[:, -count:], SOME)


def test_a_call_that_tells_no_answer_warns_of_the_logits_of_dropped_rows():
    """They are 0, and the choice saw the whole text; nothing is said where the answer is told, or the last row alone is read."""
    model, one = harden(stock("llama"), CONFIGS["tokens"]), {name: value[:1] for name, value in prompts().items()}
    labels = answered()["labels"][:1]
    with (
        pytest.warns(UserWarning, match="called without labels.* pass labels that are -100 on its prompt"),
        torch.no_grad(),
    ):
        assert not bool(model(**one).logits.any(-1).all())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        model(**one, logits_to_keep=1)
        model(**one, labels=labels)
        write(model, one, prompt_lookup_num_tokens=2)
        write(model, one, num_beams=2)
        with hf_hardattn.soft(model):
            model(**one)
        hf_hardattn.verify(model, one)
        harden(stock("llama"), CONFIGS["keys"])(**one)  # drops keys, and no row


# ---------------------------------------------------------------- training


def answered(model=None) -> dict[str, torch.Tensor]:
    """Prompts of different length with answers, padded on the left; the labels mark the answers."""
    batch = prompts()
    labels = batch["input_ids"].clone()
    labels[0, :9], labels[1, :8] = -100, -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize(("name", "config"), [("llama", "both"), ("llama", "all keys"), ("mistral", "ragged")])
def test_with_labels_the_prompt_is_selected_from_and_the_answer_is_whole(name, config):
    model, batch = harden(stock(name), CONFIGS[config]), answered()
    with hf_hardattn.record(model) as recording, torch.no_grad():
        found = model(**batch)
    assert found.logits.shape[1] == 12
    chosen = kept(recording)
    answer = batch["labels"] != -100
    for row, start in enumerate((9, 8)):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        rows = {site: mask[row : row + 1, :start] for site, mask in chosen.items()}
        expected = oracle(stock(name), alone, rows, window_of(name), start)
        # the last row of the prompt predicts the first of the answer
        assert_rounded(found.logits[row, start - 1 :], expected[0, start - 1 :], SOME)
        assert all(bool(mask[row, start - 1 :].all()) for mask in chosen.values())
    changed = {**batch, "input_ids": torch.where(answer, 3 + (batch["input_ids"] + 1) % 50, batch["input_ids"])}
    with hf_hardattn.record(model) as again, torch.no_grad():
        model(**changed)
    assert all(torch.equal(kept(again)[site], mask) for site, mask in chosen.items()), "the answer chose its own prompt"


def test_a_prompt_with_labels_is_chosen_as_a_prompt_alone():
    """What training and evaluation select is what generation selects."""
    model, batch = harden(stock("llama"), CONFIGS["both"]), answered()
    with hf_hardattn.record(model) as together, torch.no_grad():
        model(**batch)
    for row, start in enumerate((9, 8)):
        first = 0 if row == 0 else 3
        with hf_hardattn.record(model) as alone:
            write(model, {key: batch[key][row : row + 1, first:start] for key in ("input_ids", "attention_mask")})
        for site, mask in kept(together).items():
            assert torch.equal(kept(alone)[site][0], mask[row, first:start])


@pytest.mark.parametrize("estimator", ["straight_through", "simple", "rloo"])
@pytest.mark.parametrize(("name", "config"), [("llama", "both"), ("mistral", "ragged"), ("qwen3", "first keys")])
def test_every_selector_gets_a_gradient_from_the_answer(name, config, estimator):
    model = harden(stock(name), {**CONFIGS[config], "estimator": estimator, "baseline": "none"}).train()
    torch.manual_seed(4)
    model(**answered()).loss.backward()
    for site, selector in hf_hardattn.selectors(model).items():
        assert any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in selector.parameters()), site
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "config"), [("llama", "both"), ("mistral", "ragged"), ("qwen3", "all keys")])
def test_masked_training_computes_what_gathered_does(name, config):
    """The gates of a draw weigh what the same choice, dropped, would leave; also under gradient checkpointing."""
    results = []
    for checkpointing in (False, True):
        model, batch = harden(stock(name), {**CONFIGS[config], "estimator": "simple"}).train(), answered()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(4)
        with hf_hardattn.record(model) as recording:
            output = model(**batch)
        output.loss.backward()
        results.append((output, {key: p.grad for key, p in model.named_parameters()}))
    (output, gradients), (again, recomputed) = results
    assert torch.equal(output.loss, again.loss)
    assert all(torch.equal(recomputed[key], gradient) for key, gradient in gradients.items() if gradient is not None)
    chosen = {site: mask for site, mask in kept(recording).items()}
    for row, start in enumerate((9, 8)):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        rows = {site: mask[row : row + 1, :start] for site, mask in chosen.items()}
        expected = oracle(stock(name), alone, rows, window_of(name), start)
        assert_rounded(output.logits[row, start - 1 :].detach(), expected[0, start - 1 :], SOME)


@pytest.mark.parametrize("name", DECODERS)
def test_classifiers_and_bare_towers_read_the_whole_text_as_a_prompt(name):
    for head in ("ForSequenceClassification", "Model"):
        model, batch = harden(stock(name, head), CONFIGS["tokens"]), prompts()
        labels = {"labels": torch.tensor([1, 0])} if head != "Model" else {}
        with torch.no_grad():
            together = model(**batch, **labels)
            alone = model(**{key: value[1:, 3:] for key, value in batch.items()})
        if head == "Model":
            assert together.last_hidden_state.shape[1] == 12  # full length: what left holds zeros
            assert not bool(together.last_hidden_state[0].any(-1).all())
            assert_rounded(together.last_hidden_state[1, 3:], alone.last_hidden_state[0], SOME)
        else:
            assert bool(together.loss.isfinite())
            assert_rounded(together.logits[1], alone.logits[0], SOME)


def test_keys_that_nobody_reads_are_named_and_have_a_gradient():
    with pytest.warns(UserWarning, match="decoder.self.0 select keys for tokens generated after the prompt"):
        model = harden(stock("llama", "ForSequenceClassification"), {"sites": ["decoder.self.0"], "budget": 0.5})
    model.train()(**prompts(), labels=torch.tensor([1, 0])).loss.backward()
    assert all(bool((p.grad == 0).all()) for s in hf_hardattn.selectors(model).values() for p in s.parameters())


# ---------------------------------------------------------------- certificate, reload, refusals


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_certificate_holds_at_inputs(name):
    sites = {"decoder.inputs": {"budget": 5}, "decoder.tokens.0": {"budget": 3}}
    report = hf_hardattn.verify(harden(stock(name), {"sites": sites}), prompts())
    assert report.parity_ok, report
    inputs, tokens = report.sites
    assert inputs.certified and inputs.kept_ratio < 1
    assert not tokens.certified and "earlier layers" in tokens.statement


def test_a_saved_decoder_is_hard_again(tmp_path):
    model = harden(stock("llama"), CONFIGS["both"])
    expected = write(model, prompts())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    found = write(again, prompts())
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    hf_hardattn.remove(again)
    assert torch.equal(write(again, prompts()).sequences, write(stock("llama"), prompts()).sequences)
    assert again.state_dict().keys() == stock("llama").state_dict().keys()


def test_generation_without_a_cache_is_refused():
    model = harden(stock("llama"), CONFIGS["tokens"])
    with pytest.raises(
        HardAttentionError, match=r"use_cache=False at 'decoder.tokens.0': without a cache, generate\(\)"
    ):
        write(model, prompts(), use_cache=False)
    with hf_hardattn.soft(model):
        assert torch.equal(
            write(model, prompts(), use_cache=False).sequences, write(stock("llama"), prompts()).sequences
        )


def test_training_on_a_text_without_a_prompt_is_refused():
    model = harden(stock("llama"), CONFIGS["first keys"]).train()
    batch = answered()
    with pytest.raises(HardAttentionError, match="the labels leave no prompt to select from at 'decoder.self.0'"):
        model(**{**batch, "labels": batch["input_ids"]})
    with pytest.raises(
        HardAttentionError, match="in training, only labels distinguish the prompt from the answer at 'decoder.self.0'"
    ):
        model(**prompts())


def test_a_cache_that_somebody_else_filled_is_refused():
    plain, model = stock("llama"), harden(stock("llama"), CONFIGS["tokens"])
    with torch.no_grad():
        cache = plain(**prompts(padded=False), use_cache=True).past_key_values
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with pytest.raises(HardAttentionError, match="the cache given to 'decoder.tokens.0' holds rows"):
        model(input_ids=ids, past_key_values=copy.deepcopy(cache), use_cache=True)
    with hf_hardattn.soft(model), torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama", {"sites": ["decoder.self.0"], "scorer": "query_key"}, "'decoder.self.0' keeps the keys of a prompt"),
        (
            "llama",
            {"sites": ["decoder.self.0"], "per_head": True},
            "per_head=True selects per head; 'decoder.self.0' keeps",
        ),
        ("mistral", {"sites": ["decoder.self.0"]}, "'decoder.self.0' belongs to a layer with a sliding window of 5"),
        ("llama", {"sites": ["decoder.tokens.0"], "pack": True}, "pack=True is not supported at 'decoder.tokens.0'"),
        ("llama", {"sites": ["decoder.tokens.0"], "restore": False}, "restore=False leaves 'decoder'"),
    ],
)
def test_what_a_decoder_cannot_do_is_refused(name, config, message):
    with pytest.raises(HardAttentionError, match=message):
        hf_hardattn.apply(stock(name), {"budget": 2, **config})


def test_later_layers_share_a_choice_of_keys():
    config = {"sites": ["decoder.self.*"], "budget": 4, "share_selection": True}
    model = harden(stock("llama"), config)
    with hf_hardattn.record(model) as recording:
        found = write(model, prompts())
    assert recording.sites == ["decoder.self.0"]
    chosen = {f"decoder.self.{layer}": kept(recording)["decoder.self.0"] for layer in range(3)}
    text, logits = written_by_oracle(stock("llama"), prompts(), chosen, None)
    assert torch.equal(found.sequences, text)
    assert_rounded(without_end(torch.stack(found.logits, 1)), without_end(logits), MANY)


@pytest.mark.parametrize("config", ["tokens", "keys", "both"])
def test_an_exporter_can_take_the_cache_of_a_prompt_apart(config):
    model = harden(stock("llama"), CONFIGS[config])
    with torch.no_grad():
        cache = model(**prompts(), use_cache=True).past_key_values
    register_pytree_node(type(cache))  # as every export of a decoder does, for the whole process
    rebuilt = tree_unflatten(*tree_flatten(copy.deepcopy(cache)))
    word = torch.full((2, 1), 7)
    mask = torch.cat((prompts()["attention_mask"], torch.ones_like(word)), 1)
    with torch.no_grad():
        found, expected = (
            model(input_ids=word, attention_mask=mask, past_key_values=each, use_cache=True).logits
            for each in (rebuilt, cache)
        )
    assert torch.equal(found, expected)
