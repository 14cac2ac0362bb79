"""Scores a file of predictions, ours or anyone's, against a file of gold answers: `bertscale score`.

    score_files("squad", "dev-v1.1.json", "predictions.json")     # {"exact_match": 0.81, "f1": 0.88}

A prediction that is missing counts as an empty one, and a line says how many are; one of an unknown id, or a
row too many, is a mistake.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from bertscale.config import UserError
from bertscale.config.examples import ExamplesConfig
from bertscale.examples.conll import is_conll, read_token_examples
from bertscale.examples.rows import BrokenRow, Row, column, format_of, read_content, read_rows
from bertscale.examples.squad import asked_questions
from bertscale.tasks.entity_scores import entity_scores
from bertscale.tasks.questions import best_text
from bertscale.tasks.squad_scores import squad_scores
from bertscale.tasks.tags import find_scheme

Kind = Literal["squad", "tokens", "classification"]
KINDS: tuple[Kind, ...] = ("squad", "tokens", "classification")
PREDICTED = ("predicted", "prediction", "label")  # names of the column of predicted labels, the first found
Say = Callable[[str], None]


def score_files(
    kind: Kind,
    gold: str | Path,
    predictions: str | Path,
    *,
    no_answer: str | Path | None = None,
    chinese: bool | None = None,
    label: str | int = "label",
    salvage: bool = False,
    say: Say = print,
) -> dict[str, float]:
    """Returns the figures of `predictions`; raises UserError, in one line, for files that do not go together.

    Of squad `no_answer` is a file {id: how likely there is no answer}, `chinese` says by which rules, by
    default by the gold answers, and `salvage` takes the whole articles of a file that is cut off. Of
    classification `label` is the column of the gold labels. Of tokens both files have the same words.
    """
    if kind == "squad":
        return _score_squad(str(gold), str(predictions), no_answer, chinese, salvage, say)
    if kind == "tokens":
        return _score_tokens(str(gold), str(predictions))
    return _score_classification(str(gold), str(predictions), label, say)


# --------------------------------------------------------------------------------------------- squad


def _score_squad(
    gold: str, predictions: str, no_answer: str | Path | None, chinese: bool | None, salvage: bool, say: Say
) -> dict[str, float]:
    answers = _gold_answers(gold, salvage, say)
    given = _predicted_answers(predictions)
    known = {identity for identity, _ in answers}
    _check_ids(given, known, predictions, gold)
    missing = sum(identity not in given for identity, _ in answers)
    if missing:
        count = f"{missing:,} of {len(answers):,} questions"
        say(f"{predictions}: {count} have no prediction; each counts as empty")
    nothing = {"answer": ""}
    chosen = [given.get(identity, nothing) for identity, _ in answers]
    chances = None
    if no_answer is not None:
        values = _json_object(str(no_answer))
        _check_ids(values, known, str(no_answer), gold)
        if lacking := [identity for identity, _ in answers if identity not in values]:
            raise UserError(f"{no_answer} has nothing for the question {lacking[0]} of {gold}")
        chances = [float(values[identity]) for identity, _ in answers]
    elif all("no_answer_score" in one for one in given.values()) and any(not texts for _, texts in answers):
        chances = [float(one.get("no_answer_score", 0.0)) for one in chosen]
    return squad_scores(
        [texts for _, texts in answers],
        [str(one["answer"]) for one in chosen],
        chances,
        answered=[best_text(one) for one in chosen],
        chinese=chinese,
    )


def _gold_answers(path: str, salvage: bool, say: Say) -> list[tuple[str, list[str]]]:
    """The id and the right answers of each question; where they stand in the context plays no part."""
    answers: list[tuple[str, list[str]]] = []
    for asked in asked_questions(path, ExamplesConfig(train=path, salvage=salvage), say):
        if isinstance(asked, BrokenRow):
            raise UserError(f"{asked.place}: {asked.reason}")
        if asked.answers is None:
            raise UserError(f"{asked.place}: it has no answers, so that nothing can be scored by it")
        answers.append((asked.identity, [text for text, _ in asked.answers]))
    if not answers:
        raise UserError(f"{path} has no question")
    return answers


def _predicted_answers(path: str) -> dict[str, dict[str, Any]]:
    """The prediction of each id: of an object {id: answer}, or of lines or a list with `id` and `answer`."""
    if format_of(path, ExamplesConfig(train=path)) == "json" or _is_map(path):
        text = _text(path)
        if text.lstrip().startswith("{"):
            return {identity: _prediction(path, answer) for identity, answer in _json_object(path).items()}
    found: dict[str, dict[str, Any]] = {}
    for row in read_rows(path, ExamplesConfig(train=path), [("id", "id")]):
        if isinstance(row, BrokenRow):
            raise UserError(f"{row.place}: {row.reason}")
        row = ours(row)
        # prediction_text is the name in the metrics of Hugging Face.
        answer = row.values.get("answer", row.values.get("prediction_text"))
        found[str(column(row, "id", "id"))] = {**row.values, **_prediction(row.place, answer)}
    return found


def _is_map(path: str) -> bool:
    """Whether the file is one object {id: answer}, which on a single line looks like a line of jsonl."""
    try:
        values = json.loads(_text(path))
    except ValueError:
        return False
    return isinstance(values, dict) and not {"id", "answer"} <= values.keys()


def _prediction(place: str, answer: Any) -> dict[str, Any]:
    if not isinstance(answer, str):
        raise UserError(f'{place}: {str(answer)[:60]!r} is no answer; give text, and "" for no answer')
    return {"answer": answer}


def _check_ids(given: dict[str, Any], known: set[str], path: str, gold: str) -> None:
    if unknown := [identity for identity in given if identity not in known]:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        raise UserError(f"{path}: {unknown[0]!r}{more} is the id of no question of {gold}")


def _text(path: str) -> str:
    return read_content(path).decode("utf-8-sig", errors="replace")


def _json_object(path: str) -> dict[str, Any]:
    try:
        values = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no object {{id: value, ...}}")
    return values


# -------------------------------------------------------------------------------------------- tokens


def _score_tokens(gold: str, predictions: str) -> dict[str, float]:
    """The figures of tags: both files CoNLL columns, or rows with lists of tokens and tags, ours included."""
    right, given = _tagged(gold), _tagged(predictions)
    if len(right) != len(given):
        raise UserError(
            f"{gold} has {len(right):,} sentences and {predictions} {len(given):,}: both must have the same "
            "ones in the same order"
        )
    for (place, words), (other, said) in zip(right, given, strict=True):
        if len(words) != len(said):
            raise UserError(f"{other} has {len(said)} tags, and {place} {len(words)} words")
    truth, said_tags = [tags for _, tags in right], [tags for _, tags in given]
    scheme = find_scheme({tag for tags in (*truth, *said_tags) for tag in tags})
    return entity_scores(truth, said_tags, scheme)


def _tagged(path: str) -> list[tuple[str, Sequence[str]]]:
    """The place and the tags of each sentence."""
    data = ExamplesConfig(train=path)
    found: list[tuple[str, Sequence[str]]] = []
    if is_conll(path, data):
        examples, broken = read_token_examples(path, data)
        if broken:
            raise UserError(f"{broken[0]['place']}: {broken[0]['reason']}")
        found = [(example.place, example.tags or ()) for example in examples]
    else:
        for row in read_rows(path, data, []):
            if isinstance(row, BrokenRow):
                raise UserError(f"{row.place}: {row.reason}")
            tags = column(ours(row), "tags", "data.tags")
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
                raise UserError(f"{row.place}: 'tags' is no list of tags")
            found.append((row.place, tags))
    if not found:
        raise UserError(f"{path} has no sentence")
    return found


def ours(row: Row) -> Row:
    """A row of our own predictions with what the model says in place of the example's columns; else
    itself."""
    said = row.values.get("prediction")
    return Row(row.place, {**row.values, **said}) if isinstance(said, dict) else row


# ------------------------------------------------------------------------------------- classification


def _score_classification(gold: str, predictions: str, label: str | int, say: Say) -> dict[str, float]:
    right = _rows(gold, [label])
    given = [_labelled(row) for row in _rows(predictions, [])]
    name = next((name for name in PREDICTED if name in given[0].values), None)
    if name is None:
        names = ", ".join(map(repr, given[0].values))
        raise UserError(f"{predictions} has no column {' or '.join(map(repr, PREDICTED))}, but {names}")
    truth = [str(column(row, label, "--label")) for row in right]
    if all("id" in row.values for row in (*right, *given)):
        by_id = {str(row.values["id"]): str(column(row, name, "--label")) for row in given}
        identities = [str(row.values["id"]) for row in right]
        _check_ids(by_id, set(identities), predictions, gold)
        missing = sum(identity not in by_id for identity in identities)
        if missing:
            say(f"{predictions}: {missing:,} of {len(right):,} rows have no prediction; each counts as wrong")
        said = [by_id.get(identity, "") for identity in identities]
    elif len(right) != len(given):
        raise UserError(
            f"{gold} has {len(right):,} rows and {predictions} {len(given):,}: without a column 'id' in both "
            "they must have the same rows in the same order"
        )
    else:
        said = [str(column(row, name, "--label")) for row in given]
    return classification_scores(truth, said)


def _labelled(row: Row) -> Row:
    """A row with the label that was predicted as its column `prediction`."""
    said = row.values.get("prediction")
    return Row(row.place, {**row.values, "prediction": said.get("label")}) if isinstance(said, dict) else row


def classification_scores(truth: Sequence[str], said: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, macro and micro F1, Matthews' correlation; of two labels also F1 of the second."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    accuracy = sum(a == b for a, b in zip(truth, said, strict=True)) / len(truth)
    figures = {
        "accuracy": accuracy,
        "macro_f1": float(f1_score(truth, said, average="macro", zero_division=0)),
        "micro_f1": accuracy,
    }
    labels = sorted({*truth, *said})
    if len(labels) == 2:
        figures["f1"] = float(f1_score(truth, said, pos_label=labels[1], zero_division=0))
    return figures | {"matthews": float(matthews_corrcoef(truth, said))}


def _rows(path: str, columns: Sequence[str | int]) -> list[Row]:
    rows: list[Row] = []
    header: Literal["auto", True] = "auto" if any(isinstance(name, int) for name in columns) else True
    data = ExamplesConfig(train=path, header=header)
    for row in read_rows(path, data, [("--label", name) for name in columns]):
        if isinstance(row, BrokenRow):
            raise UserError(f"{row.place}: {row.reason}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows
