"""Prep gives the same bytes for any number of workers and after any crash, and bad input costs one record."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertscale.config import PrepConfig, UserError, check_config
from bertscale.data.shards import open_dataset
from bertscale.tokenizer import load_tokenizer
from data_prep import build, encode
from data_prep import plan as plan_module
from data_prep.build import prep, prep_finish, prep_share, prep_tokenizer
from data_prep.encode import Batch, Encoded
from data_prep.plan import Plan
from data_prep.readers.read import find_files
from data_prep.readers.records import LONGEST
from data_prep.workers import map_in_order

TEXT = "the a red blue old new house tree river runs sings over under with and some many green stone"
WORDS = TEXT.split()


def make_documents(count: int, seed: int = 0) -> list[str]:
    """All of them different."""
    generator = random.Random(seed)
    return [
        " ".join(
            " ".join(generator.choices(WORDS, k=generator.randint(3, 12))).capitalize() + "."
            for _ in range(generator.randint(1, 6))
        )
        + f" Number {number} of {seed}."
        for number in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def config_for(tmp_path: Path, **changes: Any) -> PrepConfig:
    values = {
        "input": [str(tmp_path / "input")],
        "output": str(tmp_path / "output"),
        "train_tokenizer": {"vocab_size": 320, "sample_documents": 100},
        "split_bytes": 8_000,
        "shard_bytes": 20_000,
        "validation_fraction": 0.1,
        "workers": 1,
    }
    return check_config(PrepConfig, values | changes, "test")


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def texts_of(folder: Path, split: str) -> dict[int, str]:
    """The text of each document, in the order of the shards."""
    tokenizer, texts = load_tokenizer(folder / "tokenizer.model"), dict[int, str]()
    for shard in open_dataset(folder, split, verify=True).shards:  # type: ignore[arg-type]
        for row, document in enumerate(shard.documents.tolist()):
            ids = shard.tokens[shard.token_offsets[row] : shard.token_offsets[row + 1]]
            lengths = shard.sentence_lengths[shard.sentence_offsets[row] : shard.sentence_offsets[row + 1]]
            sentences = np.split(ids, np.cumsum(lengths)[:-1])
            texts[document] = " ".join(tokenizer.decode(sentence.tolist()) for sentence in sentences)
            assert len(sentences) == texts[document].count(".")
    return texts


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
    summaries = {n: prep(config_for(corpus, output=str(corpus / str(n)), workers=n)) for n in (1, 2, 7)}
    assert bytes_of(corpus / "1") == bytes_of(corpus / "2") == bytes_of(corpus / "7")
    assert [summary["documents"] for summary in summaries.values()] == [300] * 3
    train, validation = (open_dataset(corpus / "1", split, verify=True) for split in ("train", "validation"))
    assert len(train.shards) > 3
    assert 10 <= validation.num_documents <= 60
    assert not list((corpus / "1" / ".prep").glob("*.spill"))


# ------------------------------------------------------------------- fewer work units than processes


@pytest.fixture
def one_unit(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All of the input in one work unit, with bad, dropped and double records, and many small batches."""
    lines = [
        json.dumps({"text": text}) for text in (*make_documents(40), "short", *make_documents(9, seed=1))
    ]
    (corpus / "input" / "d.jsonl").write_text("\n".join([*lines, "[]", lines[-1], "no JSON"]))
    monkeypatch.setattr(build, "BYTES_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 3_000)
    return corpus


def config_of_one_unit(folder: Path, output: str, **changes: Any) -> PrepConfig:
    values = {"split_bytes": 2**20, "min_characters": 20, "max_bad_fraction": 0.1, "workers": 2} | changes
    return config_for(folder, output=str(folder / output), **values)


def after_batches(count: int, event: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls `event` when `count` batches are encoded; returns how many are, a figure that rises."""
    batches = {"encoded": 0}

    def watched(
        pool: ProcessPoolExecutor, ahead: int, function: Callable[[Batch], Encoded], rest: Iterable[Batch]
    ) -> Iterator[Encoded]:
        for result in map_in_order(pool, ahead, function, rest):
            batches["encoded"] += 1
            if batches["encoded"] == count:
                event()
            yield result

    monkeypatch.setattr(build, "map_in_order", watched)
    return batches


def test_processes_share_a_single_unit(one_unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = after_batches(0, list, monkeypatch)
    summary = prep(config_of_one_unit(one_unit, "1", workers=1))
    assert batches["encoded"] == 0
    assert summary["bad"] == {"broken JSON": 1, "not a JSON object": 1}
    assert summary["dropped"] == {"duplicate": 41, "shorter than min_characters": 1}
    for workers in (2, 4):
        batches["encoded"] = 0
        assert prep(config_of_one_unit(one_unit, str(workers), workers=workers))["documents"] == 309
        assert batches["encoded"] > 10
        assert bytes_of(one_unit / str(workers)) == bytes_of(one_unit / "1")


def test_text_that_is_not_worth_another_process(one_unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = after_batches(0, list, monkeypatch)
    monkeypatch.setattr(build, "BYTES_WORTH_A_PROCESS", 100_000)
    prep(config_of_one_unit(one_unit, "small"))
    assert batches["encoded"] == 0


def test_a_single_unit_that_is_stopped(one_unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_a_worker() -> None:
        multiprocessing.active_children()[0].kill()

    def interrupt() -> None:
        raise KeyboardInterrupt

    config = config_of_one_unit(one_unit, "stopped")
    after_batches(3, kill_a_worker, monkeypatch)
    with pytest.raises(UserError, match="a prep worker was killed"):
        prep(config)
    after_batches(3, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prep(config)
    left = {path.name for path in (one_unit / "stopped" / ".prep").iterdir()}
    assert left == {"inputs.json", "lock", "plan.json", "tokenizer.json"}
    prep(config)
    prep(config_of_one_unit(one_unit, "whole"))
    assert bytes_of(one_unit / "stopped") == bytes_of(one_unit / "whole")


# ------------------------------------------------------------------------------ what is in the output


def test_the_manifest_counts_what_is_in_the_shards(corpus: Path) -> None:
    summary = prep(config_for(corpus))
    counters = open_dataset(corpus / "output").manifest["counters"]
    for split in ("train", "validation"):
        texts = texts_of(corpus / "output", split)
        dataset = open_dataset(corpus / "output", split)
        starts_word = load_tokenizer(dataset.tokenizer_path).starts_word
        assert counters["splits"][split] == {
            "documents": len(texts),
            "sentences": sum(text.count(".") for text in texts.values()),
            "tokens": dataset.num_tokens,
            "text_bytes": sum(len(text.encode()) for text in texts.values()),
            "unknown": 0,
            "single_bytes": 0,
            "words": sum(int(starts_word[shard.tokens].sum()) for shard in dataset.shards),
        }
    letters = sum(character.isalpha() for text in make_documents(300) for character in text)
    assert counters["letters"] == {"latin": letters}
    for key in ("documents", "sentences", "tokens", "text_bytes", "unknown", "single_bytes"):
        assert counters[key] == summary[key] == sum(some[key] for some in counters["splits"].values())
    assert (counters["records"], counters["bad"], counters["dropped"]) == (300, {}, {})


def test_the_shards_hold_the_text(corpus: Path) -> None:
    prep(config_for(corpus))
    found = [
        text for split in ("train", "validation") for text in texts_of(corpus / "output", split).values()
    ]
    assert sorted(found) == sorted(make_documents(300))


def test_documents_are_shuffled_across_work_units(corpus: Path) -> None:
    prep(config_for(corpus))
    shards = open_dataset(corpus / "output").shards
    units = {int(number) >> 32 for shard in shards for number in shard.documents}
    assert len(units) > 4
    for shard in shards:
        assert len({int(number) >> 32 for number in shard.documents}) >= len(units) // 2
    order = [int(number) for shard in shards for number in shard.documents]
    ranks = np.argsort(np.argsort(order))
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.25  # standard deviation 0.06
    prep(
        config_for(corpus, output=str(corpus / "other"), seed=1, tokenizer=f"{corpus}/output/tokenizer.model")
    )
    other = [int(n) for shard in open_dataset(corpus / "other").shards for n in shard.documents]
    assert sorted(other) == sorted(order)
    assert other != order


def test_a_document_that_is_cut_lies_in_one_split(tmp_path: Path) -> None:
    """Eight of them in two parts each; were those told apart by their own texts, half would be divided."""
    folder = tmp_path / "input"
    folder.mkdir()
    for number in range(8):
        sentences = random.Random(number).choices(make_documents(50, seed=number), k=20_000)
        text = " ".join(sentences)[: LONGEST * 5 // 4]
        (folder / f"{number}.txt").write_text(text)
    config = config_for(
        tmp_path, documents="file", validation_fraction=0.5, split_bytes=2**24, shard_bytes=2**24, workers=2
    )
    assert prep(config)["documents"] == 16
    numbers = [
        {
            int(document)
            for shard in open_dataset(tmp_path / "output", split).shards
            for document in shard.documents
        }
        for split in ("train", "validation")
    ]
    assert all(len(some) >= 2 for some in numbers)
    for some in numbers:  # the parts of a document have numbers side by side, the first an even one
        assert {number ^ 1 for number in some} == some


def test_the_same_text_is_kept_once(corpus: Path) -> None:
    """Across files, across work units and inside one; of several the first stays."""
    documents = make_documents(300)
    (corpus / "input" / "z.txt").write_text("\n\n".join(documents[::3] + documents[::3] + ["A new one."]))
    summary = prep(config_for(corpus))
    assert (summary["documents"], summary["dropped"]) == (301, {"duplicate": 200})
    kept = {
        number: text
        for split in ("train", "validation")
        for number, text in texts_of(corpus / "output", split).items()
    }
    assert sorted(kept.values()) == sorted([*documents, "A new one."])
    [new] = [number for number, text in kept.items() if text == "A new one."]
    assert new == max(kept)
    everything = prep(config_for(corpus, deduplicate=False, output=str(corpus / "all")))
    assert (everything["documents"], everything["dropped"]) == (501, {})


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
    for name in ("train-00001.arrow", "validation-00000.arrow", "tokenizer.model", "manifest.json"):
        path = corpus / "output" / name
        path.write_bytes(path.read_bytes()[:-10])
        assert prep(config_for(corpus))["reused"] is False
        assert bytes_of(corpus / "output") == whole


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files below `folder`, but for the lock, with their times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_changed_settings_or_input_delete_nothing(corpus: Path) -> None:
    prep(config_for(corpus))
    before = everything_in(corpus / "output")
    changed: list[tuple[dict[str, Any], str]] = [
        ({"train_tokenizer": {"vocab_size": 321, "sample_documents": 100}}, "vocab_size: 320 -> 321"),
        ({"split_bytes": 20_000, "min_letters": 0.1}, "min_letters: 0.0 -> 0.1; split_bytes: 8000 -> 20000"),
        ({"tokenizer": str(corpus / "copy.model")}, r"tokenizer: trained -> .*copy\.model"),
        ({"input": [str(corpus / "input/inner")]}, r"input: 1 file gone \(.*a\.jsonl\)"),
    ]
    shutil.copy(corpus / "output" / "tokenizer.model", corpus / "copy.model")
    for changes, said in changed:
        for part in (prep, prep_tokenizer):
            with pytest.raises(UserError, match=f"holds a finished data set of other settings or .*{said}"):
                part(config_for(corpus, **changes))
    (corpus / "input" / "a.jsonl").write_text((corpus / "input" / "a.jsonl").read_text().replace("a", "b", 1))
    with pytest.raises(UserError, match=r"input: 1 file changed \(.*a\.jsonl\)\), and nothing was changed"):
        prep(config_for(corpus))
    assert everything_in(corpus / "output") == before


def test_the_same_input_otherwise_named_or_touched_is_the_same(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prep(config_for(corpus, tokenizer=None))
    before = bytes_of(corpus / "output")
    monkeypatch.chdir(corpus)
    for name in ("input", "./input", "input/../input/"):
        assert prep(config_for(corpus, input=[name]))["reused"]
    os.utime(corpus / "input" / "a.jsonl")
    assert prep(config_for(corpus))["reused"]
    with monkeypatch.context() as patched:  # the new time is kept: the file is not read for it again
        patched.setattr(plan_module, "file_digest", None)
        assert prep(config_for(corpus))["tokens"] == first["tokens"]
    assert bytes_of(corpus / "output") == before


def test_a_plan_of_an_earlier_version_is_known(corpus: Path) -> None:
    """It names files as the user did, and has their times instead of digests."""
    prep(config_for(corpus))
    path = corpus / "output" / ".prep" / "plan.json"
    plan = json.loads(path.read_text())
    for entry, file in zip(plan["files"], find_files([str(corpus / "input")]), strict=True):
        del entry["digest"], entry["kind"]
        entry |= {"name": file.name, "mtime_ns": file.mtime_ns, "named": False}
    path.write_text(json.dumps(plan))
    (corpus / "output" / ".prep" / "inputs.json").unlink()
    assert prep(config_for(corpus))["reused"]
    os.utime(corpus / "input" / "a.jsonl")
    with pytest.raises(UserError, match=r"input: 1 file changed"):
        prep(config_for(corpus))


def test_a_data_set_is_replaced_at_the_end_of_the_new_one(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped at any moment, the old one is whole or the new one is, and the same command goes on."""
    output, new = corpus / "output", config_for(corpus, split_bytes=20_000, shard_bytes=50_000)
    prep(config_for(corpus, max_bad_fraction=0.5))
    old = bytes_of(output)
    (output / "notes.txt").write_text("of others")
    monkeypatch.setattr(build, "take_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prep(new, replace=True)
    assert bytes_of(output) == old | {"notes.txt": b"of others"}
    monkeypatch.undo()
    prep(config_for(corpus, output=str(corpus / "whole"), split_bytes=20_000, shard_bytes=50_000))
    whole = bytes_of(corpus / "whole")
    # Stopped after each step of the exchange.
    moves = 0
    while True:
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop_after(moves, os.replace))
            patched.setattr(os, "rename", stop_after(moves, os.rename))
            try:
                assert prep(new, replace=True)["reused"]
                break
            except KeyboardInterrupt:
                moves += 1
    assert moves > 2
    assert bytes_of(output) == whole | {"notes.txt": b"of others"}
    assert not (output / ".replacement").exists()
    assert "stays until the new one is finished" in capsys.readouterr().out
    assert prep(new)["reused"]


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def stop_after(count: int, function: Callable[..., None]) -> Callable[..., None]:
    """`function`, which is interrupted at each call after `count` of them that move a new file."""
    calls = [0]

    def limited(source: Any, target: Any) -> None:
        if ".replacement" in str(source) and ".tmp-" not in str(source):
            calls[0] += 1
            if calls[0] > count:
                raise KeyboardInterrupt
        function(source, target)

    return limited


def test_unfinished_work_is_replaced_at_once_but_only_when_that_is_said(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prep_tokenizer(config_for(corpus))
    before = everything_in(corpus / "output")
    other = config_for(corpus, split_bytes=20_000)
    with pytest.raises(UserError, match="holds the unfinished work of a prep of other settings or input"):
        prep(other)
    assert everything_in(corpus / "output") == before
    prep(other, replace=True)
    assert "split_bytes: 8000 -> 20000: starting over" in capsys.readouterr().out


def test_a_plan_without_work_is_replaced_without_a_word(corpus: Path) -> None:
    """A mistake that ended the run at its start is mended by the command with the right setting."""
    (corpus / "input" / "a.tsv").write_text("body\nThe text.\n")
    with pytest.raises(UserError, match="has no column 'text'"):
        prep(config_for(corpus))
    assert (corpus / "output" / ".prep" / "plan.json").is_file()
    (corpus / "input" / "a.tsv").write_text("text\nThe text.\n")
    assert prep(config_for(corpus))["documents"] == 301


def test_tasks_go_on_with_a_replacement(corpus: Path) -> None:
    prep(config_for(corpus))
    old, new = bytes_of(corpus / "output"), config_for(corpus, split_bytes=20_000)
    prep_tokenizer(new, replace=True)
    prep_share(new, 0, 1)
    with pytest.raises(UserError, match="another plan, and here split_bytes: 20000 -> 30000"):
        prep_share(config_for(corpus, split_bytes=30_000), 0, 1)
    assert prep(config_for(corpus))["reused"]
    assert bytes_of(corpus / "output") == old
    prep_finish(new)
    prep(config_for(corpus, split_bytes=20_000, output=str(corpus / "whole")))
    assert bytes_of(corpus / "output") == bytes_of(corpus / "whole")


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
    for given in (own, own.parent):
        with pytest.raises(UserError, match=f"{given} is prep's own output"):
            prep(config_for(corpus, tokenizer=str(given)))
    (corpus / "other").mkdir()
    (corpus / "other" / "train-00000.arrow").write_text("precious")
    with pytest.raises(UserError, match=r"other holds train-00000\.arrow, which this prep did not write"):
        prep(config_for(corpus, output=str(corpus / "other")))
    assert (corpus / "other" / "train-00000.arrow").read_text() == "precious"


# ----------------------------------------------------------------------------------------- bad input

BAD_LINES = [
    (b'{"text": "broken \xff byte"}', "invalid UTF-8"),
    (b'{"text": "no end', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'["a list"]', "not a JSON object"),
    (b'{"text": 5}', "field 'text' is not a string"),
    (b'{"text": "a lone \\ud800 surrogate"}', "lone surrogate"),
]


def test_bad_records_are_counted_by_reason(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = corpus / "input" / "z.jsonl"
    bad.write_bytes(b"".join(line + b"\n" for line, _ in BAD_LINES) + b'{"text": "A last good one."}')
    with pytest.raises(UserError, match=r"6 of 307 records cannot be read, more than max_bad_fraction=0.01"):
        prep(config_for(corpus))
    assert not (corpus / "output" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"about 67\.\d+% of the input's \S+ bytes are lost with bad records"):
        prep(config_for(corpus, max_bad_fraction=0.05))
    summary = prep(config_for(corpus, max_bad_fraction=0.05, max_lost_fraction=0.7))
    assert summary["lost_bytes"] > 100_000
    counts: dict[str, int] = {}
    for _, reason in BAD_LINES:
        counts[reason] = counts.get(reason, 0) + 1
    assert summary["bad"] == counts
    assert (summary["records"], summary["documents"]) == (307, 301)
    output = capsys.readouterr().out
    assert "work units are finished and kept" in output
    assert f"1 bad: invalid UTF-8 ({bad}, byte 0)" in output


def test_bad_records_go_to_the_quarantine(corpus: Path) -> None:
    prep(config_for(corpus, output=str(corpus / "good")))
    given = f"{corpus}/good/tokenizer.model"
    bad = corpus / "input" / "z.jsonl"
    bad.write_bytes(b"".join(line + b"\n" for line, _ in BAD_LINES) * 30)
    quarantine = corpus / "output" / "quarantine.jsonl"
    with pytest.raises(UserError, match=rf"They are listed in {quarantine}\. Mend them"):
        prep(config_for(corpus, tokenizer=given))
    lines = [json.loads(line) for line in quarantine.read_bytes().splitlines()]
    assert [line["reason"] for line in lines] == [reason for _, reason in BAD_LINES] * 30
    assert all(line["place"].startswith(f"{bad}, byte ") for line in lines)
    assert len({line["place"] for line in lines}) == 180
    assert lines[1]["excerpt"].strip() == '{"text": "no end'
    assert lines[0]["excerpt"].strip() == '{"text": "broken \ufffd byte"}'
    assert lines[2]["excerpt"] == "[" * 200
    before = quarantine.read_bytes()
    for workers in (1, 2):
        output = corpus / str(workers)
        limits = {"max_bad_fraction": 0.6, "max_lost_fraction": 1.0}
        prep(config_for(corpus, **limits, output=str(output), workers=workers, tokenizer=given))
        assert (output / "quarantine.jsonl").read_bytes() == before
        assert not list((output / ".prep").glob("*.bad.jsonl"))
    bad.unlink()
    prep(config_for(corpus, tokenizer=given), replace=True)
    assert not quarantine.exists()


def test_input_without_a_text_leaves_a_quarantine_file(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    lines = ['{"text": null}', '{"text": 5}', '{"id": 1}', "no JSON"]
    (tmp_path / "input" / "a.jsonl").write_text("\n".join(lines))
    quarantine = tmp_path / "output" / "quarantine.jsonl"
    bad = "1 bad: broken JSON; 1 bad: field 'text' is not a string"
    told = f"no readable document in it; {bad}; 1 dropped: blank; 1 dropped: no field 'text'"
    with pytest.raises(UserError, match=f"{told}. .* are listed in {quarantine}"):
        prep(config_for(tmp_path))
    assert [json.loads(line)["excerpt"].strip() for line in quarantine.open()] == ['{"text": 5}', "no JSON"]


@pytest.mark.parametrize("run", [prep, lambda config: prep_share(config, 0, 1)])
def test_an_output_that_is_read_only_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[PrepConfig], object]
) -> None:
    def refused(self: Plan, *arguments: Any) -> None:
        raise OSError(30, "Read-only file system", f"{tmp_path}/output/.prep/plan.json.tmp-1")

    (tmp_path / "input").mkdir()
    write_jsonl(tmp_path / "input" / "a.jsonl", make_documents(5))
    for method in ("begin", "join"):
        monkeypatch.setattr(Plan, method, refused)
    with pytest.raises(
        UserError, match=r"cannot write in \S+output \(Read-only file system: .*choose another"
    ):
        run(config_for(tmp_path))


def test_a_damaged_file_counts_by_its_bytes(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One record of 701, but two fifths of the input."""
    draw = random.Random(0)
    lines = [json.dumps({"text": draw.randbytes(200).hex()}) for _ in range(400)]
    data = gzip.compress("\n".join(lines).encode())
    (corpus / "input" / "z.jsonl.gz").write_bytes(data + b"\1" * 100_000)
    with pytest.raises(
        UserError, match=r"39\.\d+% of the input's .* 1 bad: a damaged file, the rest of it lost"
    ):
        prep(config_for(corpus))
    lost = prep(config_for(corpus, max_lost_fraction=0.9))["lost_bytes"]
    assert lost > 80_000
    assert f"warning: about {lost:,} bytes (" in capsys.readouterr().out


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
    with pytest.raises(UserError, match="has no file of the kinds"):
        prep(config_for(tmp_path))
    (folder / "a.jsonl").touch()
    with pytest.raises(UserError, match="every file is empty"):
        prep(config_for(tmp_path))
    (folder / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no readable document"):
        prep(config_for(tmp_path))
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        prep(config_for(tmp_path, input=[str(tmp_path / "a.parquet")]))
    (tmp_path / "output.txt").touch()
    write_jsonl(folder / "a.jsonl", make_documents(5))
    with pytest.raises(UserError, match="cannot make the folder"):
        prep(config_for(tmp_path, output=str(tmp_path / "output.txt")))


CHINESE = ["我们在城市里看书。", "他说：“你好。”", "今天天气很好！", "北京是中国的首都。", "你去哪里？"]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_forgotten_language_is_told(
    language: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input").mkdir()
    texts = ["".join(random.Random(n).choices(CHINESE, k=5)) for n in range(60)]
    write_jsonl(tmp_path / "input" / "a.jsonl", texts)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(CHINESE)))]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    given = str(tmp_path / "vocab.txt")
    config = config_for(tmp_path, language=language, deduplicate=False, tokenizer=given)
    assert (prep(config)["sentences"] == 300) == (language == "zh")
    said = capsys.readouterr().out
    right = "prep: warning: 100% of the letters are Han, but language=en, whose rules are not for such text: "
    assert ((right + "set language=zh and run prep again\n") in said) == (language == "en")
    assert ("warning" in said) == (language == "en")
    prep(config)  # found finished: told again
    assert ("warning" in capsys.readouterr().out) == (language == "en")


def test_a_tokenizer_of_another_language_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prep_english = config_for(tmp_path, output=str(tmp_path / "english"))
    (tmp_path / "input").mkdir()
    write_jsonl(tmp_path / "input" / "a.jsonl", make_documents(100))
    prep(prep_english)
    assert "0.00% of the tokens are unknown pieces, 0.00% single bytes" in capsys.readouterr().out
    write_jsonl(tmp_path / "input" / "a.jsonl", [f"{text}{text}" for text in CHINESE])
    tokenizer = str(tmp_path / "english" / "tokenizer.model")
    summary = prep(config_for(tmp_path, language="zh", tokenizer=tokenizer), replace=True)
    tokens = [
        tokenizer_piece
        for shard in open_dataset(tmp_path / "output").shards
        for tokenizer_piece in map(load_tokenizer(tokenizer).piece, shard.tokens.tolist())
    ]
    assert summary["single_bytes"] > 0.9 * summary["tokens"]
    assert summary["splits"]["train"]["single_bytes"] == sum(piece.startswith("<0x") for piece in tokens)
    said = capsys.readouterr().out
    assert (
        "% of the tokens are single bytes of characters without a piece, so the tokenizer does not fit"
        in said
    )
    assert f"give another one than {tokenizer}, or leave `tokenizer` out" in said

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n。\n的\n", encoding="utf-8")
    given = config_for(tmp_path, language="zh", tokenizer=str(tmp_path / "vocab.txt"))
    summary = prep(given, replace=True)
    assert summary["unknown"] > 0.5 * summary["tokens"]
    assert "% of the tokens are unknown pieces, so the tokenizer does not fit" in capsys.readouterr().out


def test_a_data_set_of_an_earlier_version_is_used_and_its_unfinished_work_is_not(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prep(config_for(corpus))
    path = corpus / "output" / ".prep" / "plan.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 2'))
    assert prep(config_for(corpus))["reused"]
    assert "an earlier version of bertscale made" in capsys.readouterr().out
    assert prep(config_for(corpus), replace=True)["reused"] is False
    prep_tokenizer(config_for(corpus, output=str(corpus / "other")))
    path = corpus / "other" / ".prep" / "plan.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(UserError, match=r"\(another version of bertscale, which gives other bytes\)"):
        prep(config_for(corpus, output=str(corpus / "other")))


def test_settings_that_are_seldom_meant_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "novel.txt").write_text("\n\n".join(make_documents(120)))
    prep(config_for(tmp_path, validation_fraction=1e-9))
    said = capsys.readouterr().out
    assert "prep: warning: no document is held out, of 120 and validation_fraction=1e-09: raise it" in said
    assert "prep: warning: a .txt file has 120 documents of" in said
    assert "set documents=file" in said
