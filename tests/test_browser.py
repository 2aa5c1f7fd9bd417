"""The pages in a real headless Chromium: they show what they say, run no script of a user's, and call nobody."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from transformers import ViTConfig, ViTForImageClassification

import hf_hardattn
from hf_hardattn.inspection.html import page
from hf_hardattn.inspection.model_with_processor import ModelWithProcessor
from hf_hardattn.inspection.playground import POLICY, _load, launch
from hf_hardattn.inspection.report import explain
from hf_hardattn.inspection.tokens import mark_spans

pytestmark = pytest.mark.browser
EVIL = "a <script>document.title='owned'</script> & <img src=x onerror=\"document.title='owned'\"> b"


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    """Debian's Chromium, without a window, logging every request."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail("chromium and chromedriver are not installed; 'make browser' installs Debian's, as root.")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1300,1000",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.set_page_load_timeout(120)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def hard_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved hard ViT, untrained: 8 x 8 patches, a quarter kept."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=64)
    model = ViTForImageClassification(ViTConfig(patch_size=8, num_channels=3, num_labels=3, **sizes)).eval()
    hf_hardattn.apply(model, {"sites": ["vision.inputs"], "budget": 0.25, "scorer": "conv"})
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    pixels = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(pixels.numpy()).save(path)
    return path


def requests(browser: webdriver.Chrome) -> set[str]:
    """Hosts (``file`` for a file) that the browser sent requests to since the last call, but for those its policy stopped."""
    asked: dict[str, str] = {}
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        params: dict[str, Any] = message.get("params", {})
        if message["method"] == "Network.requestWillBeSent":
            asked[params["requestId"]] = params["request"]["url"]
        if message["method"] == "Network.loadingFailed" and params.get("blockedReason") == "csp":
            asked.pop(params["requestId"], None)
    inside = ("data:", "blob:", "about:", "chrome:")
    return {urlparse(url).hostname or urlparse(url).scheme for url in asked.values() if not url.startswith(inside)}


def show(browser: webdriver.Chrome, source: str, folder: Path) -> None:
    path = folder / "page.html"
    path.write_text(source, encoding="utf-8")
    requests(browser)  # forget earlier ones
    browser.get(path.as_uri())


def luminance(colour: str) -> float:
    """WCAG relative luminance of ``rgb(r, g, b)``."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : colour.index(")")].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_token_page_is_inert_and_readable(chromium: webdriver.Chrome, tmp_path: Path, theme: str) -> None:
    """``<script>`` in a token stays text, and kept tokens stand out by more than colour, with WCAG AA contrast."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    cut = EVIL.index("</script>")
    show(chromium, page(f"Tokens {EVIL}", mark_spans(EVIL, [(2, cut)])), tmp_path)
    assert "owned" not in chromium.title.replace(EVIL, "")
    assert not chromium.find_elements(By.CSS_SELECTOR, "script, .hfha img")
    shown = chromium.find_element(By.CSS_SELECTOR, ".hfha")
    assert shown.text == EVIL
    mark, struck = shown.find_element(By.TAG_NAME, "mark"), shown.find_elements(By.TAG_NAME, "s")[-1]
    assert int(mark.value_of_css_property("font-weight")) >= 600 and "line-through" in struck.value_of_css_property(
        "text-decoration-line"
    )
    pair = sorted((luminance(mark.value_of_css_property(name)) for name in ("color", "background-color")), reverse=True)
    assert (pair[0] + 0.05) / (pair[1] + 0.05) >= 4.5
    assert requests(chromium) <= {"file"}


def test_report_is_one_file_that_calls_nobody(
    chromium: webdriver.Chrome, hard_vit: Path, photo: Path, tmp_path: Path
) -> None:
    report = explain(ModelWithProcessor.load(str(hard_vit)), [Image.open(photo)], measure=False, title=EVIL)
    assert "<script" not in report.replace("&lt;script", "") and "http" not in report.split("</head>")[1]
    show(chromium, report, tmp_path)
    assert chromium.title == EVIL
    for picture in chromium.find_elements(By.TAG_NAME, "img"):
        assert chromium.execute_script("return arguments[0].naturalWidth", picture) > 100
        assert picture.get_attribute("alt")
    assert "cannot influence the output: it is bit-identical" in chromium.find_element(By.TAG_NAME, "body").text
    assert requests(chromium) <= {"file"}
    assert not [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.slow
def test_upload_an_image_and_move_the_slider(chromium: webdriver.Chrome, hard_vit: Path, photo: Path) -> None:
    """The demo page opens with an image; the overlay changes with the image and the budget; nothing is sent to any other host."""
    _load.cache_clear()
    requests(chromium)
    address = launch([str(hard_vit)], block=False)
    chromium.get(address)
    wait = WebDriverWait(chromium, 120)
    first = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#hard img"))[0].get_attribute("src")

    def changed(browser: webdriver.Chrome) -> bool:
        found = browser.find_elements(By.CSS_SELECTOR, "#hard img")
        return bool(found) and found[0].get_attribute("src") != first

    chromium.find_element(By.CSS_SELECTOR, "button[aria-label='Remove Image']").click()
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0].send_keys(str(photo))
    wait.until(changed)
    first = chromium.find_element(By.CSS_SELECTOR, "#hard img").get_attribute("src")
    said = chromium.find_element(By.ID, "hard").text
    assert "vision.inputs keeps 25%" in said and "of full attention" in said
    slider = chromium.find_element(By.CSS_SELECTOR, "input[type=range]")
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    time.sleep(1.0)  # the page scrolls smoothly
    ActionChains(chromium).drag_and_drop_by_offset(slider, slider.size["width"] // 3, 0).perform()

    wait.until(changed)
    assert "keeps 25%" not in chromium.find_element(By.ID, "hard").text
    assert "GFLOPs (counted)" in chromium.find_element(By.ID, "soft").text
    time.sleep(1.0)  # late requests
    assert requests(chromium) <= {"127.0.0.1", "localhost"}
    assert urllib.request.urlopen(address).headers["content-security-policy"] == POLICY
