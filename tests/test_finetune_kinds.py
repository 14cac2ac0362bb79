"""Each kind of task is learnt from its files to its figures, by one small encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_finetune import FILLERS, WORDS, configure, read_lines, run, world, write_rows  # noqa: F401

from bertscale.convert.task_models import open_task_model

KINDS = ("multi_label", "regression", "tokens", "question_answering", "multiple_choice")


def words_of(draw: np.random.Generator, label: str) -> tuple[list[str], int]:
    """Fillers with a word of a label among them, and its place."""
    words = draw.choice(FILLERS, draw.integers(2, 8)).tolist()
    place = int(draw.integers(len(words) + 1))
    words.insert(place, str(draw.choice(WORDS[label])))
    return words, place


def example(kind: str, number: int, draw: np.random.Generator) -> dict[str, Any]:
    """A row whose target one word decides."""
    labels = list(WORDS)
    label = labels[number % 3]
    words, place = words_of(draw, label)
    text = " ".join(words)
    if kind == "multi_label":
        more = [] if number % 2 else [labels[(number + 1) % 3]]
        return {"text": " ".join([text, *(WORDS[each][0] for each in more)]), "label": [label, *more]}
    if kind == "regression":
        return {"text": text, "label": number % 3 - 1.0}
    if kind == "tokens":
        tags = ["O"] * len(words)
        tags[place] = f"B-{label}"
        return {"tokens": words, "tags": tags}
    if kind == "question_answering":
        answer = words[place]
        start = len(" ".join(words[:place])) + (place > 0)
        return {
            "id": str(number),
            "question": f"which {label}",
            "context": text,
            "answers": {"text": [answer], "answer_start": [start]},
        }
    right = int(draw.integers(3))
    options = [" ".join(words_of(draw, "fruit" if place == right else "metal")[0]) for place in range(3)]
    return {"text": "people saw", "options": options, "label": right}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_learnt(world: Path, tmp_path: Path, kind: str) -> None:  # noqa: F811
    for name, count, seed in (("train", 150, 1), ("test", 45, 2)):
        draw = np.random.default_rng(seed)
        write_rows(tmp_path / f"{name}.jsonl", [example(kind, number, draw) for number in range(count)])
    changes = [
        *(f"task={kind}", f"data.train={tmp_path}/train.jsonl", f"data.test={tmp_path}/test.jsonl"),
        *("train.epochs=16", "train.micro_tokens=512", "model.hidden_dropout_prob=0"),
        "optimizer.learning_rate=3.0e-3",
        *(["data.options=options"] if kind == "multiple_choice" else []),
    ]
    (result,) = run(configure(world, tmp_path / "output", *changes))
    assert "error" not in result, result
    figure = result["pretrained"]["test"][result["metric"]]["mean"]
    majority = result["majority"]["test"].get(result["metric"], 0.0)
    assert figure > majority + 0.15, (figure, majority)
    (record,) = result["pretrained"]["runs"]
    assert json.loads((tmp_path / "output/result.json").read_text()) == result
    predictions = read_lines(tmp_path / "output/predictions-test.jsonl")
    assert len(predictions) == 45
    assert all(row["prediction"] for row in predictions)
    model = open_task_model(tmp_path / "output/model")
    assert model.head.kind == kind
    assert record["steps"] == 16 * 10  # of 16 examples, in each epoch the last one of 6
