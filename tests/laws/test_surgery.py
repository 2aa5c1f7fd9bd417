"""Law 13: layers of a hard model are stock modules, to iterate, slice, wrap, replace, compile, copy and hook."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from cases import HEADS, Example, close, harden, run, stock, train_loss
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_hardattn
from hf_hardattn import HardAttentionError, models
from hf_hardattn.models import family_of

FIRST_HEADS = list(dict(reversed(HEADS)).items())
EVERY_FAMILY = pytest.mark.parametrize(("architecture", "head"), FIRST_HEADS)
LAYERED = pytest.mark.parametrize(("architecture", "head"), [pair for pair in FIRST_HEADS if pair[0] != "gru"])
CONFIG = {"sites": ["*"], "budget": 2}


def hard_example(architecture, head, **changes):
    example = stock(architecture, head)
    harden(example.model, {**CONFIG, **changes})
    return example


def lists(model) -> dict[str, nn.ModuleList]:
    return {name: tower.layers for name, tower in family_of(model).towers(model).items()}


def layers(model) -> list[nn.Module]:
    return [layer for each in lists(model).values() for layer in each]


def rearrange(model, order) -> None:
    """Replace the list of layers of every tower by what ``order`` makes of it."""
    for tower in family_of(model).towers(model).values():
        path, _, name = tower.spec.layers.rpartition(".")
        setattr(tower.module.get_submodule(path), name, nn.ModuleList(order(tower.layers)))


# ------------------------------------------------------------------------------------------------------------ modules are stock


@EVERY_FAMILY
def test_modules_and_signatures_are_those_of_stock(architecture, head):
    plain, example = stock(architecture, head), hard_example(architecture, head)
    stock_modules = {name: module for name, module in example.model.named_modules() if "selector" not in name}
    assert stock_modules.keys() == dict(plain.model.named_modules()).keys()
    for name, module in plain.model.named_modules():
        assert type(stock_modules[name]) is type(module), name
        assert inspect.signature(type(stock_modules[name]).forward) == inspect.signature(type(module).forward)
    for layer in layers(example.model):
        assert layer.forward.__func__ is type(layer).forward  # nobody put another one on the layer


@EVERY_FAMILY
def test_a_list_of_layers_is_a_list(architecture, head):
    example = hard_example(architecture, head)
    for each in lists(example.model).values():
        assert type(each) is nn.ModuleList and [*each] == [each[n] for n in range(len(each))]
        assert len(nn.ModuleList([*each])) == len(each) and len(each + each) == 2 * len(each)
        assert [*each[:1]] == [each[0]]
        for layer in each:
            layer.mark = 7
        assert all(layer.mark == 7 for layer in each)


@LAYERED
def test_layers_can_be_rebuilt_into_a_list(architecture, head):
    example = hard_example(architecture, head)
    expected = run(example)
    rearrange(example.model, list)
    close(run(example), expected, 0)


@pytest.mark.parametrize("architecture", ["vit", "deit", "dinov2", "clip", "siglip", "bert"])
def test_a_slice_of_the_layers_is_a_shallower_model(architecture):
    head = models.load(architecture).spec.heads[0]
    example, shallow = hard_example(architecture, head), stock(architecture, head, num_hidden_layers=2)
    hf_hardattn.apply(shallow.model, CONFIG)
    kept = {name: value for name, value in example.model.state_dict().items() if name in shallow.model.state_dict()}
    shallow.model.load_state_dict(kept)
    rearrange(example.model, lambda layers: layers[:2])
    with pytest.raises(HardAttentionError, match="layer 2 of '.*' is gone; .*a site in it, .* Call hf_hardattn.apply"):
        run(example)
    hf_hardattn.apply(example.model, CONFIG)
    close(run(example), run(Example(shallow.model, example.batch)), 0)


@pytest.mark.parametrize("mode", ["gathered", "masked"])
@pytest.mark.parametrize(
    ("architecture", "refused"), [("bert", False), ("vit", False), ("siglip", True), ("clip", False)]
)
def test_layers_without_a_site_can_be_taken_out(architecture, refused, mode):
    """The last one cannot, where the rows behind it are pooled."""
    head = models.load(architecture).spec.heads[0]
    tower = next(iter(lists(stock(architecture, head).model)))
    config = {"sites": [f"{tower}.tokens.0"], "budget": 2}
    example, shallow = stock(architecture, head), stock(architecture, head)
    harden(example.model, config)
    for each in (example, shallow):
        rearrange(each.model, lambda layers: [layers[0], layers[1]])
    harden(shallow.model, config)
    with hf_hardattn.execution(example.model, mode), hf_hardattn.execution(shallow.model, mode):
        if refused:
            with pytest.raises(HardAttentionError, match="layer 2 of 'vision' is gone; .* to pool the rows"):
                run(example)
        else:
            close(run(example), run(shallow), 0)


ORDERS = {
    "reversed": lambda layers: [*layers][::-1],
    "one twice, as a copy": lambda layers: [*layers[:2], copy.deepcopy(layers[1]), *layers[2:]],
}


@pytest.mark.parametrize("order", ORDERS)
@LAYERED
def test_layers_in_another_order_are_refused_until_hard_attention_is_applied_again(architecture, head, order):
    """Masked execution, and so training, would not hide from a layer what was dropped behind it before."""
    example, plain = (stock(architecture, head) for _ in range(2))
    harden(example.model, CONFIG)
    for each in (example, plain):
        rearrange(each.model, ORDERS[order])
    for training in (False, True):
        with pytest.raises(HardAttentionError, match="are no longer in the order .* Call hf_hardattn.apply"):
            example.model.train(training)(**example.batch)
    hf_hardattn.apply(example.model.eval(), CONFIG)
    hf_hardattn.apply(plain.model, CONFIG)
    for site, selector in hf_hardattn.selectors(plain.model).items():
        selector.load_state_dict(hf_hardattn.selectors(example.model)[site].state_dict())
    options = {"use_cache": False} if architecture == "t5" else {}  # a copy of a layer shares its place in the cache
    for mode in ("gathered", "masked"):
        with hf_hardattn.execution(example.model, mode), hf_hardattn.execution(plain.model, mode):
            close(run(example, **options), run(plain, **options), 0)


@LAYERED
def test_a_layer_in_two_places_is_refused(architecture, head):
    """After apply, and before it, where each place would need a plan; one attention in two layers likewise."""
    example = hard_example(architecture, head)
    rearrange(example.model, lambda layers: [layers[0], layers[0]])
    with pytest.raises(HardAttentionError, match=r"are no longer in the order .* \[0, 0\]"):
        run(example)
    with pytest.raises(HardAttentionError, match="layer 0 of '(.*)' and layer 1 of '\\1' share one"):
        hf_hardattn.apply(example.model, CONFIG)
    twin = stock(architecture, head)
    for tower in family_of(twin.model).towers(twin.model).values():
        path = tower.spec.attention or tower.spec.cross
        tower.layers[1].set_submodule(path, tower.layers[0].get_submodule(path))
    expected = run(twin)
    with pytest.raises(HardAttentionError, match="layer 0 of .* and layer 1 of .* share one .*Attention"):
        hf_hardattn.apply(twin.model, CONFIG)
    close(run(twin), expected, 0)


@pytest.mark.parametrize("sites", [["encoder.tokens.0"], ["encoder.self.*"], ["encoder.inputs"]], ids=str)
def test_t5_without_its_first_layer_has_no_position_bias(sites):
    """As stock: only that layer holds the bias, which the others receive."""
    plain, example = (stock("t5", "T5ForConditionalGeneration") for _ in range(2))
    for each in (plain, example):
        rearrange(each.model, lambda layers: [*layers][1:] or [*layers])
    harden(example.model, {"sites": sites, "budget": 2})
    with hf_hardattn.soft(example.model):
        close(run(example), run(plain), 0)
    expected = run(example)
    with hf_hardattn.execution(example.model, "masked"):
        close(run(example), expected)


@LAYERED
def test_a_module_can_be_replaced_inside_every_layer(architecture, head):
    """Each last linear map by a module of the user's around it."""

    class Doubled(Wrapper):
        def forward(self, states):
            return 2 * self.wrapped(states)

    plain, example = stock(architecture, head), hard_example(architecture, head)
    for each in (plain, example):
        for layer in layers(each.model):
            name, last = [pair for pair in layer.named_modules() if type(pair[1]) is nn.Linear][-1]
            layer.set_submodule(name, Doubled(last))
    with hf_hardattn.soft(example.model):
        close(run(example), run(plain))
    assert run(example).keys() == run(plain).keys()


class Wrapper(nn.Module):
    """A module of the user's around a layer, which hands everything on."""

    def __init__(self, layer):
        super().__init__()
        self.wrapped = layer

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)


@LAYERED
@pytest.mark.parametrize("how", ["wrapped", "copied", "pickled"])
def test_a_layer_can_be_replaced_by_what_is_made_of_it(architecture, head, how):
    make = {"wrapped": Wrapper, "copied": copy.deepcopy, "pickled": lambda layer: pickle.loads(pickle.dumps(layer))}
    example = hard_example(architecture, head)
    expected = run(example)
    for each in lists(example.model).values():
        for number, layer in enumerate(each):
            each[number] = make[how](layer)
    close(run(example), expected, 0)


@LAYERED
def test_a_stock_layer_in_the_place_of_another_takes_its_part_once_applied_again(architecture, head):
    example = hard_example(architecture, head, sites=["*.tokens.0", "*.self.1"] if architecture != "t5" else ["*"])
    expected, twin = run(example), stock(architecture, head)
    for name, each in lists(example.model).items():
        each[1] = lists(twin.model)[name][1]  # the same weights, no selector, no hook
    config = example.model.config.hard_attention
    selectors = {site: selector.state_dict() for site, selector in hf_hardattn.selectors(example.model).items()}
    hf_hardattn.apply(example.model, config)
    known = hf_hardattn.selectors(hard_example(architecture, head, sites=config["sites"]).model)
    for site, selector in hf_hardattn.selectors(example.model).items():
        selector.load_state_dict(selectors.get(site, known[site].state_dict()))
    close(run(example), expected, 0)


@pytest.mark.parametrize(
    "architecture", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "blip", "bert"))]
)
def test_layers_compile_one_by_one(architecture):
    """The others' layers are made like these."""
    head = models.load(architecture).spec.heads[0]
    example = hard_example(architecture, head)
    expected = run(example)
    torch._dynamo.reset()
    for layer in layers(example.model):
        layer.compile(backend="eager")
    close(run(example), expected)
    with hf_hardattn.record(example.model) as selections:
        close(run(example), expected)
    assert set(selections.sites) == set(hf_hardattn.selectors(example.model))


# ------------------------------------------------------------------------------------------------------------------- layers alone


@LAYERED
def test_a_layer_called_alone_computes_as_stock(architecture, head):
    plain, example = stock(architecture, head), hard_example(architecture, head)
    for name, each in lists(example.model).items():
        size = family_of(example.model).towers(example.model)[name].hidden_size
        states = torch.randn(2, 5, size)
        for one, other in zip(each, lists(plain.model)[name], strict=True):
            asked = inspect.signature(type(one).forward).parameters
            more = {"attention_mask": None} if "attention_mask" in asked else {}
            with torch.no_grad():
                found, expected = one(states, **more), other(states, **more)
            found, expected = (x if isinstance(x, Tensor) else x[0] for x in (found, expected))
            assert torch.equal(found, expected)


@LAYERED
def test_copies_of_a_layer_are_apart(architecture, head):
    example = hard_example(architecture, head)
    layer = layers(example.model)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert [name for name, _ in twin.named_modules()] == [name for name, _ in layer.named_modules()]
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in layer.parameters()}
        own = {id(module) for module in twin.modules()}
        for module in twin.modules():  # what was put on a module belongs to the copy too
            for value in module.__dict__.values():
                bound = getattr(value, "args", ())
                assert all(id(part) in own for part in bound if isinstance(part, nn.Module))


# ------------------------------------------------------------------------------------------------------------------------- hooks


@LAYERED
@pytest.mark.parametrize("sites", [["*.tokens.*"], ["*.inputs"], ["*.self.*"], ["*"]], ids=str)
def test_hooks_of_users_see_the_tensors_that_stock_hands_around(architecture, head, sites):
    def seen(example):
        found = []

        def note(layer, args, kwargs, output):
            states = args[0] if args else kwargs["hidden_states"]
            found.append((type(layer), type(states), states.dim(), type(output)))
            assert states.shape[0] == 3 and (output if isinstance(output, Tensor) else output[0]).isfinite().all()

        for layer in layers(example.model):
            layer.register_forward_hook(note, with_kwargs=True)
        run(example)
        return found

    assert seen(hard_example(architecture, head, sites=sites)) == seen(stock(architecture, head))


@LAYERED
def test_a_hook_on_a_layer_can_change_what_goes_on(architecture, head):
    for number in range(2):
        example = hard_example(architecture, head)
        before = run(example)

        def shift(layer, args, output):
            whole = isinstance(output, tuple)
            states = (output[0] if whole else output) + torch.arange(float((output[0] if whole else output).shape[-1]))
            return (states, *output[1:]) if whole else states

        next(iter(lists(example.model).values()))[number].register_forward_hook(shift)
        after = run(example)
        assert any(not torch.allclose(before[name], after[name], atol=1e-3) for name in before)


@LAYERED
def test_hooks_registered_before_apply_stay(architecture, head):
    example, calls = stock(architecture, head), []
    for layer in layers(example.model):
        layer.register_forward_hook(lambda *_: calls.append(1))
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    harden(example.model, CONFIG)
    run(example)
    during = len(calls)
    hf_hardattn.remove(example.model)
    run(example)
    assert during == 2 * len(layers(example.model)) and len(calls) == 2 * during


# ----------------------------------------------------------------------------------------------------------- gradient checkpointing


def test_transformers_checkpoints_the_forward_of_a_layer_inside_its_hooks():
    """The canary: every choice is made in a layer's hook, and so never again when the layer is computed a second time."""
    calls = []

    class Layer(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, states):
            calls.append("forward")
            return self.linear(states)

    assert "forward" in Layer.__dict__ and Layer.forward.__wrapped__ is not Layer.forward
    for use_reentrant in (True, False):
        calls.clear()
        layer = Layer().train()
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda function, *args, reentrant=use_reentrant: (
            torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)
        )
        layer.register_forward_pre_hook(lambda *_: calls.append("before"))
        layer.register_forward_hook(lambda *_: calls.append("after"))
        layer(torch.ones(1, 2, requires_grad=True)).sum().backward()
        assert calls == ["before", "forward", "after", "forward"]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("estimator", ["simple", "reinforce"])
@LAYERED
def test_hooks_of_layers_run_once_under_gradient_checkpointing(architecture, head, estimator, use_reentrant):
    example = hard_example(architecture, head, estimator=estimator, baseline="none")
    example.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    counts, choices = dict.fromkeys(map(id, layers(example.model)), 0), []
    for layer in layers(example.model):
        layer.register_forward_pre_hook(lambda layer, args: counts.__setitem__(id(layer), counts[id(layer)] + 1))
    for selector in hf_hardattn.selectors(example.model).values():
        selector.register_forward_hook(lambda selector, args, output: choices.append(selector.site))
    train_loss(example).backward()
    assert set(counts.values()) == {1}
    once = [site for site, selector in hf_hardattn.selectors(example.model).items() if selector.once]
    assert all(
        choices.count(site) == 1 for site in once
    )  # others choose in the attention, from the noise of the first time
