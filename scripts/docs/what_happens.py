"""Write docs/what_happens.md: common situations, each tried on a tiny model, and their outcomes.

python scripts/docs/what_happens.py            # run all of them and rewrite the page; about a minute
python scripts/docs/what_happens.py --check    # fail if the page would change

A situation is a function. Its docstring is the first column of the page; the second is its result, warning or exception.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from transformers.models.vit.modeling_vit import ViTLayer

import hf_hardattn
from hf_hardattn import HardAttentionCallback, HardAttentionError

PAGE = Path(__file__).resolve().parents[2] / "docs/what_happens.md"
INTRODUCTION = """# What happens

What a model with hard attention does where people put models. `scripts/docs/what_happens.py` tried each situation on a tiny ViT (17 rows: CLS and 16 patches,
of which `vision.tokens.1` keeps 9) or T5, and wrote down what came out; a difference is the largest of any logit.
"""
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])
WORDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- models and answers


def soft_vit(**sizes: Any) -> Any:
    torch.manual_seed(0)
    known = dict(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return ViTForImageClassification(ViTConfig(**{**known, **sizes})).eval()


def vit(sites: Any = None, model: Any = None, **fields: Any) -> Any:
    return hf_hardattn.apply(soft_vit() if model is None else model, {"sites": sites, **fields})


def t5(sites: Any, cls: Any = T5ForConditionalGeneration, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        vocab_size=60,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return hf_hardattn.apply(cls(T5Config(**sizes)).eval(), {"sites": sites, **fields})


def logits(model: Any, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(pixel_values=images).logits
    return found


def differ(one: torch.Tensor, other: torch.Tensor) -> str:
    largest = (one - other).abs().max().item()
    return "0" if largest == 0 else "under 0.00001" if largest < 1e-5 else f"{largest:.1g}"


def state(model: Any) -> str:
    """Return whether a call of the model selects positions (hard) or not (soft)."""
    if not hf_hardattn.selectors(model):
        return "soft"
    with hf_hardattn.record(model) as selections:
        logits(model)
    return f"hard (keeps {int(selections[0].mask.sum(-1).max())} of {selections[0].mask.shape[-1]})"


def same(model: Any, before: torch.Tensor) -> str:
    return f"{state(model)}; difference {differ(logits(model), before)}"


@contextlib.contextmanager
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        yield name


def tiny_trainer(model: Any, **options: Any) -> Trainer:
    data = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    callbacks, trainer = options.pop("callbacks", []), options.pop("trainer", Trainer)
    fixed: dict[str, Any] = dict(
        max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    arguments = TrainingArguments(tempfile.mkdtemp(), **{**fixed, **options})
    return trainer(model, arguments, train_dataset=data, callbacks=callbacks)


# ------------------------------------------------------------------------------------------------------------- saving and loading


def loaded() -> str:
    """`from_pretrained(folder)` after `import hf_hardattn`"""
    model = vit()
    with folder() as place:
        model.save_pretrained(place)
        return same(AutoModelForImageClassification.from_pretrained(place), logits(model))


def loaded_without_the_import() -> str:
    """`from_pretrained(folder)` where `hf_hardattn` was never imported"""
    model = vit()
    with folder() as place:
        model.save_pretrained(place)
        torch.save(IMAGES, f"{place}/images.pt")
        code = (
            "import sys, torch; from transformers import AutoModelForImageClassification as A; m = A.from_pretrained(sys.argv[1]).eval();"
            "torch.save(m(pixel_values=torch.load(sys.argv[1] + '/images.pt')).logits.detach(), sys.argv[1] + '/logits.pt')"
        )
        subprocess.run([sys.executable, "-c", code, place], check=True, capture_output=True)
        found = torch.load(f"{place}/logits.pt")
    with hf_hardattn.soft(model):
        return f"soft: the stock model with the same weights (difference to `soft(model)` {differ(found, logits(model))}); Transformers lists the selectors as unexpected"


def loaded_soft() -> str:
    """`from_pretrained(folder, hard_attention=None)`"""
    with folder() as place:
        vit().save_pretrained(place)
        return state(AutoModelForImageClassification.from_pretrained(place, hard_attention=None))


def lost_selectors() -> str:
    """A checkpoint whose selectors are missing"""
    model = vit()
    with folder() as place:
        model.save_pretrained(place, state_dict={k: v for k, v in model.state_dict().items() if "selector" not in k})
        return state(AutoModelForImageClassification.from_pretrained(place))


def copied() -> str:
    """`copy.deepcopy` and `pickle`"""
    model = vit()
    return same(pickle.loads(pickle.dumps(copy.deepcopy(model))), logits(model))


def selectors_of_a_trained_backbone() -> str:
    """`save(selectors_only=True)` after the backbone was trained too"""
    with folder() as place:
        soft_vit().save_pretrained(f"{place}/base")
        model = AutoModelForImageClassification.from_pretrained(f"{place}/base", hard_attention={"budget": 0.5})
        with torch.no_grad():
            model.classifier.weight.add_(1)
        hf_hardattn.save(model, f"{place}/selectors", selectors_only=True)
        return "saved"


def removed() -> str:
    """`remove(model)`"""
    model, stock = vit(), soft_vit()
    hf_hardattn.remove(model)
    names = "the same" if list(model.state_dict()) == list(stock.state_dict()) else "other"
    return f"{same(model, logits(stock))} to the stock model, {names} names of weights"


# ------------------------------------------------------------------------------------------------------------- PEFT


def _lora(place: str) -> Any:
    soft_vit().save_pretrained(f"{place}/base")
    base = AutoModelForImageClassification.from_pretrained(f"{place}/base", hard_attention={"budget": 0.5})
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])).eval()


def lora_that_forgets_the_selectors() -> str:
    """`get_peft_model` whose `modules_to_save` does not name the selectors"""
    with folder() as place:
        model = _lora(place)
        trained = any(p.requires_grad for s in hf_hardattn.selectors(model).values() for p in s.parameters())
        return f"{state(model)}; the selectors are {'trained: they are added' if trained else 'frozen'}"


def lora_loaded_by_peft() -> str:
    """`PeftModel.from_pretrained(base, adapter)` and `AutoPeftModel`"""
    with folder() as place:
        model = _lora(place)
        model.save_pretrained(f"{place}/adapter")
        base = AutoModelForImageClassification.from_pretrained(f"{place}/base")
        AutoPeftModel.from_pretrained(f"{place}/adapter")
        return same(PeftModel.from_pretrained(base, f"{place}/adapter").eval(), logits(model))


def lora_merged() -> str:
    """`merge_and_unload()`"""
    with folder() as place:
        model = _lora(place)
        before = logits(model)
        return same(model.merge_and_unload(), before)


# ------------------------------------------------------------------------------------------------------------- running


def in_a_pipeline() -> str:
    """`pipeline("image-classification")`"""
    pipe = pipeline(
        "image-classification", vit(), image_processor=ViTImageProcessor(size={"height": 16, "width": 16}), device="cpu"
    )
    with hf_hardattn.record(pipe) as selections:
        pipe(Image.new("RGB", (40, 30)))
    return f"hard (keeps {int(selections[0].mask.sum(-1).max())} of {selections[0].mask.shape[-1]})"


def compiled() -> str:
    """`torch.compile(model)`, and `record` on it"""
    model = vit()
    fast: Any = torch.compile(model, backend="eager")
    return same(fast, logits(model))


def offloaded() -> str:
    """Weights offloaded by Accelerate"""
    before = logits(vit())
    return same(accelerate.cpu_offload(vit(), execution_device="cpu"), before)


def in_threads() -> str:
    """One thread in `soft(model)` while another calls the model"""
    model, found, ready, done = vit(), {}, threading.Event(), threading.Event()

    def other() -> None:
        with hf_hardattn.soft(model):
            ready.set()
            done.wait()
            found["soft"] = logits(model)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    mine = state(model)
    done.set()
    thread.join()
    return (
        f"{mine} in one, soft in the other (difference {differ(found['soft'], logits(soft_vit()))} to the stock model)"
    )


def in_generate() -> str:
    """`generate()` with three beams, with and without the cache"""
    model = t5(["decoder.cross.*"], budget=3)
    options: dict[str, Any] = dict(num_beams=3, max_new_tokens=6, do_sample=False)
    with hf_hardattn.record(model) as selections:
        one, other = (model.generate(WORDS, use_cache=cache, **options) for cache in (True, False))
    kept = max(int(selection.mask.sum(-1).max()) for selection in selections)
    return f"hard (keeps {kept} of {WORDS.shape[1]}); {'the same' if torch.equal(one, other) else 'other'} tokens"


def other_sizes() -> str:
    """Images of twice the size, `interpolate_pos_encoding=True`"""
    model = vit()
    with hf_hardattn.record(model) as selections:
        model(pixel_values=torch.randn(1, 3, 32, 32), interpolate_pos_encoding=True)
    return (
        f"hard (keeps {int(selections[0].mask.sum())} of {selections[0].mask.shape[-1]}): a ratio counts what is there"
    )


def padded() -> str:
    """A text alone, and beside a longer one"""
    model = t5(["encoder.tokens.0"], budget=0.5)
    ids, mask = WORDS.clone(), torch.ones_like(WORDS)
    ids[0, 8:], mask[0, 8:] = 0, 0
    with hf_hardattn.record(model) as batch, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=WORDS[:, :3])
    with hf_hardattn.record(model) as alone, torch.no_grad():
        model(input_ids=ids[:1, :8], decoder_input_ids=WORDS[:1, :3])
    equal = torch.equal(batch[0].mask[0, 0, 0, :8], alone[0].mask[0, 0, 0])
    return f"{'the same' if equal else 'another'} selection; {int(batch[0].mask[0, 0, 0, 8:].sum())} of 4 padding positions kept"


def copies_of_the_input() -> str:
    """A head that shows the decoder the input once more (`T5ForSequenceClassification`), at `encoder.inputs`"""
    model = t5(["encoder.inputs"], T5ForSequenceClassification, budget=4)
    ids = WORDS.clone()
    ids[:, -1] = 1
    (site,) = hf_hardattn.verify(model, {"input_ids": ids}).sites
    return "the decoder's copy is narrowed too: " + site.statement.partition("Given this selection, ")[2]


def end_to_end() -> str:
    """What was dropped is replaced, and the scorer reads that: `verify`"""
    (site,) = hf_hardattn.verify(vit(["vision.inputs"]), {"pixel_values": IMAGES}).sites
    return f"{site.statement}. {site.end_to_end}"


# ------------------------------------------------------------------------------------------------------------- training


def checkpointed() -> str:
    """Gradient checkpointing"""

    def gradients(on: bool) -> torch.Tensor:
        model = vit(estimator="rloo").train()
        if on:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(pixel_values=IMAGES, labels=LABELS).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    return f"difference of the gradients {differ(gradients(False), gradients(True))}"


def autocast() -> str:
    """bf16 autocast"""
    model = vit()
    with hf_hardattn.record(model) as selections, torch.autocast("cpu", torch.bfloat16):
        logits(model)
    return f"{state(model)}; scores are {str(selections[0].scores.dtype).removeprefix('torch.')}"


def best_checkpoint() -> str:
    """The stock Trainer with `HardAttentionCallback()`"""
    model = vit(budget={"start": 1.0, "end": 0.5, "steps": 0.5})
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    trainer = tiny_trainer(model, callbacks=[HardAttentionCallback()], logging_steps=1)
    trainer.train()
    kept = [row["hardattn/vision.tokens.1/budget"] for row in trainer.state.log_history if "loss" in row]
    left = sum(len(module._forward_hooks) for module in model.modules()) - hooks
    return f"{state(model.eval())}; the logs tell the budget of each step ({', '.join(map(str, kept))}); {left} hooks left behind"


def schedule_without_callback() -> str:
    """A schedule, and a Trainer without the callback"""
    tiny_trainer(vit(budget={"start": 1.0, "end": 0.5, "steps": 10})).train()
    return "trained"


def label_smoothing() -> str:
    """`label_smoothing_factor`, which takes the labels from the model, with estimator `rloo`"""
    tiny_trainer(vit(estimator="rloo"), label_smoothing_factor=0.1, callbacks=[HardAttentionCallback()]).train()
    return "trained"


def own_loss() -> str:
    """A `compute_loss` that computes its own loss from `outputs.logits`, with estimator `rloo`"""

    class Weighted(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"])

    tiny_trainer(vit(estimator="rloo"), trainer=Weighted, callbacks=[HardAttentionCallback()]).train()
    return "trained"


def tower_by_itself() -> str:
    """A tower called by itself in training (`model.vit(...)`, `get_image_features`), with estimator `rloo`"""
    vit(estimator="rloo").train().vit(pixel_values=IMAGES)
    return "ran"


def reward_that_nobody_reads() -> str:
    """`set_reward` where no estimator reads a reward"""
    hf_hardattn.set_reward(vit(), lambda inputs, output: torch.zeros(4))
    return "set"


# ------------------------------------------------------------------------------------------------------------- what cannot be meant


def every_layer() -> str:
    """A site after every layer, each keeping half of what is left"""
    vit(["vision.tokens.*"], model=soft_vit(num_hidden_layers=6, image_size=48))
    return "applied"


def too_large_a_count() -> str:
    """A count of more positions than there are"""
    vit(["vision.inputs"], budget=1000)
    return "applied"


def misspelt() -> str:
    """A misspelt site"""
    vit(["vision.token.1"])
    return "applied"


def unknown_model() -> str:
    """`hard_attention=...` for a model of no family"""
    SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1], hard_attention={"budget": 0.5}))
    return "soft"


def replaced_layer() -> str:
    """A layer replaced after `apply`"""
    model = vit()
    model.vit.layers[2] = ViTLayer(model.config).eval()
    logits(model)
    return state(model)


SECTIONS: dict[str, list[Callable[[], str]]] = {
    "Saving and loading": [
        loaded,
        loaded_without_the_import,
        loaded_soft,
        lost_selectors,
        selectors_of_a_trained_backbone,
        copied,
        removed,
    ],
    "PEFT": [lora_that_forgets_the_selectors, lora_loaded_by_peft, lora_merged],
    "Running": [
        in_a_pipeline,
        compiled,
        offloaded,
        in_threads,
        in_generate,
        other_sizes,
        padded,
        copies_of_the_input,
        end_to_end,
    ],
    "Training": [
        checkpointed,
        autocast,
        best_checkpoint,
        schedule_without_callback,
        label_smoothing,
        own_loss,
        tower_by_itself,
        reward_that_nobody_reads,
    ],
    "What cannot be meant": [every_layer, too_large_a_count, misspelt, unknown_model, replaced_layer],
}


# ------------------------------------------------------------------------------------------------------------- the page


def outcome(situation: Callable[[], str]) -> str:
    """Run a situation; return its result with the library's warnings, or the error that refuses it."""
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            said = situation()
        except HardAttentionError as error:
            return f"**refused**: {_quoted(str(error))}"
    ours = list(
        dict.fromkeys(
            str(w.message) for w in caught if issubclass(w.category, UserWarning) and _is_ours(str(w.message))
        )
    )
    return "".join([said, *(f"; **warned**: {_quoted(text)}" for text in ours)])


OURS = ("schedule", "site", "estimator", "budget", "selector", "hard attention")


def _is_ours(message: str) -> bool:
    return any(word in message for word in OURS)


def _quoted(message: str) -> str:
    """Return a message without paths of this machine, and with only the first of the supported families."""
    message = re.sub(r"(supported families: \w+, \w+)[^.]*", r"\1 ...", message)
    return re.sub(r"/tmp/[^\s'),]*", "FOLDER", " ".join(message.split())).replace("|", "\\|")


def page() -> str:
    lines = [INTRODUCTION]
    for title, situations in SECTIONS.items():
        lines += [f"## {title}", "", "| situation | what happens |", "|---|---|"]
        for situation in situations:
            print(situation.__name__, file=sys.stderr, flush=True)
            lines.append(f"| {(situation.__doc__ or '').strip()} | {outcome(situation)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = page()
    if "--check" in arguments:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
