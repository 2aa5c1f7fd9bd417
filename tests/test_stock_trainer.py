"""The stock Trainer's own ways with a hard model: the best checkpoint, a resume, trackers, an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import arguments, batch, build, examples, rows
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    ViTForImageClassification,
)

import hf_hardattn
from hf_hardattn import HardAttentionCallback
from hf_hardattn.errors import HardAttentionError

SAVING = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=1, max_steps=8)


def t5(**changes: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes))
    return hf_hardattn.apply(model, {"sites": ["encoder.tokens.0"], **changes})


def sentences(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(2, 40, (6,), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.flip(0)} for ids in made]


FAMILIES = {
    "vit": (lambda: build(budget=3), examples, ViTForImageClassification),
    "soft vit": (build, examples, ViTForImageClassification),
    "t5": (lambda: t5(budget=0.5), sentences, T5ForConditionalGeneration),
}


class Worsen(TrainerCallback):
    """Turns every weight to nonsense after the step, so that the best checkpoint is an earlier one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=20)


def same(model: Any, folder: Path | str, load: Any) -> bool:
    saved = load.from_pretrained(folder).state_dict()
    return all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:HardAttentionCallback has no effect")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_checkpoint_is_loaded_whole(tmp_path: Path, family: str) -> None:
    make, data, load = FAMILIES[family]
    trainer = Trainer(
        make(),
        arguments(tmp_path, load_best_model_at_end=True, **SAVING),
        train_dataset=data(),
        eval_dataset=data(),
        callbacks=[HardAttentionCallback(), Worsen(5)],
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in {str(tmp_path / f"checkpoint-{step}") for step in (2, 4)}
    assert same(trainer.model, best, load)
    trainer.save_model(tmp_path / "saved")
    assert same(trainer.model, tmp_path / "saved", load)
    assert not trainer.model._load_state_dict_pre_hooks


@pytest.mark.filterwarnings("ignore:HardAttentionCallback has no effect")
@pytest.mark.parametrize("added", ["at once", "later"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resume_loads_every_weight(tmp_path: Path, family: str, added: str) -> None:
    make, data, load = FAMILIES[family]

    def trainer(model: Any) -> Trainer:
        callbacks = [HardAttentionCallback()] if added == "at once" else []
        made = Trainer(
            model, arguments(tmp_path, **SAVING), train_dataset=data(), eval_dataset=data(), callbacks=callbacks
        )
        if added == "later":
            made.add_callback(HardAttentionCallback())
        return made

    whole = trainer(make())
    whole.train()
    other = make()
    Worsen(0).on_step_end(None, whole.state.__class__(global_step=0), None, model=other)
    resumed = trainer(other)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [row["loss"] for row in rows(resumed)] == pytest.approx([row["loss"] for row in rows(whole)], abs=1e-5)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        build(budget=3),
        arguments(tmp_path, **SAVING),
        train_dataset=examples(),
        eval_dataset=examples(),
        callbacks=[HardAttentionCallback()],
    )
    trainer.train()
    path = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "q_proj" in name or "query" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, metadata={"format": "pt"})
    with pytest.raises(HardAttentionError, match="the checkpoint has .* of .* tensors .*from_pretrained"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_trainer_without_the_callback_is_left_alone(tmp_path: Path) -> None:
    HardAttentionCallback()
    trainer = Trainer(build(budget=3), arguments(tmp_path, max_steps=2), train_dataset=examples())
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before


class Tracker(TrainerCallback):
    """Stands for W&B, TensorBoard or trackio: reads the logs when the Trainer calls its reporters."""

    seen: list[set[str]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.seen.append(set(logs or ()))


@pytest.mark.parametrize("added", ["callbacks", "add_callback", "add_to"])
def test_trackers_see_what_the_selectors_do(tmp_path: Path, added: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        __import__("transformers").integrations.integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker
    )
    Tracker.seen.clear()
    options = {"callbacks": [HardAttentionCallback()]} if added == "callbacks" else {}
    trainer = Trainer(
        build(budget=3), arguments(tmp_path, max_steps=5, report_to=["mine"]), train_dataset=examples(), **options
    )
    if added == "add_callback":
        trainer.add_callback(HardAttentionCallback())
    elif added == "add_to":
        HardAttentionCallback().add_to(trainer)
    trainer.train()
    assert "hardattn/vision.inputs/kept_ratio" in Tracker.seen[0]


class Stop(TrainerCallback):
    """Ends the training with an error, at one of its moments."""

    def __init__(self, moment: str, error: BaseException) -> None:
        self.error = error
        setattr(self, moment, self._raise)

    def _raise(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 2 or not state.log_history:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory"), SystemExit(1)])
@pytest.mark.parametrize(
    "moment", ["on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log"]
)
def test_an_interrupted_training_leaves_nothing_behind(tmp_path: Path, moment: str, error: BaseException) -> None:
    model = build(budget=3, estimator="reinforce")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    callbacks = [HardAttentionCallback(), Stop(moment, error)]
    trainer = Trainer(model, arguments(tmp_path, logging_steps=1), train_dataset=examples(), callbacks=callbacks)
    with pytest.raises(type(error)):
        trainer.train()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    selector = hf_hardattn.selectors(model)["vision.inputs"]
    assert not selector.baseline.deferred
    values = []
    for _ in range(3):  # a loop of one's own
        model.train()(**batch()).loss.backward()
        values.append(selector.baseline.value.item())
    assert len(set(values)) > 1


@pytest.mark.parametrize(("rate", "asked", "expected"), [(5e-5, None, 1e-3), (2e-3, None, 2e-3), (5e-5, 0.1, 0.1)])
def test_selectors_learn_at_a_rate_of_their_own(
    tmp_path: Path, rate: float, asked: float | None, expected: float
) -> None:
    """They start from nothing: at a rate for fine-tuning they stayed behind."""
    model = build(budget=3)
    callback = HardAttentionCallback(selector_learning_rate=asked)
    trainer = Trainer(model, arguments(tmp_path, learning_rate=rate), callbacks=[callback])
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(rates)
    assert rates == {id(p): expected if "selector" in name else rate for name, p in model.named_parameters()}
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not any(id(p) in decayed for name, p in model.named_parameters() if "bias" in name)


def test_an_optimizer_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    model = build(budget=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-5)
    trainer = Trainer(model, arguments(tmp_path), callbacks=[HardAttentionCallback()], optimizers=(optimizer, None))
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    assert trainer.optimizer is optimizer and len(optimizer.param_groups) == 1
    with pytest.raises(HardAttentionError, match="selector_learning_rate=0 is out of range in HardAttentionCallback"):
        HardAttentionCallback(selector_learning_rate=0)
