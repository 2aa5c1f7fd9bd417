"""The hooks of a tower and of a model, which open the state of a call and pass its result on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from . import members
from .arguments import Arguments
from .context import CONTEXT, ForwardContext, context_around, has_modes
from .copies import copies_input, hide_dropped
from .cross import SOURCE, SOURCE_MASK, KeptEncoderOutput, Source, handed_over
from .lost_terms import warn_of_lost_terms
from .plan import TOWER, TowerPlan
from .prompt import CANDIDATES, open_prompt, warn_of_lost_logits
from .selector import running
from .state import TowerState

HANDS_DOWN = "hard_attention_hands_down"  # whether a model's forward takes keywords, which it may pass on to its towers
COPIES = "hard_attention_copies"  # parameters of a module that feeds its decoder the encoder's input
NAMES = "hard_attention_names"  # the parameters of a model's forward
SHARES = "hard_attention_shares"  # a tower that needs to know what another one kept, or what the call says; None if there is none
SELECTORS = "hard_attention_selectors"  # the modules that hold a model's selectors, each with the name of its attribute
# a pair of functions: one adds the terms of a training loss to an output, one prepares a training call
TRAINING_LOSS = "hard_attention_training_loss"


def open_tower(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a tower: create the state of its rows.

    A tower that is called on its own opens its own call. So does one that compiled code around it passes nothing down.
    """
    plan: TowerPlan = tower.__dict__[TOWER]
    context: ForwardContext | None = kwargs.get(CONTEXT) or context_around(tower)
    if plan.idle and not tower.training and not has_modes(context):
        return None
    members.check(tower, plan)
    inner = TRAINING_LOSS not in tower.__dict__  # a tower that is the whole model adds its terms itself
    if inner and context is None and plan.terms and tower.training and torch.compiler.is_compiling():
        torch.compiler.disable(_refuse_compiled_training)(plan.name)
    context = context or ForwardContext(tower)
    arguments = Arguments(plan.names, args, kwargs)
    arguments.keywords[CONTEXT] = context
    if context.copies_input and plan.reads is not None:
        hide_dropped(plan, context, arguments)
    mask = arguments.get("attention_mask")
    state = TowerState(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    context.towers[plan.name] = state
    pixels = arguments.get("pixel_values") if plan.patch_size is not None else None
    if isinstance(pixels, Tensor) and plan.patch_size is not None:  # for anything else, Transformers raises the error
        state.grid = pixels.shape[-2] // plan.patch_size[0], pixels.shape[-1] // plan.patch_size[1]
    if plan.always is not None:
        state.always = plan.always(tower, arguments)
    if plan.prompt:
        state.prompt = open_prompt(tower, plan, context, arguments)
    if plan.pools:
        context.enter(tower)  # the pooling module gets no keywords
    if plan.patches is not None:
        # imported late: only models whose scorer reads pixels need it
        from .patches import choose_patches

        choose_patches(tower, plan, context, state, arguments)
    if arguments.get(SOURCE) is not None:
        _read_source(tower, plan, context, state, arguments)
    return arguments.result()


def _refuse_compiled_training(tower: str) -> None:
    """Raise the error outside of compiled code, where Dynamo passes it on instead of retrying without compilation."""
    raise HardAttentionError(
        f"the estimator of '{tower}' adds a term to the training loss, but the compiled model around it does not pass its keyword "
        f"arguments to '{tower}', so the term would be lost. Let forward accept **kwargs and pass them on, train without torch.compile, "
        "or use an estimator without such a term ('simple')."
    )


def _refuse_compiled_call(model: str, tower: str) -> None:
    """Raise the error outside of compiled code, as ``_refuse_compiled_training`` does."""
    raise HardAttentionError(
        f"{model}.forward does not pass its keyword arguments on, which compiled code needs to tell '{tower}' which rows were kept, belong to an "
        "image, or are labelled; without them, it would read dropped rows. Let forward accept **kwargs and pass them on, or run it without "
        "torch.compile."
    )


def _read_source(
    tower: nn.Module, plan: TowerPlan, context: ForwardContext, state: TowerState, arguments: Arguments
) -> None:
    """Read which rows of the other tower may be read, and give the cross-attention a mask of them."""
    source, mask = arguments.get(SOURCE), arguments.get(SOURCE_MASK)
    other = None if plan.reads is None else context.towers.get(plan.reads)
    kept = context.kept_source
    if other is not None and other.dropped and not context.source_given:
        kept = _of_this_call(other, source)
    elif kept is None and other is None and plan.source_drops:
        kept = _of_unused_slots(tower, plan, context, source, mask)
    if kept is not None and SOURCE_MASK in plan.names:
        arguments.set(SOURCE_MASK, mask := kept.valid)
    _check_width(plan, mask, source)
    if mask is None and kept is not None:
        mask = kept.valid
    if kept is not None:
        state.source_dropped, state.source_gates, state.source_places = True, kept.gates, kept.places
    state.source_valid = mask.bool().to(source.device) if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _of_this_call(other: TowerState, source: Tensor) -> Source:
    """Return what a tower of the same call kept, for a source that generation may have repeated for its beams."""
    places = other.output_places
    if places is not None:
        places = _for_beams(places[0], source), places[1]
    return Source(_for_beams(other.output_valid, source), _for_beams(other.gates, source), places)


def _of_unused_slots(
    tower: nn.Module, plan: TowerPlan, context: ForwardContext, source: Tensor, mask: Tensor | None
) -> Source:
    """Read from given states themselves, ``[B, K, D]``, which of them may be read: a selection leaves zeros in its unused slots.

    Raises:
        HardAttentionError: in training, where the dropped rows are computed too.
    """
    if tower.training and not any(mode.soft for mode in context.modes):
        raise HardAttentionError(
            f"'{plan.name}' is given states of '{plan.reads}' alone, which do not tell what was kept; in training, states of dropped rows are "
            "among them. Give encoder_outputs as the encoder returned them."
        )
    _check_width(plan, mask, source)
    valid = source.any(-1)
    return Source(valid & mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else valid)


def _check_width(plan: TowerPlan, mask: Any, source: Tensor) -> None:
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != source.shape[1]:
        raise HardAttentionError(
            f"encoder_attention_mask has {mask.shape[1]} columns for {source.shape[1]} encoder states at '{plan.name}'; kept states "
            "carry their own mask, which a tuple loses, and so does a new last_hidden_state. Pass encoder_outputs as the encoder returned "
            "it, or select and repeat the rows of every tensor in it."
        )


def _for_beams(rows: Any, source: Tensor) -> Any:
    """Repeat ``[B, K]`` as generation repeats the source for its beams."""
    if rows is None or len(rows) == len(source):
        return rows
    return rows.to(source.device).repeat_interleave(len(source) // len(rows), 0)


def finish_tower(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a tower: return the kept rows, and record which ones they are.

    Returns:
        The output with the kept rows; None if nothing was dropped.
    """
    context: ForwardContext | None = kwargs.get(CONTEXT)
    plan: TowerPlan = tower.__dict__[TOWER]
    state = None if context is None else context.towers.get(plan.name)
    # a tower that is the whole model leaves the context at the end of its call
    if context is not None and TRAINING_LOSS not in tower.__dict__:
        context.leave(tower)
    if context is None or state is None or output is None:
        return None
    if context.owner is tower:
        context.finished = True
        if context.selections and tower.training and torch.is_grad_enabled():
            _check_own_call(tower, plan, state)
    if not state.dropped:
        return None
    if plan.prompt:
        warn_of_lost_logits(tower, state.prompt, context)
    whole = isinstance(output, tuple)
    hidden: Tensor = output[0] if whole else output["last_hidden_state"]
    rows = state.final_rows(hidden, restore=plan.restores, gate=not plan.is_read)
    if plan.is_read:
        state.output_valid = state.kept_mask(len(hidden), hidden.device, plan.restores)
        if not plan.restores and state.positions is not None:
            state.output_places = state.positions, state.length
    if whole:
        return (rows, *output[1:])
    pooled = output.get("pooler_output")
    if pooled is not None and state.gates is not None:
        # the last choice may not affect what was pooled inside the tower: give it a zero gradient, since distributed training waits
        # for every parameter
        output["pooler_output"] = pooled + 0.0 * state.gates.sum().to(pooled.dtype)
    # exporters make the model return a plain dict of tensors
    if not plan.is_read or type(output) is dict:
        output["last_hidden_state"] = rows
        return output
    return _kept_output(plan, state, output, rows)


def _check_own_call(tower: nn.Module, plan: TowerPlan, state: TowerState) -> None:
    """Check that a training call of a tower by itself loses no gradient that only a call of the whole model has.

    Raises:
        HardAttentionError: another tower reads the rows, and the gradient of their choice goes through that reading.
    """
    if plan.is_read and state.gates is not None:
        raise HardAttentionError(
            f"'{plan.name}' was called by itself in training; the gradient of its choices goes through the tower that reads it, and would "
            "be wrong. Give its inputs to the whole model instead of encoder_outputs, or call it under torch.no_grad()."
        )
    # a tower that is the whole model adds its terms itself
    if plan.terms and TRAINING_LOSS not in tower.__dict__ and not torch.compiler.is_compiling():
        warn_of_lost_terms(
            f"'{plan.name}' was called by itself in training", plan.terms, "Call the whole model, with labels."
        )


def _kept_output(plan: TowerPlan, state: TowerState, output: Any, rows: Tensor) -> Any:
    valid = state.output_valid
    if state.gates is not None and state.chosen is not None:
        valid = state.chosen if valid is None else valid & state.chosen
    known = {name: output.get(name) for name in ("last_hidden_state", "hidden_states", "attentions")}
    if not isinstance(output, KeptEncoderOutput) and set(output.keys()) - set(known):
        output.last_hidden_state = rows  # an output with extra fields keeps its class; the context knows the rest
        return output
    return KeptEncoderOutput(
        **{**known, "last_hidden_state": rows},
        kept_indices=None if state.output_places is None else state.output_places[0],
        input_length=None if state.output_places is None else state.output_places[1],
        kept_mask=rows.new_ones(rows.shape[:2]).bool() if valid is None else valid,
        kept_gates=None if state.gates is None else state.gates.detach(),
    )


def open_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a model: open the context of a call, unless an enclosing model handed one down."""
    given_context: ForwardContext | None = kwargs.get(CONTEXT)
    # the hook of a tower that is the whole model has made a context just now
    if given_context is not None and (given_context.owner is not model or given_context.opened):
        return None
    hands_down, compiling = model.__dict__[HANDS_DOWN], torch.compiler.is_compiling()
    if compiling and not hands_down:
        if model.__dict__[SHARES] is not None:
            torch.compiler.disable(_refuse_compiled_call)(type(model).__name__, model.__dict__[SHARES])
        return None  # compiled code cannot read a thread's context variable: each tower opens its own call
    context = given_context or ForwardContext(model)
    context.opened = True
    arguments = Arguments(model.__dict__[NAMES], args, kwargs)
    context.labels, predictions = arguments.get("labels"), arguments.get("logits_to_keep")
    context.predictions = predictions if isinstance(predictions, int) else 0
    tokens = model.__dict__[CANDIDATES]
    if tokens:
        context.ids = arguments.get("input_ids")
    given = arguments.get("encoder_outputs")
    if given is not None:
        context.source_given, context.kept_source = True, handed_over(given)
    _note_copy(model, args, kwargs, context)
    if _is_training(model):
        _, before = model.__dict__[TRAINING_LOSS]
        before(model, args, kwargs, context)
    by_name = kwargs.get("return_dict", getattr(model.config, "return_dict", True))
    if context.selectors and by_name is False and (hands_down or "return_dict" in kwargs):
        context.as_tuple = True
        kwargs = {**kwargs, "return_dict": True}  # the training loss reads the outputs by name
    # a forward that takes keywords need not pass them on; models with images do not, to their image tower
    if tokens or not compiling:
        context.enter(model)
    return args, {**kwargs, CONTEXT: context} if hands_down else kwargs


def _is_training(model: nn.Module) -> bool:
    """Return whether a call of a model is a training call: the model, or one of its selectors alone, is in training mode."""
    if model.training or not torch.is_grad_enabled():
        return model.training
    return any(running(host._modules[name]).training for host, name in model.__dict__[SELECTORS])


def open_copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an inner module that feeds the encoder's input to its decoder, as BART's model does under any head."""
    context = kwargs.get(CONTEXT) or context_around(module)
    if context is not None:
        _note_copy(module, args, kwargs, context)


def _note_copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: ForwardContext) -> None:
    names = module.__dict__.get(COPIES)
    if names is not None and copies_input(names, args, kwargs):
        context.copies_input = True


def close_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a model: end the call and, if it is a training call, add the estimators' terms to ``outputs.loss``."""
    context: ForwardContext | None = kwargs.get(CONTEXT) or context_around(model)
    if context is None or context.owner is not model:
        return None
    context.leave(model)
    context.finished = True
    shares = model.__dict__[SHARES]
    if shares is not None and shares not in context.towers and torch.compiler.is_compiling():
        torch.compiler.disable(_refuse_compiled_call)(type(model).__name__, shares)
    if output is None or not context.selectors:
        return None
    after, _ = model.__dict__[TRAINING_LOSS]
    if context.selections:
        after(model, args, kwargs, output, context)
    return output.to_tuple() if context.as_tuple else output
