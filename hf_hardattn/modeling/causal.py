"""The hooks of a decoder's layers: they choose which rows of a prompt stay in the residual stream and in the cache.

A decoder reads a prompt and then generates row by row. Sites choose once among the rows of the prompt, while the cache is empty:
``inputs`` and ``tokens`` drop rows for all later layers; ``self`` lets the whole prompt attend to itself, then leaves only the chosen
keys in the cache of its layer. Kept rows keep their positions, the prompt's last row is always kept, and every layer's cache has its own
length. With labels, the prompt consists of the rows before the first one; the answer is never part of the choice.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..errors import HardAttentionError
from ..functional.attention import keep_heads, keep_rows
from .arguments import Arguments
from .checkpointing import checkpoint_without_reentry
from .context import CONTEXT, ForwardContext
from .masks import as_allowed
from .plan import LAYER, LayerPlan
from .projection import AttentionView, projections_of
from .prompt import begin_rows, packed_for_flash
from .prompt_masks import as_form, dense_mask, prefill_mask, step_mask
from .prompt_memory import MEMORY, CachedRows, PromptMemory
from .rotary import tables_at
from .rows import choose_among, select_rows
from .selection import Selection
from .selector import running
from .state import AttentionInput, KeySubset, TowerState

_RECORD = "record"  # key of what layers after one selection share: the record of the rows in their caches


def before_prompt_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a decoder's layer: choose at its ``inputs`` and ``self`` sites, and reduce its other inputs to the kept rows.

    Returns:
        The arguments to run with; None if nothing changes.
    """
    context: ForwardContext | None = kwargs.get(CONTEXT)
    plan: LayerPlan = layer.__dict__[LAYER]
    state = None if context is None else context.towers.get(plan.tower)
    if context is None or state is None or state.prompt is None:
        return None
    if state.prompt.memory is not None and state.prompt.problem is None:
        return _before_step(layer, plan, state, args, kwargs)
    chooses = plan.inputs or plan.own or plan.follows is not None
    if state.begun and not state.dropped and not chooses:
        return None
    rows = _PromptRows(layer, plan, context, state, Arguments(plan.names, args, kwargs))
    rows.begin()
    rows.select_inputs()
    rows.select_keys()
    rows.narrow()
    rows.remember()
    if chooses or state.gates is not None:
        checkpoint_without_reentry(layer)
    return rows.arguments.result()


def _before_step(
    layer: nn.Module, plan: LayerPlan, state: TowerState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """After the prompt, give the layer the mask of its own cache."""
    memory: PromptMemory = state.prompt.memory
    rows = memory.of(plan.index)
    if rows is None:
        return None
    arguments = Arguments(plan.names, args, kwargs)
    attention: Any = attrgetter(plan.attention)(layer)
    hidden, cache, config = arguments.get(plan.names[0]), arguments.get("past_key_values"), attention.config

    def make() -> Any:
        later, window = state.prompt.later, plan.window
        return step_mask(rows, later, config, hidden, cache, plan.index, window, memory.rows)

    arguments.set("attention_mask", state.shared(rows, make, plan.window))
    return arguments.result()


class _PromptRows:
    """One layer's call on a prompt: its rows, keys, mask and positions."""

    def __init__(
        self, layer: nn.Module, plan: LayerPlan, context: ForwardContext, state: TowerState, arguments: Arguments
    ):
        self.layer, self.plan, self.context, self.state, self.arguments = layer, plan, context, state, arguments
        self.attention: Any = attrgetter(plan.attention)(layer)
        self.cache = arguments.get("past_key_values")
        self.chosen: Selection | None = None  # keys of this layer's ``self`` site

    @property
    def hidden(self) -> Tensor:
        return self.arguments.get(self.plan.names[0])

    def begin(self) -> None:
        """Read which rows are valid, at the first hooked layer."""
        if self.state.begun:
            return
        begin_rows(self.state, self.arguments.get("attention_mask"), self.hidden.shape[1])
        if self.attention.config._attn_implementation.startswith("flash"):
            self.state.prompt.problem = self.state.prompt.problem or packed_for_flash(self.arguments)

    def select_inputs(self) -> None:
        """Choose among the rows before the first layer."""
        if not self.plan.inputs:
            return
        indices = choose_rows(self, self.layer, "input_selector", self.hidden, self.hidden)
        if indices is not None:
            self.arguments.set(self.plan.names[0], keep_rows(self.hidden, indices))

    def select_keys(self) -> None:
        """Choose the keys of the prompt that the rows after it may read."""
        plan, state = self.plan, self.state
        state.keys = None
        if plan.follows is not None:
            state.keys = state.key_leaders.get(plan.follows)
        if not plan.own:
            return
        selector = running(self.attention.selector)
        refuse_unknown(self.context, state, selector)
        norm = None if plan.norm is None else attrgetter(plan.norm)(self.layer)
        states = self.hidden if norm is None else norm(self.hidden)
        view = AttentionView(self.attention, plan.attention_spec)
        selection = choose_among(
            self.context,
            selector,
            states,
            state.candidates,
            plan.protected,
            state.bound,
            view.projections,
            state.always,
            state.varied,
        )
        if selection is None:
            return
        selection.positions = state.positions
        state.keys = selection
        if selector.site in plan.leads:
            state.key_leaders[selector.site] = selection

    def narrow(self) -> None:
        """Give the layer the positions and the mask of the remaining rows."""
        state, arguments, plan = self.state, self.arguments, self.plan
        given = arguments.get("attention_mask")
        if state.positions is not None:
            name, positions = str(plan.attention_spec.rotary), state.positions
            tables = arguments.get(name)
            arguments.set(name, state.shared(tables[0], lambda: tables_at(tables, positions, state.length)))
            # flash attention would interpret positions with gaps as several texts in one row
            arguments.set("position_ids", None)
        keys, answer = state.keys, self._answer()
        by_answer = keys is not None and answer is not None
        if state.gates is not None or by_answer:
            mask = self._weighed(self._allowed(given), keys if by_answer else None, answer)
            arguments.set("attention_mask", mask)
        elif state.dropped:
            arguments.set("attention_mask", self._mask(given))

    def _mask(self, given: Any) -> Any:
        """Return the mask of the remaining rows, in the form of the implementation."""
        state, plan = self.state, self.plan
        if not state.dropped:
            return given

        def make() -> Any:
            config = self.attention.config
            return prefill_mask(state, config, self.hidden, given, self.cache, plan.index, plan.window)

        return state.shared(given, make, plan.window)

    def _allowed(self, given: Any) -> Any:
        """Return which keys each remaining row may read, bool ``[B or 1, 1, K, K]``."""
        if given is None or isinstance(given, Tensor) and given.dim() == 2:
            # the implementation is causal by itself, and its mask tells of padding alone
            return dense_mask(self.state, self.hidden, self.plan.window)
        return as_allowed(self._mask(given))

    def _answer(self) -> Tensor | None:
        """Return which rows read only the keys that a ``self`` site kept, bool ``[B, K]``; None if the whole call is the prompt."""
        answer, positions = self.state.prompt.answer, self.state.positions
        return answer if answer is None or positions is None else answer.expand(len(positions), -1).gather(1, positions)

    def _weighed(self, allowed: Tensor, keys: Selection | None, answer: Any) -> Any:
        """Return the mask argument if some rows read only the chosen keys, or gates weigh the keys."""
        state = self.state
        gates: Tensor | None = None
        if keys is not None and keys.gates is None:
            allowed = allowed & (keys.mask | ~answer[:, None, :, None])
        elif keys is not None and keys.gates is not None:
            gates = keys.gates.where(answer[:, None, :, None], 1.0)
        if gates is None and state.gates is None:
            config = self.attention.config
            return as_form(allowed, config._attn_implementation, self.hidden.dtype, self._site())
        subset = None if gates is None else KeySubset(gates=gates, total=gates.shape[-1])
        weights = state.wants_weights(self.attention, self.arguments)
        return AttentionInput(allowed, subset, state.gates, weights=weights)

    def _site(self) -> str:
        return f"{self.plan.tower}.self.{self.plan.index}"

    def remember(self) -> None:
        """Store with the cache which rows this layer's keys come from."""
        memory = self.memory()
        if memory is not None and self.state.dropped:
            batch, count = self.hidden.shape[:2]
            memory.layers[self.plan.index] = self.state.shared(_RECORD, lambda: self._cached(batch, count))

    def memory(self) -> PromptMemory | None:
        """Return the record stored with the cache, which tells that this model read the prompt; None without a cache."""
        if self.cache is None:
            return None
        memory = getattr(self.cache, MEMORY, None)
        if memory is None:
            prompt = self.state.prompt
            valid = None if prompt.valid is None else prompt.valid.expand(len(self.hidden), -1)
            memory = PromptMemory(self.state.length, valid, prompt.answer)
            setattr(self.cache, MEMORY, memory)
        return memory

    def _cached(self, batch: int, count: int) -> CachedRows:
        valid, positions = self.state.candidates, self.state.positions
        return CachedRows(count, None if valid is None else valid.expand(batch, -1), positions)


def choose_rows(rows: Any, host: nn.Module, name: str, hidden: Tensor, states: Tensor) -> Tensor | None:
    """Choose among the rows of a prompt; return None if all stay."""
    plan, context, state = rows.plan, rows.context, rows.state
    refuse_unknown(context, state, running(getattr(host, name)))
    projections = projections_of(rows.layer, plan)
    return select_rows(context, state, host, name, plan.protected, hidden, states, projections)


def refuse_unknown(context: ForwardContext, state: TowerState, selector: Any) -> None:
    """Raise an error if a site would choose but the prompt is not known."""
    if state.prompt.problem is not None and not context.is_soft(selector) and not selector.keeps_all:
        raise HardAttentionError(state.prompt.problem.format(site=selector.site))


def after_prompt_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a decoder's layer: leave only the chosen keys in its cache, and choose at its ``tokens`` site.

    Returns:
        The output with the remaining rows; None if nothing changes.
    """
    context: ForwardContext | None = kwargs.get(CONTEXT)
    plan: LayerPlan = layer.__dict__[LAYER]
    state = None if context is None else context.towers.get(plan.tower)
    if context is None or state is None or state.prompt is None:
        return None
    if state.prompt.memory is not None and state.prompt.problem is None:
        return None
    rows = _PromptRows(layer, plan, context, state, Arguments(plan.names, args, kwargs))
    keys, state.keys = state.keys, None
    if keys is not None and rows.cache is not None:
        prune(rows.cache, plan.index, keys, state)
    whole = isinstance(output, tuple)
    hidden: Tensor = output[0] if whole else output
    if keys is not None and keys.gates is not None and state.prompt.answer is None:
        # no row used the choice: give it a zero gradient, since distributed training waits for every parameter
        hidden = hidden + 0.0 * keys.gates.sum().to(hidden.dtype)
    elif not plan.tokens:
        return None
    if not plan.tokens:
        return (hidden, *output[1:]) if whole else hidden
    rows.begin()
    rows.memory()
    indices = choose_rows(rows, layer, "selector", hidden, rows.hidden)
    if indices is not None:
        hidden = keep_rows(hidden, indices)
    elif hidden.requires_grad and hasattr(layer, "set_reshard_after_backward"):
        hidden = (
            hidden.clone()
        )  # see ``after_layer``: FSDP2 fetches weights when the gradient reaches the layer's output
    else:
        return None
    return (hidden, *output[1:]) if whole else hidden


def prune(cache: Any, layer: int, selection: Selection, state: TowerState) -> None:
    """Leave only the chosen keys of a prompt in one layer's cache; if the choice is masked, hide the others instead."""
    memory: PromptMemory = getattr(cache, MEMORY)
    count, positions = selection.scores.shape[-1], state.positions
    if selection.masked or selection.gates is not None:
        valid = selection.mask[:, 0, 0].expand(len(cache.layers[layer].keys), -1)
        memory.layers[layer] = CachedRows(count, valid, positions)
        return
    if selection.slots >= count and selection.dense:
        return
    store = cache.layers[layer]
    indices = selection.indices[:, :, 0].expand(len(store.keys), -1, -1)
    slots = indices.shape[-1]
    used = selection.slot_valid
    used = None if used is None else used[:, 0, 0].expand(len(store.keys), -1)
    if store.is_compileable:
        for states in (store.keys, store.values):  # in place, since compiled steps use fixed addresses
            kept = keep_heads(states[:, :, :count], indices)
            states[:, :, :slots] = kept
            states[:, :, slots:count] = 0
        store.cumulative_length.fill_(slots)
    else:
        store.keys, store.values = keep_heads(store.keys, indices), keep_heads(store.values, indices)
    places = indices[:, 0] if positions is None else positions.gather(1, indices[:, 0])
    memory.layers[layer] = CachedRows(slots, used, places)
