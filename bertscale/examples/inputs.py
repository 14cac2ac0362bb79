"""What a program gives a task model -> examples: texts, pairs, lists of words, questions, choices.

examples_of("classification", ["One text.", ("A text", "and a second one")])
examples_of("tokens", ["A text.", ["or", "its", "words"]])
examples_of("question_answering", [{"question": "Who?", "context": "It was me."}])
examples_of("multiple_choice", [{"text": "It rains, so", "options": ["I stay", "I go out"]}])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bertscale.config import UserError
from bertscale.config.examples import TaskKind
from bertscale.examples.rows import Row
from bertscale.examples.text_rows import is_blank
from bertscale.examples.token_rows import example_of_tokens
from bertscale.tasks.task import ChoiceExample, Example, QuestionExample, TextExample, TokenExample
from bertscale.tasks.words import are_characters, split_words

FORMS = {
    "tokens": "a text, or a list of its words",
    "question_answering": 'a dictionary {"question": text, "context": text}',
    "multiple_choice": 'a dictionary {"text": text, "options": [texts]}',
}
TEXTS = 'a text, a tuple of two, or a dictionary {"text": text, "text_pair": text}'


def examples_of(kind: TaskKind, inputs: Sequence[Any]) -> list[Any]:
    """Returns an example for each input. Raises UserError, which tells which, for one that is no such thing
    or is blank."""
    word_lists = [each for each in inputs if kind == "tokens" and isinstance(each, list)]
    spaces = not are_characters(word_lists)
    return [example_of(kind, each, f"inputs[{number}]", spaces) for number, each in enumerate(inputs)]


def example_of(kind: TaskKind, given: Any, place: str, spaces: bool = True) -> Example:
    """Returns the example of one input, which messages call `place`; `spaces` as in `join_tokens`. Raises
    UserError as `examples_of`."""
    match kind, given:
        case "question_answering", {"question": question, "context": context}:
            return QuestionExample(
                place=place,
                identity=str(given.get("id", place)),
                question=_text(place, "the question", question),
                context=_text(place, "the context", context),
                answers=(),
                known=False,
            )
        case "multiple_choice", {"text": text, "options": [_, _, *_] as options}:
            return ChoiceExample(
                place=place,
                text=_text(place, "the text", text),
                options=tuple(_text(place, f"option {i}", option) for i, option in enumerate(options)),
                target=None,
            )
        case "tokens", str(text):
            return TokenExample(
                place=place, text=_text(place, "the text", text), words=split_words(text), tags=None
            )
        case "tokens", [_, *_] as words if isinstance(words, list):
            return example_of_tokens(Row(place, {}), [str(word) for word in words], None, spaces)
        case (("classification" | "multi_label" | "regression"), _):
            return TextExample(place=place, texts=_texts(given, place), target=None)
    raise _wrong(kind, given, place)


def _texts(given: Any, place: str) -> tuple[str, ...]:
    """One text or two, of any form in use."""
    match given:
        case str(text):
            return (_text(place, "the text", text),)
        case (first, second) if isinstance(given, tuple):
            pass
        case {"text": first, "text_pair": second}:
            pass
        case {"text": text}:
            return (_text(place, "the text", text),)
        case _:
            raise _wrong("classification", given, place)
    return _text(place, "the first text", first), _text(place, "the second text", second)


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is no text but {_short(value)}")
    if is_blank(value):
        raise UserError(f"{place}: {name} is blank")
    return value


def _wrong(kind: TaskKind, given: Any, place: str) -> UserError:
    keys = f"a dictionary with {', '.join(map(repr, given))}" if isinstance(given, Mapping) else _short(given)
    return UserError(f"{place} is {keys}; a model for {kind} takes {FORMS.get(kind, TEXTS)}")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
