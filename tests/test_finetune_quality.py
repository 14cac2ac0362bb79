"""Parts of the quality benchmark: sets written anew, batches as transformers takes them, the verdict."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertscale.config import FinetuneConfig, UserError
from bertscale.examples.read import read_task_data
from bertscale.tasks.choice import ChoiceTask
from bertscale.tasks.questions import QuestionTask
from bertscale.tasks.task import Samples
from bertscale.tasks.tokens import TokenTask

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("finetune_quality")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("trainer")


def config_of(task: str, data: dict[str, Any], **sections: Any) -> FinetuneConfig:
    values = {"task": task, "encoder": "unused", "output": "unused", "data": data, **sections}
    return FinetuneConfig.model_validate(values)


def squad(file: Path, names: str) -> str:
    """A paragraph for each name, with two questions, of which the second has no answer."""
    paragraphs = [
        {
            "context": f"{name} lives in the hills.",
            "qas": [
                {
                    "id": f"{name}-1",
                    "question": "Who lives there?",
                    "answers": [{"text": name, "answer_start": 0}] * 2,
                },
                {"id": f"{name}-2", "question": "Who does not?", "answers": [], "is_impossible": True},
            ],
        }
        for name in names.split()
    ]
    file.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    return str(file)


def test_a_set_written_anew_is_the_same(quality: Any, tmp_path: Path) -> None:
    place = tmp_path / "written"
    place.mkdir()
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f'a "b\tc {n}\t{n % 3}:x\n' for n in range(12)))
    tags = tmp_path / "train.iob"  # IOB1
    tags.write_text("EU I-ORG\nrejects O\n\nBonn I-LOC\nParis B-LOC\n\n" * 3)
    columns = {"text": 0, "text_pair": 1, "label": 2, "header": False, "label_separator": ":"}
    given = [
        config_of("classification", {"train": str(pairs), "dev_share": 0.2, **columns}),
        config_of("tokens", {"train": str(tags), "dev": str(tags), "format": "conll"}),
        config_of(
            "question_answering",
            {"train": squad(tmp_path / "a.json", "Ann Bob"), "dev": squad(tmp_path / "b.json", "Eve")},
        ),
    ]
    for config in given:
        before = read_task_data(config.task, config.data, config.samples)
        written = quality.with_files(config, place, None, None)
        after = read_task_data(written.task, written.data, written.samples)
        assert after.task.labels == before.task.labels
        assert after.task.facts() == before.task.facts()
        for old, new in ((before.train, after.train), (before.dev, after.dev)):
            assert [quality.row_of(one) for one in old] == [quality.row_of(one) for one in new]
            assert [one.content for one in old] == [one.content for one in new]
        less = quality.with_files(config, place, 2, 1)
        cut = read_task_data(less.task, less.data, less.samples)
        assert (len(cut.train), len(cut.dev)) == (2, 1)
        assert cut.task.labels == before.task.labels  # those that the cut has not drawn, too
        rows = [quality.row_of(one) for one in before.train]
        assert all(quality.row_of(one) in rows for one in cut.train)
        assert quality.with_files(config, place, 2, 1) == less


def test_batches_are_padded_and_outputs_lose_the_padding(trainer: Any) -> None:
    samples = Samples(
        tokens=np.array([2, 7, 3, 2, 8, 3, 9, 3], np.int32),
        starts=np.array([0, 3, 8]),
        second=np.array([3, 3]),
        example=np.array([0, 1]),
        targets=np.array([-100, 1, -100, -100, 0, -100, 1, -100]),
    )
    tags = TokenTask(["O", "B-X", "I-X"], "bio")
    collate = trainer.collator(tags, 5, takes_types=True)
    batch = {name: value.tolist() for name, value in collate(trainer.rows_of(samples, tags)).items()}
    assert batch == {
        "input_ids": [[2, 7, 3, 5, 5], [2, 8, 3, 9, 3]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "token_type_ids": [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
        "labels": [[-100, 1, -100, -100, -100], [-100, 0, -100, 1, -100]],
    }
    padded = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    kept = trainer.without_padding(padded, samples, tags)
    assert kept.tolist() == [*padded[0, :3].tolist(), *padded[1].tolist()]

    questions = QuestionTask(unanswerable=True)
    asked = Samples(
        samples.tokens, samples.starts, samples.second, samples.example, np.array([[0, 0], [3, 4]])
    )
    batch = trainer.collator(questions, 5, takes_types=False)(trainer.rows_of(asked, questions))
    assert set(batch) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    assert (batch["start_positions"].tolist(), batch["end_positions"].tolist()) == ([0, 3], [0, 4])
    begins, ends = np.arange(10).reshape(2, 5), 100 + np.arange(10).reshape(2, 5)
    kept = trainer.without_padding((begins, ends), asked, questions)
    assert kept.tolist() == [[n, 100 + n] for n in (0, 1, 2, 5, 6, 7, 8, 9)]


def test_what_the_trainer_does_not_follow_is_refused(trainer: Any) -> None:
    data = {"train": "unused"}
    trainer.check_comparable(config_of("tokens", data))
    with pytest.raises(UserError, match="task=multiple_choice: compared are classification, regression"):
        trainer.check_comparable(config_of(ChoiceTask.kind, data))
    with pytest.raises(UserError, match=r"optimizer.layer_decay=0.9 .* take optimizer.layer_decay=1.0"):
        trainer.check_comparable(config_of("tokens", data, optimizer={"layer_decay": 0.9}))


def test_the_table_says_whether_ours_is_within_the_spread(quality: Any) -> None:
    assert quality.within([0.5, 0.6], [0.5, 0.7]) == "yes"
    assert quality.within([0.1 + 0.2] * 3, [0.3] * 3) == "yes"
    assert quality.within([0.9], [0.5]) == "0.400 above"
    assert quality.within([0.3, 0.3], [0.5, 0.7]) == "0.200 below (t = -3.0)"
    result = {
        "set": "trec",
        "metric": "accuracy",
        "majority": 0.218,
        "random": [0.5, 0.6],
        "pretrained": [0.7, 0.7],
        "trainer": [0.65, 0.75],
        "steps": 80,
        "batch": 32,
        "examples": {"train": 4906, "dev": 545},
    }
    header, _, row, _, note = quality.markdown([result]).splitlines()
    assert header.endswith("| Trainer, pretrained | within the Trainer's spread? |")
    assert row == "| trec | accuracy | 0.218 | 0.550 ± 0.071 | 0.700 ± 0.000 | 0.700 ± 0.071 | yes |"
    assert note == "Seeds: 2; 80 steps of 32 samples; training examples: trec 4,906."
