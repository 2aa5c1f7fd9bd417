"""What the hooks of a layer and of a tower have to do; plain data, written when a model is attached."""

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
    """What the hooks of one layer do.

    Attributes:
        tower: name of its tower. index: in the tower. names: parameters of the layer's forward.
        attention, cross, norm: paths of its modules. attention_spec, cross_spec: names inside them.
        protected, source_protected: rows always kept, among its own and among those its cross-attention reads.
        inputs, own, tokens, crosses: whether it hosts a site of that kind.
        follows, cross_follows: earlier site whose choice it shares; None when it has its own, or none.
        chooses_inside: a site whose choice differs between queries, and so is made inside the layer; None when there is none.
        leads: sites of this layer whose choice later layers share.
        has_bias: its self-attention adds T5's position bias.
        uses_table: its tower's bias is kept as a table of distances while that serves.
        eager_only: its stock attention is eager; a hard tower's runs through SDPA in all layers.
        unmasked_source: its tower takes no mask of the source.
        windows: it, or a layer around it, hides rows by their distance.
        causal: its rows attend to their past only.
        pools: the tower pools its rows right behind this layer. restores: it reads them by their places there.
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
    def only_narrows(self) -> bool:
        """Whether it has nothing to do before it but to hand on what belongs to the rows that are left."""
        chooses = self.inputs or self.own or self.crosses or self.follows or self.cross_follows
        return not (chooses or self.uses_table or self.eager_only)

    @property
    def reads_rows_alone(self) -> bool:
        """Whether its attention reads neither places nor another tower, and hides nothing of its own accord."""
        spec = self.attention_spec
        places = self.has_bias or spec.own_bias or spec.rotary is not None
        return not (places or self.windows or self.causal or self.cross is not None)

    @property
    def spec_of_cross(self) -> AttentionSpec:
        """The names inside its cross-attention."""
        return self.attention_spec if self.cross_spec is None else self.cross_spec


@dataclass
class AttentionPlan:
    """What an attention module has to do; plain data on the module.

    Attributes:
        spec: the names inside it. names: parameters of its forward. layer: its layer's index.
        cross: it reads another tower. windows: its masks may hide keys by their distance.
        stock: a forward that somebody had put on the module before, or None.
    """

    spec: AttentionSpec
    names: tuple[str, ...]
    layer: int
    cross: bool
    windows: bool = False
    stock: Callable[..., Any] | None = None


@dataclass
class TowerPlan:
    """What the hooks of one tower do.

    Attributes:
        name: of the tower. layers: path of its list of layers. names: parameters of its forward.
        reads: name of the tower whose rows its cross-attention reads; None when there is none.
        restores: the output takes its full length again.
        is_read: another tower reads the output.
        patches: how its embedding module is to be used by a scorer of pixels; None when no site needs it.
        protected: rows always kept.
        pools: an attention inside it pools the rows.
        adds_terms: an estimator of its sites adds a term to the training loss.
        idle: every site in reach keeps everything: outside training there is nothing to do.
        patch_size: height and width of a patch, where the rows are patches of an image; None otherwise.
        always: see ``TowerSpec``.
        prompt: the tower reads a prompt and goes on writing.
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
    adds_terms: bool = False
    always: Callable[[Any, Any], Any] | None = None
    prompt: bool = False


def plan_of(module: Any, name: str) -> Any:
    """The plan called ``name`` of a module."""
    return module.__dict__[name]
