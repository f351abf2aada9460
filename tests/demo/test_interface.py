"""The page in Gradio and in a browser, where they are installed."""

import shutil
import sys

import pytest

from flowdcn_jax.demo import Page
from flowdcn_jax.errors import UserError
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 60_000


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "flowdcn_jax.demo.interface", raising=False)
    with pytest.raises(UserError, match="needs Gradio.* pip install 'gradio>=6'"):
        from flowdcn_jax.demo import interface  # noqa: F401


@pytest.fixture
def address(model):
    """Where the page is shown."""
    pytest.importorskip("gradio", reason="needs Gradio: the extra demo")
    from flowdcn_jax.demo import interface

    port = tiny.free_port()
    page = Page(model, ["--workdir=runs/digits"])
    blocks, address = interface.start(page, host="127.0.0.1", port=port)
    assert address == f"http://127.0.0.1:{port}/"
    with pytest.raises(UserError, match=f"--port={port} cannot be listened at"):
        interface.start(page, host="127.0.0.1", port=port)
    yield address
    blocks.close(verbose=False)


@pytest.fixture
def browser_page():
    """A page of a headless browser, and what it asked other machines for."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright; pip install playwright"
    )
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page, elsewhere = browser.new_page(), []
        own = ("http://127.0.0.1", "data:", "blob:")
        page.on("request", lambda r: r.url.startswith(own) or elsewhere.append(r.url))
        yield page, elsewhere
        browser.close()


@pytest.mark.slow
def test_a_person_draws_and_is_told_what_is_wrong(address, browser_page):
    page, elsewhere = browser_page
    page.goto(address)
    page.click("#draw", timeout=WAIT_MS)
    answer = page.locator("#answer textarea")

    def wait_for(words):
        page.wait_for_function(
            "words => document.querySelector('#answer textarea').value.includes(words)",
            arg=words,
            timeout=WAIT_MS,
        )

    wait_for("4 images in")
    for name in ("grid", "strip"):
        page.wait_for_selector(f"#{name} img", timeout=WAIT_MS)
        width = page.evaluate(f"document.querySelector('#{name} img').naturalWidth")
        assert width > 100
    assert "sample.py --workdir=runs/digits" in page.input_value("#command textarea")

    page.fill("#classes input", "seven")
    page.press("#classes input", "Enter")
    page.fill("#num_images input", "2")
    page.click("#draw")
    wait_for("2 images in")
    assert "--classes=seven" in page.input_value("#command textarea")

    page.fill("#image_size input", "9x8")
    page.press("#image_size input", "Enter")
    page.click("#draw")
    wait_for("error: ")
    assert answer.input_value().startswith("error: image_size is 9x8; expected HxW")
    assert page.locator("#grid img").count() == 0
    assert elsewhere == []
