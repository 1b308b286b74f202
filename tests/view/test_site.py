"""The documentation's site: it builds without a warning, and a browser can read it."""

import html
import inspect
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import filelock
import pytest

from tests.conftest import SHARED
from tests.test_surface import ROOMS
from tests.view.conftest import wait_for

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    str(path.relative_to(DOCS).with_suffix(""))
    for pattern in ("*.md", "*/*.md", "*/*.ipynb")
    for path in DOCS.glob(pattern)
    if "_build" not in path.parts
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site():
    """The built site; to build it, all code in it has run.

    One process of a run of tests builds it, the others wait.
    """
    pytest.importorskip("myst_nb", reason="the site needs the extra 'docs'")
    out = Path(SHARED) / "site"
    with filelock.FileLock(f"{out}.lock"):
        if not (out / "said").exists():
            out.mkdir()
            build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-j", "2"]
            done = subprocess.run(
                [*build, "-d", str(out / "trees"), str(DOCS), str(out / "html")],
                capture_output=True,
                check=False,
                text=True,
            )
            said = "" if done.returncode == 0 else done.stdout + done.stderr
            (out / "said").write_text(said)
    said = (out / "said").read_text()
    assert not said, said[-8000:]
    return out / "html"


def test_the_reference_has_every_public_name(site):
    text = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    found = set(re.findall(r'id="(attnlab\.[\w.]+)"', text))
    # Base classes are described where they are used, and only offered elsewhere.
    homes = {"Mask": "attnlab.masks", "Modifier": "attnlab", "Score": "attnlab"}
    for room in ROOMS:
        if room.__name__ == "attnlab.bench":
            continue  # a command
        for name in room.__all__:
            thing = getattr(room, name)
            if not inspect.isclass(thing) and not inspect.isroutine(thing):
                continue  # a module, a table, or a name for a type
            home = homes.get(name, room.__name__)
            assert f"{home}.{name}" in found, f"{room.__name__}.{name}"


def test_links_within_the_site_lead_somewhere(site):
    ids, links = {}, []
    for path in site.rglob("*.html"):
        text = path.read_text()
        ids[path] = set(re.findall(r'\b(?:id|name)="([^"]+)"', text))
        found = map(html.unescape, re.findall(r'<a\b[^>]*?\bhref="([^"]*)"', text))
        links += [(path, x) for x in found if not re.match(r"\w+:", x)]
    assert len(links) > 1000
    for path, link in links:
        page, place = map(unquote, urldefrag(link))
        target = (path.parent / page).resolve() if page else path
        assert target.exists(), (path, link)
        if place and target in ids:
            assert place in ids[target], (path, link)


def test_code_that_runs_has_shown_something(site):
    """Masks are drawn, and charts, results and pages to zoom into are there."""
    read = lambda page: (site / f"{page}.html").read_text()
    assert read("masks").count("48 queries (down), 48 keys") >= 2 * 18
    for page in ("scores", "modifiers", "cost"):
        assert '<img alt="_images/' in read(page), page
    for page in ("concepts", "masks", "modules", "notebooks/tour"):
        assert "<iframe" in read(page), page
    assert "on tpu: pallas_tpu" in read("cost")


def test_pages_open_and_fit_a_phone(site, browser):
    for page in PAGES:
        for width in (1200, 400):
            browser.set_window_size(width, 900)
            browser.get((site / f"{page}.html").as_uri())
            over = "return document.documentElement.scrollWidth - window.innerWidth"
            assert browser.execute_script(over) <= 0, (page, width)
        title = browser.find_element("css selector", "article h1")
        assert title.get_attribute("textContent"), page
        wrong = [x for x in browser.get_log("browser") if x["level"] == "SEVERE"]
        assert not wrong, (page, wrong)


def test_pictures_within_a_page_live(site, browser):
    browser.set_window_size(1200, 900)
    browser.get((site / "masks.html").as_uri())
    browser.switch_to.frame(browser.find_element("css selector", "iframe"))
    wait_for(browser, "return document.documentElement.dataset.ready === 'yes'")
    drawn = """
        const { width } = attnlab.canvas, pen = attnlab.canvas.getContext("2d");
        return new Set(new Uint32Array(
            pen.getImageData(0, 0, width, width).data.buffer)).size"""
    assert browser.execute_script(drawn) > 1
    browser.switch_to.default_content()


def test_the_theme_switches(site, browser):
    browser.get((site / "index.html").as_uri())
    for theme in ("dark", "light"):
        choice = f"document.querySelector('.theme-change-button[data-mode={theme}]')"
        browser.execute_script(f"{choice}.click()")
        now = browser.execute_script("return document.documentElement.dataset.theme")
        assert now == theme


def test_search_finds_pages(site, browser):
    browser.get((site / "search.html").as_uri() + "?q=sliding_window")
    wait_for(browser, "return document.querySelectorAll('.search li').length > 3")
