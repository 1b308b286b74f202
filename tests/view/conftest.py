"""A browser for the tests of pages."""

import shutil

import pytest


@pytest.fixture(scope="package")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("NO CHROMIUM: no page is looked at (packages chromium*)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1200,900",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as made:
        made.set_script_timeout(60)
        yield made


@pytest.fixture
def opened(browser, tmp_path):
    """``opened(page)`` opens it; nothing may have gone wrong in the end."""

    def start(page, width=1200, height=900):
        browser.set_window_size(width, height)
        browser.get(page.save(tmp_path / "page.html").as_uri())
        wait_for(browser, "return document.documentElement.dataset.ready === 'yes'")
        return browser

    yield start
    assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []


def wait_for(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda b: b.execute_script(script))
