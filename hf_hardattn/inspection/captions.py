"""Which regions of the image were read for each word of a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..recording import Recording
from .overlay import frame_patches, lit_image
from .rationale import kept_per_token, kept_places
from .style import new_figure


def caption_grid(
    pixel_values: Tensor,
    recording: Recording,
    words: Sequence[str],
    patch_size: int,
    site: str | None = None,
    row: int = 0,
    beam_indices: Tensor | None = None,
    columns: int = 5,
) -> Any:
    """Draw the image once for each generated word, with the patches lit that its decoding step could read.

    Args:
        pixel_values: ``[B, C, height, width]``. recording: of one ``generate()`` call.
        words: generated tokens of ``row``, without the prompt. site: a ``text.cross`` site; the first by default. If there is none,
            the last ``vision`` site is shown, which makes one choice for all words.
        beam_indices: returned by ``generate``, see ``kept_per_token``.

    Returns:
        matplotlib figure.
    """
    site = site or next((s for s in recording.sites if ".cross." in s), recording.sites[-1])
    if ".cross." in site:
        kept = kept_per_token(recording, site, beam_indices)[row].cpu()
    else:
        kept = kept_places(recording, site)[row : row + 1].cpu()
    if len(kept) == 1:
        kept = kept.expand(len(words), -1)
    count = min(len(words), len(kept))
    columns = min(columns, max(1, count))
    rows = -(-count // columns)
    figure = new_figure(1.6 * columns, 1.85 * rows + 0.3)
    for index, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.set_axis_off()
        if index < count:
            axis.imshow(lit_image(pixel_values[row], kept[index], patch_size).numpy())
            frame_patches(axis, kept[index], patch_size, pixel_values.shape[-2:])
            axis.set_title(words[index].replace("$", r"\$"), fontsize=9)
    figure.suptitle(f"{site}: lit = kept for the word", fontsize=9)
    return figure
