"""Reports in a browser: tables sort and filter."""

import pytest

from attnlab._src.bench.report_page import page_of_runs
from attnlab._src.bench.runs import Line, Run

pytestmark = pytest.mark.slow


def line(problem, contender, median):
    low, high = (None, None) if median is None else (0.9 * median, 1.1 * median)
    status = "refused" if median is None else "ok"
    found = (contender, status, "why", 64, 0.5, median, low, high)
    return Line(problem, problem, "forward", *found, None, None)


def test_tables_sort_and_filter(opened):
    from selenium.webdriver.common.by import By

    times = {"ten": 0.010, "hundred": 0.1, "nine": 0.009, "none": None}
    lines = [line(name, "native", 1.0) for name in times]
    lines += [line(name, "torch", seconds) for name, seconds in times.items()]
    lines += [line(f"more {i}", "native", 0.5) for i in range(8)]
    run = Run("<i>run</i>", [("machine", "<b>two</b> cores")], lines, [], [])
    seen = opened(page_of_runs([run]))
    table = seen.find_element(By.CSS_SELECTOR, "table.data")

    def problems():
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        cells = [x.find_element(By.TAG_NAME, "td") for x in rows if x.is_displayed()]
        return [x.text for x in cells if not x.text.startswith("more")]

    assert problems() == ["ten", "hundred", "nine", "none"]
    (head,) = (
        x for x in table.find_elements(By.TAG_NAME, "button") if x.text == "torch"
    )
    head.click()
    assert problems() == ["nine", "ten", "hundred", "none"]
    head.click()
    assert problems() == ["hundred", "ten", "nine", "none"]
    seen.find_element(By.CSS_SELECTOR, ".filter").send_keys("hun")
    assert problems() == ["hundred"]
    before = seen.execute_script("return getComputedStyle(document.body).color")
    seen.find_element(By.ID, "theme").click()
    assert before != seen.execute_script("return getComputedStyle(document.body).color")
    assert seen.execute_script("return document.querySelectorAll('b, i').length") == 0
    heights = seen.execute_script(
        "return [...document.querySelectorAll('.chart svg')].map((x) => x.clientHeight)"
    )
    assert heights
    assert min(heights) > 100
    seen.set_window_size(500, 900)
    wide = "return document.documentElement.scrollWidth - window.innerWidth"
    assert seen.execute_script(wide) <= 0
