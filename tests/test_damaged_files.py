"""Files that were edited or damaged: one clear line that names them, or nothing that matters changes.

Each test is of one file and what reads it; a draw with a seed edits it many times.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import edited_bytes, edited_table
from rich.console import Console
from test_convert import SIZES, write_checkpoint
from test_heads import random_model

from bertscale.config import ModelConfig, UserError
from bertscale.console import disk_errors_in_one_line
from bertscale.convert.task_models import write_task_model
from bertscale.convert.weights import open_weights
from bertscale.data.inspect import inspect
from bertscale.data.shards import MANIFEST_NAME, open_dataset
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.files import json_digest
from bertscale.finetune.output import finished_result
from bertscale.finetune.predict import load_task_model
from bertscale.finetune.report import table
from bertscale.model.heads import HeadConfig
from bertscale.run_folder import read_events, read_lines, read_metrics
from bertscale.tokenizer import load_tokenizer
from bertscale.train.metrics import MetricsWriter
from launcher import runs
from launcher.status import show, state

TEXTS = ["The old river carries its reflection at 12.", "na\u00efve \u65e5\u672c [MASK]"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "river", "##s", *"abcdefghijklmnopqrstuvwxyz."]
Edit = Callable[[bytes, random.Random], bytes]


def damage(path: Path, read: Callable[[], Any], edit: Edit, count: int = 25) -> int:
    """Edits `path` `count` times; returns how often `read` refused it.

    Every refusal is one line that names the folder, and every other answer is the one of the sound file.
    """
    sound, expected = path.read_bytes(), read()
    draw, refused = random.Random(path.name), 0
    for number in range(count):
        content = edit(sound, draw)
        path.write_bytes(content)
        try:
            answer = read()
        except UserError as error:
            refused += 1
            assert str(path.parent) in str(error), (number, content)  # noqa: PT017
            assert len(str(error).splitlines()) == 1, (number, content)  # noqa: PT017
        else:
            assert answer == expected, (number, content)
    path.write_bytes(sound)
    return refused


def json_edit(content: bytes, draw: random.Random) -> bytes:
    return edited_table(json.loads(content), draw)


def header_edit(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, or cut short."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    match draw.randrange(5):
        case 0:
            return content[: draw.randrange(len(content))]
        case 1:
            return struct.pack("<Q", draw.choice([0, 1, length - 1, length + 8, 2**40, 2**63])) + content[8:]
        case 2:
            header = edited_bytes(header, draw)
        case _:
            header = json_edit(header, draw)
    return struct.pack("<Q", len(header)) + header + body


# ------------------------------------------------------------------------------------- a data set


def read_data(folder: Path) -> Any:
    datasets = [open_dataset(folder, split) for split in ("train", "validation")]
    inspect(folder, Console(file=io.StringIO(), width=100))
    return [(d.num_documents, d.num_tokens, [s.tokens.tolist() for s in d.shards]) for d in datasets]


def test_a_manifest(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    assert damage(folder / MANIFEST_NAME, lambda: read_data(folder), json_edit) > 10


# --------------------------------------------------------------------------------- a model's folder


@pytest.fixture(
    scope="module",
    params=[{}, {"preset": "modern", "sentence_head": False, "local_attention": 8}],
    ids=["bert", "modern"],
)
def model(request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "native", tiny_data, request.param)
    convert(folder / "native", folder / "hf", ConvertOptions(show=False))
    return folder / "hf"


def read_weights(folder: Path) -> Any:
    weights = open_weights(folder)
    return {name: weights.tensor(name).tolist() for name in weights.parameters}


def test_the_config_of_a_model(model: Path) -> None:
    assert damage(model / "config.json", lambda: read_weights(model), json_edit, 50) > 5


def test_weights(model: Path) -> None:
    assert damage(model / "model.safetensors", lambda: read_weights(model), header_edit, 50) > 30


def test_a_conversion_of_damaged_files_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """Whole conversions, transformers' part included."""

    def convert_it() -> None:
        before = set(tmp_path.iterdir())
        try:
            convert(model, tmp_path / "out", ConvertOptions(show=False))
            shutil.rmtree(tmp_path / "out")
        finally:
            assert set(tmp_path.iterdir()) == before

    assert damage(model / "config.json", convert_it, json_edit, 12) > 1
    assert damage(model / "model.safetensors", convert_it, header_edit, 5) > 2
    assert damage(model / "tokenizer.model", convert_it, edited_bytes, 5) > 2


# -------------------------------------------------------------------------------------- tokenizers


def read_tokenizer(folder: Path) -> None:
    """Ids differ where another piece was edited, which nothing can tell; all else must work."""
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.starts_word) == tokenizer.vocab_size
    for ids, _ in tokenizer.encode_with_offsets(TEXTS):
        assert all(0 <= piece < tokenizer.vocab_size for piece in ids)
        tokenizer.decode(ids)
    tokenizer.encode([tokenizer.normalize(text) for text in TEXTS])
    tokenizer.export_hugging_face(folder / "exported", 48)


@pytest.mark.parametrize(
    ("name", "edit", "least"),
    [
        ("tokenizer.model", edited_bytes, 10),
        ("tokenizer.json", json_edit, 10),
        ("vocab.txt", edited_bytes, 5),
        ("tokenizer_config.json", json_edit, 5),
    ],
)
def test_a_tokenizer(name: str, edit: Edit, least: int, tiny_data: Path, tmp_path: Path) -> None:
    if name == "tokenizer.model":
        shutil.copy(tiny_data / name, tmp_path)
    else:
        (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    if name == "tokenizer_config.json":
        rules = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
        (tmp_path / name).write_text(json.dumps(rules))
    if name == "tokenizer.json":
        load_tokenizer(tmp_path).save(tmp_path)
        (tmp_path / "vocab.txt").unlink()
    assert damage(tmp_path / name, lambda: read_tokenizer(tmp_path), edit, 30) > least


# ---------------------------------------------------------------------------------- a task model


def test_a_task_model(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_data)
    shape = ModelConfig.model_validate(SIZES)
    head = HeadConfig("tokens", 3)
    model = random_model(shape, head, tokenizer.vocab_size)
    tensors = ((name, value.detach()) for name, value in model.named_parameters())
    facts = {"scheme": "bio", "overlap": 8, "data": {"label": "x"}}
    write_task_model(
        tmp_path, shape, tokenizer.vocab_size, head, ["O", "B-x", "I-x"], tensors, tokenizer, 32, facts
    )

    def read() -> int:
        return len(load_task_model(tmp_path)(TEXTS))

    assert damage(tmp_path / "config.json", read, json_edit, 40) > 8
    assert damage(tmp_path / "model.safetensors", read, header_edit, 20) > 10


def test_the_result_of_a_fine_tuning(tmp_path: Path) -> None:
    """A damaged one is none, so that it is made again; a sound one is shown."""
    figure = {"accuracy": {"mean": 0.5, "std": None, "min": 0.5, "max": 0.5}}
    result: dict[str, Any] = {
        "task": "classification",
        "labels": ["a", "b"],
        "metric": "accuracy",
        "examples": {"train": 8, "dev": 0, "test": 4},
        "majority": {"test": {"accuracy": 0.5}},
        "pretrained": {"test": figure, "runs": []},
        "made_of": {"train": "x"},
        "files": {},
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    assert finished_result(tmp_path, {"train": "x"}) is None  # it is not signed
    signed = {**result, "digest": json_digest(result)}
    path.write_text(json.dumps(signed))
    assert finished_result(tmp_path, {"train": "x"}) == signed
    assert "0.500" in table(signed)
    draw = random.Random(0)
    for _ in range(25):
        path.write_bytes(edited_table(signed, draw))
        assert finished_result(tmp_path, {"train": "x"}) in (None, signed)
    for broken in ({**result, "examples": {"test": "4"}}, {**result, "labels": "ab"}):
        path.write_text(json.dumps({**broken, "digest": json_digest(broken)}))
        assert finished_result(tmp_path, {"train": "x"}) is None


# ----------------------------------------------------------------------------------- a run's folder


def test_the_lines_of_a_run(tmp_path: Path) -> None:
    """`status` reads them all, whatever stands in them."""
    attempt = tmp_path / "logs" / "attempt-001"
    attempt.mkdir(parents=True)
    now = time.time()
    files: dict[Path, list[dict[str, Any]]] = {
        tmp_path / "metrics.jsonl": [{"step": n, "train/loss": 2.5, "speed/mfu": 0.1} for n in (1, 2)],
        tmp_path / "logs" / "events.jsonl": [
            {"time": now - 9, "event": "started", "attempt": "attempt-001", "nodes": "a"},
            {"time": now, "event": "failed", "rank": 0, "reason": "x"},
        ],
        tmp_path / "result.json": [{"steps": 2, "last_loss": 2.5}],
        attempt / "heartbeat": [{"step": 2, "time": now}],
        attempt / "rank-0000.json": [{"rank": 0, "node": "a", "code": 1, "time": now, "reason": "x"}],
    }
    draw = random.Random(0)
    for path, lines in files.items():
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    place = runs.find(str(tmp_path))
    for path, lines in files.items():
        sound = path.read_bytes()
        for _ in range(25):
            kept = [json.dumps(line).encode() for line in lines[1:]]
            path.write_bytes(b"\n".join([edited_table(lines[0], draw).replace(b"\n", b" "), *kept]))
            facts = runs.look(place)
            show.describe(place, facts, state.judge(place, facts, [], None, now), None, now)
        for odd in (b"null\n", b"\0\xff\n", b"[]\n", b'{"step": 1e400, "time": 1e30, "event": "done"}\n'):
            path.write_bytes(odd)
            facts = runs.look(place)
            show.describe(place, facts, state.judge(place, facts, [], None, now), None, now)
        path.write_bytes(sound)


@pytest.mark.parametrize("odd", ["1e400", str(10**400), "NaN", '"x"', "null", "[]"])
def test_the_hours_of_a_run(odd: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-0000002"
    checkpoint.mkdir(parents=True)
    (tmp_path / "logs" / "attempt-001").mkdir(parents=True)
    place, now = runs.find(str(tmp_path)), time.time()
    for hours, spent in ((odd, "1.0"), ("1.5", odd)):
        (tmp_path / "config.yaml").write_text(f'{{"train": {{"hours": {hours}}}}}')
        (checkpoint / "bertscale.json").write_text(f'{{"elapsed_seconds": {spent}}}')
        facts = runs.look(place)
        show.describe(place, facts, state.judge(place, facts, [], None, now), None, now)


def test_a_folder_of_that_name(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "result.json"):
        (tmp_path / name).mkdir()
    assert read_lines(tmp_path / "metrics.jsonl") == read_metrics(tmp_path) == []
    assert read_events(tmp_path / "events.jsonl") == []
    words = r"Is a directory: .*metrics\.jsonl.*; something else has a name"
    with pytest.raises(UserError, match=words), disk_errors_in_one_line():
        MetricsWriter(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "events.jsonl",
        "metrics.jsonl",
        "result.json",
    ]
