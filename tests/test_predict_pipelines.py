"""Our predictions beside those of transformers, from the same folder: labels, entities, answers, scores.

Texts of real sets take part where BERTSCALE_DATA names their folder; transformers 5 has no pipeline of
questions, so that its model's logits are decoded here as its example run_qa.py does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_heads import OUTPUTS, random_model, sizes_of

from bertscale.config.examples import ExamplesConfig, TaskKind
from bertscale.convert.task_models import LABELLED, write_task_model
from bertscale.examples.conll import read_token_examples
from bertscale.examples.squad import read_questions
from bertscale.finetune.predict import TaskPredictor, load_task_model
from bertscale.finetune.predict_file import predict_file
from bertscale.model.heads import HeadConfig
from bertscale.tasks.questions import QuestionTask
from bertscale.tokenizer import load_tokenizer

DATA = os.environ.get("BERTSCALE_DATA", "")  # the fixture of all tests takes such variables away
LABELS = {"classification": ["0", "1", "2"], "tokens": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]}
FACTS = {"tokens": {"scheme": "bio"}, "question_answering": QuestionTask(True).facts()}
LENGTH, OVERLAP = 64, 16
TEXTS = [
    "The cat watches the garden",
    "A small dog follows a red boat and the cat watches some bread in the garden",
    "My neighbour likes it",
    "This engine finds an answer",
]


def real(name: str) -> Path:
    """A file of the real sets."""
    if not DATA or not (Path(DATA) / name).exists():
        pytest.skip(f"BERTSCALE_DATA names no folder with {name}")
    return Path(DATA) / name


def export(folder: Path, kind: TaskKind, tokenizer_path: Path, preset: str, length: int) -> Path:
    """Writes a model with random weights, as a fine-tuning does."""
    tokenizer = load_tokenizer(tokenizer_path)
    labels = LABELS.get(kind, [])
    head = HeadConfig(kind, len(labels) or OUTPUTS.get(kind, 2), "cls", 0.0)
    sizes = sizes_of(preset, max_position_embeddings=length)
    model = random_model(sizes, head, tokenizer.vocab_size)
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    facts = {**FACTS.get(kind, {}), "overlap": OVERLAP}
    folder.mkdir()
    names = labels if kind in LABELLED else []
    write_task_model(folder, sizes, tokenizer.vocab_size, head, names, tensors, tokenizer, length, facts)
    return folder


def predictions(model: TaskPredictor, folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `bertscale predict` says of rows."""
    given, output = folder.with_suffix(".jsonl"), folder.with_suffix(".out")
    given.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    predict_file(model, str(given), ExamplesConfig(train=str(given)), output)
    return [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()]


def pipeline(task: str, folder: Path, **options: Any) -> Any:
    return transformers.pipeline(task, model=str(folder), device="cpu", dtype=torch.float32, **options)


# ------------------------------------------------------------------------------------------------ labels


def same_labels(folder: Path, texts: list[str]) -> None:
    said = predictions(load_task_model(folder), folder, [{"text": text} for text in texts])
    theirs = pipeline("text-classification", folder, top_k=None)(texts, truncation=True)
    for ours, found in zip(said, theirs, strict=True):
        assert {one["label"]: one["score"] for one in found} == pytest.approx(ours["probabilities"], abs=1e-4)
        assert found[0]["label"] == ours["label"]


@pytest.mark.parametrize("preset", ["bert", "modern cls"])
def test_labels(preset: str, tiny_data: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "model", "classification", tiny_data, preset, LENGTH)
    same_labels(folder, [*TEXTS, " ".join(TEXTS * 8), "A cat, a dog: 12!"])


def test_labels_of_sst2(tmp_path: Path) -> None:
    lines = real("tasks/sst2/train.tsv").read_text(encoding="utf-8").splitlines()[1:201]
    vocabulary = real("vocab/bert-base-uncased-vocab.txt")
    folder = export(tmp_path / "model", "classification", vocabulary, "bert", 128)
    same_labels(folder, [line.split("\t")[1] for line in lines])


# -------------------------------------------------------------------------------------------- entities


def same_entities(folder: Path, texts: list[str]) -> None:
    said = predictions(load_task_model(folder), folder, [{"text": text} for text in texts])
    theirs = pipeline("token-classification", folder, aggregation_strategy="first")(texts)
    assert sum(len(ours["entities"]) for ours in said) > len(texts) / 2
    for text, ours, found in zip(texts, said, theirs, strict=True):
        mine = [(one["start"], one["end"], one["label"]) for one in ours["entities"]]
        assert mine == [(one["start"], one["end"], one["entity_group"]) for one in found], text
        scores = [float(one["score"]) for one in found]
        assert [one["score"] for one in ours["entities"]] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("preset", ["bert", "modern cls"])
def test_entities(preset: str, tmp_path: Path) -> None:
    """Of WordPiece: with SentencePiece the pipeline guesses where words begin, and takes spaces into them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["the", "cat", "dog", "garden", "boat"],
        *letters,
    ]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*pieces, *(f"##{letter}" for letter in letters)]) + "\n")
    folder = export(tmp_path / "model", "tokens", vocabulary, preset, 128)
    same_entities(folder, [text.lower() for text in TEXTS])


def test_entities_of_conll(tmp_path: Path) -> None:
    path = str(real("tasks/conll2003/valid.txt"))
    examples, _ = read_token_examples(path, ExamplesConfig(train=path))
    vocabulary = real("vocab/bert-base-cased-vocab.txt")
    folder = export(tmp_path / "model", "tokens", vocabulary, "bert", 256)
    same_entities(folder, [example.text for example in examples[:200]])


# ---------------------------------------------------------------------------------------------- answers


def decoded(
    tokenizer: Any, model: Any, question: str, context: str, length: int
) -> tuple[float, float, int, int]:
    """Scores of no answer and of the best one, and where that is, by the rules of run_qa.py."""
    features = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=length,
        stride=OVERLAP,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = range(len(features["input_ids"]))
    of_context = [[s == 1 for s in features.sequence_ids(i)] for i in windows]
    best, null = (-np.inf, 0, 0), np.inf
    # Of each token of the context the window that gives it the most of it on both sides, the first of equals.
    most: dict[tuple[int, int], tuple[float, int]] = {}
    for i in windows:
        places = [j for j, inside in enumerate(of_context[i]) if inside]
        for j in places:
            amount = min(j - places[0], places[-1] - j) + 0.01 * len(places)
            span = tuple(features["offset_mapping"][i][j])
            most[span] = max(most.get(span, (-1.0, 0)), (amount, -i))
    for i in windows:
        keys = ("input_ids", "attention_mask", "token_type_ids")
        given = {key: torch.tensor([features[key][i]]) for key in keys if key in features}
        with torch.no_grad():
            output = model(**given)
        begins, ends = output.start_logits[0].numpy(), output.end_logits[0].numpy()
        spans = features["offset_mapping"][i]
        null = min(null, float(begins[0] + ends[0]))
        for begin in range(len(spans)):
            if not of_context[i][begin] or most[tuple(spans[begin])][1] != -i:
                continue
            for end in range(begin, min(begin + 30, len(spans))):
                score = float(begins[begin] + ends[end])
                if of_context[i][end] and score > best[0]:
                    best = score, spans[begin][0], spans[end][1]
    return null, *best


def same_answers(folder: Path, questions: list[dict[str, Any]], length: int) -> None:
    said = predictions(load_task_model(folder), folder, questions)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    for given, ours in zip(questions, said, strict=True):
        null, score, begin, end = decoded(tokenizer, model, given["question"], given["context"], length)
        assert ours["no_answer_score"] == pytest.approx(null - score, abs=1e-4)
        while given["context"][begin].isspace():  # transformers' SentencePiece pieces begin with the space
            begin += 1
        text = given["context"][begin:end]
        first = next(one for one in ours["nbest"] if one["text"])
        assert (first["text"], first["start"], first["end"]) == (text, begin, end)
        assert ours["answer"] == ("" if null > score else text)


@pytest.mark.parametrize("preset", ["bert", "modern cls"])
def test_answers(preset: str, tiny_data: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "model", "question_answering", tiny_data, preset, LENGTH)
    contexts = [TEXTS[1], " and ".join(TEXTS * 6)]
    rows = [{"question": question, "context": text} for question in TEXTS[2:] for text in contexts]
    same_answers(folder, rows, LENGTH)


def test_answers_of_squad(tmp_path: Path) -> None:
    path = real("tasks/squad/v11_3articles_maddy6_train-v1.1.json")
    examples, _ = read_questions(path, ExamplesConfig(train=str(path)))
    vocabulary = real("vocab/bert-base-uncased-vocab.txt")
    folder = export(tmp_path / "model", "question_answering", vocabulary, "bert", 384)
    rows = [{"question": one.question, "context": one.context} for one in examples[:200]]
    same_answers(folder, rows, 384)
