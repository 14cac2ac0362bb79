"""Prep gives the same bytes for any number of workers and after any crash, and bad input costs one record."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertscale.config import PrepConfig, UserError, check_config
from bertscale.shards import open_dataset
from bertscale.tokenizer import Tokenizer
from data_prep.build import prep
from data_prep.clean import clean
from data_prep.read import Bad, Part, cut_into_splits, find_files, read_records
from data_prep.segment import split_sentences
from data_prep.train_tokenizer import draw_sample

TEXT = "the a red blue old new house tree river runs sings over under with and some many green stone"
WORDS = TEXT.split()


def make_documents(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [
        " ".join(
            " ".join(generator.choices(WORDS, k=generator.randint(3, 12))).capitalize() + "."
            for _ in range(generator.randint(1, 6))
        )
        for _ in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def config_for(tmp_path: Path, **changes: Any) -> PrepConfig:
    values = {
        "input": [str(tmp_path / "input")],
        "output": str(tmp_path / "output"),
        "train_tokenizer": {"vocab_size": 320, "sample_documents": 100},
        "split_bytes": 8_000,
        "validation_fraction": 0.1,
        "workers": 1,
    }
    return check_config(PrepConfig, values | changes, "test")


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files of jsonl and one of text, in a folder with an inner one."""
    documents = make_documents(300)
    inner = tmp_path / "input" / "inner"
    inner.mkdir(parents=True)
    write_jsonl(tmp_path / "input" / "a.jsonl", documents[:150])
    write_jsonl(inner / "b.jsonl", documents[150:200])
    (inner / "c.txt").write_text("\n\n".join(documents[200:]))
    return tmp_path


def test_bytes_do_not_depend_on_the_workers(corpus: Path) -> None:
    one = prep(config_for(corpus, output=str(corpus / "one"), workers=1))
    two = prep(config_for(corpus, output=str(corpus / "two"), workers=2))
    assert bytes_of(corpus / "one") == bytes_of(corpus / "two")
    assert one["documents"] == two["documents"] == 300
    train, validation = (
        open_dataset(corpus / "one", split, verify=True) for split in ("train", "validation")
    )
    assert len(train.shards) > 3
    assert train.num_documents + validation.num_documents == 300
    assert 10 <= validation.num_documents <= 60
    assert one["tokens"] == train.num_tokens + validation.num_tokens


def test_the_shards_hold_the_text(corpus: Path) -> None:
    prep(config_for(corpus))
    expected = sorted(make_documents(300))
    found = []
    tokenizer = Tokenizer.load(corpus / "output" / "tokenizer.model")
    for split in ("train", "validation"):
        for shard in open_dataset(corpus / "output", split).shards:
            for row in range(len(shard.documents)):
                ids = shard.tokens[shard.token_offsets[row] : shard.token_offsets[row + 1]]
                lengths = shard.sentence_lengths[
                    shard.sentence_offsets[row] : shard.sentence_offsets[row + 1]
                ]
                sentences = np.split(ids, np.cumsum(lengths)[:-1])
                found.append(" ".join(tokenizer.decode(sentence.tolist()) for sentence in sentences))
                assert len(sentences) == found[-1].count(".")
    assert sorted(found) == expected


def test_a_finished_output_is_used_again(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = prep(config_for(corpus))
    before = {path.name: path.stat().st_mtime_ns for path in (corpus / "output").iterdir() if path.is_file()}
    again = prep(config_for(corpus, workers=2, max_bad_fraction=0.5))
    assert "already prepared" in capsys.readouterr().out
    assert (first["reused"], again["reused"]) == (False, True)
    assert again["tokens"] == first["tokens"]
    after = {path.name: path.stat().st_mtime_ns for path in (corpus / "output").iterdir() if path.is_file()}
    assert before == after


def test_damage_is_mended_by_the_same_command(corpus: Path) -> None:
    prep(config_for(corpus))
    whole = bytes_of(corpus / "output")
    for name in ("train-00001.arrow", "tokenizer.model"):
        path = corpus / "output" / name
        path.write_bytes(path.read_bytes()[:-10])
        assert prep(config_for(corpus))["reused"] is False
        assert bytes_of(corpus / "output") == whole


def test_changed_settings_or_input_start_over(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prep(config_for(corpus))
    smaller = prep(config_for(corpus, split_bytes=20_000))
    assert "the setting split_bytes changed" in capsys.readouterr().out
    names = {shard["name"] for shard in open_dataset(corpus / "output").manifest["shards"]}
    assert {path.name for path in (corpus / "output").glob("*.arrow")} == names
    (corpus / "input" / "a.jsonl").unlink()
    fewer = prep(config_for(corpus, split_bytes=20_000))
    assert "the input changed" in capsys.readouterr().out
    assert fewer["documents"] == smaller["documents"] - 150


def test_a_given_tokenizer_is_copied(corpus: Path) -> None:
    prep(config_for(corpus))
    given = corpus / "output" / "tokenizer.model"
    prep(config_for(corpus, output=str(corpus / "other"), tokenizer=str(given)))
    assert bytes_of(corpus / "other")["tokenizer.model"] == given.read_bytes()
    arrow = {name: data for name, data in bytes_of(corpus / "output").items() if name.endswith(".arrow")}
    assert arrow.items() <= bytes_of(corpus / "other").items()


def test_files_of_others_are_not_overwritten(corpus: Path) -> None:
    prep(config_for(corpus))
    own = corpus / "output" / "tokenizer.model"
    with pytest.raises(UserError, match=r"tokenizer\.model is prep's own output"):
        prep(config_for(corpus, tokenizer=str(own)))
    (corpus / "other").mkdir()
    (corpus / "other" / "train-00000.arrow").write_text("precious")
    with pytest.raises(UserError, match=r"other holds train-00000\.arrow, which this prep did not write"):
        prep(config_for(corpus, output=str(corpus / "other")))
    assert (corpus / "other" / "train-00000.arrow").read_text() == "precious"


def start_prep(folder: Path, output: str) -> subprocess.Popen[str]:
    config = config_for(folder, output=str(folder / output), workers=2)
    (folder / "prep.yaml").write_text(json.dumps(config.model_dump()))
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", str(folder / "prep.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)


def test_killed_and_run_again_gives_the_same_bytes(corpus: Path) -> None:
    write_jsonl(corpus / "input" / "more.jsonl", make_documents(12_000, seed=1))
    prep(config_for(corpus, output=str(corpus / "whole"), workers=2))
    output = corpus / "killed"
    for pattern in (".prep/sample-*.txt", ".prep/split-00003.json"):
        process = start_prep(corpus, "killed")
        wait_for(pattern, output, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()  # returns only when the workers, who hold the pipe too, are gone
        assert not (output / "manifest.json").exists()
        with pytest.raises(UserError, match="prep did not finish here"):
            open_dataset(output)
    finished = {path.name: path.stat().st_mtime_ns for path in (output / ".prep").glob("split-*.json")}
    assert finished
    process = start_prep(corpus, "killed")
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "splits are finished and kept" in text
    assert all((output / ".prep" / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert bytes_of(output) == bytes_of(corpus / "whole")


def test_a_dead_worker_and_ctrl_c_end_the_run(corpus: Path) -> None:
    write_jsonl(corpus / "input" / "more.jsonl", make_documents(12_000, seed=1))
    process = start_prep(corpus, "output")
    wait_for("output/.prep/split-*.json", corpus, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    text, _ = process.communicate()
    assert process.returncode == 2, text
    assert "a prep worker was killed" in text
    assert "Traceback" not in text

    (corpus / "output" / "manifest.json").unlink(missing_ok=True)
    for record in (corpus / "output" / ".prep").glob("split-*.json"):
        record.unlink()
    process = start_prep(corpus, "output")
    wait_for("output/.prep/split-*.json", corpus, process)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 130, text
    assert "the same command continues, finished splits are kept" in text
    assert "Traceback" not in text


# ----------------------------------------------------------------------------------------- bad input

BAD_LINES = [
    (b'{"text": "broken \xff byte"}', "invalid UTF-8"),
    (b'{"text": "no end', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'["a list"]', "not a JSON object"),
    (b'{"body": "another field"}', "no field 'text'"),
    (b'{"text": null}', "field 'text' is null"),
    (b'{"text": 5}', "field 'text' is not a string"),
    (b'{"text": "a lone \\ud800 surrogate"}', "lone surrogate"),
    (b'{"text": "  \\n "}', "blank"),
    (b"", "blank"),
]


def test_bad_records_are_counted_by_reason(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = corpus / "input" / "z.jsonl"
    bad.write_bytes(b"".join(line + b"\n" for line, _ in BAD_LINES) + b'{"text": "A last good one."}')
    with pytest.raises(UserError, match=r"10 of 311 records cannot be read, more than max_bad_fraction=0.01"):
        prep(config_for(corpus))
    assert not (corpus / "output" / "manifest.json").exists()
    summary = prep(config_for(corpus, max_bad_fraction=0.05))
    counts: dict[str, int] = {}
    for _, reason in BAD_LINES:
        counts[reason] = counts.get(reason, 0) + 1
    assert summary["bad"] == counts
    assert (summary["records"], summary["documents"]) == (311, 301)
    output = capsys.readouterr().out
    assert "splits are finished and kept" in output
    assert f"1 bad: invalid UTF-8 ({bad}, byte 0)" in output


def test_short_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    write_jsonl(tmp_path / "input" / "a.jsonl", [*make_documents(50), "Short.", "\x00\x07"])
    summary = prep(config_for(tmp_path, min_characters=10))
    assert summary["dropped"] == {
        "shorter than min_characters": 1,
        "nothing but white space and control characters": 1,
    }
    assert summary["documents"] == 50


def test_input_that_cannot_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    with pytest.raises(UserError, match="there is no file, folder or match for"):
        prep(config_for(tmp_path))
    folder.mkdir()
    with pytest.raises(UserError, match=r"has no \.jsonl or \.txt files"):
        prep(config_for(tmp_path))
    (folder / "a.jsonl").touch()
    with pytest.raises(UserError, match="every file is empty"):
        prep(config_for(tmp_path))
    (folder / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no readable document"):
        prep(config_for(tmp_path))
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"a\.parquet is neither"):
        prep(config_for(tmp_path, input=[str(tmp_path / "a.parquet")]))
    (tmp_path / "output.txt").touch()
    write_jsonl(folder / "a.jsonl", make_documents(5))
    with pytest.raises(UserError, match="cannot make the folder"):
        prep(config_for(tmp_path, output=str(tmp_path / "output.txt")))


# ------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("split_bytes", [1, 7, 50, 200, 10_000])
def test_cuts_fall_between_documents(tmp_path: Path, split_bytes: int) -> None:
    texts = [f"first line {i}\nsecond line é {i}" for i in range(30)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    separators = ["\n\n", "\n \t\n", "\n\n\n\n"]
    content = "\n" + "".join(text + separators[i % 3] for i, text in enumerate(texts))
    (tmp_path / "b.txt").write_bytes(content.encode())
    files = find_files([str(tmp_path)])
    splits = cut_into_splits(files, split_bytes)
    records = [record for parts in splits for part in parts for record in read_records(part, "text")]
    assert [r.strip() for r in records if isinstance(r, str)] == texts + texts
    assert not any(isinstance(record, Bad) for record in records)
    assert all(parts for parts in splits)
    if split_bytes <= 50:
        assert len(splits) >= 30


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffHello.\r\n\r\nBye.".encode())
    records = list(read_records(Part(str(path), 0, path.stat().st_size), "text"))
    assert [str(record).strip() for record in records] == ["Hello.", "Bye."]


def test_inputs_are_found_once_and_in_order(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jsonl", "a.txt", "c.csv", ".hidden/a.txt", ".b.txt"):
        (tmp_path / name).write_text("x")
    files = find_files([str(tmp_path / "*.jsonl"), str(tmp_path)])
    assert [Path(file.name).name for file in files] == ["b.jsonl", "a.txt"]


def test_clean_keeps_paragraphs() -> None:
    assert clean("One\nline.\r\n \r\n\r\nNext\tone. ", 1) == ("One line.\nNext one.", "")
    assert clean("  \n", 1)[1]
    assert clean("abc", 4) == ("", "shorter than min_characters")


def test_the_sample_is_uniform_and_repeatable() -> None:
    documents = [str(number) for number in range(40)]
    assert draw_sample(documents, 100, "0") == documents
    assert (
        draw_sample(documents, 10, "0") == draw_sample(documents, 10, "0") != draw_sample(documents, 10, "1")
    )
    drawn = [int(text) for seed in range(400) for text in draw_sample(documents, 10, str(seed))]
    counts = np.bincount(drawn, minlength=40)
    assert counts.sum() == 4000
    assert 60 < counts.min() <= counts.max() < 140  # 100 expected, standard deviation 8.7


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. Smith paid 3.50 dollars.", "(He was late.)", "Why?"],
        ["It works, e.g. In this case.", "See Fig. 3 for more."],
        ["J. R. Smith left.", "He came from the U.S.", "The end."],
        ["He lives near the U.S. Army base."],
        ['He said "No."', "Then he left."],
        ["1. Introduction to it.", "It begins."],
        ["Use version 1.2.", "`Next` is new…", "And so!", "“Quoted.”", "Done"],
        ["No. 5 is alive.", "She said no.", "He left at 5 p.m.", "The rest followed."],
        ["Apples, pears, etc. are fruit.", "Apples, pears, etc.", "These are fruit."],
        ["Smith et al. (2019) found it.", "In Jan. 2020 it rained."],
        ["What?!", "Really...", "Yes."],
        ["It was Éric.", "Élan is a word."],
    ],
)
def test_sentences(sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences)) == sentences


def test_sentences_lose_no_text() -> None:
    text = 'A title\nOne (two.) Three. "Four." five. Mr. X. 3.5 is Six! [Seven.] e.g. Eight\nEnd.'
    assert "".join(split_sentences(text)).replace(" ", "") == text.replace(" ", "").replace("\n", "")
