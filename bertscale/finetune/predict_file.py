"""Predictions of a file of any size: `bertscale predict`.

    predict_file(model, "reviews.jsonl", data, "predictions.jsonl")

Rows are read, predicted and written in chunks, so that memory does not grow with the file. To score them,
their labels and predictions stay in memory as well.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from bertscale.config import UserError, overridden
from bertscale.config.examples import NOT_OF_INPUTS, ExamplesConfig, TaskKind
from bertscale.examples.conll import is_conll
from bertscale.examples.inputs import example_of
from bertscale.examples.rows import ENDINGS, BrokenRow, ending_of
from bertscale.examples.stream import for_score, has_target, read_inputs, without_target
from bertscale.examples.text_rows import check_labels
from bertscale.files import whole_file
from bertscale.finetune import predict
from bertscale.finetune.predict import Prediction, TaskPredictor
from bertscale.progress import Progress
from bertscale.tasks.tags import OUTSIDE, is_tag
from bertscale.tasks.task import Example, TextExample, TokenExample
from bertscale.tasks.tokens import TokenTask

Line = dict[str, Any]  # of the output
Say = Callable[[str], None]
# Keys of `data` that are of a format: what a model remembers of them holds for files of the same alone.
OF_FORMAT = ("format", "header", "separator", "columns", "quoting")


def data_of(model: TaskPredictor, path: str, overrides: Sequence[str] = ()) -> ExamplesConfig:
    """Returns the form of an input file: that of the model's own files, with `key=value` overrides.

    Raises UserError for a key that is unknown or that says nothing of an input.
    """
    values = dict(model.columns)
    remembered, ending = values.get("format"), _format_by_name(model.kind, path)
    if remembered and ending and (remembered.replace("squad", "json") != ending):
        values = {key: value for key, value in values.items() if key not in OF_FORMAT}
    given = [override.removeprefix("data.") for override in overrides]
    for key in (override.partition("=")[0] for override in given):
        if key in NOT_OF_INPUTS:
            raise UserError(f"{key} is a key of `bertscale finetune`; it says nothing of an input file")
    return overridden(ExamplesConfig, {"train": path, **values}, given, "the form of the input")


def _format_by_name(kind: TaskKind, path: str) -> str | None:
    if kind == "tokens" and is_conll(path, ExamplesConfig(train=path)):
        return "conll"
    ending = ending_of(path)
    return "json" if ending == ".json" else ENDINGS.get(ending)


def predict_text(model: TaskPredictor, text: str, pair: str | None = None) -> Line:
    """Returns the line of one text, or pair; of question answering these are question and context.

    Raises UserError for a text that is blank, or a kind of task that needs something else.
    """
    given: Any = text if pair is None else (text, pair)
    line: Line = {"text": text} if pair is None else {"text": text, "text_pair": pair}
    match model.kind:
        case "question_answering" if pair is None:
            raise UserError("--text is the question: give the text that the answer stands in as --text-pair")
        case "question_answering":
            given = line = {"question": text, "context": pair}
        case "tokens" if pair is not None:
            raise UserError("a model for tokens takes one text: leave --text-pair out")
        case "multiple_choice":
            raise UserError(
                "a model for multiple_choice takes a file: give --input, with a column of options"
            )
    (prediction,) = model.predict([example_of(model.kind, given, "--text")])
    return {**line, "prediction": prediction}


def predict_file(
    model: TaskPredictor,
    path: str,
    data: ExamplesConfig,
    output: Path | None = None,
    *,
    score: bool = False,
    say: Say = print,
) -> dict[str, float]:
    """Writes a line for each row of a file, in its order, with its columns and `prediction`; of a row that
    cannot be predicted this is null, and `error` tells why.

    They go to `output`, which appears when it is whole, or to the standard output; of question answering
    to a file whose name ends in .json as one object {id: answer}. `say` is given what there is to know.
    Returns the figures of all rows whose labels are known, if asked for. Raises UserError for a file that
    cannot be read, or has a label that the model does not.
    """
    rows = read_inputs(model.kind, path, data, labelled=score, say=say)
    count = wrong = 0
    first = ""
    scored: list[tuple[Example, Prediction]] = []
    hidden = output is None and sys.stdout.isatty()  # the lines themselves are to be seen
    with (
        _opened(output, model.kind) as write,
        Progress("predict", None, "rows", file=sys.stderr, hidden=hidden) as progress,
    ):
        while chunk := list(islice(rows, predict.CHUNK)):
            _check_labels(model, chunk)
            lines = predict_rows(model, chunk)
            write(lines)
            errors = [line["error"] for line in lines if line["prediction"] is None]
            first = first or next(iter(errors), "")
            count, wrong = count + len(lines), wrong + len(errors)
            if score:
                scored += [
                    (for_score(row), line["prediction"])
                    for row, line in zip(chunk, lines, strict=True)
                    if isinstance(row, Example) and line["prediction"] and _can_be_scored(model, row)
                ]
            progress.advance(len(lines))
    if wrong:
        say(f"warning: {wrong:,} of {count:,} rows cannot be predicted; the first one is {first}")
    return _figures(model, path, scored, count, say) if score else {}


def _check_labels(model: TaskPredictor, rows: Sequence[Example | BrokenRow]) -> None:
    """Raises UserError for a label that the model cannot say, and which therefore cannot be scored."""
    if model.kind in ("classification", "multi_label"):
        known = [row for row in rows if isinstance(row, TextExample) and has_target(row)]
        check_labels(known, model.labels, "the model's labels")


def _can_be_scored(model: TaskPredictor, example: Example) -> bool:
    """Whether it is known what is right; tags of no scheme mark no entities."""
    if isinstance(model.task, TokenTask) and isinstance(example, TokenExample) and example.tags:
        return model.task.scheme == "none" or all(tag == OUTSIDE or is_tag(tag) for tag in example.tags)
    return has_target(example)


def _figures(
    model: TaskPredictor, path: str, scored: list[tuple[Example, Prediction]], count: int, say: Say
) -> dict[str, float]:
    if not scored:
        raise UserError(f"{path}: nothing can be scored, since no row has what is right")
    if len(scored) < count:
        say(f"warning: {count - len(scored):,} of {count:,} rows are not scored, having no usable label")
    examples, predictions = zip(*scored, strict=True)
    return model.task.score(examples, predictions)


def predict_rows(model: TaskPredictor, rows: Sequence[Example | BrokenRow]) -> list[Line]:
    """Returns the line of each row: its columns, `prediction`, and `error` where that is null."""
    given = [(i, without_target(row)) for i, row in enumerate(rows) if isinstance(row, Example)]
    found: dict[int, Prediction] = {}
    errors = {i: f"{row.place}: {row.reason}" for i, row in enumerate(rows) if isinstance(row, BrokenRow)}
    try:
        found = _predictions(model, given)
    except UserError:  # of an example that leaves no token: which ones?
        for i, example in given:
            try:
                model.task.encode([example], model.tokenizer, model.encoding)
            except UserError as error:
                errors[i] = str(error)
        found = _predictions(model, [(i, example) for i, example in given if i not in errors])
    lines = []
    for i, row in enumerate(rows):
        columns = row.row if isinstance(row.row, dict) else {}
        line = {**columns, "prediction": found.get(i)}
        lines.append({**line, "error": errors[i]} if i in errors else line)
    return lines


def _predictions(model: TaskPredictor, given: Sequence[tuple[int, Example]]) -> dict[int, Prediction]:
    if not given:
        return {}
    numbers, examples = zip(*given, strict=True)
    return dict(zip(numbers, model.predict(examples), strict=True))


# ------------------------------------------------------------------------------------------------ output


@contextlib.contextmanager
def _opened(output: Path | None, kind: TaskKind) -> Iterator[Callable[[list[Line]], None]]:
    """Gives what writes lines. A file appears when all are written; of a device there is no other name."""
    with contextlib.ExitStack() as stack:
        stream: BinaryIO = sys.stdout.buffer
        if output is not None and output.exists() and not output.is_file():
            stream = stack.enter_context(open(output, "wb"))
        elif output is not None:
            stream = stack.enter_context(_named_errors(output))
        if kind == "question_answering" and output is not None and output.suffix == ".json":
            answers: dict[str, str] = {}
            yield lambda lines: answers.update(_answers(lines))
            stream.write((json.dumps(answers, ensure_ascii=False, indent=1) + "\n").encode())
        else:
            yield lambda lines: stream.writelines(as_json(line) for line in lines)
        stream.flush()


@contextlib.contextmanager
def _named_errors(output: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears when it is whole; an error of the system says which one it was."""
    try:
        with whole_file(output) as file:
            yield file
    except OSError as error:
        error.filename = error.filename or str(output)
        raise


def _answers(lines: Sequence[Line]) -> dict[str, str]:
    said = [line["prediction"] for line in lines if line["prediction"] is not None]
    return {prediction["id"]: prediction["answer"] for prediction in said}


def as_json(line: Line) -> bytes:
    """Returns one line of JSON; what it has no form for, such as dates of parquet, becomes text."""
    return (json.dumps(line, ensure_ascii=False, default=str) + "\n").encode("utf-8", "surrogatepass")
