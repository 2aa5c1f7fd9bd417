"""Training outside the scripts: the stock Trainer with HardAttentionCallback, a plain loop, LoRA."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

import hf_hardattn
from hf_hardattn import HardAttentionCallback, HardAttentionConfig, HardAttentionError
from hf_hardattn.training.driver import Driver

LINEAR = {"start": 2.0, "end": 1.0, "steps": 10}


def build(**changes: Any) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37, num_labels=2)
    config = ViTConfig(image_size=12, patch_size=4, num_channels=1, initializer_range=0.2, **sizes)
    if changes:
        config.hard_attention = HardAttentionConfig(**{"sites": ["vision.inputs"], "scorer": "linear", **changes})
    return ViTForImageClassification(config)


def examples(count: int = 24) -> list[dict[str, torch.Tensor]]:
    """One bright patch among nine; its sign is the class."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        image = 0.1 * torch.randn(1, 12, 12, generator=generator)
        top, left = (4 * int(torch.randint(3, (), generator=generator)) for _ in range(2))
        image[:, top : top + 4, left : left + 4] += 2.0 if i % 2 else -2.0
        rows.append({"pixel_values": image, "labels": torch.tensor(i % 2)})
    return rows


def batch(count: int = 24) -> dict[str, torch.Tensor]:
    rows = examples(count)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    base = dict(
        output_dir=str(folder), per_device_train_batch_size=8, learning_rate=3e-3, max_steps=30, logging_steps=5,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    return TrainingArguments(**{**base, **changes})


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.named_parameters() if not torch.equal(before[name], value)}


def rows(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


class Witness(TrainerCallback):
    """A tracker: sees the logs when the Trainer calls it."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.seen.append(set(logs or ()))


@pytest.mark.parametrize("estimator", ["simple", "reinforce"])
def test_stock_trainer_trains_and_logs(tmp_path: Path, estimator: str) -> None:
    model = build(budget=3, estimator=estimator, temperature=LINEAR, entropy_weight=0.01)
    before, tracker = weights(model), Witness()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=examples(), callbacks=[tracker])
    callback = HardAttentionCallback().add_to(trainer)
    trainer.train()
    logged = rows(trainer)
    if estimator == "reinforce":  # its loss holds the surrogate, which is no measure of anything; the reward is
        assert logged[-1]["hardattn/reward"] > 0.7 * logged[0]["hardattn/reward"]
    else:
        assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
    assert {"vit.layers.0.input_selector.scorer.weight", "classifier.weight"} <= moved(before, model)
    names = {"kept_ratio", "entropy", "temperature", "budget"}
    expected = {f"hardattn/vision.inputs/{name}" for name in names}
    if estimator == "reinforce":
        expected |= {"hardattn/reward", "hardattn/baseline"}
    assert all(expected == {key for key in row if key.startswith("hardattn/")} for row in logged)
    kept = [row["hardattn/vision.inputs/kept_ratio"] for row in logged]
    assert kept[-1] == pytest.approx(3 / 9) and (
        kept[0] == kept[-1] if estimator == "reinforce" else kept[0] > kept[-1]
    )
    assert all(row["hardattn/vision.inputs/budget"] == 3 for row in logged)
    temperatures = [
        row["hardattn/vision.inputs/temperature"] for row in logged
    ]  # of the step just done, counted from 0
    assert temperatures == pytest.approx([1.6, 1.1, 1.0, 1.0, 1.0, 1.0])
    assert expected <= tracker.seen[0]
    assert callback.driver is not None and not any(s._forward_hooks for s in hf_hardattn.selectors(model).values())


def test_evaluations_compare_with_random_selection(tmp_path: Path) -> None:
    options = dict(eval_strategy="steps", eval_steps=3, logging_steps=1, max_steps=6)
    logged = []
    for callbacks in ([HardAttentionCallback()], []):
        trainer = Trainer(
            build(budget=3, estimator="rloo"),
            arguments(tmp_path, **options),
            train_dataset=examples(),
            eval_dataset=examples(),
            callbacks=callbacks,
        )
        trainer.train()
        logged.append([row for row in trainer.state.log_history if "loss" in row])
    steps = [row["step"] for row in logged[0] if "hardattn/changed_by_random" in row]
    assert steps == [4]  # the row that follows the evaluation
    assert all(0 <= row["hardattn/changed_by_random"] <= 1 for row in logged[0] if row["step"] == 4)
    assert [row["loss"] for row in logged[0]] == [row["loss"] for row in logged[1]]  # the training does not notice


class OnePass(IterableDataset):
    """Examples that can be read once, as from a stream."""

    def __init__(self) -> None:
        self.rows = iter(examples(8))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.rows


class Pairs(Trainer):
    """A Trainer whose batches are not the model's keyword inputs."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (model(pixel_values=inputs["better"]).logits - model(pixel_values=inputs["worse"]).logits)[:, 0].mean()

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


PAIRS = [{"better": row["pixel_values"], "worse": -row["pixel_values"]} for row in examples(8)]


@pytest.mark.parametrize(
    ("trainer", "train", "evaluation", "said"),
    [(Pairs, PAIRS, lambda: PAIRS, True), (Trainer, examples(8), list, False), (Trainer, examples(8), OnePass, True)],
    ids=["pairs", "nothing", "one pass"],
)
def test_no_evaluation_fails_because_its_batch_cannot_be_compared(
    tmp_path: Path, trainer: type[Trainer], train: Any, evaluation: Any, said: bool
) -> None:
    options = arguments(tmp_path, eval_strategy="epoch", logging_steps=1, max_steps=1, remove_unused_columns=False)
    model, callback = build(budget=3, anneal=0), HardAttentionCallback()
    made = trainer(model, options, train_dataset=train, eval_dataset=evaluation(), callbacks=[callback])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    assert sum("not compared with random selections" in str(w.message) for w in caught) == said
    assert not any("hardattn/changed_by_random" in row for row in made.state.log_history)


def test_a_learning_rate_beside_an_optimizer_of_ones_own_is_said_to_have_no_effect(tmp_path: Path) -> None:
    model = build(budget=3, anneal=0)
    own = torch.optim.SGD(model.parameters(), 0.1)
    for rate in (0.5, None):
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=1),
            train_dataset=examples(8),
            optimizers=(own, None),
            callbacks=[HardAttentionCallback(selector_learning_rate=rate)],
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert sum("selector_learning_rate=0.5 of" in str(w.message) for w in caught) == (rate is not None)


STATEFUL = {"reinforce": {"baseline": "moving_average"}, "imle": {}}


@pytest.mark.parametrize("estimator", STATEFUL)
def test_averaged_weights_follow_a_training_with_state_of_its_run(estimator: str) -> None:
    model = build(budget=3, estimator=estimator, anneal=0, **STATEFUL[estimator]).train()
    buffers = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    average = AveragedModel(model)
    for _ in range(2):
        model(**batch(4)).loss.backward()
        average.update_parameters(model)
    assert (list(model.state_dict()), [name for name, _ in model.named_buffers()]) == buffers
    held = copy.deepcopy(model)
    for site, selector in hf_hardattn.selectors(held).items():
        for part in (selector.estimator, selector.baseline):
            for name in () if part is None else part.run_state:
                of = hf_hardattn.selectors(model)[site]
                assert any(
                    torch.equal(getattr(part, name), getattr(own, name, torch.empty(0))) for own in of.children()
                )


@pytest.mark.parametrize("estimator", STATEFUL)
def test_accelerate_saves_the_state_of_a_run(tmp_path: Path, estimator: str) -> None:
    states = []
    for trains in (True, False):
        model = build(budget=3, estimator=estimator, anneal=0, **STATEFUL[estimator]).train()
        driver, accelerator = Driver(model), Accelerator(cpu=True)
        accelerator.register_for_checkpointing(driver)
        if trains:
            driver.begin_step(0)
            model(**batch(4)).loss.backward()
            driver.before_update()
            accelerator.save_state(str(tmp_path))
        else:
            accelerator.load_state(str(tmp_path))
        states.append(driver.state_dict())
        driver.close()
    assert states[0] == states[1] and all(value is not None for value in states[0]["vision.inputs"].values())


@pytest.mark.parametrize("step", [(-1,), ("x",), (2.5,), (None,), (1, 0), (1, 2.5), (1, "x")])
def test_a_step_is_a_number_of_steps(step: Any) -> None:
    with pytest.raises(HardAttentionError, match="is not a number of optimizer steps"):
        hf_hardattn.set_step(build(budget=3), *step)


def test_trainer_resume_keeps_step_and_baseline(tmp_path: Path) -> None:
    options = dict(save_strategy="steps", save_steps=4, logging_steps=1)
    settings = dict(budget=3, estimator="reinforce", temperature=LINEAR)
    whole = Trainer(
        build(**settings), arguments(tmp_path, max_steps=8, **options), train_dataset=examples(),
        callbacks=[HardAttentionCallback()],
    )  # fmt: skip
    whole.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["HardAttentionCallback"]["attributes"]["baselines"]["vision.inputs"]["value"]
    assert isinstance(kept, float)
    # Transformers 5.23: the Trainer does not map a ViT checkpoint's key names back when it resumes, from_pretrained does
    model = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    resumed = Trainer(
        model, arguments(tmp_path, max_steps=8, **options), train_dataset=examples(),
        callbacks=[HardAttentionCallback()],
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name in ("loss", "hardattn/reward", "hardattn/baseline", "hardattn/vision.inputs/temperature"):
        assert [row[name] for row in rows(resumed)] == pytest.approx([row[name] for row in rows(whole)], abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator, name", [("reinforce", "value"), ("imle", "state")])
def test_run_state_that_is_not_finite_is_not_loaded(estimator: str, name: str, bad: float) -> None:
    driver = Driver(build(budget=3, estimator=estimator))
    before = driver.state_dict()
    with pytest.warns(UserWarning, match=f"{name} of .* is not finite"):
        driver.load_state_dict({"vision.inputs": {name: bad}})
    assert driver.state_dict() == before


def test_warmup_moves_the_selectors_only(tmp_path: Path) -> None:
    model = build(budget=3)
    before = weights(model)
    callback = HardAttentionCallback(selector_warmup_steps=3)
    options = dict(weight_decay=0.1, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=3, **options), train_dataset=examples(), callbacks=[callback]
    )
    trainer.train()
    assert moved(before, model) == {f"vit.layers.0.input_selector.scorer.{name}" for name in ("weight", "bias")}
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=4, **options), train_dataset=examples(), callbacks=[callback]
    )
    trainer.train()
    assert "classifier.weight" in moved(before, model)


def test_recomputation_chooses_nothing(tmp_path: Path) -> None:
    """Gradient checkpointing runs each layer twice and each selector once; the readings are of training, not of evaluation."""
    model = build(sites=["vision.self.*"], budget=3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    driver = Driver(model)
    seen = []
    note = driver._note_selection
    for selector in driver.selectors.values():
        selector.register_forward_hook(lambda *call: seen.append(torch._C._current_graph_task_id() == -1))
    model.train()(**batch()).loss.backward()
    assert seen == [True, True]  # once a layer, outside the backward pass
    first = dict(driver._latest)
    model.eval()(**batch(3))
    assert all(driver._latest[site] is selection for site, selection in first.items())
    assert note.__self__ is driver
    driver.close()


def test_callback_warns_on_a_soft_model_and_refuses_deepspeed(tmp_path: Path) -> None:
    trainer = Trainer(build(), arguments(tmp_path, max_steps=1), train_dataset=examples())
    trainer.add_callback(HardAttentionCallback())
    with pytest.warns(UserWarning, match="no effect: ViTForImageClassification has no hard attention"):
        trainer.train()
    settings = copy.copy(arguments(tmp_path))
    settings.deepspeed = "zero.json"
    with pytest.raises(hf_hardattn.HardAttentionError, match="selector_warmup_steps=2 does not work under DeepSpeed"):
        HardAttentionCallback(selector_warmup_steps=2).on_train_begin(settings, None, None, model=build(budget=3))
    with pytest.raises(hf_hardattn.HardAttentionError, match="selector_warmup_steps=-1 is out of range"):
        Driver(build(budget=3), -1)


@pytest.mark.parametrize("estimator", ["simple", "reinforce"])
def test_gradient_accumulation_weighs_the_terms_like_the_task(tmp_path: Path, estimator: str) -> None:
    """The Trainer divides ViT's loss by the examples of all micro-batches; the estimator's terms must follow."""

    def gradient(size: int, accumulation: int) -> torch.Tensor:
        model = build(budget=3, estimator=estimator, baseline="none", entropy_weight=0.5)
        site = hf_hardattn.selectors(model)["vision.inputs"]
        noise = iter(torch.rand(8, 1, 1, 10, generator=torch.Generator().manual_seed(3)).clamp(0.01, 0.99).split(size))
        choose = site.estimator.choose
        site.estimator.choose = lambda *a, sampling, **k: choose(
            *a, sampling=replace(sampling, uniform=lambda _: next(noise)), **k
        )
        taken = []

        class Take(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                taken.append(site.scorer.weight.grad.clone())

        options = dict(gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0.0)
        options |= dict(per_device_train_batch_size=size, train_sampling_strategy="sequential")
        Trainer(model, arguments(tmp_path, **options), train_dataset=examples(8), callbacks=[Take()]).train()
        return taken[0]

    torch.testing.assert_close(gradient(4, 2), gradient(8, 1), atol=1e-6, rtol=1e-4)


def test_lora_trains_saves_and_reloads(tmp_path: Path) -> None:
    config = HardAttentionConfig(sites=["vision.inputs", "vision.tokens.0"], budget=0.6)
    base = build()
    base.save_pretrained(tmp_path / "base")

    def hard() -> ViTForImageClassification:
        return ViTForImageClassification.from_pretrained(tmp_path / "base", hard_attention=config)

    settings = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["selector", "input_selector", "classifier"]
    )
    model = get_peft_model(hard(), settings)
    before = weights(model)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=6), train_dataset=examples(), callbacks=[HardAttentionCallback()]
    )
    trainer.train()
    changed = moved(before, model)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in changed if "modules_to_save" in name} == {
        "selector", "input_selector", "classifier",
    }  # fmt: skip
    assert "hardattn/vision.tokens.0/kept_ratio" in rows(trainer)[0]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(hard(), tmp_path / "adapter")
    inputs = {"pixel_values": batch()["pixel_values"]}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, model.eval()(**inputs).logits, atol=0, rtol=0)
        with hf_hardattn.soft(again):
            assert not torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_plain_loop() -> None:
    model = build(budget=2, temperature=LINEAR)
    before, data = weights(model), batch()
    driver = Driver(model.train(), selector_warmup_steps=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        driver.begin_step(step)
        loss = model(**data).loss
        loss.backward()
        driver.before_update()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 4:
            assert {name.split(".")[3] for name in moved(before, model)} == {"input_selector"}
    logs = driver.logs()
    assert logs["hardattn/vision.inputs/temperature"] == 1.0
    assert logs["hardattn/vision.inputs/kept_ratio"] == pytest.approx(2 / 9)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
