"""Fills of masks at each evaluation: how sentences are cut, what is chosen, where it is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import pretrain_config

from bertscale.config import PretrainConfig, UserError
from bertscale.data.shards import open_dataset
from bertscale.export.masks import Masked
from bertscale.export.masks import fill as fill_masks
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.pretrain.fills import (
    Sentence,
    _best,
    _merge,
    encode_masked,
    encode_sentences,
    fill,
    show_fills,
    table,
)
from bertscale.run_folder import FILLS, append_line, read_steps
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.metrics import MetricsWriter


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return load_tokenizer(open_dataset(tiny_data).tokenizer_path)


class Alone:
    """An engine of one rank with its first weights."""

    def __init__(self, config: PretrainConfig, vocab_size: int) -> None:
        self.config, self.model = config, PretrainingModel(config.model, vocab_size)
        for name, parameter in self.model.named_parameters():
            parameter.data = 20 * initial_value(name, parameter.shape, config.model, vocab_size, seed=1)
        self.ranks = SimpleNamespace(
            device=torch.device("cpu"), tensor=1, tensor_rank=0, gather=lambda value: [value]
        )

    def __call__(self, batch: Any) -> Any:
        assert not self.model.training
        return self.model(batch)


def test_the_text_around_a_mask_is_cut_as_if_a_word_stood_there(tokenizer: Tokenizer) -> None:
    [(whole, spans)] = tokenizer.encode_with_offsets(["The cat finds the garden at 9."])
    finds = [n for n, (begin, end) in enumerate(spans) if begin < 13 and end > 8]
    number = [n for n, (begin, _) in enumerate(spans) if begin == 28]
    expected = [*whole[: finds[0]], tokenizer.mask_id, *whole[finds[-1] + 1 : number[0]], tokenizer.mask_id]
    found = encode_masked("The cat [MASK] the garden at [MASK].", tokenizer)
    assert found == [*expected, *whole[number[-1] + 1 :]]
    assert tokenizer.decode([whole[-1]]) == "."  # and not a point that begins a word
    # Where no word keeps to itself, the parts are cut alone.
    joined = SimpleNamespace(
        mask_id=9,
        encode_with_offsets=lambda texts: [([1], [(0, len(texts[0]))])],
        encode=lambda parts: [[len(part)] for part in parts],
    )
    assert encode_masked("ab[MASK]c", joined) == [2, 9, 1]  # type: ignore[arg-type]


def test_sentences_that_cannot_be_filled_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"fills: 'Paris\.' has no \[MASK\]; put one"):
        pretrain_config("data", "run", train={"fills": ["Paris."]})
    with pytest.raises(ValueError, match=r"train\.fills needs masked tokens to be learnt"):
        pretrain_config("data", "run", train={"fills": ["A [MASK]."]}, objectives={"mlm": 0})
    config = pretrain_config("data", "run", train={"fills": ["The cat " * 40 + "[MASK]"]})
    with pytest.raises(UserError, match=r"samples\.max_length=48 holds 46; shorten it"):
        encode_sentences(config, tokenizer)


@pytest.mark.parametrize("generator", [None, 0.5])
def test_fills_are_those_of_the_model(generator: float | None, tokenizer: Tokenizer) -> None:
    fills = ["The cat [MASK] the garden.", "[MASK] and [MASK]"]
    model = {"generator_size": generator, "sentence_head": True}
    config = pretrain_config("data", "run", train={"fills": fills}, model=model)
    engine: Any = Alone(config, tokenizer.vocab_size)
    sentences = encode_sentences(config, tokenizer)
    found = fill(engine, sentences, tokenizer)
    assert [len(masks) for masks in found] == [1, 2]
    assert engine.model.training
    engine.model.eval()
    for sentence, masks in zip(sentences, found, strict=True):
        places = [n for n, number in enumerate(sentence.ids) if number == tokenizer.mask_id]
        for place, choices in zip(places, masks, strict=True):
            [expected] = fill_masks(engine.model, [Masked("", sentence.ids, place, -1)], tokenizer)
            best = expected.topk(5)
            assert [piece for piece, _ in choices] == [tokenizer.spelt(n) for n in best.indices.tolist()]
            assert [share for _, share in choices] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_shares_of_the_vocabulary_are_merged(tokenizer: Tokenizer) -> None:
    logits = torch.randn(3, 330, generator=torch.Generator().manual_seed(0))
    whole = _merge([_best(logits, 0)], tokenizer)
    shared = _merge([_best(logits[:, :170], 0), _best(logits[:, 170:], 170)], tokenizer)
    for one, other in zip(whole, shared, strict=True):
        assert [piece for piece, _ in one] == [piece for piece, _ in other]
        assert [share for _, share in one] == pytest.approx([share for _, share in other], rel=1e-5)


def test_fills_are_written_once(tmp_path: Path) -> None:
    sentences = [Sentence("a [MASK] [MASK]", [])]
    fills = [[[("x|y", 0.5), ("z", 0.25)], [("z", 1.0)]]]
    rows = table(sentences, fills).splitlines()
    assert rows[2:] == [
        "| a **[MASK]** [MASK] | x\\|y 50 % | z 25 % |  |  |  |",
        "| a [MASK] **[MASK]** | z 100 % |  |  |  |  |",
    ]
    append_line(tmp_path / FILLS, {"step": 8, "fills": []})  # of an attempt that went further
    writer = MetricsWriter(tmp_path, 4)
    show_fills(writer, tmp_path, 6, sentences, fills)
    writer.close()
    [entry] = read_steps(tmp_path / FILLS)
    masks = [[["x|y", 0.5], ["z", 0.25]], [["z", 1.0]]]
    assert entry == {"step": 6, "fills": [{"text": "a [MASK] [MASK]", "masks": masks}]}
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name))
    events.Reload()
    [text] = events.Tensors("fills/text_summary")
    assert text.step == 6
    assert json.dumps(rows[2])[1:-1] in json.dumps(text.tensor_proto.string_val[0].decode())
