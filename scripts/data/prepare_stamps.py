"""Create image-caption pairs with classes from the drawings and photos of Tux Paint's stamps.

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default*.deb outputs/stamps
    python scripts/data/prepare_stamps.py outputs/stamps --output outputs/data/stamps

Each stamp becomes a square image on white. Its caption is the first line of its text file, which is English, and its label is the name of
its folder. Rows are split by caption: no caption of the test or validation set is seen in training. The stamps are under the GPL-2.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

from PIL import Image
from tqdm import tqdm

PARTS = {"test": range(0, 15), "validation": range(15, 25), "train": range(25, 100)}  # hundredths of the captions


def square(path: Path, size: int) -> Image.Image:
    """Return the stamp in the middle of a white square of at most ``size`` pixels per side."""
    stamp = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", (max(stamp.size),) * 2, "white")
    canvas.alpha_composite(stamp, ((canvas.width - stamp.width) // 2, (canvas.height - stamp.height) // 2))
    canvas.thumbnail((size, size), Image.Resampling.BICUBIC)
    return canvas.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path, help="folder with the unpacked package")
    parser.add_argument("--output", type=Path, default=Path("outputs/data/stamps"), help="folder for the rows")
    parser.add_argument(
        "--size", type=int, default=224, help="maximum width and height of an image in pixels (default: 224)"
    )
    arguments = parser.parse_args()
    root = next(arguments.stamps.rglob("tuxpaint/stamps"), None)
    if root is None:
        raise SystemExit(f"no tuxpaint/stamps under {arguments.stamps}; unpack the package there with dpkg -x")
    images = arguments.output / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    for text in tqdm(sorted(root.rglob("*.txt"))):
        stamp = text.with_suffix(".png")
        caption = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
        if not stamp.is_file() or not caption:  # the other stamps are vector graphics
            continue
        place = stamp.relative_to(root)
        name = "-".join(place.parts)
        square(stamp, arguments.size).save(images / name)
        bucket = zlib.crc32(caption.lower().encode()) % 100
        part = next(part for part, buckets in PARTS.items() if bucket in buckets)
        rows[part].append({"image": f"images/{name}", "caption": caption, "label": place.parts[0]})
    for part, found in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (arguments.output / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{arguments.output}: " + ", ".join(f"{len(found)} {part}" for part, found in rows.items()) + " images")


if __name__ == "__main__":
    main()
