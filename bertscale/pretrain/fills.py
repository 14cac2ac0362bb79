"""What the model fills into the masks of a few given sentences (`train.fills`), at each evaluation.

    {"step": 500, "fills": [{"text": "Paris is the [MASK] of France.", "masks": [[["capital", 0.31], ...]]}]}

is a line of RUN/fills.jsonl; TensorBoard shows the same as a table. P: masks of a sentence, V: vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bertscale.config import PretrainConfig, UserError
from bertscale.data.micro_batch import MicroBatch
from bertscale.run_folder import FILLS, append_line
from bertscale.tokenizer import MASK, Tokenizer
from bertscale.train.engine import Engine
from bertscale.train.metrics import MetricsWriter

CHOICES = 5
# Stand where a mask is, so that the text around it is cut as ever; the first that takes pieces of its own.
WORDS = ("the", "who", "一", "的", "0")

Fill = list[tuple[str, float]]  # pieces and their probabilities, the most probable first


class Sentence(NamedTuple):
    """A sentence with masks, as given, and its tokens without [CLS] and [SEP]."""

    text: str
    ids: list[int]


def encode_sentences(config: PretrainConfig, tokenizer: Tokenizer) -> list[Sentence]:
    """The sentences of `train.fills`; raises UserError where one is longer than a sample."""
    sentences = []
    for text in config.train.fills:
        ids = encode_masked(text, tokenizer)
        if len(ids) + 2 > config.samples.max_length:
            raise UserError(
                f"train.fills: {text!r} has {len(ids)} tokens, a sample of samples.max_length="
                f"{config.samples.max_length} holds {config.samples.max_length - 2}; shorten it"
            )
        sentences.append(Sentence(text, ids))
    return sentences


def encode_masked(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of `text`, with the mask's for each [MASK], and the others as if a word stood there."""
    parts = text.split(MASK)
    for word in WORDS:
        whole = word.join(parts)
        [(ids, spans)] = tokenizer.encode_with_offsets([whole])
        found: list[int] = []
        kept, place = 0, 0  # tokens done, characters done
        for part in parts[:-1]:
            begin = place + len(part)
            place = begin + len(word)
            inside = [n for n in range(kept, len(ids)) if spans[n][1] > begin and spans[n][0] < place]
            if not inside or spans[inside[0]][0] < begin or spans[inside[-1]][1] > place:
                break  # a piece reaches beyond the word
            found += [*ids[kept : inside[0]], tokenizer.mask_id]
            kept = inside[-1] + 1
        else:
            return [*found, *ids[kept:]]
    first, *others = tokenizer.encode(parts)
    return [*first, *(number for ids in others for number in (tokenizer.mask_id, *ids))]


@torch.no_grad()
def fill(engine: Engine[PretrainConfig], sentences: list[Sentence], tokenizer: Tokenizer) -> list[list[Fill]]:
    """The best `CHOICES` for each mask of each sentence. All ranks must call; all get the same."""
    ranks = engine.ranks
    decoder: nn.Module = engine.model.predictions.decoder
    logits: list[Tensor] = []  # [P, V of this rank] of each sentence

    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        logits.append(engine.model.predictions.decoder.logits(inputs[0]).float())

    # Before the decoder's own forward pass: there ZeRO-3 has gathered its weight.
    hook = decoder.register_forward_pre_hook(read)
    engine.model.eval()
    try:
        for sentence in sentences:
            engine(_batch(sentence, tokenizer).to(ranks.device))
    finally:
        hook.remove()
        engine.model.train()
    shares = [_best(share, ranks.tensor_rank * share.shape[1]) for share in logits]
    of_ranks = ranks.gather(shares)[: ranks.tensor]  # those of the first data rank: they see all the same
    return [_merge(list(parts), tokenizer) for parts in zip(*of_ranks, strict=True)]


def _batch(sentence: Sentence, tokenizer: Tokenizer) -> MicroBatch:
    tokens = torch.tensor([tokenizer.cls_id, *sentence.ids, tokenizer.sep_id])
    places = torch.tensor([1 + n for n, number in enumerate(sentence.ids) if number == tokenizer.mask_id])
    return MicroBatch(
        tokens=tokens,
        token_types=torch.zeros_like(tokens),
        positions=torch.arange(len(tokens)),
        lengths=(len(tokens),),
        target_positions=places,
        targets=torch.zeros_like(places),  # some id: the loss is not looked at
        num_targets=len(places),
        uniforms=torch.full((len(places),), 0.5, dtype=torch.float64),
    )


# Of each mask, in one share of the vocabulary: the best logits, their ids, and log(sum(exp(all logits))).
Share = list[tuple[list[float], list[int], float]]


def _best(logits: Tensor, first: int) -> Share:
    """Of logits [P, V here], the first of which is that of the id `first`."""
    best = logits.topk(min(CHOICES, logits.shape[1]))
    sums = logits.logsumexp(1)
    return list(zip(best.values.tolist(), (best.indices + first).tolist(), sums.tolist(), strict=True))


def _merge(shares: list[Share], tokenizer: Tokenizer) -> list[Fill]:
    """The best of all shares of the vocabulary, for each mask."""
    fills = []
    for parts in zip(*shares, strict=True):
        highest = max(total for _, _, total in parts)
        total = highest + math.log(sum(math.exp(each - highest) for _, _, each in parts))
        choices = [pair for values, ids, _ in parts for pair in zip(values, ids, strict=True)]
        best = sorted(choices, key=lambda pair: (-pair[0], pair[1]))[:CHOICES]
        fills.append([(tokenizer.spelt(number), math.exp(value - total)) for value, number in best])
    return fills


def show_fills(
    writer: MetricsWriter, run: Path, step: int, sentences: list[Sentence], fills: list[list[Fill]]
) -> None:
    """Writes what `fill` has found into RUN/fills.jsonl and TensorBoard."""
    entries = [
        {
            "text": sentence.text,
            "masks": [[[piece, round(share, 6)] for piece, share in mask] for mask in masks],
        }
        for sentence, masks in zip(sentences, fills, strict=True)
    ]
    append_line(run / FILLS, {"step": step, "fills": entries})
    writer.write_text(step, "fills", table(sentences, fills))


def table(sentences: list[Sentence], fills: list[list[Fill]]) -> str:
    """The fills as a table in Markdown, a row for each mask, which is printed bold."""
    rows = [["sentence", *map(str, range(1, CHOICES + 1))], ["---"] * (CHOICES + 1)]
    for sentence, masks in zip(sentences, fills, strict=True):
        parts = sentence.text.split(MASK)
        for number, choices in enumerate(masks, 1):
            marked = f"{MASK.join(parts[:number])}**{MASK}**{MASK.join(parts[number:])}"
            cells = [f"{piece} {100 * share:.0f} %" for piece, share in choices]
            rows.append([marked, *cells, *[""] * (CHOICES - len(cells))])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
