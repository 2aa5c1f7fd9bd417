"""The page bounds what visitors send: bytes, pixels, characters, kinds of files."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hub_server.models import harden
from PIL import Image
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

import hf_hardattn
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.inspection import uploads
from hf_hardattn.inspection.model_with_processor import ModelWithProcessor
from hf_hardattn.inspection.playground import compare, launch
from hf_hardattn.inspection.uploads import MOST_BYTES, MOST_CHARACTERS, BoundedBodies, read_image


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16)
    model = ViTForImageClassification(ViTConfig(patch_size=4, num_labels=2, **sizes)).eval()
    return str(hf_hardattn.save(harden(model), tmp_path_factory.mktemp("page") / "vit"))


@pytest.fixture(scope="module")
def page(vit: str) -> Iterator[str]:
    import gradio

    yield launch([vit], block=False)
    gradio.close_all()


def upload(page: str, content: bytes, name: str = "a.png") -> httpx.Response:
    return httpx.post(f"{page}gradio_api/upload", files={"files": (name, content)}, timeout=60)


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize("size", [MOST_BYTES + 1, 3 * MOST_BYTES])
def test_an_upload_that_is_too_large_is_refused(page: str, size: int) -> None:
    assert upload(page, b"x" * size).status_code == 413
    assert upload(page, png(8, 8)).status_code == 200


def test_a_body_without_its_length_is_bounded(page: str) -> None:
    """Sent in pieces, so that no header says how much comes."""

    def pieces() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        yield from [b"x" * (1 << 20)] * 60
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    try:
        answer = httpx.post(f"{page}gradio_api/upload", content=pieces(), headers=headers, timeout=60)
        assert answer.status_code >= 400
    except httpx.HTTPError:
        pass  # the connection was closed on us


def test_what_is_behind_the_bound_never_sees_more() -> None:
    seen = []

    async def app(scope: object, receive: Any, send: object) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            seen.append(len(message["body"]))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    asyncio.run(BoundedBodies(app, most=3500)({"type": "http", "headers": []}, receive, None))
    assert seen == [1000, 1000, 1000]


def test_a_large_message_is_refused(page: str) -> None:
    """An image inside JSON is an upload too."""
    url = "data:image/png;base64," + "A" * (3 * MOST_BYTES)
    answer = httpx.post(f"{page}gradio_api/queue/join", json={"data": [None, {"url": url}], "fn_index": 1}, timeout=60)
    assert answer.status_code == 413


@pytest.mark.parametrize("size", [(13_000, 13_000), (100_000, 300), (20_000, 20_000)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    vit: str, tmp_path: Path, size: tuple[int, int]
) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    started = time.process_time()
    assert "Not shown" in compare(vit, str(tmp_path / "a.png"), "", 0.5)[1]
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "content", [b"", b"<svg/>", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF", png(64, 64)[:45], b"\0" * 100]
)
def test_a_file_that_is_no_picture_is_refused(vit: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert "Not shown: the file is not a complete image" in compare(vit, str(tmp_path / "a.png"), "", 0.5)[1]


def test_a_file_of_too_many_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(64, 64))
    read_image(tmp_path / "a.png")
    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    with pytest.raises(HardAttentionError, match="bytes; at most 10 are allowed"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
def test_every_kind_of_picture_is_shown(vit: str, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (40, 30)).save(path)
    assert "GFLOPs (counted)" in compare(vit, str(path), "", 0.5)[0]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "word": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    sizes = dict(vocab_size=8, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    folder = tmp_path_factory.mktemp("page") / "t5"
    hf_hardattn.save(harden(model, {"sites": ["encoder.tokens.0"], "budget": 0.5}), folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def test_a_text_that_is_too_long_is_refused(t5: str) -> None:
    assert "GFLOPs (counted)" in compare(t5, None, "word word word", 0.5)[0]
    started = time.process_time()
    assert f"at most {MOST_CHARACTERS:,}" in compare(t5, None, "word " * 20_000, 0.5)[1]
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_text_is_asked_for(t5: str, text: str) -> None:
    assert "Enter a text" in compare(t5, None, text, 0.5)[1]
    with pytest.raises(HardAttentionError, match="input 2 of 2 is empty; t5 reads texts"):
        ModelWithProcessor.load(t5).encode(["word", text])
