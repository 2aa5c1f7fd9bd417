"""The form of a row of ``models/``, which contains the names of a family's modules. No code runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class AttentionSpec:
    """Names inside an attention module.

    Attributes:
        query, key, value: linear projections of the states.
        fused: one projection with query, key and value as three equal blocks of rows; it replaces the three above.
        output: projection of the attended values; None if the module returns them as they are.
        output_dropout: module after that projection; None if there is none.
        query_norm, key_norm: norms of the projected queries and keys, head by head; None if there are none.
        rotary: parameter of ``forward`` that carries the tables ``(cos, sin)`` of a rotary embedding; None if there is none.
        rotary_function: name of the function in the family's file that rotates queries and keys by these tables.
        head_size: attribute with the width of a head.
        scale: attribute with the factor of the logits; None for ``head_size ** -0.5``.
        dropout: attribute with the dropout rate of the weights, a number or a ``Dropout``.
        mask: parameter of ``forward`` that carries the mask.
        source: parameter of ``forward`` that carries the states of another tower; if they are passed, the module is a cross-attention.
        position_bias: the module adds a relative position bias and returns ``(output, bias, weights)``, as T5's does.
        own_bias: the module computes its own relative position bias, and returns ``(output, weights)``, as UMT5's does.
        interface: the module calls an attention function of ``AttentionInterface``; False if it computes attention itself.
        eager_only: the module computes attention eagerly, and its cross-attention never sees the source's mask. In a hard tower
            all layers run through SDPA instead.
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    fused: str | None = None
    output: str | None = "o_proj"
    output_dropout: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    rotary: str | None = None
    rotary_function: str = "apply_rotary_pos_emb"
    head_size: str = "head_dim"
    scale: str | None = "scaling"
    dropout: str = "attention_dropout"
    mask: str = "attention_mask"
    source: str | None = None
    position_bias: bool = False
    own_bias: bool = False
    interface: bool = True
    eager_only: bool = False


@dataclass(frozen=True)
class PatchSpec:
    """Names inside the module that turns an image into rows.

    Attributes:
        embedding: name of the embedding module's class; other classes embed in their own way and do not support scorers of pixels.
        module: path of the embedding module, from the tower.
        projection: path of its convolution, whose kernel and stride are one patch.
        positions: its table of position embeddings: a parameter ``[1, P, D]``, or an ``Embedding``.
        cls: parameter of the CLS row, which has the table's first position; None if there is no such row.
        registers: parameter ``[1, R, D]`` of rows that follow CLS and have no position; None if there are none.
        carrier: parameter of the embedding's ``forward`` that the tower passes on unchanged.
        fixed_size: images of another size need ``interpolate_pos_encoding=True``.
        always_interpolates: positions are interpolated for other image sizes without that argument.
    """

    embedding: str
    module: str = "embeddings"
    projection: str = "patch_embeddings.projection"
    positions: str = "position_embeddings"
    cls: str | None = "cls_token"
    registers: str | None = None
    carrier: str = "interpolate_pos_encoding"
    fixed_size: bool = True
    always_interpolates: bool = False


@dataclass(frozen=True)
class TowerSpec:
    """A stack of layers with its sites.

    Attributes:
        name: first part of its site names.
        module: name of the tower's class; subclasses count.
        layers: path of the list of layers, from the tower.
        attention, cross: paths of the attention modules, from a layer; None if there is none.
        attention_spec, cross_spec: names inside them.
        norm: path of the norm before the self-attention, from a layer; None if the attention reads the layer's input.
        where: attributes that the tower must have, to distinguish towers of one class.
        protect_first: number of rows at the start that are always kept (CLS, registers), or numbers and names of configuration fields to
            add up.
        protect_last: whether the last valid row is always kept.
        windows: some layers hide rows by their distance; their masks are kept for the remaining rows instead of being created anew.
        causal: a row attends only to its past, and each row chooses its own keys at ``self`` sites. Such a tower drops no rows.
        prompt: the tower reads a prompt and continues it: its sites choose once among the rows of the prompt, while its cache is filled
            (see ``modeling/causal.py``). Its ``causal`` is False, since one choice serves all rows.
        continues: rows may follow the prompt; False for ``reading_heads``.
        window: configuration field with the width of a sliding window; None if the attention modules have their own.
        reads: name of the tower whose output the cross-attention reads.
        source_protected: rows of that tower that are always kept, ``(number at the start, whether the last)``.
        source_size: configuration field with the width of those rows.
        restores: whether the output gets its full length back, for heads that read it by position, unless another tower reads it.
        patches: how an image becomes rows, for scorers of pixels; None if these are not supported.
        pooling: path of the module inside the tower that pools the rows after the last layer, a ``MultiheadAttention`` or one that
            takes an ``attention_mask``; None if there is none.
        pools_by_place: the tower itself reads rows of its output by their positions in the input, so that they return to these positions
            after the last layer.
        always: function that finds the protected rows of a call if they are not at the ends: ``(tower, arguments of its call)`` to bool
            ``[B, N]``, with as many True in each row as ``protect_first`` and ``protect_last`` specify; None if these suffice.
        only: kinds of its sites, if not every kind is supported, for example because another part of the model reads its rows by index.
        heads: configuration field with the number of attention heads.
        inputs: name of the model input that the rows come from. patchified: this input contains patches ``[B, N, P]``, not images.
    """

    name: str
    module: str
    layers: str
    attention: str = "self_attn"
    attention_spec: AttentionSpec = AttentionSpec()
    norm: str | None = None
    cross: str | None = None
    cross_spec: AttentionSpec | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    protect_first: int | tuple[int | str, ...] = 0
    protect_last: bool = False
    windows: bool = False
    causal: bool = False
    prompt: bool = False
    continues: bool = True
    window: str | None = None
    reads: str | None = None
    source_size: str = "hidden_size"
    source_protected: tuple[int, bool] = (0, False)
    restores: bool = False
    patches: PatchSpec | None = None
    pooling: str | None = None
    pools_by_place: bool = False
    always: Callable[[Any, Any], Any] | None = None
    only: tuple[str, ...] | None = None
    heads: str = "num_attention_heads"
    inputs: str = "input_ids"
    patchified: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its sites, in the order they are listed."""
        if self.only is not None:
            return self.only
        rows = () if self.causal or self.cross is not None else ("inputs",)
        own = ("self",) if self.attention else ()
        return (*rows, *own, *(("tokens",) if rows else ()), *(("cross",) if self.cross else ()))


@dataclass(frozen=True)
class ModelSpec:
    """A family of models.

    Attributes:
        name: name of the family. family: prefix of the Python modules that define it.
        towers: its towers. recommended: globs of the sites used if the configuration names none; the first one whose tower a model has is
            used. ``vision.tokens.25%`` is the site after a quarter of the layers. Only one site drops rows, because the ratios of several
            sites multiply and the model should keep what the budget says.
        heads: names of the Transformers classes that the contract suites try.
        tiny: sizes of a tiny configuration for them.
        restored_heads: names of heads whose predictions are aligned with the input, so that the outputs of its towers get their full
            length back.
        averaging_heads: names of heads that average the rows, so that every row of a batch must keep the same number.
        copying_heads: names of heads that feed the encoder's input to the decoder as well, shifted by one.
        candidates: configuration fields with the ids of tokens that represent an image's rows, among which a decoder's sites then choose;
            empty if they choose among the whole prompt.
        counting_heads: names of heads that count rows by the caller's mask, so that none may be dropped.
        reading_heads: names of heads that read a prompt and never continue it, so that no row reads the keys that a ``self`` site leaves
            in the cache.
        hands_down: its models pass unknown keywords on to their towers.
        find_towers: maps a model to its towers by name, if class names alone do not identify the towers.
        functions: replacements of the functions in ``modeling/heads.py`` that read a head's labels and losses; ``prepare`` and
            ``release`` set up and undo whatever else a hard model of the family needs.
    """

    name: str
    family: str
    towers: tuple[TowerSpec, ...]
    recommended: tuple[str, ...]
    heads: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)
    restored_heads: tuple[str, ...] = ()
    averaging_heads: tuple[str, ...] = ()
    copying_heads: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    counting_heads: tuple[str, ...] = ()
    reading_heads: tuple[str, ...] = ()
    hands_down: bool = True
    find_towers: Callable[[nn.Module], dict[str, tuple[TowerSpec, nn.Module]]] | None = None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
