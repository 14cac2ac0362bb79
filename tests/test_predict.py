"""Predictions of saved task models: from Python, of files, and beside transformers' pipelines."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import KINDS, OUTPUTS, random_model, sizes_of

import bertscale
from bertscale.config import UserError
from bertscale.config.examples import ExamplesConfig, TaskKind
from bertscale.convert.task_models import LABELLED, write_task_model
from bertscale.finetune.predict import TaskPredictor
from bertscale.model.heads import HeadConfig
from bertscale.tasks.questions import QuestionTask
from bertscale.tasks.saved import columns_to_keep, encoding_of, task_of
from bertscale.tasks.task import Task
from bertscale.tasks.tokens import TokenTask
from bertscale.tokenizer import load_tokenizer

VOCAB = 330  # of the tiny data's tokenizer
LABELS = {
    "classification": ["cat", "dog", "river"],
    "multi_label": ["cat", "dog"],
    "tokens": ["O", "B-WHO", "I-WHO", "B-WHAT", "I-WHAT"],
}
FACTS: dict[str, dict[str, Any]] = {
    "tokens": {"scheme": "bio"},
    "question_answering": QuestionTask(True, answer_length=7, answers=4).facts(),
    "multiple_choice": {"data": {"options": ["first", "second"]}},
}
TEXT = "The cat watches the garden at 12. A small dog follows a red boat."
INPUTS: dict[str, list[Any]] = {
    "classification": [TEXT, ("My neighbour likes it.", "This engine finds some bread at 7.")],
    "multi_label": ["a", {"text": "The cat.", "text_pair": "The dog."}],
    "regression": [TEXT, {"text": "a boat"}],
    "tokens": [TEXT, ["My", "neighbour", "likes", "12", "."]],
    "question_answering": [
        {"question": "Who watches the garden?", "context": TEXT, "id": "q1"},
        {"question": "What follows a small dog?", "context": " ".join([TEXT] * 6), "id": "q2"},
    ],
    "multiple_choice": [
        {"text": "The cat watches", "options": ["the garden.", "some bread.", "an answer at 12."]},
        {"text": "A small dog", "options": ["follows.", "likes a boat."]},
    ],
}


def write_model(folder: Path, kind: TaskKind, data: Path, preset: str = "bert") -> Path:
    """The folder of a model with random weights, which gives each text another answer."""
    tokenizer = load_tokenizer(data)
    labels = LABELS.get(kind, [])
    outputs = len(labels) or OUTPUTS.get(kind, 2)
    model = random_model(
        sizes_of(preset, max_position_embeddings=64), HeadConfig(kind, outputs, "cls", 0.0), VOCAB
    )
    folder.mkdir(parents=True)
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    write_task_model(
        folder,
        model.config,
        VOCAB,
        model.head_config,
        labels if kind in LABELLED else [],
        tensors,
        tokenizer,
        48,
        FACTS.get(kind, {}),
    )
    return folder


@pytest.fixture(scope="module")
def models(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind, as a fine-tuning leaves it: OUTPUT/model."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind / "model", kind, tiny_data).parent for kind in KINDS}


def close(one: Any, other: Any, tolerance: float = 1e-5) -> Any:
    """Whether two predictions are the same but for the last digits of their scores."""
    if isinstance(one, float):
        return abs(one - other) < tolerance
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return one == other


# -------------------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_kind(kind: TaskKind, models: dict[str, Path]) -> None:
    model = bertscale.load_task_model(models[kind])
    assert isinstance(model, TaskPredictor)
    assert (model.kind, model.labels, model.max_length) == (kind, LABELS.get(kind, []), 48)
    inputs = INPUTS[kind]
    predictions = model(inputs)
    assert len(predictions) == len(inputs)
    assert close(bertscale.load_task_model(models[kind] / "model")(inputs), predictions)
    assert model([]) == []
    # A prediction is of its own input, whatever stands beside it, and in its order.
    assert close(model(inputs[::-1]), predictions[::-1])
    alone = model(inputs[1])
    if kind == "tokens":  # a list of words alone would be a list of texts
        alone = model([inputs[1]])[0]
    assert close(alone, predictions[1])
    json.dumps(predictions)


def test_predictions_have_the_keys_of_their_kind(models: dict[str, Path]) -> None:
    found = {kind: bertscale.load_task_model(models[kind])(INPUTS[kind]) for kind in KINDS}
    label = found["classification"][0]
    assert label["probability"] == max(label["probabilities"].values())
    assert label["probabilities"][label["label"]] == label["probability"]
    assert sum(label["probabilities"].values()) == pytest.approx(1)
    assert list(label["probabilities"]) == LABELS["classification"]
    several = found["multi_label"][0]
    assert several["labels"] == [name for name, p in several["probabilities"].items() if p >= 0.5]
    assert isinstance(found["regression"][0]["score"], float)
    tokens = found["tokens"][0]
    assert len(tokens["words"]) == len(tokens["tags"]) == len(TEXT.split()) + 2
    assert all(TEXT[one["start"] : one["end"]] == one["text"] for one in tokens["entities"])
    assert found["tokens"][1]["words"] == INPUTS["tokens"][1]
    for answer, given in zip(found["question_answering"], INPUTS["question_answering"], strict=True):
        assert given["context"][answer["start"] : answer["end"]] == answer["answer"]
        assert 1 < len(answer["nbest"]) <= 5
        assert "" in [one["text"] for one in answer["nbest"]]
    choices = found["multiple_choice"]
    assert [len(one["probabilities"]) for one in choices] == [3, 2]


def test_many_inputs_are_predicted_as_few_are(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bertscale.load_task_model(models["classification"])
    texts = [f"{TEXT[: 10 + i % 50]} {i}" for i in range(30)]
    together = model(texts)
    monkeypatch.setattr("bertscale.finetune.predict.CHUNK", 7)
    monkeypatch.setattr("bertscale.finetune.predict.MICRO_TOKENS", 50)
    assert close(model(texts), together)


def test_precision_and_device(models: dict[str, Path]) -> None:
    full = bertscale.load_task_model(models["classification"], device="cpu")
    assert {parameter.dtype for parameter in full.model.parameters()} == {torch.float32}
    half = bertscale.load_task_model(models["classification"], precision="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    inputs = INPUTS["classification"]
    assert close(full(inputs), half(inputs), 0.2)
    assert not close(full(inputs), half(inputs), 1e-6)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("classification", ["one", " \t"], "inputs[1]: the text is blank"),
        ("classification", ["one", ("two", "\u200b")], "inputs[1]: the second text is blank"),
        (
            "classification",
            [["a", "b"]],
            "inputs[0] is ['a', 'b']; a model for classification takes a",
        ),
        ("classification", ("a", "b", "c"), "inputs[0] is ('a', 'b', 'c'); a model for classification takes"),
        ("classification", ["a", None], "inputs[1] is None; a model for"),
        ("classification", {"texts": "a"}, "inputs[0] is a dictionary with 'texts'; a model for"),
        ("classification", {"text": 3}, "inputs[0]: the text is no text but 3"),
        ("tokens", ["", "a"], "inputs[0]: the text is blank"),
        ("tokens", [["a", " "]], "inputs[0]: token 2 of 2 is blank"),
        ("tokens", [[]], "inputs[0] is []; a model for tokens takes a text, or a list of its words"),
        ("question_answering", ["Who?"], "inputs[0] is 'Who?'; a model for question_answering takes a dict"),
        ("question_answering", {"question": "Who?", "context": ""}, "inputs[0]: the context is blank"),
        ("multiple_choice", {"text": "a", "options": ["b"]}, "a model for multiple_choice takes"),
        ("multiple_choice", {"text": "a", "options": ["b", "\n"]}, "inputs[0]: option 1 is blank"),
    ],
)
def test_an_input_that_is_none_is_named(
    kind: TaskKind, given: Any, said: str, models: dict[str, Path]
) -> None:
    with pytest.raises(UserError) as error:
        bertscale.load_task_model(models[kind])(given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_task_model_is_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*none with a task model; nothing is downl"):
        bertscale.load_task_model(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no task model: neither it nor .*model has a config.json"):
        bertscale.load_task_model(tmp_path)
    shutil.copytree(models["tokens"] / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").unlink()
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        bertscale.load_task_model(tmp_path)


# --------------------------------------------------------------------------------- what a model remembers


@pytest.mark.parametrize(
    "task",
    [
        TokenTask(["O", "B-A", "I-A"], "bio"),
        TokenTask(["O", "B-A", "I-A"], "none"),
        QuestionTask(False),
        QuestionTask(True, answer_length=12, answers=3, threshold=-1.5, chinese=True),
    ],
)
def test_facts_make_the_task_again(task: Task[Any]) -> None:
    facts = json.loads(json.dumps(task.facts()))
    again = task_of(task.kind, task.labels, {"max_length": 17, **facts}, Path("config.json"))
    assert vars(again) == vars(task)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"scheme": "iob"}, "config.json is damaged: bertscale.scheme='iob': input should be"),
        ({"answers": 0}, "bertscale.answers=0: input should be greater"),
        ({"threshold": "high"}, "bertscale.threshold='high': input should be a valid number"),
        ({"long_texts": 1}, "bertscale.long_texts=1: input should be"),
        ({"data": []}, "bertscale.data: input should be a valid dictionary"),
    ],
)
def test_damaged_facts_are_one_line(facts: dict[str, Any], said: str) -> None:
    for read in (
        lambda: task_of("tokens", ["O", "B-A", "I-A"], facts, Path("config.json")),
        lambda: encoding_of(facts, 32, Path("config.json")),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            read()
        assert "\n" not in str(error.value)


def test_samples_are_made_as_they_were() -> None:
    encoding = encoding_of({"long_texts": "windows", "overlap": 3}, 32, Path("x"))
    assert (encoding.max_length, encoding.long_texts, encoding.overlap) == (32, "windows", 3)
    assert encoding_of({}, 32, Path("x")).overlap == 8
    with pytest.raises(UserError, match=r"x: .*overlap=20 is more than half of max_length=32"):
        encoding_of({"overlap": 20}, 32, Path("x"))


def test_columns_that_differ_from_the_defaults_are_kept() -> None:
    data = ExamplesConfig(train="a", test="b", text=3, label=1, header=False, dev_share=0.1, format="tsv")
    assert columns_to_keep(data) == {"text": 3, "label": 1, "header": False, "format": "tsv"}
