"""Tables of records: an index, and blocks of documents."""

import csv
import json
import re
from pathlib import Path

import pytest

from experiment.results import read_results

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.compile(r"<!-- results: .*?<!-- end of results -->", re.DOTALL)
NUMBER = re.compile(r"\d{2}\.\d+")
BLOCK = "# Title\n\n<!-- results: {} {} -->\nold\n<!-- end of results -->\n\nThe end.\n"


def record(network, seed, accuracy):
    """The record of two exits of which the last has this accuracy, with a front of one policy."""
    return {
        "schema": 2,
        "provenance": {
            "network": network,
            "options": {},
            "data_set": "DIGITS",
            "num_test": 8,
            "input_size": 32,
            "confidence": "max_prob",
        },
        "origin": {
            "training": {"seed": seed},
            "made": {"commit": "abcdef0", "machine": "a CPU"},
            "model": f"{seed:08x}",
            "test": "0a7a339b",
            "files": {},
        },
        "anytime": [{"macs": 1e6, "acc1": 0.25}, {"macs": 16e6, "acc1": accuracy}],
        "front": [{"macs": 3e6, "accuracy": {"value": 0.5}, "policy": {"accuracy": 0.5}}],
    }


@pytest.fixture
def folders(tmp_path):
    """Records of two seeds of one network and of one of another, and a document; as words of a command."""
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir(), docs.mkdir()
    records = {"a-0": ("msdnet", 0, 0.8), "a-1": ("msdnet", 1, 0.9), "b-0": ("ranet", 0, 0.7)}
    for name, what in records.items():
        (results / f"{name}.json").write_text(json.dumps(record(*what)))
    (docs / "x.md").write_text(BLOCK.format("exits", "a-*"))
    return ["--results", str(results), "--docs", str(docs)], results, docs


def test_an_index_and_blocks_are_written(folders, script, capsys):
    (words, results, docs), main = folders, script("results").main
    assert main([*words, "--check", "true"]) == 1
    assert not list(results.glob("index.*")) and "old" in (docs / "x.md").read_text()
    assert main(words) == 0 and main([*words, "--check", "true"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 records, 0 of 3 files differ"
    rows = list(csv.DictReader((results / "index.csv").open()))
    assert [(row["record"], row["seed"], row["top1"]) for row in rows][1:] == [
        ("a-1", "1", "0.9"),
        ("b-0", "0", "0.7"),
    ]
    text = (docs / "x.md").read_text()
    assert (
        "| a | `msdnet` | joint | 8 | 25.00 ± 0.00 (n = 2) at 1.00 M | 85.00 ± 7.07 (n = 2) at 16.00 M |\n"
        in text
    )
    assert text.startswith("# Title\n") and text.endswith("The end.\n") and "ranet" not in text


def test_curves_are_compared_with_the_first(folders, script):
    (words, results, docs), main = folders, script("results").main
    content = record("ranet", 0, 0.7)
    content["origin"]["training"] |= {"epochs": 3, "epoch_images": 12}
    (results / "b-0.json").write_text(json.dumps(content))
    cascade = record("ebjr", 0, 0.7)
    cascade["origin"]["training"]["members"] = [
        content["origin"]["training"],
        {"epochs": 2, "epoch_images": 7},
    ]
    (results / "c-0.json").write_text(json.dumps(cascade))
    (docs / "x.md").write_text(BLOCK.format("curves", "b-* a-* c-*"))
    assert main(words) == 0
    lines = (docs / "x.md").read_text().splitlines()
    heads = "| record | images trained on | last exit, % | area, 1.00 to 16.00 M, % | within 2.52 M, % |"
    assert lines[4].startswith(heads)
    assert [line.split("|")[2] for line in lines[6:9]] == [" 36 ", " – ", " 50 "]
    assert lines[4].endswith("| within 16.00 M, % | p against b: area |")
    assert [line.split("|")[1] for line in lines[6:8]] == [" b ", " a "]
    assert "| 25.00 ± 0.00 (n = 2) | 50.00 ± 0.00 (n = 2) | 50.00 ± 0.00 (n = 2) | – |" in lines[7]


def test_the_speed_of_chosen_policies_is_a_table(folders, script, error_of):
    (words, results, docs), main = folders, script("results").main
    way = {"images_per_s": 2021.4, "p50_ms": None, "macs": 3e6, "accuracy": 0.5}
    names = "all exits", "exit 1 alone", "drop 1 %, throughput order", "drop 1 %, latency order"
    timed = {"num_images": 8, "table": [way | {"policy": name} for name in names]}
    timed["points"] = [{"point": "drop 1 %", "speedup": 2.114, "speedup_interval": [2.0, 2.25]}]
    chosen = {"name": "drop 1 %", "accuracy": {"value": 0.6}, "macs": {"value": 2e6}}
    content = record("ranet", 0, 0.7) | {"runtime": timed, "headline": chosen}
    (results / "b-0.json").write_text(json.dumps(content))
    (docs / "x.md").write_text(BLOCK.format("speed", "*"))
    assert main(words) == 0
    row = "| b | drop 1 % | 60.00 | 2.00 | 2,021 | 2,021 at 3.00 M | 2.11 [2.00, 2.25] |"
    assert (docs / "x.md").read_text().splitlines()[6:8] == [row, ""]
    (results / "b-0.json").write_text(json.dumps(content | {"headline": chosen | {"name": "budget 9 M"}}))
    said = "was timed, but is no chosen policy with images/s beside those of the last exit alone"
    assert error_of(main, *words) == f"b-0: drop 1 % {said}"


def test_mistakes_are_one_line(folders, script, error_of):
    (words, _, docs), main = folders, script("results").main
    assert error_of(main, "--results", "nowhere") == "--results nowhere: no such folder"
    (docs / "x.md").write_text(BLOCK.format("area", "*"))
    assert error_of(main, *words) == "x.md: results: area; accepted: exits, curves, speed"
    (docs / "x.md").write_text(BLOCK.format("exits", "c-*"))
    assert error_of(main, *words) == "x.md: no record is named c-*"
    assert error_of(main, *words, "--docs", "nowhere") == "--docs nowhere: no such folder"


def test_marks_must_be_in_pairs(folders, script, error_of):
    """So that no prose between a lost end and the next block is taken for a block's content."""
    (words, _, docs), main = folders, script("results").main
    block, end = BLOCK.format("exits", "a-*"), "<!-- end of results -->\n"
    for text, mark in (
        (block.replace(end, "") + block, "<!-- results: exits a-* -->"),
        (block + block.replace(end, ""), "<!-- results: exits a-* -->"),
        (block + end, end.strip()),
        (block.replace("exits a-*", "exits"), "<!-- results: exits -->"),
        (block.replace("results:", "Results:"), "<!-- Results: exits a-* -->"),
    ):
        (docs / "x.md").write_text(text)
        said = f"x.md: {mark} is no pair of <!-- results: KIND PATTERN ... --> and its end"
        assert error_of(main, *words) == said and (docs / "x.md").read_text() == text


def test_the_documents_and_the_page_are_those_of_the_records(script, capsys):
    """What this repository's results/ and docs/ hold is what scripts/results.py makes of its records."""
    assert script("results").main(["--check", "true"]) == 0, capsys.readouterr().out


def sections(text):
    """The sections of a document without blocks that scripts/results.py makes, and if each has an origin.

    That is a command and a commit. Code is left out of the text.
    """
    for section in re.split(r"^(?=## )", BLOCKS.sub("", text), flags=re.MULTILINE):
        command = re.search(r"`(python|bash) \S+|^(python|bash) \S+|`[\w/]+\.py[` ]", section, re.MULTILINE)
        commit = re.search(r"\b(at|[Cc]ommits?) [0-9a-f]{7,40}\b", section)
        yield re.sub(r"```.*?```", "", section, flags=re.DOTALL), bool(command and commit)


def unaccounted(text):
    """Lines of a document with a figure of unknown origin: rows of tables and percentages."""
    lines = [line for prose, known in sections(text) if not known for line in prose.splitlines()]
    return [line for line in lines if re.search(r"^\||\d ?%", line)]


def accuracies(section):
    """Those of two decimals: before "%", alone or in a list, and in columns that are of top-1 or accuracy."""
    for listed in re.findall(r"(?:(?<![\d.])\d{2}\.\d{2}(?:,| and| to| ±|\s)*)+(?:\d\.\d{2} )?%", section):
        yield from re.findall(r"(?<![\d.])\d{2}\.\d{2}", listed)
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, *rows = ([*map(str.strip, line.strip("|").split("|"))] for line in table.splitlines())
        columns = [i for i, title in enumerate(head) if re.search("top-1|accuracy", title)]
        for cell in (row[i] for row in rows for i in columns):
            yield from re.findall(r"\b\d{2}\.\d{2}\b", cell)


def outside_blocks(text):
    """Tables that are no block, and accuracies that no block of their section has, unless it names an origin.

    A section with blocks has no other origin than these.
    """
    for section in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        blocks = BLOCKS.findall(section)
        *_, (prose, known) = sections(section)  # before a heading there is an empty one
        if blocks:
            yield from re.findall(r"^\|.*", prose, re.MULTILINE)
            yield from set(accuracies(prose)) - set(NUMBER.findall(" ".join(blocks)))
        elif not known:
            yield from unaccounted(section)


def test_every_figure_of_the_measurements_has_an_origin():
    """Rows of tables and percentages. That a section's command printed them is not checked."""
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert not unaccounted(text)
    section = "## X\n\nIt has 81.5 % and costs 3 M.\n\n| a |\n|---|\n| 1 |\n"
    assert unaccounted(text + section) == ["It has 81.5 % and costs 3 M.", "| a |", "|---|", "| 1 |"]
    assert (
        len(unaccounted(section + "At commit f33fa3a.")) == len(unaccounted(section + "`python x.py`")) == 4
    )
    assert not unaccounted(section + "At commit f33fa3a: `python x.py --a b`.")
    assert not unaccounted("<!-- results: exits a -->\n\n| a |\n\n<!-- end of results -->\n")


def test_every_figure_of_the_results_is_in_a_block():
    """Rows of tables and accuracies, beside a section without records that names its command."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert not [*outside_blocks(text)]
    origin = "`python x.py --a b` at commit f33fa3a.\n\n"
    block = "## X\n\n<!-- results: exits a -->\n\n| 81.52 ± 0.10 |\n\n<!-- end of results -->\n\n"
    assert not [*outside_blocks(f"{block}It has 81.52 %.\n")]
    assert [*outside_blocks(f"{block}{origin}It has 81.53 %.\n\n| 1 |\n")] == ["| 1 |", "81.53"]
    assert [*outside_blocks(f"## X\n\n{origin}It has 81.53 %.\n")] == []
    assert [*outside_blocks("## X\n\nIt has 81.53 %.\n")] == ["It has 81.53 %."]


def test_accuracies_elsewhere_are_those_of_an_origin():
    """In README.md and docs/: of a section with an origin, a chosen policy, a paper, or of a block.

    The block is of the same document, or of one that the section links to.
    """
    records = [one.record for one in read_results(ROOT / "results")]
    chosen = {f"{100 * one.headline.accuracy.value:.2f}" for one in records if one.headline}
    published = {
        f"{float(n):.2f}"
        for path in ROOT.glob("results/published/*")
        for n in NUMBER.findall(path.read_text())
    }
    texts = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
    parts = [(path, *part) for path, text in texts.items() for part in sections(text)]
    known = (
        chosen
        | published
        | {figure for _, text, origin in parts if origin for figure in NUMBER.findall(text)}
    )
    blocks = {path: NUMBER.findall(" ".join(BLOCKS.findall(text))) for path, text in texts.items()}
    wild = []
    for path, text, _ in parts:
        linked = [path.parent / name for name in re.findall(r"\]\(([\w/]+\.md)", text)]
        near = known.union(*(blocks.get(one, ()) for one in (path, *linked)))
        wild += [(path.name, figure) for figure in accuracies(text) if figure not in near]
    assert not wild
    text = "It has 81.50 %, 82.50, 83.50 and\n84.50 ± 0.12 %, and 13.25 M, 4.25 times.\n"
    table = "| top-1 | M |\n|---|---|\n| 81.2 | 7 |\n| 82.25 | 10.25 |\n"
    assert [*accuracies(text + table)] == ["81.50", "82.50", "83.50", "84.50", "82.25"]
