"""Pretraining goes on from folders that transformers has written: the same weights, some steps, and back."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from test_sources import saved
from tiny import pretrain_config

from bertscale.config import PretrainConfig, UserError
from bertscale.run_folder import checkpoints
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

STEPS = 20
PACKED = {"kind": "packed", "max_length": 16}
REPLACED = {**PACKED, "mask_token_rate": 1.0, "random_token_rate": 0.0}  # for a generator
# Class -> its samples here, and the class that comes out again.
CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "BertForPreTraining": ({"max_length": 16}, "BertForPreTraining"),
    "BertModel": (PACKED, "BertForMaskedLM"),
    "MegatronBertForPreTraining": ({"max_length": 16}, "MegatronBertForPreTraining"),
    "ModernBertForMaskedLM": (PACKED, "ModernBertForMaskedLM"),
    "RobertaForMaskedLM": (PACKED, "BertForMaskedLM"),
    "XLMRobertaForMaskedLM": (PACKED, "BertForMaskedLM"),
    "CamembertForTokenClassification": (PACKED, "BertForMaskedLM"),
    "DistilBertForMaskedLM": (PACKED, "BertForMaskedLM"),
    "ElectraForPreTraining": (REPLACED, "ElectraForPreTraining"),
}


def go_on(data: str, folder: str) -> dict[str, str]:
    """On a rank: each class saved, its weights in the engine at the start, and a training from there."""
    from bertscale.config import with_model_of
    from bertscale.pretrain.init import open_source, start_from
    from bertscale.pretrain.pretrain import train
    from bertscale.train.device import local_device
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import start_ranks
    from bertscale.train.stop import StopSignal

    ranks, tokenizer = start_ranks(1, local_device()), load_tokenizer(data)
    said = {}
    for kind, (samples, _) in CLASSES.items():
        source, run = Path(folder) / kind / "source", Path(folder) / kind / "run"
        saved(source, kind, vocab_size=tokenizer.vocab_size)
        shutil.copy(Path(data) / "tokenizer.model", source)
        run.mkdir()
        values = pretrain_config(data, run, samples=samples).model_dump()
        values["model"] = {}
        values["train"] |= {"steps": STEPS, "log_every": STEPS, "eval_every": STEPS, "eval_samples": 8}
        config = PretrainConfig.model_validate({**values, "init": str(source)})
        assert config.init is not None
        found = open_source(config.init, run, ranks)
        whole = with_model_of(config, found.weights.model)
        engine = pretraining_engine(whole, tokenizer.vocab_size, ranks, torch.float32)
        start_from(engine, found, tokenizer)
        for fragment in engine.fragments():
            if fragment.name not in found.weights.missing:
                expected = found.weights.tensor(fragment.name).flatten()
                part = expected[fragment.start : fragment.start + len(fragment.states["weight"])]
                assert torch.equal(fragment.states["weight"], part), (kind, fragment.name)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert train(config, ranks, StopSignal()) == 0
        said[kind] = printed.getvalue()
    return said


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("published")
    return folder, run_ranks(__file__, "go_on", world=1, data=str(tiny_data), folder=str(folder))[0]


def test_heads_that_are_not_there_are_named(runs: tuple[Path, dict[str, str]]) -> None:
    _, said = runs
    assert "new " not in said["BertForPreTraining"]
    assert "new       predictions.dense.weight" in said["BertModel"]
    assert "left out  classifier.bias, classifier.weight" in said["CamembertForTokenClassification"]
    assert "generator.layers.0" in said["ElectraForPreTraining"]


@pytest.mark.parametrize("kind", CLASSES)
def test_what_comes_out_loads_strictly(kind: str, runs: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    import transformers

    from bertscale.export.convert import convert
    from bertscale.export.options import ConvertOptions

    folder, _ = runs
    (newest,) = checkpoints(folder / kind / "run")[-1:]
    trained = open_checkpoint(newest)
    assert trained.step == STEPS
    assert trained.lineage[0]["folder"] == str(folder / kind / "source")
    convert(newest, tmp_path / "out", ConvertOptions(show=False))
    (name,) = json.loads((tmp_path / "out/config.json").read_text())["architectures"]
    assert name == CLASSES[kind][1]
    _, loading = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading


def test_another_tokenizer_is_refused_before_training(
    runs: tuple[Path, dict[str, str]], tiny_data: Path
) -> None:
    from bertscale.config import with_model_of
    from bertscale.convert.sources import open_source_weights
    from bertscale.pretrain.init import in_shape_of

    source = runs[0] / "BertModel" / "source"
    vocabulary = source.parent / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"]))
    config = pretrain_config(tiny_data, "new", samples=PACKED, init={"from": str(source)})
    weights = open_source_weights(source)
    config = with_model_of(config.model_copy(update={"model": type(config.model)()}), weights.model)
    with pytest.raises(UserError, match=r"init\.vocabulary=same, but the source's tokenizer"):
        in_shape_of(config, weights, load_tokenizer(vocabulary))
