"""The page of a run in headless Chromium: no errors, sorting by click and by keyboard, phones, dark mode and print.

`MOECOVER_SCREENSHOTS=DIR` keeps its screenshots and its print, to be looked at. Skipped with a reason where Debian's
packages chromium and chromium-driver are not installed.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moecover.reporting.page import report
from tests.support.runs import HOSTILE, METHODS, make_run

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="no chromium or chromedriver: install Debian's packages chromium and chromium-driver",
)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of the pages: of the paper's grid for one model, and of a run with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    model = ("Qwen1.5-MoE-A2.7B", 24, 60)
    paper = make_run(folder / "paper", models=(model,), samples=2, fails=("ExpertSparsity",))
    methods = [(HOSTILE + str(i), *m[1:]) for i, m in enumerate(METHODS)]
    hostile = make_run(
        folder / "hostile",
        models=((HOSTILE + "-" * 80, 2, 8),),
        methods=methods,
        tasks=(HOSTILE, "b"),
        texts=(HOSTILE,),
        corpora=(HOSTILE, "ß"),
        fails=(methods[1][0],),
        reason=HOSTILE * 3,
        command=HOSTILE * 4,
    )
    made = {run.name: report(run, folder / f"{run.name}.html")["page"] for run in (paper, hostile)}
    return {name: Path(page).as_uri() for name, page in made.items()}


def shown(driver: Any, address: str, *, width: int = 1280, scheme: str = "light", media: str = "") -> None:
    driver.get("about:blank")
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    driver.get_log("browser")
    driver.get(address)
    wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
    wait(driver, 30).until(lambda d: d.execute_script("return document.readyState") == "complete")


@pytest.mark.parametrize("name", ["paper", "hostile"])
def test_no_errors_and_nothing_is_fetched(driver: Any, pages: dict[str, str], name: str) -> None:
    shown(driver, pages[name])
    assert driver.get_log("browser") == []
    assert driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert driver.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert driver.execute_script("return document.styleSheets[0].cssRules.length") > 50


def test_injected_script_is_forbidden(driver: Any, pages: dict[str, str]) -> None:
    shown(driver, pages["paper"])
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    )
    assert driver.execute_script("return window.ran") is None
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


def column(driver: Any, table: Any, index: int) -> list[str]:
    found: list[str] = driver.execute_script(
        "return [...arguments[0].tBodies[0].rows].map(r => r.cells[arguments[1]].dataset.value ?? '')", table, index
    )
    return found


# Presses every heading of every table twice. Gives the kind and first order of the column, then, for each press, the
# orders that the headings announce and the values.
PRESS_ALL_JS = """
return [...document.querySelectorAll('table.sortable')].map(table => {
  const heads = [...table.tHead.rows[0].cells], rows = () => [...table.tBodies[0].rows];
  const before = rows().map(r => r.textContent).sort().join();
  const presses = heads.map((head, i) => [head.dataset.kind, head.dataset.first, [1, 2].map(() => {
    head.querySelector('button').click();
    return [heads.map(h => h.getAttribute('aria-sort')), rows().map(r => r.cells[i].dataset.value ?? '')];
  })]);
  return [presses, before === rows().map(r => r.textContent).sort().join()];
});
"""


def test_sorting_by_every_heading(driver: Any, pages: dict[str, str]) -> None:
    shown(driver, pages["paper"])
    tables = driver.execute_script(PRESS_ALL_JS)
    assert len(tables) == 10 + 1
    for heads, same_rows in tables:
        assert same_rows
        for index, (kind, first, presses) in enumerate(heads):
            second = {"ascending": "descending", "descending": "ascending"}[first]
            for order, (said, values) in zip((first, second), presses, strict=True):
                assert said == ["none"] * index + [order] + ["none"] * (len(heads) - index - 1)
                there = [v for v in values if v]
                assert values == there + [""] * (len(values) - len(there))  # what is missing comes last
                if kind == "number":
                    assert [float(v) for v in there] == sorted(map(float, there), reverse=order == "descending")


def test_sorting_by_mouse_and_by_keyboard(driver: Any, pages: dict[str, str]) -> None:
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    shown(driver, pages["paper"])
    table = driver.find_element("css selector", "table[id$='-tasks']")
    head = table.find_elements("css selector", "thead th")[3]
    button = head.find_element("css selector", "button")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert driver.switch_to.active_element == button
    button.send_keys(keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(v) for v in column(driver, table, 3)] == sorted(float(v) for v in column(driver, table, 3))
    button.send_keys(keys.TAB)
    following = driver.switch_to.active_element
    assert following == table.find_elements("css selector", "thead th button")[4]
    following.send_keys(keys.SPACE)
    assert head.get_attribute("aria-sort") == "none"
    assert table.find_elements("css selector", "thead th")[4].get_attribute("aria-sort") == "descending"


OVERFLOWING_JS = """
for (const d of document.querySelectorAll('details')) d.open = true;
return new Promise(done => requestAnimationFrame(() => setTimeout(() => done(
  [...document.querySelectorAll('.scroll')].map(f => [f.scrollWidth > f.clientWidth + 1, f.tabIndex,
    !f.previousElementSibling.hidden])), 50)));
"""


def test_tables_fit_a_desktop_and_a_phone_shows_every_budget(driver: Any, pages: dict[str, str]) -> None:
    shown(driver, pages["paper"])
    assert [f for f in driver.execute_script(OVERFLOWING_JS) if f != [False, -1, False]] == []
    shown(driver, pages["paper"], width=390)
    frames = driver.execute_script(OVERFLOWING_JS)
    assert [True, 0, True] in frames  # what scrolls says so and can be reached by keyboard
    assert all(over == hint == (place == 0) for over, place, hint in frames)
    places = driver.execute_script(
        "return [...document.querySelectorAll(\"table[id$='-verdicts'] td\")].map(c => {"
        "const r = c.getBoundingClientRect(); return [c.dataset.head, r.left, r.right]})"
    )
    assert {head for head, *_ in places} == {"measure", "75% kept", "50% kept", "25% kept"}
    assert all(0 <= left < right <= 390 for _, left, right in places)


# Opens everything, and takes out what is alike: rows after the fourth, and what is inside figures, whose label speaks.
FEWER_JS = """
for (const d of document.querySelectorAll('details')) d.open = true;
for (const row of document.querySelectorAll('tbody tr:nth-child(n+5)')) row.remove();
for (const figure of document.querySelectorAll('svg.curve')) figure.replaceChildren();
"""


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 390)])
def test_axe_finds_no_violation(driver: Any, pages: dict[str, str], scheme: str, width: int) -> None:
    package = pytest.importorskip("axe_core_python", reason="axe-core-python, which brings axe-core, is not installed")
    shown(driver, pages["paper"], width=width, scheme=scheme)
    driver.execute_script(FEWER_JS)
    driver.execute_script((resources.files(package) / "axe.min.js").read_text(encoding="utf-8"))
    driver.set_script_timeout(120)
    found = driver.execute_async_script(
        "axe.run({resultTypes: ['violations']}).then(r => arguments[0]([r.passes.length, "
        "r.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 200))])]))"
    )
    assert found[0] > 30
    assert found[1] == []


@pytest.mark.parametrize("name", ["paper", "hostile"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_is_wider_than_the_screen(driver: Any, pages: dict[str, str], name: str, width: int) -> None:
    shown(driver, pages[name], width=width)
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    letters = driver.execute_script(
        "return [...document.querySelectorAll('svg.curve text')].map(t => [t, t.getScreenCTM()])"
        ".map(([t, m]) => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.a, m.b))"
    )
    assert min(letters) >= (7 if width < 360 else 8 if width < 1000 else 9)  # pixels


def contrast(one: str, two: str) -> float:
    """Ratio of the luminances of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS_JS = """
const probe = document.createElement('p');
document.body.append(probe);
const found = {};
for (const name of arguments[0]) {
  probe.className = ''; probe.setAttribute('hidden', '');
  const sheet = document.styleSheets[0];
  sheet.insertRule(`.probe-${name} { color: var(--${name}) }`, sheet.cssRules.length);
  probe.className = `probe-${name}`;
  found[name] = getComputedStyle(probe).color;
}
probe.remove();
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_contrast(driver: Any, pages: dict[str, str], scheme: str) -> None:
    shown(driver, pages["paper"], scheme=scheme)
    words, lines = ["ink", "faint", "link", "better", "worse", "same"], [f"c{i}" for i in range(6)]
    found = driver.execute_script(COLOURS_JS, ["ground", "card", *words, *lines])
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == found["ground"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert (
        driver.execute_script("return getComputedStyle(document.querySelector('svg.curve text')).fill") == found["ink"]
    )
    for name in words:
        assert contrast(found[name], ground) >= 4.5, name
    if scheme == "dark":  # on white, the two palest of Okabe and Ito's colours are told by their markers and names
        assert all(contrast(found[name], ground) >= 3 for name in lines)


def test_print_shows_everything_on_white(driver: Any, pages: dict[str, str]) -> None:
    shown(driver, pages["paper"], scheme="dark", media="print")
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert driver.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    driver.execute_script(
        "window.closed_when_printed = -1; addEventListener('beforeprint', () => "
        "{ window.closed_when_printed = document.querySelectorAll('details:not([open]):not(.screen)').length })"
    )
    printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type /Page\b", printed)) <= 6  # of a model
    assert driver.execute_script("return window.closed_when_printed") == 0
    assert driver.execute_script("return document.querySelectorAll('details:not([open])').length") > 0  # closed again


def test_screenshots_to_look_at(driver: Any, pages: dict[str, str], tmp_path: Path) -> None:
    folder = Path(os.environ.get("MOECOVER_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, scheme in (("1280", 1280, "light"), ("390", 390, "light"), ("dark", 1280, "dark")):
        shown(driver, pages["paper"], width=width, scheme=scheme)
        high = driver.execute_script("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": high, "scale": 1}
        taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        (folder / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))
        assert Image.open(folder / f"{name}.png").size == (width, high)
    printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    (folder / "print.pdf").write_bytes(base64.b64decode(printed))
