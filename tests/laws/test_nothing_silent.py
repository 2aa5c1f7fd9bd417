"""Law 17: an option, recording, replay or removal that cannot take effect raises or warns, and says why.

The terms of the training loss have tests of their own in ``test_faults.py``.
"""

from __future__ import annotations

import collections
import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from cases import HEADS, close, harden, run, stock
from transformers import AutoConfig, AutoModel, SwinConfig, SwinModel, ViTForImageClassification

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.modeling.remaining import KEYS_PAY_FROM

HEAD = ("vit", "ViTForImageClassification")
FIRST_HEADS = list(dict(reversed(HEADS)).items())
MASK = torch.ones(3, 10, dtype=torch.bool)


def hard_vit(**changes):
    example = stock(*HEAD)
    harden(example.model, {"sites": ["vision.inputs", "vision.self.1"], "budget": 3, **changes})
    return example


# ------------------------------------------------------------------------------------------------------------------------- typos


@pytest.mark.parametrize("name", ["maskd", "", "MASKED", "auto ", None, 1])
def test_an_unknown_execution(name):
    with pytest.raises(HardAttentionError, match="unknown execution"), hf_hardattn.execution(hard_vit().model, name):
        pass


@pytest.mark.parametrize("site", ["vision.input", "text.inputs", "vision.tokens.0", "vision.self.99"])
def test_a_replay_of_an_unknown_site(site):
    with pytest.raises(HardAttentionError, match=f"unknown site '{site}'"):
        with hf_hardattn.replay(hard_vit().model, {site: MASK}):
            pass


def test_a_recorded_site_that_is_not_there():
    example = hard_vit()
    with hf_hardattn.record(example.model) as selections:
        run(example)
    with pytest.raises(HardAttentionError, match="unknown recorded site 'vision.tokens.0'"):
        selections["vision.tokens.0"]


@pytest.mark.parametrize("mask", [MASK.float(), MASK[0], MASK[:, None], [True] * 10, None])
def test_a_replayed_mask_of_another_kind(mask):
    with pytest.raises(HardAttentionError, match="pass a bool tensor"):
        with hf_hardattn.replay(hard_vit().model, {"vision.inputs": mask}):
            pass


@pytest.mark.parametrize("shape", [(3, 9), (2, 10), (3, 11), (4, 10)])
def test_a_replayed_mask_of_another_shape(shape):
    example = hard_vit()
    with pytest.raises(HardAttentionError, match="the selection to replay at 'vision.inputs' has the shape"):
        with hf_hardattn.replay(example.model, {"vision.inputs": torch.ones(shape, dtype=torch.bool)}):
            run(example)


def test_more_calls_than_were_recorded():
    example = hard_vit()
    with hf_hardattn.record(example.model) as selections:
        run(example)
    with pytest.raises(HardAttentionError, match="the recording holds fewer selections at 'vision.inputs'"):
        with hf_hardattn.replay(example.model, selections):
            run(example)
            run(example)


def test_a_recording_of_another_batch():
    example = hard_vit()
    with hf_hardattn.record(example.model) as selections:
        run(example)
    example.batch = {name: torch.cat((value, value))[:4] for name, value in example.batch.items()}
    with pytest.raises(HardAttentionError, match="Replay a recording on the batch it was made on"):
        with hf_hardattn.replay(example.model, selections):
            run(example)


# ----------------------------------------------------------------------------------------------------------------- nothing to act on


@pytest.mark.parametrize(
    "verb",
    [
        lambda model: hf_hardattn.record(model).__enter__(),
        lambda model: hf_hardattn.replay(model, []).__enter__(),
        lambda model: hf_hardattn.set_budget(model, 3),
        lambda model: hf_hardattn.verify(model, {}),
        lambda model: hf_hardattn.diagnose(model, {}),
        lambda model: hf_hardattn.find_collapse(model, {}),
        lambda model: hf_hardattn.execution(model, "masked").__enter__(),
        lambda model: hf_hardattn.sampled(model).__enter__(),
        lambda model: hf_hardattn.freeze_backbone(model).__enter__(),
        lambda model: hf_hardattn.set_reward(model, lambda inputs, output: output.loss),
    ],
    ids="record replay set_budget verify diagnose find_collapse execution sampled freeze_backbone set_reward".split(),
)
def test_a_model_without_sites(verb):
    with pytest.raises(HardAttentionError, match="ViTForImageClassification has no"):
        verb(stock(*HEAD).model)


def test_a_soft_model_is_soft_and_bare_already():
    """These ask for what is there, so that they have nothing to say."""
    example = stock(*HEAD)
    expected = run(example)
    with hf_hardattn.soft(example.model):
        close(run(example), expected, 0)
    assert hf_hardattn.remove(example.model) is example.model
    assert "no hard attention" in hf_hardattn.status(example.model)


def test_a_reward_that_no_estimator_reads():
    with pytest.warns(UserWarning, match="no site .* uses a reward"):
        hf_hardattn.set_reward(hard_vit(estimator="simple").model, lambda inputs, output: output.loss)


# ----------------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "budget", [0, -1, 0.0, 1.5, -0.5, "threshold", "top_p:2", "all", None, True, float("nan"), [3]]
)
def test_a_budget_out_of_range_changes_nothing(budget):
    example = hard_vit()
    expected, said = run(example), hf_hardattn.status(example.model)
    with pytest.raises(HardAttentionError, match="budget"):
        hf_hardattn.set_budget(example.model, budget)
    close(run(example), expected, 0)
    assert hf_hardattn.status(example.model) == said


@pytest.mark.parametrize("site", ["vision.inputz", "vision.tokens.0", "text.inputs"])
def test_a_budget_of_an_unknown_site_changes_nothing(site):
    example = hard_vit()
    said = hf_hardattn.status(example.model)
    with pytest.raises(HardAttentionError, match=site):
        hf_hardattn.set_budget(example.model, {"vision.inputs": 2, site: 2})
    assert hf_hardattn.status(example.model) == said


# ------------------------------------------------------------------------------------------------- configurations and modules around


class Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model


def test_a_plain_module_around_a_model_has_no_settings_and_is_refused():
    example = stock("vit", "ViTForImageClassification")
    for call in (lambda m: hf_hardattn.apply(m, {"sites": ["vision.inputs"]}), lambda m: hf_hardattn.set_budget(m, 2)):
        with pytest.raises(HardAttentionError, match=r"Around has no config.* \(\.inner\)"):
            call(Around(example.model))
        hf_hardattn.apply(example.model, {"sites": ["vision.inputs"]})


@pytest.mark.parametrize("save", ["stock", "full", "selectors"])
def test_a_configuration_that_was_edited_is_not_saved(save, tmp_path):
    example = hard_vit()
    ways = {
        "stock": lambda: example.model.save_pretrained(tmp_path / "a"),
        "full": lambda: hf_hardattn.save(example.model, tmp_path / "a"),
        "selectors": lambda: hf_hardattn.save(
            example.model, tmp_path / "a", selectors_only=True, base_model="a/b", verify_base=False
        ),
    }
    before = example.model.config.hard_attention["budget"]
    example.model.config.hard_attention["budget"] = {"count": 1}
    with pytest.raises(HardAttentionError, match="was changed after it had been attached"):
        ways[save]()
    example.model.config.hard_attention["budget"] = before
    ways[save]()


# ----------------------------------------------------------------------------------------------------------------- refused as a whole

REFUSED = [
    {"sites": ["nowhere.*"]},
    {"sites": ["*"], "scorer": "nobody"},
    {"sites": ["*"], "estimator": "nobody"},
    {"sites": ["*"], "budget": 0},
    {"sites": ["*"], "execution": "gathered", "estimator": "simple"},
    {"sites": ["*"], "scorer": "query_key", "scorer_options": {"nothing": 1}},
    {"sites": ["*"], "budget": {"start": 1.0}},
    {"sites": ["*"], "nothing": 1},
]


@pytest.mark.parametrize("config", REFUSED, ids=str)
@pytest.mark.parametrize(("architecture", "head"), FIRST_HEADS)
def test_a_refused_configuration_leaves_the_whole_model(architecture, head, config):
    """A hard model stays as hard as it was, and a soft one soft."""
    example = stock(architecture, head)
    for before in (None, {"sites": ["*"], "budget": 2}):
        if before is not None:
            harden(example.model, before)
        expected, keys, said = (
            run(example),
            list(example.model.state_dict()),
            copy.deepcopy(example.model.config.to_dict()),
        )
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in example.model.modules()]
        with pytest.raises(HardAttentionError):
            hf_hardattn.apply(example.model, config)
        assert list(example.model.state_dict()) == keys and example.model.config.to_dict() == said
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in example.model.modules()] == hooks
        close(run(example), expected, 0)


# -------------------------------------------------------------------------------------------------------------- compiled and recorded


def test_a_model_whose_layers_are_compiled_and_ran_is_recorded():
    """As a whole, compiled in either form: see ``test_wrappers.py``."""
    example = hard_vit()
    torch._dynamo.reset()
    for layer in example.model.vit.layers:
        layer.compile(backend="eager")
    for _ in range(2):
        run(example)
    with hf_hardattn.record(example.model) as selections:
        run(example)
    assert sorted(selections.sites) == ["vision.inputs", "vision.self.1"]


def test_a_schedule_that_nobody_counts():
    example = hard_vit(temperature={"start": 1.0, "end": 0.1, "steps": 100})
    with pytest.warns(UserWarning, match="the schedule of .* does not advance: it is still at step 0"):
        example.model.train()(**example.batch)


# ------------------------------------------------------------------------------------------------- what is asked for is what is kept


@pytest.mark.parametrize(("architecture", "head"), FIRST_HEADS)
def test_the_recommended_sites_keep_what_the_budget_says(architecture, head):
    """In all, not of what earlier sites left: one that drops rows in a tower, or some that choose among the same keys."""
    example = stock(architecture, head)
    hf_hardattn.apply(example.model, {"budget": 0.5})
    kinds = collections.Counter(site.rsplit(".", 1)[0] for site in hf_hardattn.selectors(example.model))
    (kind, count), *others = kinds.items()
    assert not others and (count == 1 or kind.endswith(".cross"))
    assert example.model.config.hard_attention["sites"], "a saved model does not change with the recommendation"


def test_status_counts_what_is_left_behind_each_site():
    example = stock("vit", "ViTForImageClassification")
    hf_hardattn.apply(example.model, {"sites": {"vision.inputs": 0.7, "vision.self.1": 2, "vision.tokens.1": 0.5}})
    rows = [line.split() for line in hf_hardattn.status(example.model).splitlines()]
    left = {row[0]: " ".join(row[2:5]) for row in rows[1:] if row[0] != "note:"}
    assert left == {"vision.inputs": "8 of 10", "vision.self.1": "3 of 10", "vision.tokens.1": "5 of 10"}
    with hf_hardattn.record(example.model) as selections:
        run(example)
    assert {s.site: f"{int(s.mask.sum(-1)[0, 0, 0])} of 10" for s in selections} == left


def test_status_says_from_how_many_rows_on_keys_save_time():
    example = stock("vit", "ViTForImageClassification")
    hf_hardattn.apply(example.model, {"sites": ["vision.self.*"], "budget": 0.25})
    assert "note: selecting keys (vision.self.0, ...) saved time" in (said := str(hf_hardattn.status(example.model)))
    assert f"from about {KEYS_PAY_FROM[False]} rows on; here there are 10." in said
    hf_hardattn.apply(example.model, {"sites": ["vision.tokens.0"], "budget": 0.25})
    assert "note:" not in hf_hardattn.status(example.model)
    text = stock("t5", "T5EncoderModel")
    hf_hardattn.apply(text.model, {"sites": ["encoder.self.*"], "budget": 0.25, "share_selection": True})
    assert f"from about {KEYS_PAY_FROM[True]} rows on; here, texts differ" in hf_hardattn.status(text.model)


@pytest.mark.parametrize(("shared", "row"), [(False, "one a layer"), (True, "one selection")])
def test_what_status_says_of_keys_was_measured(shared, row):
    results = json.loads((Path(__file__).parents[2] / "results" / "bench" / "break_even.json").read_text())
    name = f"encoder.self.* keep 0.25, {row}"
    groups = [group for group in results["groups"] if name in group["rows"]]
    speeds = {g["workload"]["size"]: g["rows"][name]["against_stock"]["median"] for g in groups}
    shorter = [speed for size, speed in speeds.items() if size < KEYS_PAY_FROM[shared]]
    longer = [speed for size, speed in speeds.items() if size >= KEYS_PAY_FROM[shared]]
    assert max(shorter) < 1.05 and min(longer) > 1 / 1.05, "5 % is no difference"


def test_status_counts_the_share_of_a_text():
    example = stock("t5", "T5ForConditionalGeneration")
    sites = {"encoder.tokens.0": 0.5, "encoder.tokens.1": 0.5, "decoder.cross.0": 0.5, "decoder.cross.1": "top_p:0.5"}
    hf_hardattn.apply(example.model, {"sites": sites})
    left = [line.split("  ")[2:] for line in hf_hardattn.status(example.model).splitlines()[1:]]
    assert [" ".join(row).split("linear")[0].strip() for row in left] == ["0.5", "0.25", "0.125", "by the scores"]


def test_sites_that_leave_next_to_nothing_together():
    example = stock("vit", "ViTForImageClassification", image_size=48)
    with pytest.warns(
        UserWarning,
        match=r"3 sites of 'vision' together keep only 2.8% of its rows, because the budget of 'vision.tokens.1' is",
    ):
        hf_hardattn.apply(example.model, {"sites": ["vision.tokens.*"], "budget": 0.25})
    assert "warning: 3 sites of 'vision' together keep only 2.8%" in hf_hardattn.status(example.model)


def test_a_glob_of_several_kinds_of_sites(recwarn):
    hf_hardattn.apply(stock("vit", "ViTModel").model, {"sites": ["*"], "budget": 3})
    assert not recwarn
    with pytest.warns(UserWarning, match="'vision.*' names sites of 3 kinds .inputs, self, tokens.*'vision.tokens.*'"):
        hf_hardattn.apply(stock("vit", "ViTModel").model, {"sites": ["vision.*"], "budget": 3})


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize(("architecture", "head"), [("bart", "BartForConditionalGeneration")])
def test_sites_of_layers_that_training_skips(architecture, head, part):
    sites = {"encoder": "encoder.inputs", "decoder": "decoder.cross.*"}[part]
    example = stock(architecture, head, **{f"{part}_layerdrop": 0.5})
    with pytest.warns(UserWarning, match=f"skips each layer in 50% of the training steps.*Set {part}_layerdrop=0"):
        hf_hardattn.apply(example.model, {"sites": [sites]})
    assert "skips each layer in 50%" in hf_hardattn.status(example.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_hardattn.apply(example.model, {"sites": [f"{'en' if part == 'decoder' else 'de'}coder.self.*"]})
        hf_hardattn.apply(stock(architecture, head).model, {"sites": [sites]})


@pytest.mark.parametrize("part", ["vit", "vit.layers"])
@pytest.mark.parametrize("estimator", ["simple", "reinforce"])
def test_selectors_that_a_part_in_evaluation_mode_keeps_from_learning(estimator, part):
    example = hard_vit(estimator=estimator, anneal=0)
    known = hf_hardattn.selectors(example.model)
    example.model.train().get_submodule(part).eval()
    with pytest.warns(
        UserWarning, match="of 'vision.inputs', 'vision.self.1' are in evaluation mode and learn nothing"
    ):
        example.model(**example.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example.model(**example.batch)  # once
        for selector in known.values():
            selector.train()
        example.model(**example.batch).loss.backward()
    assert all(p.grad is not None for selector in known.values() for p in selector.scorer.parameters())


@pytest.mark.parametrize("how", ["frozen", "soft", "no_grad"])
def test_selectors_that_shall_not_learn(how):
    example = hard_vit(anneal=0, **({"estimator": "soft"} if how == "soft" else {}))
    example.model.train().vit.eval()
    if how == "frozen":
        for selector in hf_hardattn.selectors(example.model).values():
            selector.requires_grad_(False)
    with warnings.catch_warnings(), torch.set_grad_enabled(how != "no_grad"):
        warnings.simplefilter("error")
        example.model(**example.batch)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("estimator", ["simple", "reinforce", "rloo", "hard_concrete", "cropr", "variational"])
def test_selectors_alone_in_training_mode(estimator, by_name):
    """With the backbone in evaluation mode: the gradients are those of a model in training mode without dropout, which this one is."""
    gradients = []
    for mode in (True, False):
        example = hard_vit(estimator=estimator, anneal=0, baseline="none")
        known = hf_hardattn.selectors(example.model)
        example.model.train(mode)
        for selector in known.values():
            selector.train()
        torch.manual_seed(3)
        output = example.model(**example.batch, return_dict=by_name)
        (output.loss if by_name else output[0]).backward()
        gradients.append([p.grad for selector in known.values() for p in selector.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert any(gradient is not None for gradient in gradients[0])


def test_a_count_of_more_than_there_is():
    example = stock("vit", "ViTForImageClassification")
    with pytest.warns(UserWarning, match="budget=1000 at 'vision.inputs' keeps everything: there are 9 positions"):
        hf_hardattn.apply(example.model, {"sites": ["vision.inputs"], "budget": 1000})


def test_sites_of_towers_that_a_whole_model_lacks():
    example = stock("t5", "T5EncoderModel")
    with pytest.raises(HardAttentionError, match="no site of T5EncoderModel matches .'decoder.cross"):
        hf_hardattn.apply(example.model, {"sites": ["decoder.cross.*"]})


def test_a_model_of_no_family_that_is_asked_for_hard_attention():
    sizes = dict(image_size=32, embed_dim=8, depths=[1], num_heads=[1])
    with pytest.raises(HardAttentionError, match="no family supports SwinModel, so hard attention cannot be applied"):
        SwinModel(SwinConfig(**sizes, hard_attention={"budget": 0.5}))
    SwinModel(SwinConfig(**sizes))


def test_a_checkpoint_with_selectors_at_sites_that_its_config_forgot(tmp_path):
    example = stock("vit", "ViTForImageClassification")
    hf_hardattn.apply(example.model, {"sites": ["vision.tokens.*"], "budget": 0.7})
    example.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hard_attention"]["sites"] = {"vision.tokens.0": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HardAttentionError, match="holds 4 selector tensors .* for sites that are not in its config"):
        ViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("verb", ["verify", "find_collapse", "diagnose"])
@pytest.mark.parametrize("batch", [torch.zeros(1, 2, 12, 12), [1], 3])
def test_a_batch_without_names(verb, batch):
    with pytest.raises(HardAttentionError, match=f"{verb} got (Tensor|int|list); a batch is a dict"):
        getattr(hf_hardattn, verb)(hard_vit().model, batch)


def test_names_of_the_package_are_the_public_ones():
    assert set(hf_hardattn.__all__) <= set(dir(hf_hardattn)) and "importlib" not in dir(hf_hardattn)
    assert hf_hardattn.inspection.__name__ == "hf_hardattn.inspection"


def test_a_misspelt_site_is_answered_with_the_nearest():
    example = stock("vit", "ViTForImageClassification")
    with pytest.raises(HardAttentionError, match=r"no site matches 'vision.input' .* Did you mean 'vision.inputs'\?"):
        hf_hardattn.apply(example.model, {"sites": ["vision.input"]})


@pytest.mark.parametrize("auto", [ViTForImageClassification, AutoModel, AutoConfig])
def test_a_folder_of_selectors_alone_says_how_it_is_loaded(tmp_path, auto):
    stock(*HEAD).model.save_pretrained(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(tmp_path / "base", hard_attention={"budget": 0.5})
    hf_hardattn.save(model, tmp_path / "selectors", selectors_only=True)
    with pytest.raises(
        HardAttentionError, match=r"holds only selectors, without a model; .* Load both with hf_hardattn.load\("
    ):
        auto.from_pretrained(tmp_path / "selectors")
