"""Docstrings become prose, and the labelled task does not give its answers away."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from pathlib import Path

import pytest

from data_prep.demo import collect as docstrings
from data_prep.demo.prose import prose
from data_prep.demo.task import FROM_ONE_MODULE, make_task, plain_sentences

NUMPYDOC = """
Sort the ``items`` of `sequence` [1]_.

The sort is stable, see :func:`~package.other.merge` and `the guide <https://a.b/c>`_. It
takes **linear** memory in the *length* of the input:

    sorted = sort(items)

Parameters
----------
items : array_like
    The items to be sorted, of any kind.
key : callable, optional
    A key.

Returns
-------
list

See Also
--------
merge : This is a full sentence about the other function.

Notes
-----
It is an old method, and it is the default one.

.. math:: O(n) \\log n

.. note::
    This is to be read by all of the users.

Examples
--------
>>> sort([2, 1])
[1, 2]

The result of this is a new list.

References
----------
.. [1] Knuth, D. The art of computer programming. It is a book.
"""

GOOGLE = """Reads [the file](https://a.b/c) of <b>examples</b>.

Args:
    path (`str`, *optional*, defaults to `"x"`): The path of the file that is read. It
        may be a folder, too.
    mode: Mode.

Returns:
    A list of the examples in the file.

Shape:
    - Input: (N, C), where this is the number of channels of it.

```python
This is a sentence of the code that is not to be kept.
```

- The first point is that this is a list of points.
- Second.

| a table | of the words | that is dropped. |
:param x: The value of x is a number of the items.
:rtype: str
"""


def test_numpydoc_becomes_prose() -> None:
    assert prose(NUMPYDOC).split("\n") == [
        "Sort the items of sequence.",
        "The sort is stable, see merge and the guide. It takes linear memory in the length of the input.",
        "The items to be sorted, of any kind.",
        "It is an old method, and it is the default one.",
        "This is to be read by all of the users.",
        "The result of this is a new list.",
    ]


def test_google_style_and_markdown_become_prose() -> None:
    assert prose(GOOGLE).split("\n") == [
        "Reads the file of examples.",
        "The path of the file that is read. It may be a folder, too.",
        "A list of the examples in the file.",
        "The first point is that this is a list of points.",
        "The value of x is a number of the items.",
    ]


@pytest.mark.parametrize("text", ["", "Sorts.", "x = f(a, b)\ny = x.z", "==== ====\na    b\n==== ====", "::"])
def test_what_is_no_prose(text: str) -> None:
    assert prose(text) == ""


def test_docstrings_are_read_without_importing() -> None:
    source = '''"""Module."""
raise SystemExit("imported")
class A:
    """Class."""
    if True:
        def f(self):
            """Method."""
async def g():
    \'\'\'Function.\'\'\'
'''
    found = list(docstrings._docstrings(source.encode(), "m"))
    assert found == [("", "Module."), ("A", "Class."), ("A.f", "Method."), ("g", "Function.")]
    assert list(docstrings._docstrings(b'def broken(:\n    """Text."""', "m")) == []
    topics = b'topics = {"if": """The if statement."""}'
    assert list(docstrings._docstrings(topics, "pydoc_data.topics")) == [("if", "The if statement.")]


def make_texts() -> list[tuple[str, str]]:
    generator = random.Random(0)
    words = [letter * 3 for letter in "abcdefghijklmnopqrstuvwxyz"]
    return [
        (f"{' '.join(generator.choices(words, k=9)).capitalize()}. Too short.", f"package.m{module}")
        for module in range(450)
        for _ in range(5)
    ]


def test_task_divides_modules() -> None:
    texts = make_texts()
    task = make_task(texts)
    assert task == make_task(texts)
    sides = [{example["module"] for example in side} for side in (task.train, task.test)]
    assert not sides[0] & sides[1]
    assert sides[1] == task.test_modules
    assert (len(task.train), len(task.test)) == (1000, 500)
    for side in (task.train, task.test):
        assert sum(example["label"] == "shuffled" for example in side) == len(side) / 2
        modules = [example["module"] for example in side]
        assert max(map(modules.count, modules)) <= FROM_ONE_MODULE


def test_the_words_of_an_example_do_not_tell_its_label() -> None:
    """A shuffled sentence has the words of one, the first and the last in their places; none comes twice."""
    task = make_task(make_texts())
    originals = {sentence for text, _ in make_texts() for sentence in plain_sentences(text)}
    by_words = {tuple(sorted(sentence.split())): sentence for sentence in originals}
    seen = set()
    for example in (*task.train, *task.test):
        original = by_words[tuple(sorted(example["text"].split()))]
        assert original not in seen
        seen.add(original)
        assert (example["text"] == original) == (example["label"] == "sentence")
        for place in (0, -1):
            assert example["text"].split()[place] == original.split()[place]


@pytest.mark.parametrize(
    "text",
    [
        "It has too few words.",
        "It has a word with a Capital letter in it.",
        "The value x1 is not a word of the language.",
        "The the the the the the the the the.",
        "No full stop is at the end of this one",
        f"A sentence {'that goes on and on ' * 4}is too long.",
    ],
)
def test_what_is_no_plain_sentence(text: str) -> None:
    assert plain_sentences(text) == []


def test_collects_from_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    shared = "This paragraph about nothing stands in every module of it. It is the same in all of them."
    for package in ("torch", "numpy"):
        folder = tmp_path / "site" / package
        (folder / "tests").mkdir(parents=True)
        (folder / "tests" / "test_it.py").write_text(f'"""A test is not read. {shared * 3}"""')
        for number in range(410):
            words = ["".join(generator.choices(letters, k=6)) for _ in range(20)]
            text = f"The value of {package} is a {' '.join(words)}. And it is the {' '.join(words[:4])}."
            (folder / f"m{number}.py").write_text(f'"""{text}\n\n{shared}\n"""\nraise SystemExit\n')
    (tmp_path / "std").mkdir()
    site = str(tmp_path / "site")
    paths = {"stdlib": str(tmp_path / "std"), "purelib": site, "platlib": site}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)

    output = tmp_path / "output"
    summary = docstrings.collect(output)
    [corpus] = (output / "corpus").iterdir()
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    test, train = (
        [json.loads(line) for line in (output / "task" / f"{side}.jsonl").read_text().splitlines()]
        for side in ("test", "train")
    )
    assert summary["documents"] == len(records)
    assert len(records) == 2 * docstrings.FILES_OF_PACKAGE - len({example["module"] for example in test})
    assert (summary["train_examples"], summary["test_examples"]) == (len(train), 500)
    assert records[0].keys() == {"text", "package", "module", "name"}
    assert sum(shared in record["text"] for record in records) <= 1
    assert not {record["module"] for record in records} & {example["module"] for example in test}
    assert not any("tests" in record["module"] for record in records)

    assert docstrings.collect(output) == summary
    assert "already collected" in capsys.readouterr().out


def test_the_language_reference_is_on_this_machine() -> None:
    path = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")
    topics = dict(docstrings._topics(ast.parse(path.read_bytes())))
    assert len(prose(topics["exceptions"])) > 1000
