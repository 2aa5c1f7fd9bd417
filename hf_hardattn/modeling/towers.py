"""The hooks of a tower and of a model, which open the state of a call and pass its result on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from . import members
from .arguments import Arguments
from .context import CONTEXT, ForwardContext, current_context, has_modes, set_current
from .copies import copies_input, hide_dropped
from .cross import SOURCE, SOURCE_MASK, KeptEncoderOutput
from .lost_terms import warn_of_lost_terms
from .plan import TOWER, TowerPlan
from .prompt import CANDIDATES, open_prompt
from .state import TowerState

HANDS_DOWN = "hard_attention_hands_down"  # whether a model's forward passes keywords on to its towers
COPIES = "hard_attention_copies"  # parameters of a module that feeds its decoder the encoder's input
NAMES = "hard_attention_names"  # the parameters of a model's forward
SHARES = "hard_attention_shares"  # a tower that needs to know what another one kept, or what the call says; None if there is none
# a pair of functions: one adds the terms of a training loss to an output, one prepares a training call
TRAINING_LOSS = "hard_attention_training_loss"


def open_tower(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a tower: create the state of its rows.

    If the outer model passed nothing down, because the tower is called on its own or a signature is strict, the tower opens its own call.
    """
    plan: TowerPlan = tower.__dict__[TOWER]
    context: ForwardContext | None = kwargs.get(CONTEXT) or current_context()
    if plan.idle and not tower.training and not has_modes(context):
        return None
    members.check(tower, plan.layers, plan.name)
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
        set_current(context)  # the pooling module gets no keywords
    if plan.patches is not None:
        # imported late: only models whose scorer reads pixels need it
        from .patches import choose_patches

        choose_patches(tower, plan, context, state, arguments)
    if arguments.get(SOURCE) is not None:
        _read_source(plan, context, state, arguments)
    return arguments.result()


def _refuse_compiled_training(tower: str) -> None:
    """Raise the error outside of compiled code, where Dynamo passes it on instead of retrying without compilation."""
    raise HardAttentionError(
        f"the estimator of '{tower}' adds a term to the training loss, and the compiled model around it does not hand its keywords "
        f"down to '{tower}', so the term would be lost. Let forward take **kwargs and pass them on, train without torch.compile, "
        "or use an estimator without such a term ('simple')."
    )


def _refuse_compiled_call(model: str, tower: str) -> None:
    """Raise the error outside of compiled code, as ``_refuse_compiled_training`` does."""
    raise HardAttentionError(
        f"{model}.forward takes no keywords to hand down, and compiled code has no other way to tell '{tower}' which rows were kept, or are "
        "an image's: it would read what was dropped. Let forward take **kwargs and pass them on, or run it without torch.compile."
    )


def _read_source(plan: TowerPlan, context: ForwardContext, state: TowerState, arguments: Arguments) -> None:
    """Read which rows of the other tower may be read, and give the cross-attention a mask of them."""
    source: Tensor = arguments.get(SOURCE)
    if context.source_given:
        kept, gates = context.kept_source, context.source_gates
        dropped = kept is not None
    else:
        other = None if plan.reads is None else context.towers.get(plan.reads)
        dropped = other is not None and other.dropped
        kept = gates = None
        if other is not None and dropped:
            kept, gates = other.output_valid, other.gates
    kept, gates = _for_beams(kept, source), _for_beams(gates, source)
    if dropped and SOURCE_MASK in plan.names:
        arguments.set(SOURCE_MASK, kept)
    mask = arguments.get(SOURCE_MASK)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != source.shape[1]:
        raise HardAttentionError(
            f"encoder_attention_mask has {mask.shape[1]} columns for {source.shape[1]} encoder states at '{plan.name}'; states that "
            "a selection left carry their own mask, which a tuple loses. Give encoder_outputs as the encoder returned them."
        )
    if mask is None and dropped:
        mask = kept
    state.source_dropped, state.source_gates = dropped, gates
    state.source_valid = mask.bool().to(source.device) if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _for_beams(rows: Tensor | None, source: Tensor) -> Tensor | None:
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
    if plan.pools and context is not None and current_context() is context:
        set_current(None)
    if context is None or state is None or output is None:
        return None
    if context.owner is tower:
        context.finished = True
        if context.selections and tower.training and torch.is_grad_enabled():
            _check_own_call(tower, plan, state)
    if not state.dropped:
        return None
    whole = isinstance(output, tuple)
    hidden: Tensor = output[0] if whole else output["last_hidden_state"]
    rows = state.final_rows(hidden, restore=plan.restores, gate=not plan.is_read)
    if plan.is_read:
        state.output_valid = state.kept_mask(len(hidden), hidden.device, plan.restores)
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
        kept_indices=None if plan.restores else state.positions,
        kept_mask=rows.new_ones(rows.shape[:2]).bool() if valid is None else valid,
        kept_gates=None if state.gates is None else state.gates.detach(),
    )


def open_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a model: open the context of a call, unless an enclosing model has one."""
    if kwargs.get(CONTEXT) is not None or current_context() is not None:
        return None
    hands_down = model.__dict__[HANDS_DOWN]
    if not hands_down and torch.compiler.is_compiling():
        if model.__dict__[SHARES] is not None:
            torch.compiler.disable(_refuse_compiled_call)(type(model).__name__, model.__dict__[SHARES])
        return None  # compiled code cannot read a thread's context variable: each tower opens its own call
    context = ForwardContext(model)
    arguments = Arguments(model.__dict__[NAMES], args, kwargs)
    context.labels, predictions = arguments.get("labels"), arguments.get("logits_to_keep")
    context.predictions = predictions if isinstance(predictions, int) else 0
    tokens, ids = model.__dict__[CANDIDATES], arguments.get("input_ids")
    if tokens and isinstance(ids, Tensor) and ids.shape[1] > 1:
        context.candidates = torch.stack([ids == token for token in tokens]).any(0)
    given = kwargs.get("encoder_outputs")
    if given is not None:
        context.source_given = True
        context.kept_source = getattr(given, "kept_mask", None)
        context.source_gates = getattr(given, "kept_gates", None)
    _note_copy(model, args, kwargs, context)
    by_name = kwargs.get("return_dict", getattr(model.config, "return_dict", True))
    context.as_tuple = by_name is False and (hands_down or "return_dict" in kwargs)
    if context.as_tuple and model.training:
        kwargs = {**kwargs, "return_dict": True}  # the training loss reads the outputs by name
    _, before = model.__dict__[TRAINING_LOSS]
    before(model, args, kwargs, context)
    if hands_down:
        if tokens:
            set_current(context)  # such models call their image tower without passing keywords on
        return args, {**kwargs, CONTEXT: context}
    set_current(context)
    return args, kwargs


def open_copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an inner module that feeds the encoder's input to its decoder, as BART's model does under any head."""
    context = kwargs.get(CONTEXT) or current_context()
    if context is not None:
        _note_copy(module, args, kwargs, context)


def _note_copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: ForwardContext) -> None:
    names = module.__dict__.get(COPIES)
    if names is not None and copies_input(names, args, kwargs):
        context.copies_input = True


def close_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a model: end the call and, in training mode, add the estimators' terms to ``outputs.loss``."""
    handed = kwargs.get(CONTEXT)
    context: ForwardContext | None = handed or current_context()
    if context is None or context.owner is not model:
        return None
    if handed is None or model.__dict__[CANDIDATES]:
        set_current(None)
    context.finished = True
    if output is None or not model.training:
        return None
    after, _ = model.__dict__[TRAINING_LOSS]
    if context.selections:
        after(model, args, kwargs, output, context)
    return output.to_tuple() if context.as_tuple else output
