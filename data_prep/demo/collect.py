"""The English documentation on this machine -> a corpus and a labelled task, for the quickstart.

python -m data_prep.docstrings OUTPUT

Reads the docstrings of the Python installation and of the environment's packages with `ast` (nothing is
imported) and the language reference in `pydoc_data.topics`; keeps their prose, every paragraph once.

    OUTPUT/corpus/docs-00000.jsonl ...  {"text", "package", "module", "name"}, a docstring a line
    OUTPUT/task/train.jsonl, test.jsonl {"text", "label", "module"}: a sentence, or one with shuffled words
    OUTPUT/collected.json               counts; written last, and reused while the environment is the same

No text of a module of the test set is in the corpus: pretraining never sees what the classifier is tested on.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertscale.config import UserError
from bertscale.errors import INTERRUPTED, MISTAKE
from bertscale.files import write_bytes, write_json
from bertscale.progress import Progress
from data_prep.demo.prose import prose
from data_prep.demo.task import make_task, shuffle_key
from data_prep.segment import split_sentences
from data_prep.workers import number_of_cores, worker_pool

COLLECTOR_VERSION = "2"  # raise it when the same environment begins to give other texts
SHORTEST = 100  # characters
FILE_BYTES = 8 * 2**20  # of one corpus file, about
LARGEST_SOURCE = 2 * 2**20  # bytes; larger ones are generated tables
FILES_OF_PACKAGE = 400  # at most: the largest ones repeat themselves, and reading is most of the time
# Folders without documentation of their own: tests, and copies of other packages.
SKIPPED = {"__pycache__", "tests", "test", "testing", "_vendor", "vendor", "third_party"}
SKIPPED |= {"site-packages", "dist-packages", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Text:
    text: str
    package: str
    module: str
    name: str


def collect(output: str | Path) -> dict[str, Any]:
    """Writes corpus and task into `output`, or finds them there; returns the counts of collected.json."""
    began = time.monotonic()
    output = Path(output)
    environment = _environment()
    summary_path = output / "collected.json"
    try:
        summary: dict[str, Any] = json.loads(summary_path.read_bytes())
        if summary["environment"] == environment:
            print(f"already collected: {output}")
            return summary
    except (OSError, ValueError, KeyError, TypeError):
        pass
    summary_path.unlink(missing_ok=True)
    for folder in ("corpus", "task"):
        (output / folder).mkdir(parents=True, exist_ok=True)
        for old in (output / folder).glob("*.jsonl"):
            old.unlink()

    texts, docstrings = _read_all(_sources())
    task = make_task((text.text, text.module) for text in texts)
    for split, examples in (("train", task.train), ("test", task.test)):
        _write_jsonl(output / "task" / f"{split}.jsonl", examples)
    corpus = [text for text in texts if text.module not in task.test_modules]
    files = _write_corpus(output / "corpus", corpus)
    summary = {
        "environment": environment,
        "docstrings_read": docstrings,
        "documents": len(corpus),
        "text_bytes": sum(len(text.text.encode()) for text in corpus),
        "files": files,
        "packages": len({text.package for text in corpus}),
        "largest_packages": dict(Counter(text.package for text in texts).most_common(12)),
        "held_out_documents": len(texts) - len(corpus),
        "train_examples": len(task.train),
        "test_examples": len(task.test),
        "seconds": round(time.monotonic() - began, 2),
    }
    write_json(summary_path, summary)
    print(
        "collected {documents:,} documents, {text_bytes:,} bytes, from {packages} packages; task: "
        "{train_examples:,} + {test_examples:,} examples; {seconds} s".format(**summary)
    )
    return summary


def _environment() -> str:
    """Digest of all that decides the result: versions of Python, of every package and of this collector."""
    packages = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    key = json.dumps([COLLECTOR_VERSION, sys.version, *packages])
    return hashlib.sha256(key.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ read


def _sources() -> list[tuple[str, str, str]]:
    """Lists (file, package, module) of the source files, by module; the standard library is "python"."""
    paths = sysconfig.get_paths()
    roots = {paths["stdlib"]: "python", paths["purelib"]: "", paths["platlib"]: ""}
    sources = []
    for root, package in roots.items():
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in SKIPPED and name.isidentifier())
            for name in names:
                path = Path(folder, name)
                if name.endswith(".py") and not name.startswith("test_"):
                    if path.stat().st_size > LARGEST_SOURCE:
                        continue
                    module = ".".join(path.relative_to(root).with_suffix("").parts)
                    module = module.removesuffix(".__init__")
                    sources.append((str(path), package or module.split(".")[0], module))
    of_package: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for source in sorted(sources, key=lambda source: shuffle_key(source[2])):
        of_package[source[1]].append(source)
    chosen = [source for all_of_it in of_package.values() for source in all_of_it[:FILES_OF_PACKAGE]]
    return sorted(chosen, key=lambda source: (source[2], source[0]))


def _read_all(sources: list[tuple[str, str, str]]) -> tuple[list[Text], int]:
    """Returns (texts in the order of `sources`, each paragraph where it first stands; docstrings read)."""
    texts, seen, docstrings = [], set[bytes](), 0
    chunks = [sources[start : start + 64] for start in range(0, len(sources), 64)]
    with (
        Progress("docstrings", len(sources), "files") as progress,
        worker_pool(min(number_of_cores(), 16)) as pool,
    ):
        for chunk, (count, of_chunk) in zip(chunks, pool.map(_read_files, chunks), strict=True):
            docstrings += count
            for text in of_chunk:
                new_lines = [line for line in text.text.split("\n") if _is_new(line, seen)]
                new = Text("\n".join(new_lines), text.package, text.module, text.name)
                if _is_document(new.text):
                    texts.append(new)
            progress.advance(len(chunk))
    return texts, docstrings


def _is_new(paragraph: str, seen: set[bytes]) -> bool:
    """Whether no paragraph in `seen` has the same letters; adds it."""
    letters = re.sub(r"[^a-z]+", "", paragraph.lower())
    key = hashlib.blake2b(letters.encode(), digest_size=16).digest()
    if key in seen:
        return False
    seen.add(key)
    return True


def _is_document(text: str) -> bool:
    return len(text) >= SHORTEST and len(split_sentences(text)) >= 2


def _read_files(sources: list[tuple[str, str, str]]) -> tuple[int, list[Text]]:
    gc.disable()  # syntax trees have no cycles; walking them again and again takes a quarter of the time
    texts, docstrings = [], 0
    for path, package, module in sources:
        for name, docstring in _docstrings(Path(path).read_bytes(), module):
            docstrings += 1
            if len(docstring) < SHORTEST:
                continue
            text = prose(docstring)
            if _is_document(text):
                texts.append(Text(text, package, module, name))
    return docstrings, texts


def _docstrings(source: bytes, module: str) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, docstring) of a module and of its classes and functions."""
    if b'"""' not in source and b"'''" not in source:
        return  # parsing is most of the time, and a long docstring is triple-quoted
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    if module == "pydoc_data.topics":
        yield from _topics(tree)
        return
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield name, docstring
        for child in reversed(getattr(node, "body", [])):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((f"{name}.{child.name}".lstrip("."), child))
            elif isinstance(child, ast.If | ast.Try | ast.With):
                stack.append((name, child))


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The entries of `topics = {"assert": "The assert statement ...", ...}`."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for key, value in zip(statement.value.keys, statement.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), str(value.value)


# ----------------------------------------------------------------------------------------------- write


def _write_corpus(folder: Path, texts: list[Text]) -> int:
    """Files of about FILE_BYTES; returns how many."""
    files: list[list[dict[str, str]]] = [[]]
    room = FILE_BYTES
    for text in texts:
        if room <= 0:
            files.append([])
            room = FILE_BYTES
        files[-1].append(vars(text))
        room -= len(text.text)
    for number, records in enumerate(files):
        _write_jsonl(folder / f"docs-{number:05d}.jsonl", records)
    return len(files)


def _write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_bytes(path, lines.encode("utf-8", "replace"))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments and arguments[0] in ("-h", "--help") else MISTAKE
    try:
        collect(arguments[0])
    except UserError as error:
        print(f"docstrings: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("\ndocstrings: stopped; the same command starts again", file=sys.stderr)
        return INTERRUPTED
    return 0
