"""Shows how well a model fills masks, in sentences that it was not trained on.

    masks     the masked word of 200 held-out sentences: right in 31 %
              (the most frequent of these words, always: right in 6 %)

The sentences are short ones of the validation split that the checkpoint's config names, and the words those
that are one piece, so that one mask hides a whole word; in Chinese and Japanese a piece. Without such
sentences masks stand between frequent pieces of the vocabulary, where nothing is right or wrong.

N: sentences, T: their tokens, V: vocabulary.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bertscale.config import PretrainConfig, UserError, check_config
from bertscale.data.mixture import data_digest
from bertscale.data.shards import Dataset, open_dataset
from bertscale.model.model import PretrainingModel
from bertscale.tokenizer import MASK, Tokenizer, han_or_kana

SENTENCES = 200
SHORTEST, LONGEST = 6, 24  # tokens of a sentence
DRAWN = 5  # sentences for each one that is wanted: some have no word of one piece
SHOWN = 3
CHOICES = 3  # of each that is shown


class Masked(NamedTuple):
    """A text with one piece masked."""

    text: str  # with [MASK]
    ids: list[int]  # of its tokens, without [CLS] and [SEP]
    place: int  # of the mask, in ids
    target: int  # the id that stood there; -1 where there was none


def show_masks(model: PretrainingModel, table: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Prints how often `model` finds the masked word of held-out sentences, and those that it is surest of.

    `table` is the checkpoint's. Data that is absent, damaged or of another run is a line, no error.
    """
    config = table.get("config")
    if table.get("causal"):
        _print("masks     not tried: the last training was causal (objectives.clm), without masks")
        return
    if config and not config.get("objectives", {}).get("mlm", 1):
        return  # it never learnt to fill masks
    longest = min(LONGEST, model.config.max_position_embeddings - 2)
    try:
        masked = held_out(table, tokenizer, longest)
    except Exception as error:  # whatever is wrong with the data, the conversion has succeeded
        reason = str(error) if isinstance(error, UserError) else f"the data is damaged ({error!r})"
        _print(f"masks     not tried in held-out sentences: {' '.join(reason.split())}")
        masked = between_frequent_pieces(tokenizer)
        if not masked:
            return
        probabilities = fill(model, masked, tokenizer)
        _print("          what it expects between frequent pieces of the vocabulary:")
        shown = list(range(len(masked)))
    else:
        probabilities = fill(model, masked, tokenizer)
        targets = torch.tensor([sentence.target for sentence in masked])
        right = int((probabilities.argmax(1) == targets).sum()) / len(masked)
        same = int(targets.bincount().max()) / len(masked)
        _print(f"masks     the masked word of {len(masked)} held-out sentences: right in {_percent(right)}")
        _print(f"          (the most frequent of these words, always: right in {_percent(same)})")
        _print("          the surest of its first choices, no word twice:")
        shown = surest(probabilities)
    for number in shown:
        _print(f"  {masked[number].text}")
        _print(f"      {_choices(probabilities[number], masked[number].target, tokenizer)}")


# ------------------------------------------------------------------------------------------- sentences


def held_out(table: dict[str, Any], tokenizer: Tokenizer, longest: int) -> list[Masked]:
    """Sentences of the run's validation data, of at most `longest` tokens, each with a word masked.

    The same ones each time. Raises UserError where there are none, or the data is not that of the run.
    """
    if table.get("config") is None:
        raise UserError("the checkpoint was imported, so that no data is known")
    config = check_config(PretrainConfig, table["config"], "the checkpoint's config")
    datasets = [open_dataset(corpus.path, "validation") for corpus in config.corpora]
    paths = ", ".join(corpus.path for corpus in config.corpora)
    if data_digest(datasets, config.corpora) != table.get("data_digest"):
        raise UserError(f"{paths} is not the data that the model was trained on")
    wanted = -(-SENTENCES // len(datasets))
    masked = [
        sentence for dataset in datasets for sentence in _of_dataset(dataset, tokenizer, longest, wanted)
    ]
    if not masked:
        raise UserError(f"the validation data of {paths} has no short sentence with a word of one piece")
    # Sentences of one length side by side: attention on a CPU takes such together.
    return sorted(masked, key=lambda sentence: len(sentence.ids))


def _of_dataset(dataset: Dataset, tokenizer: Tokenizer, longest: int, wanted: int) -> list[Masked]:
    """At most `wanted` different sentences of the first shard, whose digest is compared."""
    shard = next((shard for shard in dataset.shards if len(shard.sentence_lengths)), None)
    if shard is None:
        return []
    shard.verify()
    lengths = shard.sentence_lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    draw = np.random.default_rng(0)
    short = np.flatnonzero((lengths >= SHORTEST) & (lengths <= longest))
    masked: dict[str, Masked] = {}  # by sentence
    for number in draw.choice(short, min(len(short), DRAWN * wanted), replace=False):
        ids = shard.tokens[ends[number] - lengths[number] : ends[number]].tolist()
        text = tokenizer.decode(ids)
        if text not in masked and (sentence := _mask_a_word(text, ids, tokenizer, draw)):
            masked[text] = sentence
        if len(masked) == wanted:
            break
    return list(masked.values())


def _mask_a_word(text: str, ids: list[int], tokenizer: Tokenizer, draw: np.random.Generator) -> Masked | None:
    """Masks one of the words of one piece in the sentence `text`, drawn; None where there is none."""
    [(again, spans)] = tokenizer.encode_with_offsets([text])
    if again != ids:  # what is shown has to be what the model sees
        return None
    starts = [*tokenizer.starts_word[ids].tolist(), True]
    places = [
        place
        for place, (begin, end) in enumerate(spans)
        if starts[place] and starts[place + 1] and _is_word(text[begin:end])
    ]
    if not places:
        return None
    place = int(draw.choice(places))
    begin, end = spans[place]
    masked_ids = [*ids[:place], tokenizer.mask_id, *ids[place + 1 :]]
    return Masked(f"{text[:begin]}{MASK}{text[end:]}".strip(), masked_ids, place, ids[place])


def _is_word(text: str) -> bool:
    """Whether a piece that begins and ends like a word is one: no number, no mark, no lone Latin letter."""
    return text[:1].isalpha() and (len(text) > 1 or not text.isascii())


def between_frequent_pieces(tokenizer: Tokenizer) -> list[Masked]:
    """Masks between the vocabulary's first pieces that begin a word; where it was trained, the frequent ones.

    They are of the script that most of those have: Han and Kana, or any other.
    """
    numbers = np.flatnonzero(tokenizer.starts_word).tolist()
    words = [(number, tokenizer.decode([number]).strip()) for number in numbers]
    words = [(number, word) for number, word in words if _is_word(word)]
    in_han = sum(bool(han_or_kana.match(word)) for _, word in words) > len(words) / 2
    words = [(number, word) for number, word in words if bool(han_or_kana.match(word)) == in_han]
    space = "" if in_han else " "
    return [
        Masked(space.join((before, MASK, after)), [first, tokenizer.mask_id, second], 1, -1)
        for (first, before), (second, after) in pairwise(words[: SHOWN + 1])
    ]


# --------------------------------------------------------------------------------------------- answers


@torch.no_grad()
def fill(model: PretrainingModel, masked: list[Masked], tokenizer: Tokenizer) -> Tensor:
    """The probability of each piece at each of the masks: [N, V]."""
    sentences = [[tokenizer.cls_id, *sentence.ids, tokenizer.sep_id] for sentence in masked]
    lengths = tuple(map(len, sentences))
    tokens = torch.tensor([number for ids in sentences for number in ids])  # [T]
    positions = torch.cat([torch.arange(length) for length in lengths])
    sample = tokens, torch.zeros_like(tokens), positions, lengths
    if model.generator is None:
        hidden, _ = model.encoder(*sample)  # [T, H]
    else:
        hidden, _ = model.generator(*sample, model.encoder.embeddings)
    places = torch.tensor([1 + sentence.place for sentence in masked])
    places[1:] += torch.tensor(lengths).cumsum(0)[:-1]
    logits = model.predictions.logits(hidden[places])[:, : model.vocab_size]  # [T, H] -> [N, V]
    return logits.softmax(1)


def surest(probabilities: Tensor) -> list[int]:
    """The sentences whose first choice has the highest probability, one for each word that is chosen."""
    best, choice = probabilities.max(1)  # [N] each
    by_choice: dict[int, int] = {}
    for number in best.argsort(descending=True, stable=True).tolist():
        by_choice.setdefault(int(choice[number]), number)
    return list(by_choice.values())[:SHOWN]


def _choices(probabilities: Tensor, target: int, tokenizer: Tokenizer) -> str:
    """The first choices at a mask, the right one marked; where it is not among them, it follows."""
    best = probabilities.topk(CHOICES)
    said = [
        f"{tokenizer.spelt(number)} {_percent(share)}{' (right)' if number == target else ''}"
        for share, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    if target >= 0 and target not in best.indices.tolist():
        said.append(f"(right: {tokenizer.spelt(target)})")
    return "   ".join(said)  # no commas, which may be choices


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _print(line: str) -> None:
    """Prints `line`; a terminal without its letters shows question marks, which is no reason to fail."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding))
