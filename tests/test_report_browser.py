"""The report in a browser: what a user clicks and reads, beside what the library computes.

Slow; skipped where Chromium, its driver or selenium (``pip install mto-analysis[browser]``) are missing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mto_analysis import affinity_matrix, heterogeneity, load_checkpoint, row_entropy
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.figures.report import render_report
from mto_analysis.figures.report_contents import collect_report
from mto_analysis.images import choose_images, open_images
from mto_analysis.probe.request import Request, Settings
from mto_analysis.probe.shown import shown_models

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves sockets to the collector
]

LABELS = ("MAE", "SimMIM")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    sources = [DEMO_CHECKPOINTS[label] for label in LABELS]
    contents = collect_report(Request(sources, open_images(DEMO_IMAGES), Settings(limit=8), LABELS), shown=3)
    path.write_text(render_report(contents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    browser.get(report.as_uri())
    yield browser
    assert browser.get_log("browser") == []  # no error, nothing blocked, nothing asked for


def violations(page: Any) -> list[str]:
    """What axe-core finds in a page as it is: rule and first element."""
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    page.execute_script((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    page.set_script_timeout(120)
    run = (
        "const done = arguments[0]; axe.run().then(({ violations }) => done(violations.map((each) =>"
        " `${each.id}: ${each.nodes[0].html}`)))"
    )
    found: list[str] = page.execute_async_script(run)
    return found


def said(page: Any) -> str:
    return str(page.find_element(By.ID, "said").text)


def patch(page: Any, number: int) -> Any:
    return page.find_element(By.CSS_SELECTOR, f'.patch[data-patch="{number}"]')


def tokens_of(label: str, image: str, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = choose_images(open_images(DEMO_IMAGES), [image])
    shown = next(shown_models(Request([DEMO_CHECKPOINTS[label]], images)))
    with torch.no_grad():
        layers = list(load_checkpoint(DEMO_CHECKPOINTS[label]).layer_tokens(shown.images, shown.mask))
    return layers[depth].tokens, layers[depth].mask


def check_numbers(page: Any, label: str, image: str, depth: int, chosen: int) -> None:
    """All that is read on the page follows from the tokens."""
    tokens, mask = tokens_of(label, image, depth)
    visible = (~mask[0]).nonzero().flatten()
    logits = (tokens[0, chosen] @ tokens[0].T)[visible].double()
    text = said(page)
    assert f"{label}, image {image}, layer depth {depth} of" in text
    assert f"Masked patch in row {chosen // 8 + 1}, column {chosen % 8 + 1}:" in text
    entropy, bound, mean = (
        float(re.search(pattern, text)[1])  # type: ignore[index]
        for pattern in (r": H ([\d.]+) nats", r"log \d+ = ([\d.]+)", r"image here: ([\d.]+)\.")
    )
    assert entropy == pytest.approx(row_entropy(logits).item(), abs=2e-4)
    assert bound == pytest.approx(np.log(len(visible)), abs=1e-4)
    assert mean == pytest.approx(heterogeneity(tokens, mask).item(), abs=2e-4)

    weights = logits.softmax(dim=0)
    cosines = affinity_matrix(tokens, kind="cosine")[0, chosen]
    best = weights.argsort(descending=True)[:5]
    rows = page.find_elements(By.CSS_SELECTOR, "#top tr")
    assert len(rows) == 5
    for row, at in zip(rows, best.tolist(), strict=True):
        number = int(row.get_attribute("data-patch"))
        place, weight, cosine = (cell.text for cell in row.find_elements(By.TAG_NAME, "td"))
        if float(weights[at]) > 1e-6:
            assert number == visible[at]
            assert float(weight) == pytest.approx(float(weights[at]), rel=2e-3)
            assert float(cosine) == pytest.approx(float(cosines[number]), abs=1e-3)
            label_of = patch(page, number).get_attribute("aria-label")
            assert label_of == f"visible patch, {place}, weight {weight}"
    sorted_rows = int(mask[0, :chosen].sum())
    assert int(page.find_element(By.ID, "map-row").get_attribute("data-row")) == sorted_rows


def test_explorer__shows_the_librarys_numbers_for_what_is_clicked(page: Any) -> None:
    _, mask = tokens_of("MAE", "0", 0)
    check_numbers(page, "MAE", "0", 0, int(mask[0].nonzero()[0]))

    images = page.find_elements(By.CSS_SELECTOR, "#images label")
    assert len(images) == 3
    images[1].click()
    name = page.find_elements(By.CSS_SELECTOR, "#images input")[1].get_attribute("aria-label").removeprefix("image ")
    _, mask = tokens_of("MAE", name, 1)
    slider = page.find_element(By.ID, "depth")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("aria-valuetext") == "layer depth 1 of 6"  # the other model has six layers
    chosen = int(mask[0].nonzero()[17])
    patch(page, chosen).click()
    assert patch(page, chosen).get_attribute("aria-selected") == "true"
    check_numbers(page, "MAE", name, 1, chosen)

    slider.send_keys(Keys.END)
    check_numbers(page, "MAE", name, 4, chosen)


def test_explorer__a_visible_patch_is_refused_in_words(page: Any) -> None:
    _, mask = tokens_of("MAE", "0", 0)
    before = page.find_element(By.CSS_SELECTOR, ".patch[aria-selected='true']").get_attribute("data-patch")
    patch(page, int((~mask[0]).nonzero()[3])).click()
    assert "is visible. Choose a masked one" in said(page)
    assert patch(page, int(before)).get_attribute("aria-selected") == "true"


def test_explorer__works_by_keyboard_alone(page: Any) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element(By.ID, "model")).select_by_visible_text("SimMIM")
    page.find_element(By.CSS_SELECTOR, "#images input:checked").send_keys(Keys.ARROW_RIGHT)
    assert "SimMIM, image 64," in said(page)
    page.find_element(By.CSS_SELECTOR, "#images input:checked").send_keys(Keys.ARROW_LEFT)
    _, mask = tokens_of("SimMIM", "0", 0)
    start = int(mask[0].nonzero()[0])
    only = page.find_elements(By.CSS_SELECTOR, "#view-1 .patch[tabindex='0']")
    assert [each.get_attribute("data-patch") for each in only] == [str(start)]
    page.execute_script("arguments[0].focus()", only[0])
    place = start
    for key, step in ((Keys.ARROW_DOWN, 8), (Keys.ARROW_DOWN, 8), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_UP, -8)):
        page.switch_to.active_element.send_keys(key)
        place += step
        assert page.switch_to.active_element.get_attribute("data-patch") == str(place)
    while not mask[0, place]:
        page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
        place += 8
    page.switch_to.active_element.send_keys(Keys.ENTER)
    check_numbers(page, "SimMIM", "0", 0, place)
    assert page.switch_to.active_element.get_attribute("data-patch") == str(place)
    page.find_element(By.ID, "depth").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    check_numbers(page, "SimMIM", "0", 2, place)


def pixels_of(page: Any, canvas: str) -> np.ndarray:
    script = """const c = document.getElementById(arguments[0]);
        return [c.width, Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data)]"""
    width, values = page.execute_script(script, canvas)
    return np.array(values, dtype=np.uint8).reshape(-1, width, 4)


@pytest.mark.parametrize("kind", ["softmax", "log", "dot", "cosine"])
def test_explorer__draws_the_map_of_the_library(page: Any, kind: str) -> None:
    import matplotlib as mpl
    from selenium.webdriver.support.ui import Select

    Select(page.find_element(By.ID, "kind")).select_by_value(kind)
    page.find_element(By.ID, "depth").send_keys(Keys.ARROW_RIGHT)
    tokens, mask = tokens_of("MAE", "0", 1)
    expected = affinity_matrix(tokens, mask, kind="softmax" if kind == "log" else kind)[0].numpy()  # type: ignore[arg-type]
    scaled = (expected - expected.min()) / (expected.max() - expected.min())
    if kind == "log":
        scaled = np.clip(1 + np.log10(np.maximum(expected, 1e-30) / expected.max()) / 4, 0, 1)
    drawn = pixels_of(page, "map")[..., :3].astype(float)
    assert drawn.shape == (64, 64, 3)
    viridis = 255 * mpl.colormaps["viridis"](scaled)[..., :3]
    assert np.abs(drawn - viridis).max() < 4  # rounded colours, straight lines between them
    share = 48 / 64
    down = page.find_element(By.CSS_SELECTOR, ".border.down").value_of_css_property("left")
    frame = page.find_element(By.ID, "map-frame").size["width"]
    assert float(down.removesuffix("px")) == pytest.approx(share * frame, abs=1.5)


def test_explorer__a_click_on_the_map_chooses_its_row(page: Any) -> None:
    _, mask = tokens_of("MAE", "0", 0)
    page.execute_script("document.getElementById('map').scrollIntoView({block: 'center'})")
    canvas = page.find_element(By.ID, "map")
    from selenium.webdriver import ActionChains

    height = canvas.size["height"]
    ActionChains(page).move_to_element_with_offset(canvas, 0, int(height * (20.5 / 64 - 0.5))).click().perform()
    check_numbers(page, "MAE", "0", 0, int(mask[0].nonzero()[20]))


def test_explorer__shows_two_models_in_step(page: Any) -> None:
    from selenium.webdriver.support.ui import Select

    assert [page.find_element(By.ID, name).text for name in ("heading-1", "heading-2")] == list(LABELS)
    slider = page.find_element(By.ID, "depth")
    slider.send_keys(Keys.END)
    words = [page.find_element(By.ID, name).text for name in ("said", "said-2")]
    assert "MAE, image 0, layer depth 4 of 4." in words[0]  # its last, where the other goes on
    assert "SimMIM, image 0, layer depth 6 of 6." in words[1]
    thumbnails = page.find_elements(By.CSS_SELECTOR, "#layers-2 button")
    assert [each.text for each in thumbnails] == [str(depth) for depth in range(7)]
    thumbnails[2].click()
    for view in ("layers", "layers-2"):
        chosen = page.find_element(By.CSS_SELECTOR, f"#{view} button[aria-current]")
        assert chosen.get_attribute("aria-label") == "Layer depth 2"
    _, mask = tokens_of("SimMIM", "0", 2)
    number = int(mask[0].nonzero()[11])
    page.find_element(By.CSS_SELECTOR, f'#view-2 .patch[data-patch="{number}"]').click()
    place = f"row {number // 8 + 1}, column {number % 8 + 1}"
    assert f"Masked patch in {place}:" in page.find_element(By.ID, "said-2").text
    if tokens_of("MAE", "0", 2)[1][0, number]:
        assert f"Masked patch in {place}:" in said(page)

    play = page.find_element(By.ID, "play")
    play.click()
    WebDriverWait(page, 10).until(lambda _: "layer depth 3" in said(page))
    assert play.text == "Pause"
    play.click()
    assert (play.text, page.find_element(By.ID, "said").get_attribute("aria-live")) == ("Play", "polite")
    Select(page.find_element(By.ID, "with")).select_by_visible_text("none")
    assert not page.find_element(By.ID, "view-2").is_displayed()


def test_explorer__its_address_holds_what_is_shown(page: Any, report: Path) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element(By.ID, "model")).select_by_visible_text("SimMIM")
    Select(page.find_element(By.ID, "with")).select_by_visible_text("MAE")
    Select(page.find_element(By.ID, "kind")).select_by_value("dot")
    page.find_elements(By.CSS_SELECTOR, "#images label")[2].click()
    page.find_element(By.ID, "depth").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    name = page.find_elements(By.CSS_SELECTOR, "#images input")[2].get_attribute("aria-label").removeprefix("image ")
    number = int(tokens_of("SimMIM", name, 3)[1][0].nonzero()[9])
    patch(page, number).click()
    address, words = page.current_url, [page.find_element(By.ID, each).text for each in ("said", "said-2")]
    assert all(part in address for part in ("model=SimMIM", "with=MAE", "depth=3", "map=dot", f"image={name}"))
    page.get("about:blank")
    page.get(address)
    assert [page.find_element(By.ID, each).text for each in ("said", "said-2")] == words
    assert Select(page.find_element(By.ID, "kind")).first_selected_option.get_attribute("value") == "dot"
    page.get(f"{report.as_uri()}#model=no&with=no&image=no&depth=-4&patch=a,7&map=no")  # shows what there is
    assert "MAE, image 0, layer depth 0 of 4." in said(page)


def test_explorer__values_stand_under_the_pointer_and_a_figure_is_copied(page: Any) -> None:
    from selenium.webdriver import ActionChains

    tokens, mask = tokens_of("MAE", "0", 0)
    canvas = page.find_element(By.ID, "map")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    side = canvas.size["height"]
    row, column = 10, 50  # a masked query, a visible key
    offset = [int(side * ((at + 0.5) / 64 - 0.5)) for at in (column, row)]
    ActionChains(page).move_to_element_with_offset(canvas, *offset).perform()
    order = torch.cat([mask[0].nonzero().flatten(), (~mask[0]).nonzero().flatten()])
    expected = affinity_matrix(tokens, kind="cosine")[0, order[row], order[column]]
    text = page.find_element(By.ID, "hover").text
    assert text.startswith("query: masked, row")
    assert "key: visible, row" in text
    assert float(text.rsplit(": ", 1)[1]) == pytest.approx(float(expected), abs=1e-3)

    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": permissions})
    page.find_element(By.ID, "copy").click()
    WebDriverWait(page, 10).until(lambda _: page.find_element(By.ID, "told").text)
    assert page.find_element(By.ID, "told").text == "Copied: the figure as an image, its caption as text."
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, (error) => done(String(error)))"
    copied = page.execute_async_script(read)
    assert said(page) in copied
    assert page.find_element(By.ID, "said-2").text in copied


@pytest.mark.parametrize("width", [390, 1024, 1440])
def test_report__has_no_violation_that_axe_finds(page: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for theme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        page.refresh()
        assert violations(page) == [], theme
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_report__prints_figures_without_controls(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = [page.find_element(By.ID, name).is_displayed() for name in ("controls", "theme", "hover")]
    assert hidden == [False] * 3
    assert page.find_element(By.ID, "map").is_displayed()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_report__is_light_or_dark_as_the_system_and_the_button_say(page: Any, tmp_path: Path) -> None:
    def background() -> int:
        colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        return int(re.findall(r"\d+", colour)[0])

    seen = {}
    for theme, dark in (("light", False), ("dark", True)):
        feature = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        page.refresh()  # forgets what the button said
        assert (background() < 60) == dark
        button = page.find_element(By.ID, "theme")
        button.send_keys(Keys.SPACE)
        assert (background() < 60) != dark
        assert button.get_attribute("aria-label") == f"Use {theme} colours"
        button.click()
        assert (background() < 60) == dark
        page.save_screenshot(str(tmp_path / f"{theme}.png"))
        seen[theme] = (tmp_path / f"{theme}.png").read_bytes()
    assert seen["light"] != seen["dark"]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_report__text_stands_out_in_light_and_dark(page: Any) -> None:
    script = """
        const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => {
            v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const fill = (e) => getComputedStyle(e).backgroundColor;
        const behind = (e) => { while (e && fill(e) === "rgba(0, 0, 0, 0)") e = e.parentElement;
            return fill(e || document.body); };
        const kinds = "h1, h2, h3, p, li, td, th, label, legend, figcaption, caption, dt, dd, button, select";
        return [...document.querySelectorAll(kinds)]
            .filter((e) => e.textContent.trim() && e.offsetParent && !e.matches(".patch"))
            .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 40)]; });
    """
    for theme in ("light", "dark"):
        page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        worst = min(page.execute_script(script))
        assert worst[0] >= 4.5, (theme, worst)


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_report__fits_its_window(page: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
