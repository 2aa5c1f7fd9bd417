"""A page to try out a model: give it an image or a text, change the budget, and see full and hard attention side by side."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .. import sample
from ..budget import final_budget
from ..efficiency.counting import count_flops
from ..errors import HardAttentionError, missing_extra
from ..modes import soft
from ..recording import selectors
from .html import paragraph, picture
from .model_with_processor import ModelWithProcessor
from .overlay import whole_image
from .perturbation import PerturbationEvaluator
from .side_by_side import pictures, quoted
from .uploads import MOST_BYTES, MOST_CHARACTERS, BoundedBodies, check_text, read_image

# With this policy, the browser refuses every request to another host, even if the page of a library makes one.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'"
)
# The text that is shown for a text model before the visitor enters one.
TEXT = "The council approved the budget on Tuesday, after a long debate about schools, roads and the price of a new bridge."
WIDE = "<style>#hard img, #soft img { width: 100%; }</style>"
_turn = threading.Lock()  # the model's mode and budget are changed during a request, so only one runs at a time


class SameOrigin:
    """ASGI middleware that sends ``POLICY`` with every response."""

    def __init__(self, app: Callable[..., Any]):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, answer)


@functools.lru_cache(maxsize=2)
def _load(path: str) -> ModelWithProcessor:
    return ModelWithProcessor.load(path)


def compare(path: str, image: Any, text: str, ratio: float) -> tuple[str, str]:
    """Render the two results: the model with full attention, and the same weights keeping ``ratio`` of the positions at every site.

    Args:
        path: of the model. image: file from the visitor, or None. text: from the visitor.
    """
    bundle = _load(path)
    if image is None if bundle.takes_images else not text.strip():
        return "", paragraph("Upload an image." if bundle.takes_images else "Enter a text.")
    try:
        given = read_image(image) if bundle.takes_images else check_text(text)
    except HardAttentionError as error:
        return "", paragraph(f"Not shown: {error}")
    with _turn:
        batch = bundle.encode([given])
        with soft(bundle.model):
            loose = bundle.predict(batch)
            whole = count_flops(bundle.model, PerturbationEvaluator(bundle.model, batch).batch)
        with bundle.at_budget(ratio):
            hard = bundle.predict(batch)
            cost = count_flops(bundle.model, PerturbationEvaluator(bundle.model, batch).batch)
            shown = WIDE + "\n".join(pictures(bundle, given, batch, hard, whole=False))
        plain = ""
        if bundle.takes_images:
            plain = WIDE + picture(whole_image(batch["pixel_values"]), "The image, with all patches computed.", dpi=180)
    kept = "; ".join(f"{row['site']} keeps {row['kept_ratio']:.0%}" for row in hard.recording.summary())
    return (
        paragraph(f"{quoted(loose)}, {whole / 1e9:.4g} GFLOPs (counted).") + plain,
        paragraph(f"{quoted(hard)}, {cost / 1e9:.4g} GFLOPs (counted), {cost / whole:.0%} of full attention. {kept}.")
        + shown,
    )


def build(models: Sequence[str]) -> Any:
    """Build the page for the checkpoints ``models``; visitors can choose only among these.

    Raises:
        ImportError: gradio is not installed. HardAttentionError: no model, or a soft one.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise missing_extra("gradio", "demo", "the page") from error
    if not models:
        raise HardAttentionError(
            "no model is named; the page shows one or more hard checkpoints. Name one with --model."
        )
    for path in models:
        if not _load(path).hard:
            raise HardAttentionError(
                f"{path} has no hard-attention sites; the page compares soft and hard. Name a hard checkpoint."
            )
    first = _load(models[0])
    images = [str(path) for path in sample.image_paths()] if any(_load(path).takes_images for path in models) else []

    def opening(bundle: Any) -> tuple[str | None, str]:
        """Return the image and the text that the page shows before the visitor enters one."""
        return (images[0], "") if bundle.takes_images else (None, TEXT)

    # uploads are removed after an hour
    with gr.Blocks(
        title="hf_hardattn: full and hard attention", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        gr.Markdown(
            "# Full and hard attention, side by side\nThe same weights, run twice: with full attention, and computing only what the model selects. "
            "Lit and framed, or marked: kept. Faded, or struck through: dropped. Move the budget to keep more or less."
        )
        model = gr.Dropdown(list(models), value=models[0], label="model", interactive=len(models) > 1)
        with gr.Row():
            with gr.Column(min_width=240):
                image = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="image",
                    visible=first.takes_images,
                    value=opening(first)[0],
                    height=280,
                )
                if images:
                    gr.Examples(images, image, label="images of the sample model")
                text = gr.Textbox(
                    opening(first)[1], lines=5, max_length=MOST_CHARACTERS, label="text", visible=not first.takes_images
                )
                ratio = gr.Slider(
                    0.02, 1.0, value=_own_ratio(first), step=0.02, label="budget: share of positions kept at every site"
                )
            with gr.Column(min_width=240):
                gr.Markdown("## Hard attention")
                hard = gr.HTML(elem_id="hard")
            with gr.Column(min_width=240):
                gr.Markdown("## Full attention")
                loose = gr.HTML(elem_id="soft")

        def choose(path: str) -> tuple[Any, Any, float]:
            bundle = _load(path)
            return (
                gr.update(visible=bundle.takes_images, value=opening(bundle)[0]),
                gr.update(visible=not bundle.takes_images, value=opening(bundle)[1]),
                _own_ratio(bundle),
            )

        shown: dict[str, Any] = {
            "inputs": [model, image, text, ratio],
            "outputs": [loose, hard],
            "show_progress": "minimal",
        }
        model.change(choose, model, [image, text, ratio], show_progress="hidden").then(compare, **shown)
        for change in (image.change, text.submit, text.blur, ratio.release):
            change(compare, **shown)
        page.load(compare, **shown)
    page.queue(max_size=32, default_concurrency_limit=1)
    return page


def launch(models: Sequence[str], port: int | None = None, host: str | None = None, block: bool = True) -> str:
    """Serve the page and return its address (immediately if ``block`` is False).

    Args:
        models: checkpoints. port, host: where to serve; by default those of Gradio, which a Space sets.
    """
    page = build(models)
    import gradio as gr
    from starlette.middleware import Middleware

    _, address, _ = page.launch(
        server_port=port,
        server_name=host,
        share=False,
        max_file_size=MOST_BYTES,
        prevent_thread_lock=not block,
        quiet=not block,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [Middleware(SameOrigin), Middleware(BoundedBodies)]},
    )
    return str(address)


def _own_ratio(bundle: ModelWithProcessor) -> float:
    """Return the share that the model's own budget keeps if it is a ratio or a count of patches, otherwise one half."""
    budget = final_budget(next(iter(selectors(bundle.model).values())).config.budget)
    if isinstance(budget, int) and bundle.takes_images:
        config = getattr(bundle.model.config, "vision_config", bundle.model.config)
        budget = min(1.0, budget / (config.image_size // config.patch_size) ** 2)
    return round(float(budget), 2) if isinstance(budget, float) else 0.5
