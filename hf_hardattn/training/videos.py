"""Read the frames of a video: a file, a folder of images, or a list of images."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from ..errors import HardAttentionError, missing_extra
from .rows import read_image

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read_frames(value: Any, folder: Path, count: int) -> list[Any]:
    """``count`` RGB frames, evenly spaced; the last one is repeated where there are fewer.

    Args:
        value: path of a video file or of a folder of images (in the order of their names), or a list of paths of images.
        folder: that relative paths start from.

    Raises:
        HardAttentionError: there is no frame, or one cannot be read.
    """
    if isinstance(value, str) and not (folder / value).is_dir():
        return _decode(folder / value, count)
    if isinstance(value, str):
        paths = sorted(path for path in (folder / value).iterdir() if path.suffix.lower() in PICTURES)
    else:
        paths = [folder / path for path in value or []]
    if not paths:
        raise HardAttentionError(
            f"video {value!r} has no frames; a row needs a video file, a folder of images, or a list of images. Mend it, or take the row out."
        )
    return [read_image({"path": str(paths[i]), "bytes": None}) for i in spaced(len(paths), count)]


def check_frames(value: Any, folder: Path) -> None:
    """Raise HardAttentionError where ``read_frames`` would, as far as a first frame tells."""
    if isinstance(value, str) and not (folder / value).is_dir():
        _decode(folder / value, 1, most=1)
    else:
        read_frames(value, folder, 1)


def spaced(total: int, count: int) -> list[int]:
    """``count`` of ``total`` places, the middle of as many equal parts: all of them in order when the two are equal."""
    return [min(total - 1, (2 * i + 1) * total // (2 * count)) for i in range(count)]


def _decode(path: Path, count: int, most: int | None = None) -> list[Any]:
    try:
        import av
        from av.video.reformatter import VideoReformatter
    except ImportError as error:
        raise missing_extra("av", "video", "a column of video files") from error
    try:
        with av.open(str(path)) as container:
            frames = list(itertools.islice(container.decode(container.streams.video[0]), most))
        if not frames:
            raise HardAttentionError(f"the video {path} has no frames; every row needs some. Take the row out.")
        # one for all frames: each starts threads, which takes longer than a small frame does
        colours = VideoReformatter()
        return [colours.reformat(frames[i], format="rgb24").to_image() for i in spaced(len(frames), count)]
    except (OSError, IndexError, av.FFmpegError) as error:
        raise HardAttentionError(
            f"the video {path} cannot be read ({type(error).__name__}: {error}); every row needs a whole file with a video stream. "
            "Mend the file, or take the row out."
        ) from error
