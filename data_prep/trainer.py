"""SentencePiece's trainer: lines of text -> a model, the same on every machine."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

THREADS = 16  # the trainer's sums depend on the number of its threads, so that number is fixed
LONGEST_SENTENCE = 2**16  # bytes; the trainer leaves longer ones out


def trained_model(lines: Iterable[str], log: Path | None, **settings: Any) -> bytes:
    """Trains on `lines`; `settings` are the library's. What it says goes to `log`, by default nowhere.

    Raises RuntimeError with the library's words where the text does not suit the settings.
    """
    import sentencepiece  # reading the sample does without it

    trained = io.BytesIO()
    with _errors_to(log) if log else nullcontext():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=trained,
            max_sentence_length=LONGEST_SENTENCE,
            num_threads=THREADS,
            minloglevel=0 if log else 2,
            **settings,
        )
    return trained.getvalue()


@contextmanager
def _errors_to(file: Path) -> Iterator[None]:
    """Sends what this process writes to its standard error, C++ libraries too, to `file`."""
    kept = os.dup(2)
    try:
        with open(file, "wb") as target:
            os.dup2(target.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def lines_of(files: list[Path]) -> Iterator[str]:
    """The lines of all `files`, one after another, without their ends."""
    for path in files:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.rstrip("\n")
