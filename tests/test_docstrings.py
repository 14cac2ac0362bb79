"""Docstrings become prose, and the labelled task does not give its answers away."""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from pathlib import Path

import pytest

from data_prep.demo import collect as docstrings
from data_prep.demo.prose import prose
from data_prep.demo.task import FROM_ONE_MODULE, MASKED_NAME, make_task, mask_names, names_of

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


def make_texts() -> list[tuple[str, str, str]]:
    generator = random.Random(0)
    words = [f"word{number:c}" for number in range(97, 123)]
    texts = []
    for package in ("torch", "numpy", "sklearn", "small"):
        for module in range(60 if package != "small" else 3):
            for _ in range(5):
                text = f"In {package} {' '.join(generator.choices(words, k=30))}."
                texts.append((text, package, f"{package}.m{module}"))
    return texts


def test_task_divides_modules() -> None:
    texts = make_texts()
    task = make_task(texts)
    assert task == make_task(texts)
    assert task.labels == ["numpy", "sklearn", "torch"]
    sides = [{example["module"] for example in side} for side in (task.train, task.test)]
    assert not sides[0] & sides[1]
    assert sides[1] <= task.test_modules
    assert not sides[0] & task.test_modules
    for label in task.labels:
        assert sum(example["label"] == label for example in task.train) == 32
        assert sum(example["label"] == label for example in task.test) == 100
    for side in (task.train, task.test):
        modules = [example["module"] for example in side]
        assert max(map(modules.count, modules)) <= FROM_ONE_MODULE
        assert not any(re.search("torch|numpy|sklearn", example["text"]) for example in side)


def test_copies_of_training_texts_leave_the_test_set() -> None:
    texts = [
        ("This one text is the same in all of the modules of it.", "numpy", f"numpy.m{number}")
        for number in range(200)
    ]
    task = make_task(texts)
    assert len(task.train) == 32
    assert task.test == []


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Use PyTorch's torch.nn.Linear, torchvision.", "Use library's library, library."),
        ("A scikit-learn or scikit learn or sklearn.svm model.", "A library or library or library model."),
        ("Like np.array, numpy, NumPy and np.", "Like library, library, library and library."),
        ("The snp and input are no names.", "The snp and input are no names."),
        ("See my_numpy_helper.", "See library."),
        ("As scikit-bio does.", "As library does."),
    ],
)
def test_names_are_masked(text: str, masked: str) -> None:
    assert MASKED_NAME == "library"
    assert mask_names(text, names_of(["torch", "sklearn", "numpy"])) == masked


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
        for number in range(140):
            words = ["".join(generator.choices(letters, k=6)) for _ in range(20)]
            text = f"The value of {package} is a {' '.join(words)}. And it is the {words[0]}."
            (folder / f"m{number}.py").write_text(f'"""{text}\n\n{shared}\n"""\nraise SystemExit\n')
    (tmp_path / "std").mkdir()
    site = str(tmp_path / "site")
    paths = {"stdlib": str(tmp_path / "std"), "purelib": site, "platlib": site}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)

    output = tmp_path / "output"
    summary = docstrings.collect(output)
    [corpus] = (output / "corpus").iterdir()
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    test = [json.loads(line) for line in (output / "task" / "test.jsonl").read_text().splitlines()]
    assert summary["documents"] == len(records) == 2 * 40
    assert summary["labels"] == ["numpy", "torch"]
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
