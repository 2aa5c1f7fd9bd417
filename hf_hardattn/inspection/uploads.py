"""Uploads from visitors of a page, whose size is checked before they are stored, decoded or passed to a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import HardAttentionError

MOST_BYTES = 10 * 1024 * 1024
MOST_PIXELS = 25_000_000
MOST_CHARACTERS = 5_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class BoundedBodies:
    """ASGI middleware that ends a request whose body is too large.

    Args:
        app: the application that answers the other requests. most: largest body in bytes; above that of a file, since a form adds some.
    """

    def __init__(self, app: Callable[..., Any], most: int = 2 * MOST_BYTES):
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            return await _refuse(send)
        seen = 0

        async def bounded() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return {"type": "http.disconnect"} if seen > self.most else message  # a body sent in chunks has no length

        await self.app(scope, bounded, send)


async def _refuse(send: Any) -> None:
    text = f"The file is too large; at most {MOST_BYTES // 1024**2} MB are allowed.".encode()
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def read_image(path: str | Path) -> Any:
    """Open an uploaded image and rotate it upright; its size is checked before any pixel is decoded.

    Raises:
        HardAttentionError: not an image of a known format, a damaged image, too many bytes or pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    size = Path(path).stat().st_size
    if size > MOST_BYTES:
        raise HardAttentionError(f"the image has {size:,} bytes; at most {MOST_BYTES:,} are allowed. Reduce its size.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise HardAttentionError(
                f"the image has {image.width:,} x {image.height:,} pixels; at most {MOST_PIXELS:,} in all are allowed. Reduce its size."
            )
        return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HardAttentionError(
            f"the file is not a complete image ({type(error).__name__}); it must be one of {', '.join(FORMATS)}."
        ) from error


def check_text(text: str) -> str:
    """Return ``text``.

    Raises:
        HardAttentionError: it is too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise HardAttentionError(
            f"the text has {len(text):,} characters; at most {MOST_CHARACTERS:,} are allowed. Shorten it."
        )
    return text
