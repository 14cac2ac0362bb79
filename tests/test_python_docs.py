"""Every Python block of the docs runs as it stands, and what is told of the names for notebooks is true.

The pages name the files of the quickstart: `quickstart` lays tiny ones at the same paths, and the blocks run
in that folder. There is no other substitution.
"""

from __future__ import annotations

import json
import os
import pydoc
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, assert_type

import pytest
import torch
from dist import run_ranks
from pages import PAGES, ROOT, blocks, has_python, run_python
from tiny import pretrain_config

import bertscale
from bertscale.cli import main
from bertscale.config import FinetuneConfig, ModelConfig, PretrainConfig, UserError, load_config
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.shards import Dataset
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.finetune.predict import TaskPredictor
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.run_folder import checkpoint_folder
from bertscale.tokenizer import Tokenizer
from bertscale.train.checkpoint import write_whole

PAGE = ROOT / "docs/python.md"
USING = ROOT / "docs/using-models.md"
# The blocks of checkpoints.md read moments, which only a training leaves: tests/test_checkpoint.py runs them;
# tests/test_chinese.py runs those of chinese.md, which read a file of labelled sentences.
OTHERS = [
    page
    for page in PAGES
    if page.name not in ("python.md", "using-models.md", "checkpoints.md", "chinese.md") and has_python(page)
]
SMALLER = ["train.epochs=1", "train.seeds=[0]", "samples.max_length=32"]  # of the fine-tuning


@pytest.fixture(scope="module")
def quickstart(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/quickstart and the configs, as `make quickstart` leaves them, but tiny."""
    folder = tmp_path_factory.mktemp("notebook")
    runs = folder / "runs/quickstart"
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(tiny_data, runs / "data")

    tokenizer = bertscale.load_tokenizer(runs / "data")
    shape = load_config(PretrainConfig, ROOT / "configs/pretrain/quickstart.yaml", []).model
    write_model(checkpoint_folder(runs / "pretrain", 1), shape, tokenizer, seed=1)
    write_model(checkpoint_folder(runs / "pretrain", 2), shape, tokenizer, seed=2)
    convert(runs / "pretrain", runs / "hugging-face", ConvertOptions(show=False))
    convert(runs / "pretrain", runs / "onnx", ConvertOptions(as_="onnx", pooling="mean"))

    rows = [
        {"text": f"{word} {number}", "label": word} for word in ("the cat", "a boat") for number in range(8)
    ]
    data = {split: runs / f"task/{split}.jsonl" for split in ("train", "test")}
    for path in data.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "encoder": str(runs / "pretrain"),
        "output": str(runs / "finetune"),
        "data": {split: str(path) for split, path in data.items()},
        "samples": {"max_length": 32},
        "train": {"epochs": 1, "global_batch": 8},
    }
    run_ranks(__file__, "tune", world=1, settings=settings)
    return folder


def tune(settings: dict[str, Any]) -> int:
    """Runs on a rank."""
    from bertscale.finetune.finetune import finetune

    return finetune(FinetuneConfig.model_validate(settings))


def write_model(folder: Path, shape: ModelConfig, tokenizer: Tokenizer, seed: int) -> None:
    """Writes a checkpoint of first values."""
    tensors = (
        (name, initial_value(name, list(value.shape), shape, tokenizer.vocab_size, seed))
        for name, value in PretrainingModel(shape, tokenizer.vocab_size).named_parameters()
    )
    facts = {"vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.sha256}
    write_whole(folder, {"model": shape.model_dump(), **facts}, tensors, tokenizer.path)


@pytest.fixture(autouse=True)
def _there(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart)


# --------------------------------------------------------------------------------------------- the pages


def test_the_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = run_python(PAGE)
    tokens, width = len(notebook["tokens"]), 128
    assert notebook["hidden"].shape == (tokens, width)
    assert notebook["pooled"] is None
    assert notebook["first"].count(notebook["tokenizer"].sep_id) >= 1
    assert notebook["label"] in ("the cat", "a boat")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("there is no folder runs/nowhere: give a run, a checkpoint, or ")


def test_the_page_shows_every_name() -> None:
    code = "\n".join(text for language, text in blocks(PAGE) if language == "python")
    assert [name for name in bertscale.__all__ if f"bertscale.{name}" not in code] == []


def test_using_models_runs_from_top_to_bottom() -> None:
    """The commands too; of those that are not ours it is looked whether they know their words."""
    notebook: dict[str, Any] = {}
    commands = []
    for language, text in blocks(USING):
        if language == "python":
            exec(compile(text, str(USING), "exec"), notebook)
            continue
        for line in text.replace("\\\n", " ").strip().splitlines():
            program, *words = shlex.split(line)
            commands.append(f"{program} {words[0]}")
            if program == "bertscale":
                assert main([*words, *(SMALLER if words[0] == "finetune" else [])]) == 0, line
            elif program == "hf":
                hub = [str(Path(sys.executable).with_name("hf")), words[0], "--help"]
                help_text = subprocess.run(hub, capture_output=True, text=True, check=True).stdout
                assert [word for word in words if word.startswith("-") and word not in help_text] == []
            else:
                subprocess.run([program, *words], check=True)
    exports = ["bertscale convert", "bertscale convert"]
    assert commands == ["bertscale convert", "bertscale finetune", *exports, "cp -r", "hf upload"]

    assert len(notebook["answers"]) == 3
    vectors = notebook["vectors"]
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(3))
    alone = notebook["embed"](["Opens a file."])  # padding beside longer texts has changed nothing
    assert torch.allclose(alone[0], vectors[0], atol=1e-5)
    assert notebook["label"] in ("the cat", "a boat")
    assert notebook["loss"] < 0.3  # it has learnt the two examples, from log 2
    written = {path.name for path in Path("runs/encoder").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= written
    encoder = notebook["AutoModel"].from_pretrained("runs/encoder")
    assert encoder.config.architectures == ["ModernBertModel"]
    both = [notebook["AutoTokenizer"].from_pretrained(path) for path in ("runs/encoder", notebook["folder"])]
    assert both[0](notebook["texts"])["input_ids"] == both[1](notebook["texts"])["input_ids"]


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_other_pages_run(page: Path) -> None:
    assert run_python(page)


# ---------------------------------------------------------------------------------------------- the names


def python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_needs_no_library() -> None:
    # -S: nothing that is installed. A name without its libraries fails when it is used, not before.
    code = "import bertscale; print(bertscale.__version__, *dir(bertscale)); bertscale.UserError"
    assert python("-S", "-c", code).split() == [bertscale.__version__, *sorted(bertscale.__all__)]


def test_batches_and_models_need_neither_deepspeed_nor_megatron() -> None:
    code = (
        "import sys, bertscale; before = set(sys.modules)\n"
        "next(bertscale.iterate_batches('configs/pretrain/quickstart.yaml'))\n"
        "bertscale.load_model('runs/quickstart/pretrain')\n"
        "bertscale.load_task_model('runs/quickstart/finetune/model')\n"
        "print('torch' in before, *[name for name in ('deepspeed', 'megatron') if name in sys.modules])"
    )
    assert python("-c", code).split() == ["False"]


def test_help_begins_each_name_with_a_sentence() -> None:
    text = pydoc.plain(pydoc.render_doc(bertscale))
    for name in ("iterate_batches", "load_model", "load_task_model", "load_tokenizer", "open_dataset"):
        sentence = getattr(bertscale, name).__doc__.splitlines()[0]
        assert sentence.endswith("."), name
        assert sentence in text
    assert "class UserError" in text


def test_a_name_that_is_not_there_is_said() -> None:
    with pytest.raises(AttributeError, match="module 'bertscale' has no attribute 'load_modle'"):
        bertscale.load_modle  # type: ignore[attr-defined]  # noqa: B018


def test_paths_are_text_or_path() -> None:
    """And mypy sees the real types through the package."""
    run, data = "runs/quickstart/pretrain", "runs/quickstart/data"
    for kind in (str, Path):
        assert assert_type(bertscale.open_dataset(kind(data)), Dataset).num_documents > 0
        tokenizers = [bertscale.load_tokenizer(kind(path)) for path in (data, run, f"{data}/tokenizer.model")]
        assert len({assert_type(tokenizer, Tokenizer).sha256 for tokenizer in tokenizers}) == 1
        assert_type(bertscale.load_model(kind(run)), PretrainingModel)
        model = assert_type(bertscale.load_task_model(kind("runs/quickstart/finetune")), TaskPredictor)
        assert_type(model(["the cat 3"]), list[dict[str, Any]])
        assert_type(model("the cat 3"), dict[str, Any])
        batches = bertscale.iterate_batches(kind("configs/pretrain/quickstart.yaml"), "train.micro_batch=2")
        step, micro_batches = assert_type(next(batches), tuple[int, list[MicroBatch]])
        assert (step, len(micro_batches)) == (0, 4)


# ---------------------------------------------------------------------------------------- what they give


def test_a_model_is_the_newest_of_a_run_in_evaluation_mode() -> None:
    run = Path("runs/quickstart/pretrain")
    newest = bertscale.load_model(run)
    assert not newest.training
    assert {(value.dtype, value.device.type) for value in newest.parameters()} == {(torch.float32, "cpu")}
    weights = newest.state_dict()
    for path, same in (
        (checkpoint_folder(run, 2), True),
        (checkpoint_folder(run, 1), False),
        ("runs/quickstart/hugging-face", True),
    ):
        other = bertscale.load_model(path).state_dict()
        assert all(value.equal(other[name]) for name, value in weights.items()) == same


def test_weights_that_do_not_fit_their_config_are_named(tmp_path: Path) -> None:
    shutil.copytree("runs/quickstart/hugging-face", tmp_path / "other")
    path = tmp_path / "other/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 100}))
    with pytest.raises(UserError) as error:
        bertscale.load_model(tmp_path / "other")
    assert (
        "feed_forward.intermediate.weight with the shape [384, 128], config.json asks for [200, 128]"
        in str(error.value)
    )


def test_batches_are_those_of_the_config_from_any_step_on() -> None:
    config = pretrain_config("runs/quickstart/data", "unused")
    whole = bertscale.iterate_batches(config)
    for _ in range(3):
        next(whole)
    step, late = next(whole)
    again, same = next(bertscale.iterate_batches(config, start_step=3))
    assert step == again == 3
    assert [batch.tokens.tolist() for batch in late] == [batch.tokens.tolist() for batch in same]
    assert len(late) == 4  # of 2 samples each, a global batch of 8
    _, heldout = next(bertscale.iterate_batches(config, split="validation", start_step=3))
    assert heldout[0].tokens.tolist() != late[0].tokens.tolist()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("configs/nowhere.yaml",), {}, "configs/nowhere.yaml"),
        (("configs/pretrain/quickstart.yaml", "train.step=3"), {}, "did you mean train.steps"),
        (("configs/pretrain/quickstart.yaml", "data=runs/nowhere"), {}, "no data folder runs/nowhere"),
        (("configs/pretrain/quickstart.yaml",), {"start_step": -1}, "start_step=-1: the first step is 0"),
        (("configs/pretrain/quickstart.yaml",), {"split": "test"}, "the splits train and validation"),
        ((None, "train.steps=3"), {}, "overrides are for a config file"),
        (
            ("configs/pretrain/quickstart.yaml", "train.batch_warmup=[[1000, 30]]"),
            {},
            "a batch of train.batch_warmup=30 is not a multiple of 8",
        ),
    ],
)
def test_what_is_wrong_is_said_at_the_call(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    config, *overrides = arguments
    with pytest.raises(UserError) as error:
        bertscale.iterate_batches(
            config or pretrain_config("runs/quickstart/data", "unused"), *overrides, **options
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_text_to_a_task_model_gets_its_prediction_alone() -> None:
    model = bertscale.load_task_model("runs/quickstart/finetune/model")
    assert [model("the cat 3")] == model(["the cat 3"])
    assert model([]) == []
