"""Plans of what the hooks of layers and towers have to do: plain data, written when a model is attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .selector import Protected
from .spec import AttentionSpec, PatchSpec

LAYER = "hard_attention_layer"
TOWER = "hard_attention_tower"
ATTENTION = "hard_attention_plan"
FOLLOWS = "hard_attention_follows"  # attribute of an attention module: the site whose choice it shares


@dataclass
class LayerPlan:
    """The plan of the hooks of one layer.

    Attributes:
        tower: name of its tower. index: index in the tower. names: parameters of the layer's forward.
        attention, cross, norm: paths of its modules. attention_spec, cross_spec: names inside them.
        protected, source_protected: rows that are always kept, among its own and among those that its cross-attention reads.
        inputs, own, tokens, crosses: whether it hosts an ``inputs``, ``self``, ``tokens`` or ``cross`` site.
        follows, cross_follows: earlier site whose choice it shares; None if it makes its own choice, or none.
        chooses_inside: a site whose choice differs between queries, and so is made inside the layer; None if there is none.
        leads: sites of this layer whose choice later layers share.
        has_bias: its self-attention adds T5's position bias.
        uses_table: its tower's bias is kept as a table of distances while that suffices.
        eager_only: its stock attention is eager; in a hard tower, all layers use SDPA instead.
        unmasked_source: its tower accepts no mask of the source.
        windows: it, or another layer of its tower, hides rows by their distance.
        causal: its rows attend to their past only.
        pools: the tower pools its rows right after this layer. restores: the tower then reads its rows by position.
        window: width of the layer's sliding window; None without one.
    """

    tower: str
    index: int
    names: tuple[str, ...]
    attention: str
    attention_spec: AttentionSpec
    norm: str | None
    cross: str | None
    cross_spec: AttentionSpec | None
    protected: Protected
    source_protected: Protected
    inputs: bool = False
    own: bool = False
    tokens: bool = False
    crosses: bool = False
    follows: str | None = None
    cross_follows: str | None = None
    chooses_inside: str | None = None
    leads: tuple[str, ...] = ()
    has_bias: bool = False
    uses_table: bool = False
    eager_only: bool = False
    pools: bool = False
    restores: bool = False
    causal: bool = False
    windows: bool = False
    window: int | None = None
    unmasked_source: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether it has a site or shares the choice of one, or the rows are pooled or restored right after it."""
        chooses = self.inputs or self.own or self.tokens or self.crosses or self.follows or self.cross_follows
        return bool(chooses or self.pools or self.restores)

    @property
    def only_narrows(self) -> bool:
        """Whether the pre-hook only reduces the layer's inputs to the remaining rows."""
        chooses = self.inputs or self.own or self.crosses or self.follows or self.cross_follows
        return not (chooses or self.uses_table or self.eager_only)

    @property
    def reads_rows_alone(self) -> bool:
        """Whether its attention reads neither positions nor another tower, and hides nothing by itself."""
        spec = self.attention_spec
        places = self.has_bias or spec.own_bias or spec.rotary is not None
        return not (places or self.windows or self.causal or self.cross is not None)

    @property
    def spec_of_cross(self) -> AttentionSpec:
        """The names inside its cross-attention."""
        return self.attention_spec if self.cross_spec is None else self.cross_spec


@dataclass
class AttentionPlan:
    """The plan of an attention module: plain data on the module.

    Attributes:
        spec: the names inside it. names: parameters of its forward. layer: its layer's index.
        cross: it reads another tower. windows: its masks may hide keys by their distance.
        stock: a forward that had been set on the module before, or None.
    """

    spec: AttentionSpec
    names: tuple[str, ...]
    layer: int
    cross: bool
    windows: bool = False
    stock: Callable[..., Any] | None = None


@dataclass
class TowerPlan:
    """The plan of the hooks of one tower.

    Attributes:
        name: name of the tower. layers: path of its list of layers. names: parameters of its forward.
        reads: name of the tower whose rows its cross-attention reads; None if there is none.
        source_drops: that tower may drop rows.
        restores: the output takes its full length again.
        is_read: another tower reads the output.
        patches: how a scorer of pixels uses its embedding module; None if no site needs it.
        protected: rows that are always kept.
        pools: an attention inside it pools the rows.
        terms: what its sites add to the training loss, in words.
        idle: every relevant site keeps everything, so that outside training there is nothing to do.
        patch_size: height and width of a patch, where the rows are patches of an image; None otherwise.
        always: see ``TowerSpec``.
        prompt: the tower reads a prompt and continues it.
        needs: indices of the layers that have a site, or behind which the rows are pooled or restored.
    """

    name: str
    layers: str
    names: tuple[str, ...]
    reads: str | None
    restores: bool
    is_read: bool
    patches: PatchSpec | None
    protected: Protected
    patch_size: tuple[int, int] | None = None
    pools: bool = False
    idle: bool = False
    source_drops: bool = False
    terms: tuple[str, ...] = ()
    always: Callable[[Any, Any], Any] | None = None
    prompt: bool = False
    needs: tuple[int, ...] = ()


def plan_of(module: Any, name: str) -> Any:
    """Return a module's plan called ``name``."""
    return module.__dict__[name]
