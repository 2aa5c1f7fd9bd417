"""Run a model over a data set and audit what it kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import HardAttentionError
from ..recording import Recording, record
from .audit import (
    Finding,
    audit,
    border_groups,
    length_groups,
    position_groups,
    rarity_groups,
)
from .model_with_processor import ModelWithProcessor
from .perturbation import choosable


@torch.no_grad()
def audit_rows(
    bundle: ModelWithProcessor, rows: Any, column: str, by: Sequence[str] = (), site: str | None = None, batch: int = 32
) -> list[Finding]:
    """Audit ``bundle`` on ``rows``.

    Args:
        rows: a ``datasets.Dataset``. column: its column of images or texts. by: columns that define subgroups. site: the site to
            audit; by default the first whose candidates are the model's input. batch: rows per forward pass.

    Raises:
        HardAttentionError: a soft model, or a column that does not exist.
    """
    if not bundle.hard:
        raise HardAttentionError(f"{bundle.name} has no hard-attention sites to audit; load a hard checkpoint.")
    for name in (column, *by):
        if name not in rows.column_names:
            raise HardAttentionError(f"no column {name!r} in the data; it has: {', '.join(rows.column_names)}.")
    if not len(rows):
        raise HardAttentionError("the data has no rows to audit; name a file or folder that has some.")
    kept, places, ids = [], [], []
    for start in range(0, len(rows), batch):
        encoded = bundle.encode(rows[start : start + batch][column])
        inputs = dict(encoded)
        if bundle.model.can_generate():  # one decoder step is enough to reach every site of the input
            with record(bundle.model) as recording:
                bundle.model.generate(**inputs, max_new_tokens=1, max_length=None, num_beams=1, do_sample=False)
        else:
            with record(bundle.model) as recording:
                bundle.model(**inputs)
        one, free = kept_and_free(bundle.model, encoded, recording, site)
        kept.append(one)
        places.append(free)
        ids.append(encoded.get("input_ids"))
    longest = max(free.shape[1] for free in places)

    def join(parts: list[Any]) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts]).cpu()

    found, free = join(kept), join(places)
    computed: dict[str, Any] = {"position": position_groups(free)}
    if bundle.takes_images:
        computed["region"] = border_groups(free, *bundle.grid(encoded["pixel_values"]))
    else:
        computed |= {"frequency": rarity_groups(join(ids), free), "length": length_groups(free)}
    # a column of the data keeps its name
    groups = {f"{name} (computed)" if name in by else name: values for name, values in computed.items()}
    return audit(found, free, {name: rows[name] for name in by} | groups)


def kept_and_free(
    model: Any, batch: Mapping[str, Any], recording: Recording, site: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of a batch's input that ``site`` kept, and those that it could have kept: both bool ``[B, P]``.

    Args:
        recording: of a call on ``batch``. site: by default the first whose candidates are the input.
    """
    tower, free, _ = choosable(model, batch)
    name = site or next((s for s in recording.sites if recording.tower(s) == tower), recording.sites[0])
    return recording.kept(recording[name][0]).flatten(1, 2).any(1).expand_as(free) & free, free
