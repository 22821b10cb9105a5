"""The page of an atlas in a browser: filtered, sorted, plotted, by mouse and by keyboard.

Slow; skipped where Chromium, its driver, selenium or axe (``pip install mto-analysis[browser]``) are missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_report_browser import CHROMIUM, DRIVER, By, Keys, browser, violations  # noqa: F401 - a fixture

from mto_analysis.atlas import Entry, Protocol
from mto_analysis.atlas.measuring import measure_entry
from mto_analysis.atlas.page import render_atlas
from mto_analysis.atlas.table import join_tables
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.images import open_images
from mto_analysis.images.image_sets import load_image_set

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves sockets to the collector
]

SCORES = {"top-1": {"MAE": 71.5, "MAE-early": 60.25, "SimMIM": 68.0}, "mIoU": {"SimMIM": 40.0}}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    chosen = load_image_set("cifar10_test_256").limited(6)
    images = chosen.find(open_images(DEMO_IMAGES))
    entries = [Entry(label.replace(", ", "-"), str(path)) for label, path in DEMO_CHECKPOINTS.items()]
    return join_tables([measure_entry(entry, images, chosen, Protocol())[0] for entry in entries])


@pytest.fixture
def page(browser: Any, table: pd.DataFrame, tmp_path: Path) -> Any:  # noqa: F811
    path = tmp_path / "atlas.html"
    path.write_text(render_atlas(table, scores=SCORES), encoding="utf-8")
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []  # no error, nothing blocked, nothing asked for


def rows(page: Any) -> list[Any]:
    return [row for row in page.find_elements(By.CSS_SELECTOR, "#checkpoints tbody tr") if row.is_displayed()]


def labels(page: Any) -> list[str]:
    return [row.find_element(By.TAG_NAME, "th").text for row in rows(page)]


def choose(page: Any, select: str, words: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element(By.ID, select)).select_by_visible_text(words)


def sort_by(page: Any, key: str) -> None:
    page.find_element(By.CSS_SELECTOR, f"th[data-key='{key}'] button").click()


def curve(table: pd.DataFrame, checkpoint: str, measure: str) -> pd.Series:
    found = table[table["checkpoint"].eq(checkpoint) & table["measure"].eq(measure)]
    return found.set_index("layer_depth")["value"]


def test_table__is_filtered_and_sorted(page: Any, table: pd.DataFrame) -> None:
    assert labels(page) == ["MAE", "MAE-early", "SimMIM", "SimMIM-early"]
    assert page.find_element(By.ID, "count").text == "4 of 4 shown, 4 chosen"
    search = page.find_element(By.ID, "search")
    search.send_keys("EARLY mae")
    assert labels(page) == ["MAE-early"]
    search.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    choose(page, "style", "the encoder")
    assert labels(page) == ["SimMIM", "SimMIM-early"]
    choose(page, "style", "either")
    last = {name: curve(table, name, "heterogeneity").iloc[-1] for name in labels(page)}
    for order in (1, -1):
        sort_by(page, "last")
        assert labels(page) == sorted(last, key=last.get)[::order]  # type: ignore[arg-type]
    choose(page, "measure", "effective rank masked")
    last = {name: curve(table, name, "effective_rank_masked").iloc[-1] for name in last}
    assert labels(page) == sorted(last, key=last.get, reverse=True)  # type: ignore[arg-type]
    shown = [float(row.find_element(By.CSS_SELECTOR, "[data-value='last']").text) for row in rows(page)]
    assert shown == [pytest.approx(last[name], rel=1e-3) for name in labels(page)]
    assert page.find_element(By.CSS_SELECTOR, "th[data-key='last']").get_attribute("aria-sort") == "descending"


def test_plot__shows_the_tables_values_of_what_is_chosen(page: Any, table: pd.DataFrame) -> None:
    page.find_element(By.ID, "clear").click()
    svg = page.find_element(By.ID, "curves")
    assert svg.get_attribute("aria-label") == "Nothing chosen"
    page.find_element(By.CSS_SELECTOR, "input[aria-label='Choose SimMIM']").click()
    assert svg.get_attribute("aria-label") == "heterogeneity over layer depth of SimMIM"
    titles = [each.get_attribute("textContent") for each in page.find_elements(By.CSS_SELECTOR, "#curves title")]
    expected = curve(table, "SimMIM", "heterogeneity")
    assert len(titles) == len(expected)
    for title, (depth, value) in zip(titles, expected.items(), strict=True):
        words, _, number = title.partition(": ")
        assert words == f"SimMIM, layer depth {depth}"
        assert float(number.split(" (")[0]) == pytest.approx(value, rel=1e-3)
    # Heights of the dots are linear in the values.
    heights = [float(each.get_attribute("cy")) for each in page.find_elements(By.CSS_SELECTOR, "#curves circle")]
    slope = (heights[-1] - heights[0]) / (expected.iloc[-1] - expected.iloc[0])
    assert slope < 0
    assert heights == [pytest.approx(heights[0] + slope * (v - expected.iloc[0]), abs=0.05) for v in expected]
    page.find_element(By.ID, "choose").click()
    assert len(page.find_elements(By.CSS_SELECTOR, "#curves path")) == 4
    page.find_element(By.CSS_SELECTOR, "#numbers summary").click()
    cells = page.find_elements(By.CSS_SELECTOR, "#numbers tbody tr:last-child td")
    assert [cell.text != "" for cell in cells] == [False, False, True, True]  # MAE's decoder has fewer layers
    choose(page, "scale", "fraction of all layers")
    places = {each.get_attribute("cx") for each in page.find_elements(By.CSS_SELECTOR, "#curves circle:last-of-type")}
    assert len(places) == 1


def test_scores__are_plotted_and_read_by_keyboard(page: Any, table: pd.DataFrame) -> None:
    dots = page.find_elements(By.CSS_SELECTOR, "#scatter circle")
    assert len(dots) == 3
    assert [dot.get_attribute("tabindex") for dot in dots] == ["0", "-1", "-1"]
    page.execute_script("arguments[0].focus()", dots[0])
    said = [page.find_element(By.ID, "point").text]
    for _ in range(2):
        page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        said.append(page.find_element(By.ID, "point").text)
    of = sorted(SCORES["top-1"], key=lambda name: curve(table, name, "heterogeneity").iloc[-1])
    assert [text.split(" (")[0] for text in said] == of
    assert all(text.endswith(f"top-1 {SCORES['top-1'][name]:g}") for text, name in zip(said, of, strict=True))
    choose(page, "task", "mIoU")
    svg = page.find_element(By.ID, "scatter")
    assert svg.get_attribute("aria-label") == "mIoU against heterogeneity of 1 checkpoint"
    choose(page, "style", "a decoder")
    assert "No checkpoint shown has both." in svg.text


def test_page__works_by_keyboard_alone(page: Any) -> None:
    page.execute_script("document.querySelector('.skip').focus()")
    seen = []
    for _ in range(30):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        seen.append(active.get_attribute("id") or active.get_attribute("aria-label") or active.text)
    for place in ("theme", "search", "family", "measure", "choose", "clear", "Checkpoint", "Choose MAE", "scale"):
        assert place in seen, seen
    box = page.find_element(By.CSS_SELECTOR, "input[aria-label='Choose MAE']")
    box.send_keys(Keys.SPACE)
    assert page.find_element(By.ID, "count").text == "4 of 4 shown, 3 chosen"
    page.find_element(By.CSS_SELECTOR, "th[data-key='label'] button").send_keys(Keys.ENTER, Keys.ENTER)
    assert labels(page) == ["SimMIM-early", "SimMIM", "MAE-early", "MAE"]
    page.find_element(By.CSS_SELECTOR, "#legend button").send_keys("")
    assert page.find_element(By.ID, "curves").get_attribute("class") == "dimmed"


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_page__is_accessible_and_fits_its_window(page: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.refresh()
    for theme in ("light", "dark"):
        page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        assert violations(page) == [], theme
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_page__shows_hostile_and_long_names_as_text(browser: Any, table: pd.DataFrame, tmp_path: Path) -> None:  # noqa: F811
    hostile, name = "<img src=x onerror=alert(1)></script><script>alert(2)</script>", ("long_name-" * 10)[:99]
    texts = dict.fromkeys(("family", "backbone", "evidence", "source", "contributor", "hardware", "stack"), hostile)
    named = table[table["checkpoint"] == "SimMIM"].assign(checkpoint=name, measure='"onmouseover="alert(3)', **texts)
    path = tmp_path / "hostile.html"
    both = pd.concat([table, named], ignore_index=True)
    path.write_text(render_atlas(both, title=hostile, scores={hostile: {name: 0.0, "MAE": 0.0}}), encoding="utf-8")
    browser.set_window_size(500, 900)
    browser.get(path.as_uri())
    browser.find_element(By.ID, "choose").click()
    assert browser.find_element(By.TAG_NAME, "h1").text == hostile
    assert browser.find_element(By.ID, "count").text == "5 of 5 shown, 5 chosen, 1 without heterogeneity"
    choose(browser, "measure", '"onmouseover="alert(3)')
    assert len(browser.find_elements(By.CSS_SELECTOR, "#scatter circle")) == 1  # of a score of 0
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert violations(browser) == []
    assert browser.get_log("browser") == []
    browser.set_window_size(1280, 900)
