"""Read the frames of a video: a file, a folder of images, or a list of images."""

from __future__ import annotations

import io
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Image, List, Video

from ..errors import HardAttentionError, missing_extra
from .rows import read_image

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def as_files(data: Any, name: str) -> Any:
    """Keep the cells of a column of videos, or of lists of images, undecoded; only the frames that are read are decoded."""
    kind = data.features[name]
    if isinstance(kind, Video):
        return data.cast_column(name, Video(decode=False))
    if isinstance(kind, List) and isinstance(kind.feature, Image):
        return data.cast_column(name, List(Image(decode=False)))
    return data


def read_frames(value: Any, folder: Path, count: int) -> list[Any]:
    """Return ``count`` RGB frames, evenly spaced; if there are fewer, the last one is repeated.

    Args:
        value: path of a video file or of a folder of images (in the order of their names), a list of paths of images, an undecoded video
            cell of `datasets`, or a list of undecoded image cells.
        folder: folder that relative paths start from.

    Raises:
        HardAttentionError: there is no frame, or one cannot be read.
    """
    if _is_file(value, folder):
        return _decode(value, folder, lambda video: _frames(video, count))
    if isinstance(value, str):
        paths = sorted(path for path in (folder / value).iterdir() if path.suffix.lower() in PICTURES)
        images: list[Any] = [str(path) for path in paths]
    else:
        images = [str(folder / image) if isinstance(image, str) else image for image in value or []]
    if not images:
        raise HardAttentionError(
            f"video {value!r} has no frames; a row needs a video file, a folder of images, or a list of images. Fix it, or remove the row."
        )
    return [read_image(images[i]) for i in spaced(len(images), count)]


def check_frames(value: Any, folder: Path) -> None:
    """Raise HardAttentionError where ``read_frames`` would, as far as the first frame shows."""
    if _is_file(value, folder):
        _decode(value, folder, lambda video: _each(video, 1))
    else:
        read_frames(value, folder, 1)


def spaced(total: int, count: int) -> list[int]:
    """Return ``count`` of ``total`` places, the middles of ``count`` equal parts; all places in order if the two are equal."""
    return [min(total - 1, (2 * i + 1) * total // (2 * count)) for i in range(count)]


def _is_file(value: Any, folder: Path) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and not (folder / value).is_dir())


def _decode(value: Any, folder: Path, read: Callable[[Callable[[], Any]], Iterable[Any]]) -> list[Any]:
    """Return the images of the frames that ``read`` takes from a video file; its argument opens the file.

    Raises:
        HardAttentionError: there are no frames, or they cannot be read.
    """
    try:
        import av
        from av.video.reformatter import VideoReformatter
    except ImportError as error:
        raise missing_extra("av", "video", "a column of video files") from error
    cell: dict[str, Any] = {"path": str(folder / value), "bytes": None} if isinstance(value, str) else value
    name = f"the video {cell['path']}" if cell["path"] else "the video"
    # one for all frames: each reformatter starts threads, which takes longer than converting a small frame
    colours = VideoReformatter()
    try:
        frames = read(lambda: av.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])))
        images = [colours.reformat(frame, format="rgb24").to_image() for frame in frames]
    except (OSError, IndexError, av.FFmpegError) as error:
        raise HardAttentionError(
            f"{name} cannot be read ({type(error).__name__}: {error}); every row needs a complete file with a video stream. "
            "Fix the file, or remove the row."
        ) from error
    if not images:
        raise HardAttentionError(f"{name} has no frames; every row needs at least one. Remove the row.")
    return images


def _frames(video: Callable[[], Any], count: int) -> list[Any]:
    """Return ``count`` frames, evenly spaced."""
    try:
        with video() as source:
            found = _sought(source, count)
    except OSError:  # the format cannot seek; a broken file raises again below
        found = None
    if found is None:  # count the frames, then decode again: memory holds only the wanted frames
        wanted = spaced(sum(1 for _ in _each(video)), count)
        shown = {i: frame for i, frame in enumerate(_each(video, wanted[-1] + 1)) if i in wanted}
        found = [shown[i] for i in wanted if i in shown]
    return found


def _sought(source: Any, count: int) -> list[Any] | None:
    """Return ``count`` frames, evenly spaced. Each is decoded from the key frame before it, so a long video is not decoded as a whole.

    Returns:
        The frames; None if the file does not hold the times of its frames, or not all of its frames are shown.
    """
    stream = source.streams.video[0]
    packets = [(packet.pts, packet.is_keyframe) for packet in source.demux(stream) if packet.size]
    shown = [time for time, _ in packets]
    if None in shown:
        return None
    times, keys = sorted(shown), sorted(time for time, key in packets if key)
    if stream.codec_context.has_b_frames and times == shown:  # an AVI holds times in storage order
        return None
    wanted = [times[i] for i in spaced(len(times), count)] if keys else []
    found: dict[int, Any] = {}
    position = None
    for time in sorted(set(wanted)):
        start = keys[max(0, bisect_right(keys, time) - 1)]
        if position is None or start > position:
            source.seek(start, stream=stream)
            decoded = source.decode(stream)
        frame = next((frame for frame in decoded if frame.pts is None or frame.pts >= time), None)
        if frame is None or frame.pts != time:
            return None
        found[time], position = frame, time
    return [found[time] for time in wanted]


def _each(video: Callable[[], Any], most: int | None = None) -> Iterator[Any]:
    """Yield the frames of a video in order."""
    with video() as source:
        yield from itertools.islice(source.decode(video=0), most)
