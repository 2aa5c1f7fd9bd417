"""The training loss as a whole: its terms are weighed as the model's own loss is, credited to their examples, and never lost unsaid."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import Example, build
from test_training import arguments, examples
from test_training import build as vit
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from transformers import Trainer, ViTForImageClassification

import hf_hardattn
from hf_hardattn import HardAttentionCallback
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.losses.task_loss import explained, reward_of
from hf_hardattn.models import family_of
from hf_hardattn.training.driver import Driver

DETERMINISTIC = {"estimator": "simple", "estimator_options": {"sample": False}, "anneal": 0, "budget": 2}
TERMS: dict[str, dict[str, Any]] = {
    **{
        name: {"estimator": name, "estimator_options": {}}
        for name in ("rloo", "reinforce", "cropr", "distil", "hard_concrete", "variational")
    },
    "marginal": {"estimator": "marginal", "estimator_options": {}, "budget": 1},
    "entropy": {"entropy_weight": 0.1},
    "self_distillation": {"self_distillation": 0.1},
}


def images(count: int = 4) -> dict[str, torch.Tensor]:
    rows = examples(count)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def hard(family: str, head: str, site: str, **changes: Any) -> Example:
    torch.manual_seed(0)
    example = build(family, head)
    hf_hardattn.apply(example.model, {"sites": [site], **DETERMINISTIC, **changes})
    example.model.train()
    return example


def train(model: Any, batch: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    return model(**batch)


def silent(call: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


# ---------------------------------------------------------------------------------------------- a loss that nobody reads


def step(model: Any, loss_of: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    driver, batch = Driver(model.train()), images()
    driver.begin_step(0)
    loss_of(model(**batch), batch["labels"]).backward()
    driver.before_update()
    driver.close()


def weighted(output: Any, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.logits, labels, weight=torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("terms", TERMS)
def test_a_loss_of_ones_own_that_loses_the_terms_is_told(terms: str) -> None:
    with pytest.warns(UserWarning, match="nothing of the loss that ViTForImageClassification returned reached"):
        step(vit(**{"budget": 3, "anneal": 0, **TERMS[terms]}), weighted)


@pytest.mark.parametrize("terms", TERMS)
def test_a_loss_that_is_scaled_or_added_to_keeps_the_terms(terms: str) -> None:
    model = vit(**{"budget": 3, "anneal": 0, **TERMS[terms]})
    silent(lambda: step(model, lambda output, labels: 0.5 * output.loss + weighted(output, labels)))


def test_a_loss_of_ones_own_needs_no_terms_of_a_pathwise_estimator() -> None:
    silent(lambda: step(vit(budget=3, anneal=0), weighted))


def test_the_trainer_tells_of_terms_that_compute_loss_drops(tmp_path: Path) -> None:
    class Weighted(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return weighted(model(**inputs), inputs["labels"])

    trainer = Weighted(
        vit(budget=3, estimator="rloo"),
        arguments(tmp_path, max_steps=3),
        train_dataset=examples(),
        callbacks=[HardAttentionCallback()],
    )
    with pytest.warns(UserWarning, match="the term of estimator 'rloo'.*Use outputs.loss") as said:
        trainer.train()
    assert sum("nothing of the loss" in str(warning.message) for warning in said) == 1


# ---------------------------------------------------------------------------------------------- a tower called by itself


@pytest.mark.parametrize("terms", ["rloo", "reinforce", "distil", "self_distillation", "entropy"])
def test_a_tower_called_by_itself_tells_what_it_loses(terms: str) -> None:
    example = hard("clip", "CLIPModel", "vision.tokens.0", **TERMS[terms])
    call = functools.partial(example.model.get_image_features, pixel_values=example.batch["pixel_values"])
    with pytest.warns(UserWarning, match="'vision' was called by itself in training, so this has no effect"):
        call()
    with torch.no_grad():
        silent(call)
    example.model.eval()
    silent(call)


def test_every_need_of_the_loss_is_told() -> None:
    for terms in ("rloo", "cropr", "distil", "variational", "hard_concrete"):
        model = vit(**{"budget": 3, "anneal": 0, **TERMS[terms]}).train()
        with pytest.warns(UserWarning, match=f"'vision' was called by itself .*estimator '{terms}'"):
            model.vit(pixel_values=images()["pixel_values"])
    bare = hard("vit", "ViTModel", "vision.inputs", **TERMS["cropr"])
    with pytest.raises(HardAttentionError, match="ViTModel was given no labels in training; estimator 'cropr'"):
        bare.model.train()(**bare.batch)


APART = [
    ("t5", "T5ForConditionalGeneration", "input_ids"),
    ("bart", "BartForConditionalGeneration", "input_ids"),
    ("whisper", "WhisperForConditionalGeneration", "input_features"),
]


@pytest.mark.parametrize("site", ["encoder.inputs", "encoder.tokens.0", "encoder.tokens.2"])
@pytest.mark.parametrize(("family", "head", "given"), APART)
def test_an_encoder_called_apart_in_training_is_refused(family: str, head: str, given: str, site: str) -> None:
    """The gradient of its choices goes through the decoder's reading, which the encoder's output does not carry."""
    example = hard(family, head, site)
    encoder = example.model.get_encoder()
    inputs = {given: example.batch[given]}
    with pytest.raises(HardAttentionError, match="'encoder' was called by itself in training; .*whole model"):
        encoder(**inputs)
    with pytest.raises(HardAttentionError, match="'encoder' was called by itself in training; .*whole model"):
        encoder(**inputs, return_dict=False)
    with torch.no_grad():
        encoder(**inputs)


@pytest.mark.parametrize(("family", "head", "given"), APART)
def test_an_encoder_without_sites_may_be_called_apart(family: str, head: str, given: str) -> None:
    example = hard(family, head, "decoder.cross.*")
    whole = train(example.model, example.batch).loss
    batch = dict(example.batch)
    source = {name: batch.pop(name) for name in (given, "attention_mask") if name in batch}
    if "attention_mask" in source:
        batch["attention_mask"] = source["attention_mask"]
    apart = train(example.model, {"encoder_outputs": example.model.get_encoder()(**source), **batch}).loss
    parameters = [p for s in hf_hardattn.selectors(example.model).values() for p in s.parameters()]
    for one, other in zip(torch.autograd.grad(whole, parameters), torch.autograd.grad(apart, parameters), strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------------------------------- how a head reduces its loss

HEADS = [
    ("bert", "BertForMaskedLM", "text.tokens.1"),
    ("bert", "BertForSequenceClassification", "text.tokens.1"),
    ("bert", "BertForTokenClassification", "text.tokens.1"),
    ("bert", "BertLMHeadModel", "text.tokens.1"),
    ("distilbert", "DistilBertForMaskedLM", "text.tokens.1"),
    ("modernbert", "ModernBertForMaskedLM", "text.tokens.1"),
    ("roberta", "RobertaForCausalLM", "text.tokens.1"),
    ("xlm_roberta", "XLMRobertaForCausalLM", "text.tokens.1"),
    ("deit", "DeiTForImageClassification", "vision.tokens.1"),
    ("dinov2", "Dinov2ForImageClassification", "vision.tokens.1"),
    ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", "vision.tokens.1"),
    ("vit", "ViTForImageClassification", "vision.tokens.1"),
    ("clip", "CLIPForImageClassification", "vision.tokens.1"),
    ("clip", "CLIPModel", "vision.tokens.1"),
    ("siglip", "SiglipModel", "vision.tokens.1"),
    ("llama", "LlamaForCausalLM", "decoder.tokens.1"),
    ("llama", "LlamaForTokenClassification", "decoder.tokens.1"),
    ("llama", "LlamaForSequenceClassification", "decoder.tokens.1"),
    ("t5", "T5ForConditionalGeneration", "encoder.tokens.1"),
    ("t5", "T5ForQuestionAnswering", "encoder.tokens.1"),
    ("bart", "BartForConditionalGeneration", "encoder.tokens.1"),
    ("blip", "BlipForConditionalGeneration", "vision.tokens.1"),
    ("gru", "GruForConditionalGeneration", "decoder.cross.*"),
]


@functools.cache
def _labelled(family: str, head: str) -> Example:
    torch.manual_seed(0)
    example = build(family, head)
    ids = example.batch.get("input_ids")
    if ids is not None and not {"labels", "return_loss", "start_positions"} & example.batch.keys():
        labels = (ids % 5 if "Classification" in head else ids).masked_fill(torch.arange(ids.shape[1]) < 4, -100)
        example.batch["labels"] = torch.tensor([3, 0, 4]) if "Sequence" in head else labels
        example.batch.pop("attention_mask", None)
    return example


def labelled(family: str, head: str) -> Example:
    found = _labelled(family, head)
    return Example(copy.deepcopy(found.model), dict(found.batch))


@pytest.mark.parametrize(("family", "head", "site"), HEADS)
def test_the_losses_of_the_labels_make_up_the_loss_of_the_head(family: str, head: str, site: str) -> None:
    example = labelled(family, head)
    with torch.no_grad():
        output = example.model.eval()(**example.batch)
        losses, counted = family_of(example.model).token_loss(example.model, example.batch, output)  # type: ignore[union-attr]
    torch.testing.assert_close(losses[counted].mean(), output.loss)


@pytest.mark.parametrize(("family", "head", "site"), HEADS)
def test_the_terms_are_divided_as_the_loss_of_the_head_is(family: str, head: str, site: str) -> None:
    """By ``num_items_in_batch``, if the stock head does so; measured by two runs that differ in the entropy bonus alone."""
    total = {"num_items_in_batch": torch.tensor(100)}

    def loss(weight: float | None, **more: Any) -> torch.Tensor:
        example = labelled(family, head)
        if weight is not None:
            config = {"sites": [site], **DETERMINISTIC, "entropy_weight": weight}
            hf_hardattn.apply(example.model, config)
        found: torch.Tensor = train(example.model.train(), {**example.batch, **more}).loss.detach()
        return found

    try:
        share = loss(None, **total) / loss(None)
    except TypeError:
        pytest.skip("its forward takes no num_items_in_batch")
    alone, part = loss(1.0) - loss(0.0), loss(1.0, **total) - loss(0.0, **total)
    torch.testing.assert_close(part, alone * share, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("terms", ["marginal", "cropr", "self_distillation"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTForImageClassificationWithCare"])
def test_an_accumulated_batch_has_the_gradient_of_the_whole(name: str, terms: str) -> None:
    """Of any subclass, whatever its name; the loss of 'marginal', which replaces the model's, included."""
    model = vit(**{**DETERMINISTIC, **TERMS[terms]})
    model.__class__ = type(name, (ViTForImageClassification,), {})
    batch, parameters = images(8), list(model.train().parameters())
    batch["labels"] = batch["labels"].index_fill(0, torch.tensor([1, 4]), -100) if terms != "cropr" else batch["labels"]
    total = (batch["labels"] != -100).sum()
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(3), slice(3, 8))]
    whole = train(model, {**batch, "num_items_in_batch": total}).loss
    split = torch.stack([train(model, {**part, "num_items_in_batch": total}).loss for part in parts]).sum()
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(split, parameters, allow_unused=True),
        torch.autograd.grad(whole, parameters, allow_unused=True),
        strict=True,
    ):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("vit", "ViTForImageClassification"),
        ("bert", "BertForSequenceClassification"),
        ("llama", "LlamaForSequenceClassification"),
        ("deit", "DeiTForImageClassification"),
    ],
)
def test_the_reward_of_several_targets_is_the_error_that_the_head_takes(family: str, head: str, problem: str) -> None:
    example = build(family, head, problem_type=problem)
    targets = torch.rand(3, 5) * 3 if problem == "regression" else torch.randint(2, (3, 5)).float()
    batch = {**example.batch, "labels": targets}
    output = example.model.eval()(**batch)
    reward = reward_of(example.model, batch, output, output.loss)
    rows = [example.model(**{name: value[i : i + 1] for name, value in batch.items()}).loss for i in range(3)]
    if family != "llama":  # a row alone has no padding, which moves its last token
        torch.testing.assert_close(reward, -torch.stack(rows).detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(reward.mean(), -output.loss.detach())


class Focused(ViTForImageClassification):
    """A loss that is not the mean loss of its labels."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output["loss"] = functional.cross_entropy(output.logits, labels, weight=torch.tensor([1.0, 5.0])) * 2
        return output


def focused(**changes: Any) -> Any:
    model = vit(**{"budget": 1, "anneal": 0, **changes})
    model.__class__ = Focused
    return model.train()


def test_a_loss_that_the_labels_do_not_explain_is_the_reward_of_the_batch() -> None:
    model, batch = focused(estimator="reinforce", baseline="none"), images()
    with pytest.warns(UserWarning, match="the loss of Focused is not the mean loss of its labels"):
        output = model(**batch)
    assert not explained(model, batch, output, output.loss)
    task = Focused.forward(model, **batch)
    with pytest.warns(UserWarning, match="the loss of Focused"):
        torch.testing.assert_close(reward_of(model, batch, task, task.loss), -task.loss.detach())
    with pytest.raises(HardAttentionError, match="the loss of Focused is not .* which estimator 'marginal'"):
        focused(estimator="marginal")(**batch)


@pytest.mark.parametrize("given", [torch.ones(1), torch.ones(8), torch.ones(4, 1), torch.tensor(1.0), None])
def test_a_reward_of_another_shape_is_refused(given: Any) -> None:
    model = vit(budget=3, estimator="reinforce", baseline="none").train()
    hf_hardattn.set_reward(model, lambda inputs, output: given)
    with pytest.raises(HardAttentionError, match="one (number|reward) per example"):
        model(**images())


def test_a_reward_that_is_no_function_is_refused() -> None:
    with pytest.raises(HardAttentionError, match="reward=5 is not a function"):
        hf_hardattn.set_reward(vit(budget=3, estimator="reinforce"), 5)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- rows of one example


def choices(**changes: Any) -> Example:
    example = hard("bert", "BertForMultipleChoice", "text.tokens.0", **changes)
    ids = torch.randint(3, 50, (3, 2, 9))
    example.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0])}
    return example


@pytest.mark.parametrize("baseline", ["none", "learned", "moving_average", "leave_one_out", "self_critical"])
def test_the_rows_of_a_multiple_choice_share_the_reward_of_their_question(baseline: str) -> None:
    example = choices(estimator="reinforce", estimator_options={}, baseline=baseline)
    hf_hardattn.set_reward(example.model, lambda inputs, output: torch.tensor([1.0, 2.0, 4.0]))
    with hf_hardattn.record(example.model) as selections:
        loss = train(example.model, example.batch).loss
    if baseline != "none":
        assert loss.isfinite()
        return
    (found,) = selections
    log_prob = found.log_prob.sum((1, 2))
    wanted = sum(reward * (log_prob[2 * i] + log_prob[2 * i + 1]) for i, reward in enumerate((1.0, 2.0, 4.0))) / -3
    parameters = list(hf_hardattn.selectors(example.model)["text.tokens.0"].scorer.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True),
        torch.autograd.grad(wanted, parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["cropr", "marginal"])
def test_an_estimator_that_needs_one_row_per_example_refuses_a_multiple_choice(estimator: str) -> None:
    with pytest.raises(HardAttentionError, match="'text.tokens.0' chooses in 6 rows, .* 3 examples"):
        example = choices(estimator=estimator, estimator_options={}, budget=1)
        train(example.model, example.batch)


def test_the_inference_network_reads_no_label_of_a_multiple_choice() -> None:
    example = choices(estimator="variational", estimator_options={})
    with pytest.warns(UserWarning, match="got no labels that an inference network could read"):
        train(example.model, example.batch)


# ---------------------------------------------------------------------------------------------- self-distillation of every head

SEVERAL = [
    ("bert", "BertForPreTraining", "text.tokens.1"),
    ("t5", "T5ForQuestionAnswering", "encoder.tokens.1"),
    ("clip", "CLIPModel", "vision.tokens.1"),
    ("siglip", "SiglipModel", "vision.tokens.1"),
    ("blip", "BlipModel", "vision.tokens.1"),
    ("vit", "ViTForImageClassification", "vision.tokens.1"),
]


@pytest.mark.parametrize(("family", "head", "site"), SEVERAL)
def test_self_distillation_compares_every_prediction(family: str, head: str, site: str) -> None:
    losses = []
    for weight in (0.0, 1e4):
        example = hard(family, head, site, self_distillation=weight)
        torch.manual_seed(1)
        for name, parameter in example.model.named_parameters():
            if name != "logit_scale":
                parameter.data.normal_(std=0.5)
        if head == "BertForPreTraining":
            example.batch |= {"labels": example.batch["input_ids"], "next_sentence_label": torch.tensor([0, 1, 0])}
        losses.append(train(example.model, example.batch).loss)
    with torch.no_grad():
        plain = example.model(**example.batch)
        example.model.eval()
        with hf_hardattn.soft(example.model):
            full = example.model(**example.batch)
    fields = [name for name in plain if "logits" in name]
    assert fields
    wanted = []
    for name in fields:
        per_row = functional.kl_div(
            plain[name].log_softmax(-1), full[name].log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        wanted.append(per_row.mean())
    assert torch.stack(wanted).mean() > 1e-6, "nothing was compared"
    torch.testing.assert_close(losses[1] - losses[0], 1e4 * torch.stack(wanted).mean(), rtol=2e-2, atol=1e-3)


def test_self_distillation_without_a_prediction_is_refused() -> None:
    example = hard("vit", "ViTForMaskedImageModeling", "vision.tokens.1", self_distillation=1.0)
    with pytest.raises(HardAttentionError, match="self_distillation compares logits, .*; it has: loss, reconstruction"):
        example.model(**example.batch)


# ---------------------------------------------------------------------------------------------- gradients of each example


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_gradients_of_each_example_are_those_of_the_rows_alone() -> None:
    model = vit(**DETERMINISTIC).train()
    batch, parameters = images(), {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Any, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        inputs = {"pixel_values": image[None], "labels": label[None]}
        found: torch.Tensor = functional_call(model, parameters, (), inputs).loss
        return found

    at_once = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, batch["pixel_values"], batch["labels"])
    for i in range(4):
        alone = grad(loss)(parameters, batch["pixel_values"][i], batch["labels"][i])
        for name in alone:
            torch.testing.assert_close(at_once[name][i], alone[name], rtol=1e-4, atol=1e-6)
