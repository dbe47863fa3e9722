"""The page of all results: its data always, its behaviour in a browser where there is one."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path

import pytest

from experiment.published_points import read_published
from experiment.results import Result
from experiment.results_page import (
    changes,
    family_of,
    first_shown,
    front_of,
    measured_rows,
    page_of,
    published_rows,
)

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
]
EVIL = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">{{ 7*7 }}"
)


def record(seed, top1, machine="a CPU", **training):
    way = {"policy": EVIL, "images_per_s": 1234.5, "p50_ms": 2.5, "macs": 2e6, "accuracy": 0.5}
    about = {"network": "msdnet", "options": {}, "data_set": "DIGITS", "num_test": 1000}
    return {
        "schema": 2,
        "provenance": {**about, "input_size": 32, "confidence": "max_prob"},
        "origin": {
            "training": {"seed": seed, **training},
            "made": {"commit": "abcdef0123", "machine": machine},
            "model": f"{seed:08x}",
            "test": "0a7a339b",
            "files": {},
        },
        "anytime": [{"macs": 1e6, "acc1": 0.25}, {"macs": 16e6, "acc1": top1}],
        "front": [
            {"macs": 3e6, "accuracy": {"value": 0.5}, "policy": {"accuracy": 0.5}},
            {"macs": 4e6, "accuracy": {"value": 0.6}, "policy": {"accuracy": 0.6}},
        ],
        "runtime": {"num_images": 512, "table": [way]},
    }


@pytest.fixture(scope="module")
def results():
    """Two seeds of one setting, and one of another."""
    records = {"a-0": record(0, 0.8), "a-1": record(1, 0.9, machine=EVIL), "b-0": record(0, 0.7, l2w=True)}
    return [Result.of(name, content) for name, content in records.items()]


@pytest.fixture(scope="module")
def papers():
    """The published points of this repository."""
    return read_published(ROOT / "results")


def test_seeds_are_a_row_and_what_was_timed_another(results):
    rows = list(measured_rows(results))
    exits = [row for row in rows if row.kind == "exit"]
    assert [(row.regime, row.way, row.n) for row in exits] == [
        *(("joint", "exit 0", 2), ("joint", "exit 1", 2)),
        *(("L2W", "exit 0", 1), ("L2W", "exit 1", 1)),
    ]
    assert exits[1].top1 == pytest.approx(85) and exits[1].std == pytest.approx(7.0711, abs=1e-4)
    assert exits[3].std is None and exits[3].source == "commit abcdef0" and exits[3].images == 1000
    timed = [row for row in rows if row.kind == "point"]
    assert [(row.ms, row.images_per_s, row.way) for row in timed] == [(2.5, 1234.5, EVIL)] * 3
    assert [row.source.endswith(EVIL) for row in timed] == [False, True, False]
    assert {(row.record, row.origin) for row in rows} == {("a", "."), ("b", ".")}
    assert first_shown(rows) == {"data_set": "DIGITS", "origin": "."} and first_shown([]) == {}
    assert not any(row.published for row in rows)


def test_a_front_is_what_is_reached_within_a_cost_by_the_mean_training(results):
    first, second = ([*front_of([one])] for one in results[:2])
    assert (first[0], first[-1]) == ((3e6, 0.5), (4e6, 0.6)) and len(first) == 31
    cheaper = record(1, 0.9)
    cheaper["front"][0] |= {"macs": 2e6, "policy": {"accuracy": 0.9}, "accuracy": {"value": 0.4}}
    both = [*front_of([results[0], Result.of("a-1", cheaper)])]
    assert both[0] == (3e6, pytest.approx(0.45)) and both[-1] == (4e6, pytest.approx(0.5))
    assert [macs for macs, _ in both] == [macs for macs, _ in first] and second == first
    assert not [*front_of([results[0], Result.of("a-1", cheaper | {"front": []})])]


def test_every_paper_is_published_and_has_a_source(papers):
    rows = list(published_rows(papers))
    assert {row.family for row in rows} == {"msdnet", "ranet", "dyn_perceiver", "rexnet", "ebjr"}
    assert all(row.published and row.n is None and row.url for row in rows)
    assert all(row.source.startswith("published: ") and "cost: " in row.source for row in rows)
    assert {row.data_set for row in rows} == {"CIFAR10", "CIFAR100", "IMNET"}
    assert all(" latency on " in row.source for row in rows if row.ms)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "measured"}, "label: Input should be 'published', not 'measured'"),
        ({"url": "javascript:alert(1)"}, "url: .*, not 'javascript:alert.1.'"),
        ({"curves": []}, "curves: .* at least 1 item"),
        ({"paper": None}, "paper: .* valid string, not None"),
    ],
)
def test_what_is_no_paper_is_refused_in_one_line(tmp_path, change, said):
    content = json.loads((ROOT / "results" / "published" / "ranet.json").read_text())
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "x.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=f"x.json is no published results: {said}"):
        read_published(tmp_path)


@pytest.mark.parametrize(
    ("network", "file"),
    [
        ("reg800m_perceiver_t128", "dyn_perceiver"),
        ("boosted/msdnet_cifar_lin5", "msdnet"),
        ("timm/resnet18", "timm"),
        ("someone-else", "someone-else"),
    ],
)
def test_the_family_is_the_file_of_a_network(network, file):
    assert family_of(network) == file


class Tags(HTMLParser):
    """The tags of a page, and the names of their attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_the_data_say_only_what_changes(results, papers):
    rows = [*measured_rows(results), *published_rows(papers)]
    found = list(accumulate(changes(rows), lambda before, changed: before | changed))
    assert [row["top1"] for row in found] == pytest.approx([row.top1 for row in rows], rel=1e-5)
    assert [(row["curve"], row["way"], row["n"]) for row in found] == [
        (row.curve, row.way, row.n) for row in rows
    ]
    lines = list(zip(rows, changes(rows), strict=True))[1:]
    assert all(
        changed.keys() <= {"macs", "top1", "kind", "way", "std", "n"}
        for row, changed in lines
        if row.kind == "front"
    )


def test_the_page_loads_nothing_and_its_data_are_text(results, papers):
    page, found = page_of(results, papers), Tags()
    found.feed(page)
    assert found.tags.count("script") == 2 and not {"img", "link", "iframe", "object"} & set(found.tags)
    assert not [
        name for name in found.attributes if name.startswith("on") or name in ("src", "srcset", "style")
    ]
    assert not re.search(r"@import|url\(|fetch\(|innerHTML", page)
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert EVIL in {row.get("way") for row in json.loads(data)} and "NaN" not in data
    assert page == page_of(results, papers)


@pytest.fixture(scope="module")
def visit(results, papers, tmp_path_factory):
    """`visit(...)` opens the page with these options of a browser; it must complain of nothing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
    if not BROWSER:
        pytest.skip("no Chromium or Chrome is installed")
    path, wrong = tmp_path_factory.mktemp("page") / "index.html", []
    path.write_text(page_of(results, papers), encoding="utf-8")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=FLAGS, timeout=60_000)

        def opened(width=1100, **options):
            page = browser.new_context(viewport={"width": width, "height": 800}, **options).new_page()
            page.on("console", lambda message: wrong.append(message.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: request.url == path.as_uri() or wrong.append(request.url))
            page.goto(path.as_uri())
            return page

        yield opened
        browser.close()
    assert not wrong


COLUMN = """(place) => [...document.querySelectorAll("#table tbody tr")].filter((row) => !row.hidden)
    .map((row) => row.cells[place].textContent)"""


def test_rows_are_filtered_and_sorted_with_the_keyboard(visit):
    page = visit()
    assert page.title() == "Results" and page.locator("#filters select").count() == 4
    assert page.locator("select[data-field=data_set]").input_value() == "DIGITS"
    tops = page.evaluate(COLUMN, 6)
    assert sorted(tops) == ["25.00", "25.00 ± 0.00", "50.00", "50.00", "50.00", "70.00", "85.00 ± 7.07"]
    head = page.locator("th[data-field=top1]")
    for direction, first in (("ascending", "25.00 ± 0.00"), ("descending", "85.00 ± 7.07")):
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == direction and page.evaluate(COLUMN, 6)[0] == first
    assert [cell.split("/")[0] for cell in page.evaluate(COLUMN, 0)] == ["."] * 7
    page.locator("th[data-field=ms] button").press("Space")
    assert page.evaluate(COLUMN, 9)[:3] == ["2.50"] * 3 and head.get_attribute("aria-sort") is None
    page.locator("select[data-field=regime]").select_option("L2W")
    assert page.locator("#count").text_content().startswith("3 of ")
    assert page.evaluate(COLUMN, 4)[0] == EVIL and page.title() == "Results"


def test_published_points_are_hollow_and_named_so(visit):
    page = visit()
    filled = "#cost > svg circle:not([fill='var(--card)'])"
    assert page.locator("#cost > svg circle").count() == page.locator(filled).count() == 4
    assert page.locator("#cost > svg polyline.front").count() == 2
    assert page.locator("#latency > svg circle").count() == 3
    page.locator("select[data-field=data_set]").select_option("IMNET")
    assert page.locator(filled).count() == 0 < page.locator("#cost > svg circle").count()
    names = page.locator("#cost li").all_text_contents()
    assert page.locator("#cost summary").text_content() == f"{len(names)} curves"
    assert (
        len(names) > 12
        and not page.locator("#cost li").first.is_visible()
        and all(name.endswith(" (published)") for name in names)
    )
    page.locator("#published").uncheck()
    assert "Nothing" in page.locator("#cost").text_content() and page.locator("#cost svg").count() == 0


def test_it_fits_a_narrow_screen_in_the_dark_and_needs_no_scripts(visit):
    page = visit(360, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    still = visit(java_script_enabled=False)
    assert still.locator("#table tbody tr").count() > 100 and still.locator("noscript p").is_visible()
