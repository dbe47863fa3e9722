"""The page of an evaluation in a real browser, where there is one."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from adaptive.classes import ClassRow
from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.exit_tables import ExitFigures
from adaptive.findings import Findings
from adaptive.front import FrontRow
from adaptive.headline import Headline
from adaptive.intervals import Estimate
from adaptive.policy import OperatingPoint, Policy
from adaptive.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EXITS = [ExitFigures(k, 10**7 * (k + 1), 10**7 * (k + 1), 1.0, 0.6 + k / 20, 0.9) for k in range(8)]
COUNT, CHOSEN = 12, 4
LONG = "python eval_dynamic.py --checkpoint " + "runs/" * 20 + " --note '</script><b>&amp;'"


def front_row(i):
    limits = [0.5 + i / 100 + k / 1000 for k in range(7)]
    off = (i % 7,)
    thresholds = [NOBODY if k in off else limit for k, limit in enumerate(limits)]
    policy = Policy(
        (*thresholds, EVERYBODY),
        name="search",
        off=off,
        accuracy=0.7 + i / 99,
        macs=1e7 + i,
        latency_ms=1.5 + i,
    )
    top1 = 0.7 + i / 100
    shares = [(i + 1) / 20, *[0.0] * 6, 1 - (i + 1) / 20]
    interval = Estimate(top1, top1 - 0.011, top1 + 0.012)
    return FrontRow(policy, interval, 1e7 + 5e6 * i, shares, f"{LONG} {i}")


def everything():
    """Findings with all that a page can show."""
    front = [front_row(i) for i in range(COUNT)]
    one = front[CHOSEN]
    point = OperatingPoint(one.policy, one.accuracy.value, one.macs, one.shares)
    names = ("macs", "static_accuracy", "difference", "fewer_macs", "fewer_than_all")
    about = {"name": "row 4", "reason": "the cheapest", "num_images": 5000, "static_macs": 80_000_000}
    macs = Estimate(one.macs, one.macs - 1e6, one.macs + 1e6)
    figures = {**dict.fromkeys(names, one.accuracy), "macs": macs}
    given = {"risk": "drop", "bound": 0.01, "method": "ltt", "images": 2500, "observed": 0.004}
    words = {"statement": "It drops by 1 point at most. " * 5, "assumption": "Images are alike. " * 5}
    bins = [SimpleNamespace(count=n, confidence=n / 10, accuracy=n / 11) for n in range(10)]
    return Findings(
        EXITS,
        [point] * 3,
        headline=Headline(point=point, accuracy=one.accuracy, **figures, **about),
        front=front,
        guarantee=SimpleNamespace(**given, **words, delta=0.05, smallest_bound=0.001, feasible=True),
        reliability=[SimpleNamespace(ece=0.1, auroc=0.9, bins=bins)] * 8,
        classes=[ClassRow("long_name_of_a_class" * 3, 99, [0.5] * 8, [0.125] * 8, i / 30) for i in range(30)],
    )


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests of this file."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
    if not BROWSER:
        pytest.skip("no Chromium or Chrome is installed")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=BROWSER, args=FLAGS, timeout=60_000)
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the page is."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, everything(), title="net </title>", subtitle="8 exits", facts=[("a", "b/" * 99)])
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """`visit(...)` opens the page with these options of a browser; it must load and complain of nothing."""
    wrong, contexts = [], []

    def opened(width=1100, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url == address or wrong.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


SHOWN = """() => {
    const texts = (selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent);
    const named = [...document.querySelectorAll("[data-show]")].map((one) => [one.dataset.show, one.textContent]);
    const at = (id, name) => Number(document.getElementById(id).getAttribute(name));
    const bars = [...document.querySelectorAll("[data-width]")].map((one) => one.style.width);
    return {
        ...Object.fromEntries(named), thresholds: texts("[data-threshold]"), shares: texts("[data-share]"),
        spoken: document.getElementById("slider").getAttribute("aria-valuetext"),
        widths: bars.map((width) => parseFloat(width)), x: at("marker", "cx"), y: at("marker", "cy"),
        low: at("interval", "y1"), high: at("interval", "y2"),
    };
}"""


def expected(page, i):
    """What the page shall show at stop i, by its data."""
    stop = json.loads(page.locator("#stops").text_content())[i]
    return {**stop, "widths": [float(width.rstrip("%")) for width in stop["widths"]]}


def test_the_slider_moves_by_keys_and_all_that_is_shown_moves_with_it(visit):
    page = visit()
    slider = page.get_by_role("slider", name="Cost")
    assert slider.input_value() == str(CHOSEN) and page.evaluate(SHOWN) == expected(page, CHOSEN)
    start = page.evaluate(SHOWN)
    assert start["note"] == "This is the policy chosen above."
    slider.focus()
    for key, place in {"ArrowRight": CHOSEN + 1, "End": COUNT - 1, "ArrowLeft": COUNT - 2, "Home": 0}.items():
        slider.press(key)
        now = page.evaluate(SHOWN)
        assert slider.input_value() == str(place) and now == expected(page, place)
        assert not [name for name, value in now.items() if value == start[name]], "this did not change"
    assert page.locator("#interval").get_attribute("x1") == str(now["x"])


def test_the_slider_moves_by_value_to_what_the_front_says(visit):
    page = visit()
    page.get_by_role("slider", name="Cost").fill("7")
    now, row = page.evaluate(SHOWN), front_row(7)
    assert now == expected(page, 7)
    assert now["accuracy"] == "77.00 % [75.90, 78.20]" and now["cost"].startswith("45.00 M, 1.78× fewer")
    assert now["latency"] == "8.5 ms" and now["command"] == row.command and now["thresholds"][0] == "off"
    assert now["thresholds"][1:] == ["0.571", "0.572", "0.573", "0.574", "0.575", "0.576", "all others"]
    assert now["shares"] == ["40.0 %", *["0.0 %"] * 6, "60.0 %"] and now["note"] == ""
    assert now["spoken"] == "45.00 M multiply-adds, 77.00 % top-1"
    width = "() => document.querySelector('[data-width]').getBoundingClientRect().width"
    whole = "() => document.querySelector('[data-width]').parentElement.getBoundingClientRect().width"
    assert page.evaluate(width) / page.evaluate(whole) == pytest.approx(0.4, abs=0.01)


def test_without_scripts_the_chosen_policy_is_there_and_no_slider(visit):
    page = visit(java_script_enabled=False)
    assert page.get_by_role("slider").count() == 0 and page.locator("#slider").count() == 1
    text = page.locator("main").inner_text()
    assert front_row(CHOSEN).command in text and "Moving along the front needs scripts" in text
    assert "74.00 % [72.90, 75.20]" in text


@pytest.mark.parametrize("width", [400, 1100])
def test_no_part_of_the_page_is_wider_than_the_screen(visit, width):
    page = visit(width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    page.get_by_role("slider", name="Cost").fill("11")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    outside = """(width) => [...document.querySelectorAll("section, .stop, .command, figure, dl, input")]
        .filter((one) => one.getBoundingClientRect().right > width).map((one) => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside, width) == []


COLOURS = """() => [...document.querySelectorAll("h2, p, dd, dt, th, td, code, .ends span, label")].map((one) => {
    let paper = one;
    while (getComputedStyle(paper).backgroundColor === "rgba(0, 0, 0, 0)") paper = paper.parentElement;
    return [getComputedStyle(one).color, getComputedStyle(paper).backgroundColor];
})"""


def luminance(colour):
    """Relative luminance (WCAG 2) of "rgb(1, 2, 3)"."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(visit, scheme):
    pairs = set(map(tuple, visit(color_scheme=scheme).evaluate(COLOURS)))
    assert len(pairs) > 1
    for ink, paper in pairs:
        low, high = sorted(map(luminance, (ink, paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)
        assert (luminance(paper) > 0.5) == (scheme == "light")
