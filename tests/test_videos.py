"""Frames of videos: files of several codecs, folders and lists of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import hf_hardattn
from hf_hardattn.training import videos
from hf_hardattn.training.videos import check_frames, read_frames, spaced


def test_video_is_read_from_a_file_a_folder_and_a_list(tmp_path: Path) -> None:
    """Frame i has grey level 20 i in all three; a lossless file gives the very pixels."""
    (tmp_path / "folder").mkdir()
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 12, 12, "gray"
        for i in range(6):
            image = Image.new("L", (12, 12), 20 * i)
            image.save(tmp_path / "folder" / f"{i}.png")
            container.mux(stream.encode(av.VideoFrame.from_image(image).reformat(format="gray")))
        container.mux(stream.encode())
    for value in ("v.mkv", "folder", [f"folder/{i}.png" for i in range(6)]):
        assert [frame.getpixel((3, 3))[0] for frame in read_frames(value, tmp_path, 6)] == [0, 20, 40, 60, 80, 100]
        assert [frame.getpixel((3, 3))[0] for frame in read_frames(value, tmp_path, 3)] == [20, 60, 100]
    assert spaced(2, 4) == [0, 0, 1, 1] and spaced(1, 3) == [0, 0, 0]
    (tmp_path / "bad.mkv").write_text("no video")
    (tmp_path / "empty").mkdir()
    for value, message in (
        ("bad.mkv", "bad.mkv cannot be read"),
        ("empty", "video 'empty' has no frames"),
        ([], "has no frames"),
        (None, "no frames"),
    ):
        with pytest.raises(hf_hardattn.HardAttentionError, match=message):
            check_frames(value, tmp_path)
    check_frames("v.mkv", tmp_path)


def write_video(path: Path, codec: str, frames: int, pixels: str, options: dict[str, str]) -> None:
    """A bar that moves over a ground that brightens."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 64, pixels, options
        for i in range(frames):
            ground = 2 * i % 250
            picture = np.full((64, 64, 3), ground, np.uint8)
            picture[:, 3 * i % 60 : 3 * i % 60 + 6] = 255 - ground
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options", "sought"),
    [
        ("closed.mp4", "libx264", "yuv420p", {}, True),
        ("open.mp4", "libx264", "yuv420p", {"g": "10", "bf": "3", "x264-params": "open-gop=1"}, True),
        ("short.mkv", "libx264", "yuv420p", {"g": "7"}, True),
        ("hidden.webm", "libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16"}, True),
        ("no-times.h264", "libx264", "yuv420p", {}, False),
        ("wrong-times.avi", "libx264", "yuv420p", {"bf": "2"}, False),
        ("picture.gif", "gif", "rgb8", {}, True),
    ],
)
def test_frames_are_those_of_the_whole_video(
    name: str, codec: str, pixels: str, options: dict[str, str], sought: bool, tmp_path: Path
) -> None:
    """From a file and from its bytes, found by seeking or, where the file does not tell the times, by counting."""
    path = tmp_path / name
    write_video(path, codec, 60, pixels, options)
    with av.open(str(path)) as container:
        every = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    assert len(every) == 60
    for count in (1, 3, 8, 70):
        for value in (name, {"path": name, "bytes": path.read_bytes()}):
            found = [np.asarray(image) for image in read_frames(value, tmp_path, count)]
            wanted = [every[i] for i in spaced(60, count)]
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        with av.open(str(path)) as container:
            assert (videos._sought(container, count) is not None) == sought


def test_long_video_is_not_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between key frames 10 apart, 3 frames of 1,000 take at most 30 frames' decoding."""
    write_video(tmp_path / "long.mp4", "libx264", 1000, "yuv420p", {"g": "10", "bf": "0"})
    decoded = []

    class Counted:
        """A container that counts what is decoded of it."""

        def __init__(self, source: Any) -> None:
            self.source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self.source, name)

        def decode(self, stream: Any) -> Any:
            for frame in self.source.decode(stream):
                decoded.append(frame.pts)
                yield frame

    sought = videos._sought
    monkeypatch.setattr(videos, "_sought", lambda source, count: sought(Counted(source), count))
    assert len(videos.read_frames("long.mp4", tmp_path, 3)) == 3
    assert 3 <= len(decoded) <= 30
