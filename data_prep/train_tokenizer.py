"""Sentences of a random sample of the documents -> a SentencePiece Unigram model.

The result depends on the input, the settings and the seed alone: not on the number of workers (the sample is
drawn split by split) and not on the machine (the trainer's sums depend on its number of threads, so that
number is fixed).

Unigram: Kudo, "Subword Regularization", 2018, https://arxiv.org/abs/1804.10959
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path

import sentencepiece
import xxhash

from bertscale.config import UserError
from bertscale.progress import Progress
from bertscale.shards import TOKENIZER_NAME, write_bytes, write_json
from bertscale.tokenizer import CLS, MASK, PAD, SEP, UNK, Tokenizer
from data_prep.clean import clean
from data_prep.plan import Plan, Unit, read_json
from data_prep.segment import split_sentences

TRAINER_THREADS = 16
LONGEST_SENTENCE = 2**16  # bytes; the trainer leaves longer ones out


def finished_tokenizer(plan: Plan) -> Tokenizer | None:
    """The tokenizer in the output folder, if it is whole and was made for this plan."""
    path, made = plan.output / TOKENIZER_NAME, read_json(_record(plan))
    if not made or made.get("plan") != plan.digest or not path.is_file():
        return None
    if hashlib.sha256(path.read_bytes()).hexdigest() != made["sha256"]:
        return None
    return Tokenizer.load(path)


def make_tokenizer(pool: ProcessPoolExecutor, plan: Plan) -> Tokenizer:
    """The tokenizer in the output folder: kept, copied there, or trained."""
    if (kept := finished_tokenizer(plan)) is not None:
        return kept
    config, path = plan.config, plan.output / TOKENIZER_NAME
    _record(plan).unlink(missing_ok=True)
    if config.tokenizer:
        write_bytes(path, Path(config.tokenizer).read_bytes())
    else:
        documents = _sample(pool, plan)
        size = config.train_tokenizer.vocab_size
        print(f"tokenizer: training {size:,} pieces on {documents:,} documents", flush=True)
        began = time.monotonic()
        samples = [unit.sample for unit in plan.units]
        pool.submit(train_tokenizer, samples, size, path).result()
        print(f"tokenizer: trained in {time.monotonic() - began:.1f} s", flush=True)
        for sample in samples:
            sample.unlink()
    tokenizer = Tokenizer.load(path)
    write_json(_record(plan), {"sha256": tokenizer.sha256, "plan": plan.digest})
    return tokenizer


def _record(plan: Plan) -> Path:
    return plan.output / ".prep" / "tokenizer.json"


# ------------------------------------------------------------------------------------------ the sample


def _sample(pool: ProcessPoolExecutor, plan: Plan) -> int:
    """Writes each split's share of the sample; returns the number of documents in all of them."""
    documents, sizes = 0, [unit.bytes for unit in plan.units]
    shares = _share(plan.config.train_tokenizer.sample_documents, sizes)
    with Progress("sample", sum(sizes), "bytes") as progress:
        futures = {
            pool.submit(_sample_split, unit, share): unit
            for unit, share in zip(plan.units, shares, strict=True)
        }
        for future in as_completed(futures):
            documents += future.result()
            progress.advance(futures[future].bytes)
    if not documents:
        raise UserError(f"input: {', '.join(plan.config.input)}: no readable document in it")
    return documents


def _share(total: int, weights: list[int]) -> list[int]:
    """`total` cut into whole numbers in proportion to `weights`; they add up to `total`."""
    everything, ends, so_far = sum(weights), [0], 0
    for weight in weights:
        so_far += weight
        ends.append(total * so_far // everything)
    return [end - start for start, end in pairwise(ends)]


def _sample_split(unit: Unit, size: int) -> int:
    """Writes the sentences of `size` random training documents of one split; returns how many there were."""
    config = unit.config
    texts = (clean(r, config.min_characters)[0] for r in unit.records() if isinstance(r, str))
    kept = (text for text in texts if text and not held_out(text, config.validation_fraction))
    sample = draw_sample(kept, size, f"{config.seed}-{unit.number}")
    lines = [f"{sentence}\n" for text in sample for sentence in split_sentences(text)]
    unit.sample.write_text("".join(lines), encoding="utf-8", newline="\n")
    return len(sample)


def held_out(text: str, fraction: float) -> bool:
    """Whether `text` is for validation: the same text always is, wherever it stands."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


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


# --------------------------------------------------------------------------------------------- the model


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
