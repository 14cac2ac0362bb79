"""Sentences of a random sample of the documents -> a tokenizer, of SentencePiece or bytes, or more pieces.

The result depends on the input, the settings and the seed alone: not on the number of workers (the sample is
drawn unit by unit) and not on the machine. The sample is bounded in documents and in bytes, so that memory
is, whatever the input. A given tokenizer is extended on the same sample (`extend_tokenizer`).

Unigram: Kudo, "Subword Regularization", 2018, https://arxiv.org/abs/1804.10959
BPE: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016,
https://arxiv.org/abs/1508.07909
"""

from __future__ import annotations

import hashlib
import heapq
import math
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

from bertscale.config import UserError
from bertscale.files import write_bytes, write_json
from bertscale.progress import Progress, show_count
from bertscale.tokenizer import (  # fmt: skip
    CLS,
    DROPPED_RULE,
    FAST_NAME,
    MASK,
    PAD,
    SENTENCE_PIECE_NAME,
    SEP,
    SPACES_RULE,
    UNK,
    Tokenizer,
    WordPieceTokenizer,
    han_or_kana,
    load_tokenizer,
)
from data_prep.clean import clean_records
from data_prep.extend_tokenizer import extend_tokenizer, is_unigram_or_bpe
from data_prep.plan import Plan, Unit, read_json
from data_prep.readers.compressed import temporary_folder_named
from data_prep.readers.read import undecodable
from data_prep.readers.records import Bad
from data_prep.segment import splitter
from data_prep.trainer import LONGEST_SENTENCE, lines_of, trained_model

SAMPLE_BYTES = 100_000_000  # of all units; Unigram takes about twenty times that in memory while it trains
SAMPLE_UNITS = 256  # at most so many are read for the sample
EXCERPT = 2**16  # characters: longer documents are drawn in parts
COVERAGE, WIDE_COVERAGE = 0.9995, 0.9998  # of characters, WIDE where Han and Kana are many
WIDE_SHARE = 1 / 3  # of the letters
NOT_LEARNT = 5 + 256  # special pieces and bytes
BAD_SHOWN = 1000  # records of a work unit without any text
COMPARED = 10_000  # sentences, at most, for the agreement with the Hugging Face form
POLL_SECONDS = 1.0  # between two looks at what the trainer wrote


def finished_tokenizer(plan: Plan) -> Tokenizer | None:
    """The tokenizer in the output folder, if it is whole and was made for this plan."""
    record = read_json(plan.tokenizer_record) or {}
    path = plan.output / record.get("name", "")
    if record.get("plan") != plan.digest or not path.is_file():
        return None
    whole = hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    return load_tokenizer(path) if whole else None


def make_tokenizer(pool: ProcessPoolExecutor, plan: Plan) -> Tokenizer:
    """The tokenizer in the output folder: kept, copied there, or trained."""
    if (finished := finished_tokenizer(plan)) is not None:
        return finished
    plan.tokenizer_record.unlink(missing_ok=True)
    if plan.config.tokenizer:
        given = load_tokenizer(plan.config.tokenizer, plan.config.lowercase)
        if given.form == "NFC" and plan.config.normalization == "nfkc":
            raise UserError(
                f"normalization=nfkc, but the tokenizer {plan.config.tokenizer} is for text in NFC, as which "
                "fine-tuning and the exported tokenizer would read theirs: take normalization=nfc"
            )
        print(f"tokenizer: {plan.config.tokenizer}: {given}")
        path = plan.output / given.file_name
        if plan.config.train_tokenizer.extend_to is None:
            write_bytes(path, given.content)
        else:
            check_extension(given, plan.config.train_tokenizer.extend_to)
            _sample_and_train(pool, plan, path, given)
    else:
        in_bytes = plan.config.tokenizer_model == "byte_bpe"
        path = plan.output / (FAST_NAME if in_bytes else SENTENCE_PIECE_NAME)
        _sample_and_train(pool, plan, path, None)
    tokenizer = load_tokenizer(path)
    record = {"name": path.name, "sha256": tokenizer.sha256, "plan": plan.digest}
    write_json(plan.tokenizer_record, record)
    return tokenizer


def check_extension(given: Tokenizer, size: int) -> None:
    """Raises UserError where the tokenizer `given` cannot be extended to `size` pieces."""
    if not (isinstance(given, WordPieceTokenizer) or is_unigram_or_bpe(given)):
        raise UserError(
            "train_tokenizer.extend_to: WordPiece vocabularies and SentencePiece models of the kinds unigram "
            f"and bpe are extended, and {given.path} is {given}: leave extend_to out, or leave `tokenizer` "
            "out and one is trained on this text"
        )
    if size <= given.vocab_size:
        raise UserError(
            f"train_tokenizer.extend_to={size}, but the tokenizer {given.path} has {given.vocab_size} pieces "
            "already: give a larger number, of old and new pieces together"
        )


def _sample_and_train(pool: ProcessPoolExecutor, plan: Plan, path: Path, given: Tokenizer | None) -> None:
    """Writes to `path` a model that is trained on a sample, or else the tokenizer `given`, with more
    pieces."""
    config, training, kind = plan.config, plan.config.train_tokenizer, plan.config.tokenizer_model
    units = _drawn_units(plan)
    sample = _sample(pool, plan, units)
    files = [unit.sample for unit in units]
    wide = sample["wide"] > WIDE_SHARE * sample["letters"]
    coverage = training.character_coverage or (WIDE_COVERAGE if wide else COVERAGE)
    of_units = sum(unit.bytes for unit in units) / sum(unit.bytes for unit in plan.units)
    share = sample["characters"] / sample["seen"] * of_units
    size = training.extend_to or training.vocab_size
    if given is None:
        doing = f"training {size:,} {kind} pieces"
    else:
        doing = f"learning {size - given.vocab_size:,} more pieces"
    in_bytes = given is None and kind == "byte_bpe"
    covered = "" if in_bytes else f"; {_percent(coverage)} of its characters get pieces"
    print(
        f"tokenizer: {doing} on {sample['documents']:,} documents: {sample['bytes'] / 1e6:,.1f} MB, "
        f"{show_count(sample['characters'])} characters, {_percent(share)} of the text{covered}",
        flush=True,
    )
    if wide and kind == "unigram" and given is None:
        print("tokenizer: such text has few spaces: train_tokenizer.model=bpe is trained many times faster")
    began = time.monotonic()
    compatible, log = config.normalization == "nfkc", plan.trainer_log
    if given is not None:
        how = (given.path, config.lowercase, size, coverage, log)
        trained = pool.submit(extend_tokenizer, files, path, *how)
    elif kind == "byte_bpe":
        form: Literal["NFC", "NFKC"] = "NFKC" if compatible else "NFC"
        trained = pool.submit(train_byte_level, files, path, size, form, config.is_spaced, log)
    else:
        rule: Literal["nfkc", "identity"] = "nfkc" if compatible else "identity"
        settings = (kind, size, coverage, rule, config.is_spaced, log)
        trained = pool.submit(train_tokenizer, files, path, *settings)
    _show_training(trained, log, size)
    log.unlink()
    print(f"tokenizer: trained in {time.monotonic() - began:.1f} s", flush=True)
    if given is None and not in_bytes:  # which is the Hugging Face form
        same, compared = pool.submit(compare_with_hugging_face, path, files, sample["sentences"]).result()
        print(
            f"tokenizer: its Hugging Face form gives the same ids for {same:,} of {compared:,} sentences "
            f"({_percent(same / compared)})",
            flush=True,
        )
    for file in files:
        file.unlink()


def _show_training(trained: Future[None], log: Path, vocab_size: int) -> None:
    """Shows how far the trainer is, by its `log`, until it has `trained`; raises its errors."""
    with Progress("tokenizer", None, "steps") as progress:
        while not wait([trained], POLL_SECONDS).done:
            done, total, doing = training_state(_text_of(log), vocab_size)
            if total and not progress.total:  # the time left is that of the steps
                progress.began, progress.start, progress.done = time.monotonic(), done, done
            progress.total = total
            progress.advance(done - progress.done, now=doing)
        trained.result()
        _, progress.total, _ = training_state(_text_of(log), vocab_size)
        progress.facts.clear()
        progress.advance((progress.total or 0) - progress.done)


def _text_of(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # the worker has not begun yet
        return ""


def training_state(log: str, vocab_size: int) -> tuple[int, int | None, str]:
    """How far the trainer is: (steps done, steps in all where it can be known, what it does).

    `log` is what SentencePiece, or `train_byte_level`, wrote so far; to the latter, a step is a sentence that
    is read. A step of BPE is a piece that is joined of two; one of Unigram is a pass over the text: the
    candidates become fewer by a quarter after every two passes, until they are a tenth more than the
    vocabulary.
    """
    if sentences := re.findall(r"read (\d+) of (\d+) sentences", log):
        done, total = map(int, sentences[-1])
        return done, total, "counting words" if done < total else "joining pieces"
    if merges := re.findall(r"\bmerges=(\d+)", log):
        alphabet = re.search(r"Alphabet size=(\d+)", log)
        single = int(alphabet[1]) if alphabet else 0
        return int(merges[-1]), max(vocab_size - single - NOT_LEARNT, int(merges[-1])), "joining pieces"
    if passes := re.findall(r"EM sub_iter=\d+ size=(\d+)", log):
        rounds = math.log(max(int(passes[-1]) / (1.1 * vocab_size), 1)) / math.log(4 / 3)
        left = 2 * max(0, math.ceil(rounds) - 1) + len(passes) % 2
        return len(passes), len(passes) + left, "choosing among candidates"
    for message, doing in (
        ("Extracting seed", "looking for candidates"),
        ("all chars count", "counting words"),
        ("Normalizing", "counting characters"),
    ):
        if message in log:
            return 0, None, doing
    return 0, None, "reading the sample"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


# ------------------------------------------------------------------------------------------ the sample


def _drawn_units(plan: Plan) -> list[Unit]:
    """All work units, or some of very many, so that the sample of a terabyte does not take a day to draw."""
    if len(plan.units) <= SAMPLE_UNITS:
        return plan.units
    # The seed has an old name of the units: another one would draw another sample, and change the bytes.
    drawn = random.Random(f"{plan.config.seed}-splits").sample(plan.units, SAMPLE_UNITS)
    return sorted(drawn, key=lambda unit: unit.number)


def _sample(pool: ProcessPoolExecutor, plan: Plan, units: list[Unit]) -> Counter[str]:
    """Writes each work unit's share of the sample; returns the sums of `_sample_unit` over all of them."""
    sample, sizes = Counter[str](), [unit.bytes for unit in units]
    documents = _share(plan.config.train_tokenizer.sample_documents, sizes)
    lengths = _share(SAMPLE_BYTES, sizes)
    with Progress("sample", sum(sizes), "bytes") as progress:
        futures = {
            pool.submit(_sample_unit, unit, *share): unit
            for unit, *share in zip(units, documents, lengths, strict=True)
        }
        for future in as_completed(futures):
            sample += future.result()
            progress.advance(futures[future].bytes)
    plan.check_encoding(sample["undecoded"], sample["records"])
    if not sample["sentences"]:
        raise _nothing_to_train_on(plan, sample)
    return sample


def _nothing_to_train_on(plan: Plan, sample: Counter[str]) -> UserError:
    """The error of an input without a text; what was bad lies in the quarantine file."""
    message = f"input: {', '.join(plan.config.input)}: no readable document in it"
    reasons = {key: count for key, count in sample.items() if key.startswith(("bad: ", "dropped: "))}
    if reasons:
        message += f"; {'; '.join(f'{count:,} {reason}' for reason, count in sorted(reasons.items()))}"
    if any(reason.startswith("bad: ") for reason in reasons):
        message += f". The first bad ones are listed in {plan.write_quarantine()}"
    return UserError(message)


def _share(total: int, weights: list[int]) -> list[int]:
    """`total` cut into whole numbers in proportion to `weights`; they add up to `total`."""
    everything, ends, so_far = sum(weights), [0], 0
    for weight in weights:
        so_far += weight
        ends.append(total * so_far // everything)
    return [end - start for start, end in pairwise(ends)]


def _sample_unit(unit: Unit, documents: int, size: int) -> Counter[str]:
    """Writes the sentences of training documents of one work unit: at most so many documents and bytes.

    Returns how many documents, sentences, bytes, characters, letters and wide letters (Han and Kana) were
    drawn, how many characters were seen of all text that they were drawn from, and how many records, some of
    them no text in the encoding (`undecoded`).
    """
    sample, characters = Counter[str](), Counter[str]()
    split = splitter(unit.config.language)
    no_text = undecodable(unit.config.encoding)
    bad_records = list[bytes]()

    def texts() -> Iterator[str]:
        for record, text, reason, held_out, _ in clean_records(unit, Counter()):
            sample.update(records=1, undecoded=isinstance(record, Bad) and reason in no_text)
            if isinstance(record, Bad):
                if len(bad_records) < BAD_SHOWN:
                    bad_records.append(record.line())
                sample[f"bad: {reason}"] += 1
            elif reason:
                sample[f"dropped: {reason}"] += 1
            if text and not held_out:
                sample["seen"] += len(text)
                yield text

    drawn = draw_sample(texts(), documents, size, f"{unit.config.seed}-{unit.number}")
    with open(unit.sample, "w", encoding="utf-8", newline="\n") as file:
        for _, content in drawn:
            text = content.decode()
            characters.update(text)
            sentences = [part for sentence in split(text) for part in _trainable(sentence)]
            file.writelines(f"{sentence}\n" for sentence in sentences)
            sample.update(bytes=len(content), sentences=len(sentences))
    if not drawn:
        unit.bad_records.write_bytes(b"".join(bad_records))
    letters = {character: count for character, count in characters.items() if character.isalpha()}
    sample.update(
        documents=len({number for number, _ in drawn}),
        characters=characters.total(),
        letters=sum(letters.values()),
        wide=sum(count for character, count in letters.items() if han_or_kana.match(character)),
    )
    return sample


def draw_sample(texts: Iterable[str], documents: int, size: int, seed: str) -> list[tuple[int, bytes]]:
    """At random, in order, at most so many documents and bytes: (number of the document, its text as UTF-8).

    Each document has the same chance; of one longer than EXCERPT, each part has. Memory holds the sample
    alone.
    """
    generator = random.Random(seed)
    # Each part gets a random key; those with the smallest are kept, as many as there is room for.
    drawn: list[tuple[float, int, int, bytes]] = []  # a heap: the largest key first
    held, limit = 0, 1.0
    for number, text in enumerate(texts):
        for place, part in enumerate(_excerpts(text, EXCERPT)):
            key = generator.random()
            if key >= limit:
                continue
            content = part.encode()
            heapq.heappush(drawn, (-key, number, place, content))
            held += len(content)
            while len(drawn) > documents or held > size:
                key, _, _, out = heapq.heappop(drawn)
                limit, held = -key, held - len(out)
    return [(number, content) for _, number, _, content in sorted(drawn, key=lambda part: part[1:3])]


def _trainable(sentence: str) -> Iterator[str]:
    """`sentence`, or its parts where it is longer than the trainer takes: it would be left out."""
    if len(sentence) <= LONGEST_SENTENCE // 4 or len(sentence.encode()) <= LONGEST_SENTENCE:
        yield sentence
        return
    for part in _excerpts(sentence, LONGEST_SENTENCE // 4):
        if part.strip():
            yield part.strip()


def _excerpts(text: str, longest: int) -> Iterator[str]:
    """`text` in parts of at most `longest` characters, cut at spaces where there are any."""
    start = 0
    while len(text) - start > longest:
        end, middle = start + longest, start + longest // 2
        cut = max(text.rfind(" ", middle, end), text.rfind("\n", middle, end))
        end = cut + 1 if cut >= 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


# --------------------------------------------------------------------------------------------- the model


def train_tokenizer(
    sentences: list[Path],
    output: Path,
    model: Literal["unigram", "bpe"] = "unigram",
    vocab_size: int = 32_768,
    coverage: float = COVERAGE,
    rule: Literal["nfkc", "identity"] = "identity",
    space_before_text: bool = True,
    log: Path | None = None,
) -> None:
    """Trains on files with a sentence a line and writes the model to `output`.

    `rule` is the Unicode normalisation that the model itself does; text in NFC needs none.
    `space_before_text` makes the first word of a text the same pieces as after a space; where words have no
    spaces it would make every text begin with other pieces than those inside of it. What the library says
    goes to `log`, by default nowhere. Raises UserError if the text has too few different words, or too
    many characters, for `vocab_size`.
    """
    try:
        trained = trained_model(
            lines_of(sentences),
            log,
            model_type=model,
            vocab_size=vocab_size,
            normalization_rule_name=rule,
            add_dummy_prefix=space_before_text,
            character_coverage=coverage,  # the rarest characters are spelt in bytes
            byte_fallback=True,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece=PAD,
            unk_piece=UNK,
            control_symbols=[CLS, SEP, MASK],  # user_defined_symbols could be written by a text
        )
    except RuntimeError as error:
        if limit := re.search(r"value <= (\d+)", str(error)):
            raise UserError(
                f"train_tokenizer.vocab_size={vocab_size} is too large for this text; "
                f"the largest that fits is {limit[1]}"
            ) from error
        if limit := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", str(error)):
            raise UserError(
                f"train_tokenizer.vocab_size={vocab_size} is too small for the characters of this text; the "
                f"smallest that fits is {limit[1]}, or lower train_tokenizer.character_coverage={coverage}"
            ) from error
        if "character_coverage" in str(error):
            raise UserError(
                f"train_tokenizer.character_coverage={coverage}: SentencePiece takes 0.98 to 1"
            ) from error
        raise
    write_bytes(output, trained)


def train_byte_level(
    sentences: list[Path],
    output: Path,
    vocab_size: int = 32_768,
    form: Literal["NFC", "NFKC"] = "NFC",
    space_before_text: bool = True,
    log: Path | None = None,
) -> None:
    """Trains byte-level BPE on files with a sentence a line and writes its tokenizer.json to `output`.

    Words are cut as GPT-2 and ModernBERT cut them. Any text is first given the normal form of prep, so that a
    model meets no white space that it has not seen in training. The pieces depend on the counts of words
    alone, not on their order. `space_before_text` as in `train_tokenizer`. How many sentences are read goes
    to `log`. Raises UserError if the text has too few different words for `vocab_size`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE())
    of_unicode = {"NFC": normalizers.NFC, "NFKC": normalizers.NFKC}[form]()
    dropped = normalizers.Replace(Regex(DROPPED_RULE), "")
    one_space = normalizers.Replace(Regex(SPACES_RULE), " ")
    fast.normalizer = normalizers.Sequence([dropped, of_unicode, one_space, normalizers.Strip()])
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space_before_text)
    fast.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in (PAD, UNK, CLS, SEP)]
    # lstrip: the mask takes the space before it, which would otherwise be a piece of its own.
    mask = AddedToken(MASK, special=True, normalized=False, lstrip=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, mask],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = lines_of(sentences) if log is None else _logged(sentences, log)
    fast.train_from_iterator(lines, trainer)
    if (size := fast.get_vocab_size()) < vocab_size:
        raise UserError(
            f"train_tokenizer.vocab_size={vocab_size} is too large for this text; "
            f"the largest that fits is {size}"
        )
    write_bytes(output, fast.to_str().encode())
    write_bytes(output, load_tokenizer(output).content)  # which names the special pieces by their roles


def _logged(files: list[Path], log: Path) -> Iterator[str]:
    """The lines of `files`; every hundredth part of them it says so in `log`."""
    count = sum(1 for _ in lines_of(files))
    with open(log, "w", encoding="utf-8") as file:
        for number, line in enumerate(lines_of(files), 1):
            yield line
            if number % max(1, count // 100) == 0 or number == count:
                file.write(f"read {number} of {count} sentences\n")
                file.flush()


def compare_with_hugging_face(model: Path, files: list[Path], sentences: int) -> tuple[int, int]:
    """Returns (sentences to which the model's Hugging Face form gives the same ids, sentences compared).

    Compared are COMPARED of all the `sentences` in the files, at even distances.
    """
    tokenizer = load_tokenizer(model)
    compared = list(islice(lines_of(files), 0, None, -(-sentences // COMPARED)))
    what = "the tokenizer in its Hugging Face form"
    with temporary_folder_named(what), tempfile.TemporaryDirectory() as folder:
        tokenizer.export_hugging_face(folder, max_length=512)
        return round(tokenizer.agreement(folder, compared) * len(compared)), len(compared)
