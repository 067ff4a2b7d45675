"""The page in Chromium, as on a phone, a tablet and a desk, by day and by night. Skipped where there is no Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import served
from test_report import make

import flap_stream
from flap_stream.report.live import Watch

pytest.importorskip("matplotlib")
sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]

# What a reader would stumble over: the page wider than the window, the smallest text as it is drawn, and the contrast
# of the text with what is behind it (WCAG 2), which is 21 for black on white.
LOOK = """() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const sizes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    const scale = element.ownerSVGElement ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
    sizes.push(parseFloat(getComputedStyle(element).fontSize) * scale);
  }
  const style = getComputedStyle(document.body);
  const behind = light(style.backgroundColor), text = light(style.color);
  return {
    wide: document.scrollingElement.scrollWidth - innerWidth, texts: sizes.length, smallest: Math.min(...sizes), behind,
    contrast: (Math.max(behind, text) + 0.05) / (Math.min(behind, text) + 0.05),
  };
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make(tmp_path_factory.mktemp("page"), loss_windows=4)
    flap_stream.plan(run, ratio=0.4, round_neurons_to=1)
    flap_stream.sweep(run, ratios=(0.2, 0.5), evaluate=(str(run.parent / "tokens.npy"),))
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has none


@pytest.fixture(scope="module", params=["written", "watched"])
def url(request: pytest.FixtureRequest, run: Path) -> Iterator[str]:
    if request.param == "written":
        flap_stream.write_report(run, run.parent / "report.html")
        yield (run.parent / "report.html").as_uri()
    else:
        with served(Watch(run)) as server:
            yield server.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1400])
def test_it_fits_and_can_be_read(browser: Any, url: str, width: int, scheme: str) -> None:
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    seen = page.evaluate(LOOK)
    page.close()
    assert complaints == []
    assert seen["wide"] <= 0
    assert seen["texts"] > 100 and seen["smallest"] >= 11
    assert (seen["behind"] < 0.1) == (scheme == "dark") and seen["contrast"] > 7
