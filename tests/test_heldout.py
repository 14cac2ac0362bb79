"""Held-out losses with names: which sets there are, how they are masked, and what is said of them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damage import change_manifest
from tiny import pretrain_config

from bertscale.config import PretrainConfig, UserError
from bertscale.data.loader import Loader
from bertscale.data.shards import open_dataset
from bertscale.model.model import LossSums
from bertscale.pretrain.heldout import evaluate, heldout_loaders, heldout_sets, perplexity
from bertscale.tokenizer import load_tokenizer
from bertscale.train.metrics import heldout_brief


def config_of(data: Any, **changes: Any) -> PretrainConfig:
    values = pretrain_config("unused", "run", samples=changes.pop("samples", {})).model_dump()
    return PretrainConfig.model_validate({**values, "data": data, **changes})


def loaders_of(config: PretrainConfig) -> dict[str, Loader]:
    data = [open_dataset(corpus.path) for corpus in config.corpora]
    alone: Any = None  # no ranks: one process
    return heldout_loaders(config, load_tokenizer(data[0].tokenizer_path), data, alone)


def test_each_of_several_corpora_is_a_set_of_its_own() -> None:
    assert heldout_sets(config_of("runs/wiki")) == {}
    assert heldout_sets(config_of([{"path": "runs/wiki"}])) == {}
    assert heldout_sets(config_of(["runs/wiki", "runs/law"], heldout={"web": "/web"})) == {
        "wiki": "runs/wiki",
        "law": "runs/law",
        "web": "/web",
    }
    same = config_of(["runs/wiki/data", "runs/law/data"], heldout={"law": "/law"})
    assert list(heldout_sets(same)) == ["wiki-data", "law-data", "law"]
    taken = config_of(["runs/wiki", "runs/law"], heldout={"wiki": "/other"})
    assert list(heldout_sets(taken)) == ["runs-wiki", "runs-law", "wiki"]
    once = config_of(["runs/wiki", "./runs/wiki"])
    assert list(heldout_sets(once)) == ["corpus-1", "corpus-2"]


def test_a_name_with_other_characters_is_refused() -> None:
    with pytest.raises(ValueError, match="the name 'a/b' has other characters than"):
        config_of("data", heldout={"a/b": "/web"})


def test_sets_with_names_are_masked_alike_whatever_training_does(tiny_data: Path) -> None:
    heldout = {"same": str(tiny_data)}
    light, heavy = (
        loaders_of(config_of(str(tiny_data), heldout=heldout, samples={"mask_rate": rate, **more}))
        for rate, more in ((0.15, {}), (0.4, {"mask_unit": "word", "min_document_tokens": 40}))
    )
    assert list(light) == list(heavy) == ["heldout", "heldout/same"]
    first, second = (loaders["heldout/same"].step(0) for loaders in (light, heavy))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.target_positions, other.target_positions)
    # The set without a name keeps the masking of the run.
    share = [sum(batch.num_targets for batch in loaders["heldout"].step(0)) for loaders in (light, heavy)]
    assert share[1] > 2 * share[0]


def test_a_set_of_another_tokenizer_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    tokenizer = open_dataset(other).tokenizer_path
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    changed = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    change_manifest(other, lambda manifest: manifest.update(tokenizer_sha256=changed))
    with pytest.raises(
        UserError, match=r"^heldout\.web: .*other was made with another tokenizer than .*data"
    ):
        loaders_of(config_of(str(tiny_data), heldout={"web": str(other)}))


class Uniform:
    """An engine whose model finds every piece equally likely, of 8."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config, self.training = config, True
        self.model = SimpleNamespace(eval=lambda: self.set(False), train=lambda: self.set(True))
        self.ranks = SimpleNamespace(device=torch.device("cpu"), sum_over_data=lambda *sums: list(sums))

    def set(self, training: bool) -> None:
        self.training = training

    def __call__(self, batch: Any) -> LossSums:
        assert not self.training
        sums = torch.zeros(len(LossSums._fields))
        sums[0] = batch.num_targets * torch.tensor(8.0).log()
        return LossSums(*sums)


def test_every_set_has_its_figures(tiny_data: Path) -> None:
    config = config_of(str(tiny_data), heldout={"web": str(tiny_data)})
    engine: Any = Uniform(config)
    figures = evaluate(engine, loaders_of(config), {}, 16, 5)
    assert engine.training
    assert figures["heldout/mlm_loss"] == pytest.approx(2.0794, abs=1e-4)
    assert figures["heldout/web/mlm_loss"] == pytest.approx(2.0794, abs=1e-4)
    assert figures["heldout/web/masked_perplexity"] == pytest.approx(8, rel=1e-5)
    assert {"heldout/web/loss", "heldout/web/mlm_accuracy", "heldout/web/nsp_accuracy"} < figures.keys()
    assert "heldout/masked_perplexity" not in figures
    assert heldout_brief(figures) == "MLM loss 2.0794, NSP accuracy 0.0%; of web 2.0794"
    assert perplexity(1e6) > 1e300
