"""The report of a data set: what became of each source, examples by a seed, a page that stands alone."""

from __future__ import annotations

import html.parser
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_contents import documents_of
from tiny import prep_config, write_corpus

from bertscale.config import PrepConfig, UserError
from bertscale.data.inspect import inspect
from bertscale.data.report import Lengths, histogram, page, read_report
from bertscale.data.shards import open_dataset, read_manifest
from bertscale.tokenizer import load_tokenizer
from data_prep.build import prep
from data_prep.filters.tally import DRAWS, EXAMPLES, Tally, combined, source_of


@pytest.fixture(scope="module")
def prepared(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, of one of which some documents are dropped and one line is bad."""
    folder = tmp_path_factory.mktemp("report")
    write_corpus(folder / "corpus.jsonl")
    short = [f"Short <b>text</b> {number}." for number in range(20)]
    (folder / "web").mkdir()
    lines = [json.dumps({"text": text}) for text in [*short, "The old river finds some bread. " * 9]]
    (folder / "web" / "pages.jsonl").write_text("\n".join([*lines, "no JSON"]))
    tokenizer = str(open_dataset(tiny_data).tokenizer_path)
    inputs = [str(folder / "corpus.jsonl"), str(folder / "web")]
    config = prep_config(folder, input=inputs, min_characters=40, max_bad_fraction=0.1, tokenizer=tokenizer)
    del config["train_tokenizer"]
    prep(PrepConfig.model_validate(config))
    return folder / "data"


def test_what_became_of_each_source(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = read_report(prepared)
    assert report is not None
    corpus, web = report["sources"].values()
    dropped = corpus["dropped"].get("shorter than min_characters", 0)
    assert (corpus["records"], corpus["bad"]) == (300, {})
    assert web == {"records": 22, "bad": web["bad"], "dropped": {"shorter than min_characters": 20}}
    assert sum(web["bad"].values()) == 1
    counters = read_manifest(prepared)["counters"]
    assert counters["records"] == 322
    assert counters["dropped"]["shorter than min_characters"] == dropped + 20


def test_words_are_counted(prepared: Path) -> None:
    counters = read_manifest(prepared)["counters"]
    tokenizer = load_tokenizer(open_dataset(prepared).tokenizer_path)
    splits = [open_dataset(prepared, split) for split in ("train", "validation")]
    words = [sum(int(tokenizer.starts_word[s.tokens].sum()) for s in data.shards) for data in splits]
    assert [counters["splits"][data.split]["words"] for data in splits] == words
    assert 0 < counters["words"] == sum(words) < counters["tokens"]


def test_examples_are_texts_of_the_input(prepared: Path) -> None:
    report = read_report(prepared)
    assert report is not None
    few = report["examples"]["shorter than min_characters"]
    assert len(few) == len(set(few)) == EXAMPLES
    assert len(report["examples"]["kept"]) == EXAMPLES
    assert all(len(text) < 40 for text in few)


def test_inspect_shows_it(prepared: Path) -> None:
    file = io.StringIO()
    inspect(prepared, Console(file=file, highlight=False, width=200))
    said = file.getvalue()
    report = read_report(prepared)
    assert report is not None
    for name in report["sources"]:
        assert name in said
    assert re.search(r"20 dropped: shorter than min_characters, of \S+web", said)
    assert f"  {report['examples']['shorter than min_characters'][0]}" in said
    assert re.search(r"train: \d\.\d\d tokens a word", said)


class Page(html.parser.HTMLParser):
    """Elements that are open; what a page loads; its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.bars = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}
        self.bars += tag == "rect"
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in ("rect", self.open[-1])
        if tag != "rect":
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(prepared: Path) -> None:
    content = (prepared / "report.html").read_text(encoding="utf-8")
    read = Page()
    read.feed(content)
    assert not read.open
    assert 'name="viewport"' in content
    assert "url(" not in content
    assert "http" not in content
    counters = read_manifest(prepared)["counters"]
    for number in ("documents", "sentences", "tokens", "text_bytes"):
        assert f"{counters[number]:,}" in read.text
    report = read_report(prepared)
    assert report is not None
    for texts in report["examples"].values():
        for text in texts:
            assert text in read.text  # whole, with its < and &
    assert "dropped: shorter than min_characters" in read.text
    assert read.bars >= 9


def test_the_plots_are_of_the_shards(prepared: Path) -> None:
    lengths, expected = Lengths(), []
    for split in ("train", "validation"):
        for shard in open_dataset(prepared, split).shards:
            lengths.add(shard)
            expected += [sum(map(len, document)) for _, document in documents_of(shard)]
    assert lengths.documents.tolist() == np.bincount(expected).tolist()
    bins = histogram(lengths.documents)
    assert sum(n for _, n in bins) == len(expected)
    content = (prepared / "report.html").read_text(encoding="utf-8")
    for name, n in bins:
        assert f"{' '.join(name.split())}</text>" in content
        assert f">{n:,} ({n / len(expected):.1%})<" in content


def test_a_folder_of_an_earlier_version_has_a_shorter_report(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    path = tmp_path / "data" / "report.json"
    for content, reason in ((b"{", "Expecting"), (b'{"sources": {"a": 3}}', r"sources\.a")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"report\.json is damaged: {reason}"):
            inspect(tmp_path / "data", Console(file=io.StringIO()))
    path.unlink()
    inspect(tmp_path / "data", Console(file=io.StringIO()))


def test_a_page_without_anything_left_out() -> None:
    counters: dict[str, Any] = dict.fromkeys(("documents", "sentences", "tokens", "text_bytes", "records"), 0)
    counters |= {"splits": {}, "bad": {}, "dropped": {}, "letters": {}}
    manifest = {"counters": counters, "settings": {"input": ["a & b"], "language": "en"}, "vocab_size": 300}
    read = Page()
    read.feed(page(manifest, {"sources": {}, "examples": {}}, Lengths()))
    assert not read.open
    assert "a & b" in read.text


# ------------------------------------------------------------------------------------------- tallies


def test_examples_are_the_same_wherever_the_units_end() -> None:
    """Of records that were numbered alike; and they are of all places of the input."""
    texts = [f"text {number}" for number in range(3 * DRAWS)]

    def examples(seed: int, order: list[int]) -> list[str]:
        tallies = []
        for unit in order:
            tally = Tally(seed, unit)
            for number, text in enumerate(texts):
                tally.drop("a", number, "why", f"{unit} {text}")
            tallies.append(json.loads(json.dumps(tally.content())))
        few: list[str] = combined(tallies, ["a"])["examples"]["why"]
        return few

    assert examples(0, [0, 1, 2]) == examples(0, [2, 0, 1])
    assert len(examples(0, [0, 1, 2])) == EXAMPLES
    assert examples(0, [0, 1, 2]) != examples(1, [0, 1, 2])
    units = {text.split()[0] for seed in range(12) for text in examples(seed, [0, 1, 2])}
    assert units == {"0", "1", "2"}


def test_a_file_is_of_the_entry_that_found_it() -> None:
    inputs = ("wiki", "./books/", "web/*.jsonl", "more/*")
    for name, source in {
        "wiki/AA/wiki_00": "wiki",
        "books/a.txt": "./books/",
        "web/a.jsonl": "web/*.jsonl",
        "more/folder/deep/a.txt": "more/*",
        "wikis/a": "wiki",  # of none: of the first
    }.items():
        assert source_of(name, inputs) == source
