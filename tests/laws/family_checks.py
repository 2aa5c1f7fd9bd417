"""What every family of models has to do, one function a claim; a test of each family and the table in the documentation run these."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cases import Example, close, harden, run, stock, tensors
from rounding import FEW, MANY, assert_rounded
from torch import Tensor, nn

import hf_hardattn
from hf_hardattn import models
from hf_hardattn.modeling.arguments import Arguments, parameter_names
from hf_hardattn.modeling.family import Tower


@dataclass(frozen=True)
class Subject:
    """One site of one head: the first head of a family that has a site of that kind in that tower."""

    family: str
    head: str
    site: str

    def __str__(self) -> str:
        return f"{self.head}-{self.site}"

    @property
    def tower(self) -> str:
        return self.site.split(".")[0]

    @property
    def kind(self) -> str:
        return self.site.split(".")[1]

    def stock(self) -> Example:
        """The tiny model and its batch."""
        return stock(self.family, self.head)

    def hard(self, budget: Any = 0.5, **options: Any) -> Example:
        """The same with the site in place."""
        example = self.stock()
        harden(example.model, {"sites": [self.site], "budget": budget, "scorer": "linear", **options})
        return example

    def row(self, model: nn.Module) -> Tower:
        """The site's tower in ``model``."""
        return models.load(self.family).towers(model)[self.tower]


def subjects() -> list[Subject]:
    """Every family with every kind of site that it has, each once."""
    found: dict[tuple[str, str, str], Subject] = {}
    for family in models.names():
        spec = models.load(family).spec
        if any(tower.prompt for tower in spec.towers):
            continue  # decoders select from a prompt, and have a contract of their own: test_decoders.py
        for head in sorted(spec.heads, key=lambda name: name in spec.averaging_heads):
            model = stock(family, head).model
            for name, tower in models.load(family).towers(model).items():
                # one of the first layers, so that layers behind it read what it left
                sites = {kind: site for site, kind, layer in tower.sites() if layer <= (kind == "self")}
                for kind, site in sites.items():
                    found.setdefault((family, name, kind), Subject(family, head, site))
    return list(found.values())


def equals_stock(subject: Subject) -> None:
    """A site that keeps everything changes nothing."""
    expected = visible(subject, subject.stock())
    close(visible(subject, subject.hard(1.0)), expected)
    close(visible(subject, subject.hard(1.0, execution="masked")), expected)


def equals_oracle(subject: Subject) -> None:
    """What remains is what the stock model computes when a mask hides what was dropped, in every attention implementation."""
    example = subject.hard()
    with hf_hardattn.record(example.model) as selections:
        found = run(example)
    (made,) = selections[subject.site]
    assert (made.valid & ~made.mask).any(), "nothing was dropped"
    reference = subject.stock()
    rows, kept = hides_rows(subject), made.mask[:, 0, 0]
    with hidden(subject, reference.model, made.mask):
        expected = run(reference)
    if subject.row(example.model).spec.pooling is not None and rows:
        found.pop("pooler_output"), expected.pop("pooler_output")  # of the rows that are there
    close(at_kept(found, kept, rows), at_kept(expected, kept, rows))
    example.model.set_attn_implementation("eager")
    eager = {name: value for name, value in run(example).items() if name in found}
    close(at_kept(eager, kept, rows), at_kept(expected, kept, rows))


def hides_rows(subject: Subject) -> bool:
    """Whether the output of the tower with the site has kept rows only."""
    return subject.kind in ("inputs", "tokens")


def at_kept(outputs: dict[str, Tensor], kept: Tensor, rows: bool) -> dict[str, Tensor]:
    """The outputs, those of all rows gathered at the kept ones; the rest as it is."""
    size, most = kept.shape[1], int(kept.sum(1).max())
    found = {}
    for name, value in outputs.items():
        if name.split(".")[-1] not in ("last_hidden_state", "encoder_last_hidden_state") or not rows:
            found[name] = value
            continue
        if value.shape[1] == size and size != most:
            order = (~kept).long().argsort(dim=1, stable=True)[:, :most]
            value = value.gather(1, order.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
        used = torch.arange(most) < kept.sum(1, keepdim=True)
        found[name] = value.masked_fill(~used.unsqueeze(-1), 0.0) if value.shape[1] == most else value
    return found


@contextmanager
def hidden(subject: Subject, model: nn.Module, kept: Tensor) -> Iterator[None]:
    """Hide keys from the attention of a stock model, by the masks of its own layers.

    Args:
        kept: bool ``[B, H or 1, Q or 1, N]``.
    """
    tower = subject.row(model)
    layer = int(subject.site.rpartition(".")[2]) if subject.kind != "inputs" else -1
    own, source = "attention_mask", "encoder_attention_mask"
    found = [
        (module, source if subject.kind == "cross" else own)
        for index, module in enumerate(tower.layers)
        if (index > layer if hides_rows(subject) else index == layer)
    ]
    if hides_rows(subject):
        towers = models.load(subject.family).towers(model).values()
        found += [(module, source) for other in towers if other.source == subject.tower for module in other.layers]
    hooks = [module.register_forward_pre_hook(_hide(module, name, kept), with_kwargs=True) for module, name in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hide(layer: nn.Module, name: str, kept: Tensor) -> Callable[..., Any]:
    names = parameter_names(layer)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        arguments = Arguments(names, args, kwargs)
        given = arguments.get(name)
        allowed = kept
        if isinstance(given, Tensor):
            given = given.bool() if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
            # a query in whose window nothing was kept reads all that was
            lost = given.any(-1, keepdim=True) & ~(given & allowed).any(-1, keepdim=True)
            allowed = (given | lost) & allowed
        arguments.set(name, allowed.expand(-1, -1, rows_of(arguments, names), -1))
        return arguments.result()

    return hook


def rows_of(arguments: Arguments, names: tuple[str, ...]) -> int:
    """How many queries a layer has."""
    hidden_states: Tensor = arguments.get(names[0])
    return hidden_states.shape[1]


def rows_alone(subject: Subject) -> None:
    """A row of a padded batch comes out as it does alone, without padding."""
    example = subject.hard()
    together = run(example)
    for index in (1, 2):
        alone = run(Example(example.model, one_row(example.batch, index)))
        for name, value in alone.items():
            if name.endswith("loss") or name.startswith("logits_per"):
                continue  # of the whole batch
            whole = together[name][index : index + 1]
            assert_rounded(whole[:, : value.shape[1]], value, MANY, name)


def one_row(batch: dict[str, Any], index: int) -> dict[str, Any]:
    """One example of a batch, without padding."""
    mask = batch.get("attention_mask")
    rows = {name: value[index : index + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    if mask is None:
        return rows
    real = int(mask[index].sum())
    return {
        name: value[:, :real]
        if isinstance(value, Tensor) and value.shape == rows["attention_mask"].shape and name != "decoder_input_ids"
        else value
        for name, value in rows.items()
    }


def gates_reach_attention(subject: Subject) -> None:
    """In training the choice weighs the attention, so that the scorer gets a gradient, and masked equals gathered."""
    example = subject.hard(estimator="straight_through")
    model = example.model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(3)
    outputs = tensors(model(**example.batch))
    sum(value.square().sum() for value in outputs.values() if value.requires_grad).backward()
    gradients = [p.grad for s in hf_hardattn.selectors(model).values() for p in s.parameters()]
    assert gradients and all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 1e-6 for g in gradients)
    model.eval()
    gathered = run(example)
    with hf_hardattn.execution(model, "masked"):
        masked = run(example)
    close(
        {n: v for n, v in masked.items() if v.shape == gathered[n].shape},
        {n: gathered[n] for n in gathered if masked[n].shape == gathered[n].shape},
        MANY,
    )


def reloads(subject: Subject) -> None:
    """Saved and loaded again, and loaded from the stock checkpoint with a configuration, it is hard with the same outputs."""
    example = subject.hard()
    cls = type(example.model)
    with tempfile.TemporaryDirectory() as folder:
        example.model.save_pretrained(folder)
        close(run(Example(cls.from_pretrained(folder).eval(), example.batch)), run(example), FEW)
        subject.stock().model.save_pretrained(folder)
        model = cls.from_pretrained(folder, hard_attention={"sites": [subject.site], "budget": 0.5})
        assert set(hf_hardattn.selectors(model)) == {subject.site}
        assert all(p.isfinite().all() for p in model.parameters())


def certified(subject: Subject) -> None:
    """What an ``inputs`` site dropped cannot change the output, bit for bit."""
    example = subject.hard()
    report = hf_hardattn.verify(example.model, example.batch)
    assert report.parity_ok and all(site.certified for site in report.sites), str(report)


def cache_changes_nothing(subject: Subject) -> None:
    """``generate`` with a cache writes what it writes without."""
    example = subject.hard()
    written = [generate(example, use_cache=cache) for cache in (True, False)]
    assert torch.equal(written[0].sequences, written[1].sequences)
    for one, other in zip(*(w.logits for w in written), strict=True):
        assert_rounded(one, other, MANY)
    soft = generate(subject.stock(), use_cache=True)
    assert not torch.allclose(soft.logits[-1], written[0].logits[-1], atol=1e-3), "the site changes nothing"


def generate(example: Example, **options: Any) -> Any:
    """Six tokens by three beams."""
    inputs = {name: x for name, x in example.batch.items() if name not in ("decoder_input_ids", "labels")}
    settings: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False)
    return example.model.generate(**inputs, **settings, **options, output_logits=True, return_dict_in_generate=True)


def writes(subject: Subject) -> bool:
    """Whether the head generates."""
    model: Any = stock(subject.family, subject.head).model
    return hasattr(model, "generate") and model.can_generate()


def compiles(subject: Subject) -> None:
    """The whole call is one graph, and its outputs are the same."""
    example = subject.hard()
    expected = run(example)
    torch._dynamo.reset()
    compiled: Any = torch.compile(example.model, fullgraph=True, backend="eager")
    close(run(Example(compiled, example.batch)), expected)


def flex_attends(subject: Subject) -> None:
    """Flex attention gives what SDPA gives."""
    example = subject.hard()
    expected = visible(subject, example)
    plain = subject.stock()
    with torch.compiler.set_stance("force_eager"):  # making a kernel takes a minute on a CPU
        try:
            plain.model.set_attn_implementation("flex_attention")
            run(plain)
        except Exception as error:
            reason = str(error).partition(". ")[0]
            raise NotImplementedError(f"the stock model fails as well ({reason})") from error
        example.model.set_attn_implementation("flex_attention")
        close(visible(subject, example), expected)


def visible(subject: Subject, example: Example) -> dict[str, Tensor]:
    """The outputs with padding rows cleared: what they hold means nothing."""
    mask = example.batch.get("attention_mask")
    found = run(example)
    if mask is None:
        return found
    hidden = mask == 0
    return {
        name: value.masked_fill(hidden.view(*hidden.shape, *[1] * (value.dim() - 2)), 0.0)
        if value.shape[:2] == mask.shape and not name.startswith("decoder")
        else value
        for name, value in found.items()
    }


def applies(name: str, subject: Subject) -> bool:
    """Whether a claim concerns a site."""
    if name == "certified":
        return subject.kind == "inputs"
    if name == "cache_changes_nothing":
        return writes(subject)
    if name == "equals_oracle":
        # these layers take no mask; their own suites have loops as references
        return subject.family not in ("gru", "blip") and (subject.family, subject.tower) != ("blip_2", "vision")
    return True


# these take seconds each: for the table in the documentation
SLOW: dict[str, Callable[[Subject], None]] = {check.__name__: check for check in (compiles, flex_attends)}
CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        equals_stock,
        equals_oracle,
        rows_alone,
        gates_reach_attention,
        reloads,
        certified,
        cache_changes_nothing,
    )
}
