"""Pseudo-perplexity: against a plain loop over transformers' class, and how ranks share its passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_clm import Engine
from test_masks import write_run
from tiny import pretrain_config

from bertscale.config import PretrainConfig
from bertscale.convert.weights import native_model
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.shards import open_dataset
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.pretrain.heldout import evaluate, heldout_loaders, unmasked_samples
from bertscale.pretrain.pseudo_perplexity import _of_rank, copies_of
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.checkpoint import open_checkpoint
from bertscale.train.metrics import MetricsWriter, result


def config_of(data: Path, **changes: Any) -> PretrainConfig:
    config = pretrain_config(data, "run", **changes, train={"pseudo_perplexity": 4, "micro_batch": 1})
    return config.model_copy(update={"heldout": {"web": str(data)}})


def sets_of(config: PretrainConfig, tokenizer: Tokenizer) -> tuple[Any, dict[str, MicroBatch]]:
    data = [open_dataset(corpus.path) for corpus in config.corpora]
    alone: Any = None  # no ranks: one process
    loaders = heldout_loaders(config, tokenizer, data, alone)
    return loaders, unmasked_samples(config, tokenizer, data, loaders, alone)


def plain_loop(folder: Path, samples: MicroBatch, tokenizer: Tokenizer) -> float:
    """exp of the mean loss, one mask and one sequence at a time."""
    model = transformers.AutoModelForPreTraining.from_pretrained(folder).eval()
    losses = []
    types = torch.split(samples.token_types, list(samples.lengths))
    for ids, kinds in zip(torch.split(samples.tokens, list(samples.lengths)), types, strict=True):
        for place, number in enumerate(ids.tolist()):
            if number in tokenizer.special_ids:
                continue
            masked = ids.clone()
            masked[place] = tokenizer.mask_id
            logits = model(masked[None], token_type_ids=kinds[None]).prediction_logits[0, place]
            losses.append(-float(logits.log_softmax(-1)[number]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("kind", ["nsp", "packed"])
@torch.no_grad()
def test_it_is_that_of_a_plain_loop_over_transformers(tiny_data: Path, tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "run", tiny_data)
    convert(run, tmp_path / "hf", ConvertOptions(show=False))
    tokenizer = load_tokenizer(tiny_data)
    config = config_of(tiny_data, samples={"kind": kind, "max_length": 24, "mask_rate": 0.4})
    loaders, unmasked = sets_of(config, tokenizer)
    engine: Any = Engine(config, native_model(open_checkpoint(run)))
    figures = evaluate(engine, loaders, unmasked, 8, 1)
    assert len(unmasked["heldout/web"].tokens) > 40
    assert unmasked["heldout/web"].tokens.equal(unmasked["heldout"].tokens)  # other masks, the same text
    expected = plain_loop(tmp_path / "hf", unmasked["heldout/web"], tokenizer)
    assert figures["heldout/web/pseudo_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert figures["heldout/pseudo_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert figures["heldout/web/masked_perplexity"] != pytest.approx(expected, rel=0.01)


def test_a_generator_is_asked(tiny_data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_data, model={"generator_size": 0.5, "num_attention_heads": 4})
    config = config_of(tiny_data, model={"generator_size": 0.5}, samples={"max_length": 12})
    loaders, unmasked = sets_of(config, load_tokenizer(tiny_data))
    engine: Any = Engine(config, native_model(open_checkpoint(run)))
    figures = evaluate(engine, loaders, unmasked, 8, 1)
    assert 1 < figures["heldout/web/pseudo_perplexity"] < 1e6


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_make_equally_many_passes_and_each_copy_once(tiny_data: Path, world: int) -> None:
    tokenizer = load_tokenizer(tiny_data)
    loaders, unmasked = sets_of(config_of(tiny_data, samples={"max_length": 16}), tokenizer)
    samples, rules = unmasked["heldout"], loaders["heldout"].rules
    copies = copies_of(samples, rules)
    of_ranks = [list(_of_rank(samples, copies, rules, 50, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in of_ranks}) == 1
    batches = [batch for passes in of_ranks for batch in passes]
    assert max(len(batch.tokens) for batch in batches) <= 50
    seen = []
    for batch in batches:
        ends = torch.tensor(batch.lengths).cumsum(0)
        assert (batch.tokens == tokenizer.mask_id).sum() == len(batch.lengths) == len(batch.targets)
        assert torch.searchsorted(ends, batch.target_positions, right=True).tolist() == [
            *range(len(batch.lengths))
        ]
        seen += [target for target in batch.targets.tolist() if target >= 0]
    text = samples.tokens[torch.from_numpy(~rules.special[samples.tokens.numpy()])]
    assert sorted(seen) == sorted(text.tolist())


def test_fewer_samples_than_wanted_are_taken_once(tiny_data: Path) -> None:
    config = config_of(tiny_data, samples={"kind": "packed"})
    train = config.train.model_copy(update={"pseudo_perplexity": 10**6})
    loaders, unmasked = sets_of(config.model_copy(update={"train": train}), load_tokenizer(tiny_data))
    text = (~loaders["heldout"].rules.special[unmasked["heldout"].tokens.numpy()]).sum()
    there = open_dataset(tiny_data, "validation").num_tokens
    assert there - 48 <= text <= there  # but for a last sample that is not full


def test_without_the_key_no_sample_is_read(tiny_data: Path) -> None:
    config = pretrain_config(tiny_data, "run")
    assert sets_of(config, load_tokenizer(tiny_data))[1] == {}


def test_sets_with_names_are_in_the_result(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write(3, {"train/loss": 5.0})
    named = {"heldout/web/mlm_loss": 2.0, "heldout/web/pseudo_perplexity": 6.5, "heldout/a.b/mlm_loss": 1.0}
    average = {"heldout_average/web/mlm_loss": 9.0}
    writer.write(
        3,
        {"heldout/loss": 4.0, "heldout/mlm_loss": 4.0, "heldout/pseudo_perplexity": 7.0, **named, **average},
    )
    writer.close()
    assert result(tmp_path) == {
        "steps": 3,
        "first_loss": 5.0,
        "last_loss": 5.0,
        "heldout_mlm_loss": 4.0,
        "heldout_pseudo_perplexity": 7.0,
        "heldout": {"web": {"mlm_loss": 2.0, "pseudo_perplexity": 6.5}, "a.b": {"mlm_loss": 1.0}},
    }
