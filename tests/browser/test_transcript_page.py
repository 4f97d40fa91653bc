"""The transcripts' page in a real, headless Chromium, opened from disk: real logs, real frames, the keys a person uses.

python -m pytest tests/browser -m browser          # SHOTS=FOLDER also keeps screenshots
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.transcripts import HOSTILE, LONG, WINDOW, build_page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

webdriver = pytest.importorskip("selenium.webdriver", reason="install the extra: pip install -e '.[browser]'")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("no Chromium: install chromium and chromium-driver", allow_module_level=True)

WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return build_page(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # No sandbox: continuous integration often runs as root in a container.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """One load of the page."""

    def __init__(self, browser, path: Path, width: int = 1280, dark: bool = False, fragment: str = "") -> None:
        self.browser = browser
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        browser.get("about:blank")
        for name in ("browser", "performance"):
            browser.get_log(name)
        browser.get(path.as_uri() + fragment)

    def js(self, code: str, *arguments):
        return self.browser.execute_script(f"return {code}", *arguments)

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return [node.text for node in self.all(selector)]

    def keys(self, text: str) -> None:
        webdriver.ActionChains(self.browser).send_keys(text).perform()

    @property
    def names(self) -> list[str]:
        return self.texts("#list .name span:first-child")

    @property
    def title(self) -> str:
        return self.one("#head h2").text

    def open(self, name: str) -> None:
        self.all("#list li")[self.names.index(name)].click()

    def held(self, result: str, bar: str = "v") -> list[int]:
        """Turns whose chunk (or text, bar "t") is drawn as in memory."""
        code = f"""[...document.querySelectorAll('.r-band[data-run="{result}"] .{bar}.in')]
            .map((bar) => Number(bar.closest('.col').dataset.turn)).sort((a, b) => a - b)"""
        return self.js(code)

    def shot(self, name: str) -> None:
        if folder := os.environ.get("SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.browser.save_screenshot(str(Path(folder) / f"{name}.png"))


DOWN, UP, LEFT, RIGHT, ESCAPE = "\ue015", "\ue013", "\ue012", "\ue014", "\ue00c"


def test_it_opens_without_an_error_and_asks_nothing_of_the_network(browser, page):
    view = Page(browser, page)
    assert len(view.names) == 8
    for name in view.names:
        view.open(name)
    assert browser.get_log("browser") == []
    asked = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert any('"url":"file://' in message for message in asked), "the log sees requests"
    assert not [message for message in asked if '"url":"http' in message or '"url":"ws' in message]


def test_a_stream_shows_its_frames_question_window_thoughts_answers_and_silence(browser, page):
    view = Page(browser, page)
    view.open("alert-0")
    assert view.title == "alert-0"
    assert len(view.all(".col .r-frame img")) == 12
    assert view.js("[...document.querySelectorAll('.r-frame img')].every((i) => i.complete && i.naturalWidth > 20)")
    assert view.texts(".col[data-turn='2'] .asked-pill") == ["? What colour comes now?"]
    assert view.texts(".col[data-turn='6'] .r-due") == ["red"]
    shaded = view.js("[...document.querySelectorAll('.r-due[title]')].map((c) => Number(c.parentNode.dataset.turn))")
    assert sorted(shaded) == [6, 7, 8, 9], "an answer loses a quarter a turn"
    assert view.texts(".col[data-turn='6'] .said-box") == ["✓ red"]
    assert len(view.all(".col .hush")) == 11
    assert view.texts(".col[data-turn='3'] .r-thought") == ["now answer red 3"]
    assert "now answer red 6" in view.one("[data-card=rl]").text
    assert "correctness 1.00, timing 1.00" in view.one("[data-card=rl]").text
    view.shot("stream")


def test_the_memory_band_follows_the_selected_turn_and_the_pointer(browser, page):
    view = Page(browser, page)
    view.open("alert-0")
    view.one(".col[data-turn='7'] .r-axis").click()
    assert view.held("rl") == list(range(7 - WINDOW + 1, 8))
    assert view.held("rl", "t") == list(range(8)), "text stays"
    assert "5–7 (3)" in view.one("[data-card=rl] .facts").text
    view.keys(RIGHT)
    assert view.one("#detail h2").text == "Turn 8"
    assert view.held("rl") == [6, 7, 8]
    view.keys(LEFT * 6)
    assert view.held("rl") == [0, 1, 2]
    webdriver.ActionChains(browser).move_to_element(view.one(".col[data-turn='4'] .r-frame")).perform()
    assert view.held("rl") == [2, 3, 4]
    assert view.one("#detail h2").text == "Turn 2", "looking is not choosing"


def test_results_are_compared_in_lanes_of_one_time_line(browser, page):
    view = Page(browser, page)
    view.open("alert-0")
    assert view.texts("#lanes .chip") == ["after RL · 1.00", "after SFT · 0.50", "recent frames only · 0.00"]
    view.one("[data-lane=sft]").click()
    view.one("[data-lane=recent_frames]").click()
    assert view.texts("#gutter .r-lane") == ["after RL", "after SFT", "recent frames only"]
    assert "→ red" in view.texts(".col[data-turn='8'] .said-box")
    view.one(".col[data-turn='8'] .r-axis").click()
    assert view.held("rl") == view.held("sft") == [6, 7, 8]
    assert view.held("recent_frames") == [7, 8], "the engine's own stream, under another policy"
    assert view.held("recent_frames", "t") == [2, 7, 8] or view.held("recent_frames", "t") == [7, 8]
    view.shot("lanes")
    view.one("[data-lane=rl]").click()
    assert view.texts("#gutter .r-lane") == ["after SFT", "recent frames only"]


def test_search_filters_and_order_narrow_the_list(browser, page):
    view = Page(browser, page)
    assert view.one("#count").text == "8 of 8 streams"
    view.keys("/")
    view.keys("a yellow square on grey 499")
    assert view.names == ["long-0"]
    assert view.title == "long-0"
    view.keys("xyz")
    assert view.names == []
    assert "No stream fits" in view.one("#head").text
    view.keys(ESCAPE)
    assert len(view.names) == 8
    for outcome, wanted in {
        "right": ["alert-0", "gone-0"],
        "early": ["now-1"],
        "silent": ["now-0", "failed-0"],
        "late": ["long-0"],
        "wrong": ["recall-0", "hostile-0", "long-0"],
    }.items():
        view.one(f"[data-outcome={outcome}]").click()
        assert view.names == wanted
        view.one(f"[data-outcome={outcome}]").click()
    options = view.texts("#category option")
    assert options == ["all", HOSTILE, "Koch: Schritt/1", "alert", "now", "recall", "uncategorised"]
    view.all("#category option")[4].click()
    assert view.names == ["now-0", "now-1"]
    view.all("#category option")[0].click()
    view.one("#sort option[value=high]").click()
    assert view.texts("#list .name span:last-child") == ["1.00", "1.00", "0.13"] + 5 * ["0.00"]


def test_the_arrow_keys_walk_through_the_streams(browser, page):
    view = Page(browser, page)
    assert view.title == view.names[0]
    view.keys(DOWN * 2)
    assert view.title == view.names[2]
    assert view.texts("#list [aria-selected=true] .name span:first-child") == [view.names[2]]
    view.keys(UP)
    assert view.title == view.names[1]
    view.keys(DOWN * 50)
    assert view.title == view.names[-1]


def test_what_a_model_wrote_is_text_and_nothing_else(browser, page):
    view = Page(browser, page)
    view.open("hostile-0")
    assert view.one("[data-card=rl] .thought").text == f"{HOSTILE} 6"
    assert HOSTILE in view.one("[data-card=rl]").text
    assert view.js("window.pwned") is None
    assert view.all("body svg[onload]") == []
    assert view.js("[...document.images].every((image) => image.src.startsWith('data:image/jpeg'))")
    # The content policy is the second line: markup that did get in could still not run.
    browser.execute_script("""document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.pwned=3'>")""")
    assert browser.execute_async_script("setTimeout(() => arguments[0](window.pwned), 300)") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_a_missing_video_costs_its_frames_and_a_failed_stream_says_why(browser, page):
    view = Page(browser, page)
    view.open("gone-0")
    assert "no frames" in view.one("#head").text
    assert view.all(".col .r-frame img") == []
    assert view.texts(".col[data-turn='6'] .said-box") == ["✓ red"]
    view.open("failed-0")
    assert "VideoError: no such file" in view.one("#head .failed").text


def test_a_long_stream_draws_only_what_is_seen_and_reaches_its_end(browser, page):
    view = Page(browser, page, fragment="#long-0/250")
    assert view.one("#detail h2").text == "Turn 250"
    assert view.js("document.getElementById('track').offsetWidth") > 40_000
    assert 8 <= len(view.all(".col")) <= 30
    assert view.held("rl") == [248, 249, 250]
    browser.execute_script("document.getElementById('scroll').scrollLeft = 1e6")
    drawn = "[...document.querySelectorAll('.col')].some((c) => Number(c.dataset.turn) === arguments[0])"
    waited = browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert waited is not False
    assert view.js(drawn, LONG - 1)
    assert not view.js(drawn, 250)
    view.shot("long")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_window_and_its_text_can_be_read(browser, page, width, dark):
    view = Page(browser, page, width=width, dark=dark)
    for name in ("alert-0", "hostile-0", "long-0"):
        view.open(name)
        while lanes := view.all("#lanes [aria-pressed=false]"):
            lanes[0].click()
        assert view.js("document.documentElement.scrollWidth") == width, name
        assert view.js("window.innerWidth") == width
        view.shot(f"{name}-{width}{'-dark' if dark else ''}")
    level = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + Number(b), 0) / 3"
    assert (view.js(level) < 60) == dark
    for selector in ("#head h2", "#count", ".r-thought", ".said-box", "#list .asked", "#list .tag", "dt", ".hush"):
        assert contrast(view, selector) >= (3.0 if selector == ".hush" else 4.5), selector


def contrast(view: Page, selector: str) -> float:
    """WCAG contrast of the first such node's text against the backgrounds behind it."""
    code = """(() => {
        const node = document.querySelector(arguments[0]);
        const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
        const over = (top, base) => base.map((value, i) => i < 3 ? top[i] * top[3] + value * (1 - top[3]) : 1);
        const layers = [];
        for (let at = node; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
        const back = layers.reduce((base, top) => over(top, base), [255, 255, 255, 1]);
        const ink = parse(getComputedStyle(node).color);
        ink[3] *= Number(getComputedStyle(node).opacity);
        const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
            const c = rgb[i] / 255;
            return sum + weight * (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        }, 0);
        const [a, b] = [light(over(ink, back)), light(back)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    })()"""
    return view.js(code.replace("arguments[0]", repr(selector)))


def test_the_keyboard_reaches_every_control_and_shows_where_it_is(browser, page):
    view = Page(browser, page)
    seen = set()
    for _ in range(20):
        view.keys("\ue004")
        seen.add(view.js("document.activeElement.id || document.activeElement.dataset.outcome || 'lane'"))
        if view.js("document.activeElement.matches('#list, #scroll, button, select, input')"):
            assert view.js("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert {"search", "category", "sort", "right", "list", "lane", "scroll"} <= seen
