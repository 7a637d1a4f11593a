"""MLflow's pages of a finished run in a real browser: what an engineer sees on the first screen.

They need Debian's Chromium (`apt-get install chromium`). Where MLFLOW_SOUP_SCREENSHOTS names a
folder, the screenshots are kept there.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import conftest
from conftest import MODEL
from mlflow_soup import Outcome

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="this test needs Chromium: apt-get install chromium"
    ),
]
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")
PATIENCE_MS = 60_000

# whether some text is on the screen: in the window, and cut off by no element around it
SEEN = """
text => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode());) {
    const start = node.data.indexOf(text);
    if (start < 0) continue;
    const range = document.createRange();
    range.setStart(node, start);
    range.setEnd(node, start + text.length);
    const box = range.getBoundingClientRect();
    let whole = box.height > 0 && box.top >= 0 && box.bottom <= innerHeight;
    for (let e = node.parentElement; e && e !== document.body; e = e.parentElement)
      if (getComputedStyle(e).overflowY !== 'visible')
        whole &&= box.bottom <= e.getBoundingClientRect().bottom + 1;
    if (whole) return true;
  }
  return false;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(finished: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that shows the finished store; the address that its pages begin with."""
    folder, port = tmp_path_factory.mktemp("site"), conftest.free_port()
    shutil.copy(finished[0], folder / "mlflow.db")
    process = conftest.start_server(folder / "mlflow.db", port)
    yield f"http://127.0.0.1:{port}/#"
    conftest.stop_server(process)


@pytest.fixture(scope="module")
def pages(finished: tuple[Path, Outcome]) -> dict[str, str]:
    """The links of the version's description, and the pages of the model and the OOD run."""
    outcome = finished[1]
    client = conftest.Store(tracking_uri=f"sqlite:///{finished[0]}")
    text = client.get_model_version(MODEL, str(outcome.soup.version.number)).description
    links = dict(re.findall(r"\[(run|all λ|plot|interactive)\]\(#(\S+?)\)", text))
    ood = links["run"].replace(outcome.run_id, outcome.examination.run_id)
    version = f"/models/{MODEL}/versions/{outcome.soup.version.number}"
    return links | {"ood": ood, "model": f"/models/{MODEL}", "version": version}


Opener = Callable[[str], Page]


@pytest.fixture
def show(browser: Browser, site: str, pages: dict[str, str], tmp_path: Path) -> Iterator[Opener]:
    """Opens a page by its name; in the end, its screenshot is kept."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    opened = []

    def show(name: str) -> Page:
        opened.append(name.replace(" λ", ""))
        page.goto(f"{site}{pages[name]}")
        return page

    yield show
    folder = Path(os.environ.get("MLFLOW_SOUP_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for name in opened:
        page.screenshot(path=folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size
    page.close()


def expect_seen(page: Page, *texts: str) -> None:
    """Wait until each text is on the first screen."""
    for text in texts:
        page.wait_for_function(SEEN, arg=text)


@pytest.mark.parametrize("name", ["version", "run"])
def test_the_first_screen_answers_all_questions(show: Opener, name: str) -> None:
    page = show(name)
    expect_seen(page, "Chosen: λ = ", "the better parent", "Gate: passed (margin 0.05")
    expect_seen(page, "of 3 checks", f"Promoted: alias champion → {MODEL} v4, 20")


def test_the_gates_run_says_its_verdict(show: Opener) -> None:
    expect_seen(show("ood"), "Gate: passed (margin 0.05")


def test_the_models_page_says_what_it_is(show: Opener) -> None:
    page = show("model")
    expect_seen(page, "Checkpoints of a language model", "Champion: ", "Policy, from the tags")
    expect_seen(page, "Chosen: λ = ")  # in the row of the version


def test_the_table_of_trials_is_in_the_order_of_the_curve(show: Opener) -> None:
    page = show("all λ")
    expect_seen(page, "lambda", "dev/objective", "soup.chosen", "(chosen)")
    names = page.get_by_role("link", name=re.compile(r"^λ = "))
    lams = [float(re.findall(r"[\d.]+", name)[0]) for name in names.all_inner_texts()]
    assert len(lams) > 2
    assert lams == sorted(lams)


def test_the_plot_of_trials_has_a_readable_size_and_no_other_beside_it(show: Opener) -> None:
    page = show("plot")
    expect_seen(page, "The score of each trial", "(chosen)")
    plots = page.locator(".js-plotly-plot")
    expect(plots).to_have_count(1)
    box = plots.bounding_box()
    assert box is not None
    assert box["width"] > 500
    assert box["height"] > 300


def test_the_report_can_be_explored_in_the_artifact_viewer(show: Opener, site: str) -> None:
    page = show("interactive")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    frame = page.frame_locator("iframe")
    expect(frame.get_by_text("Trials, and the items that flip")).to_be_attached()
    canvas = frame.locator(".bk-Canvas").first
    expect(canvas).to_be_visible()
    canvas.hover(position={"x": 300, "y": 150})
    expect(frame.get_by_text("expected score")).to_be_visible()
    expect(frame.get_by_text("toy_letters acc").first).to_be_visible()
    own = (site.removesuffix("/#"), "blob:", "data:")
    assert [url for url in asked if not url.startswith(own)] == []
