"""Sentences of a random sample of the documents -> a SentencePiece Unigram model.

The result depends on the input, the settings and the seed alone: not on the number of workers (the sample is
drawn split by split) and not on the machine (the trainer's sums depend on its number of threads, so that
number is fixed).

Unigram: Kudo, "Subword Regularization", 2018, https://arxiv.org/abs/1804.10959
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from bertscale.config import UserError
from bertscale.shards import write_bytes
from bertscale.tokenizer import CLS, MASK, PAD, SEP, UNK

TRAINER_THREADS = 16
LONGEST_SENTENCE = 2**16  # bytes; the trainer leaves longer ones out


def draw_sample(documents: Iterable[str], size: int, seed: str) -> list[str]:
    """`size` documents, or all if there are fewer, each with the same chance (reservoir sampling, R)."""
    generator = random.Random(seed)
    sample: list[str] = []
    for count, document in enumerate(documents):
        if count < size:
            sample.append(document)
        elif (place := generator.randrange(count + 1)) < size:
            sample[place] = document
    return sample


def train_tokenizer(sentences: list[Path], vocab_size: int, output: Path) -> None:
    """Trains on files with a sentence a line and writes the model to `output`.

    Raises UserError if the text has too few different words, or too many characters, for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            normalization_rule_name="identity",  # `normalize` did it
            character_coverage=0.9995,  # the rarest characters are spelt in bytes
            byte_fallback=True,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece=PAD,
            unk_piece=UNK,
            control_symbols=[CLS, SEP, MASK],  # user_defined_symbols could be written by a text
            max_sentence_length=LONGEST_SENTENCE,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if limit:
            raise UserError(
                f"train_tokenizer.vocab_size={vocab_size} is too large for this text; "
                f"the largest that fits is {limit[1]}"
            ) from error
        if "smaller than required_chars" in str(error):
            raise UserError(
                f"train_tokenizer.vocab_size={vocab_size} is too small for the characters of this text"
            ) from error
        raise
    write_bytes(output, model.getvalue())


def _lines(files: list[Path]) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.rstrip("\n")
