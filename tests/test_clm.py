"""Causal language modelling: its batches and figures, what is refused, and what becomes of its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_masks import write_run
from tiny import pretrain_config
from torch import Tensor
from torch.nn import functional as F

from bertscale.config import PretrainConfig, load_phases
from bertscale.convert.weights import native_model
from bertscale.data.batches import make_loader
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.shards import open_dataset
from bertscale.export.average import Options, average
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.model import kernels
from bertscale.model.kernels import Packing, attend
from bertscale.pretrain.heldout import evaluate, heldout_loaders
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint
from bertscale.train.metrics import Rate, brief, heldout_brief
from bertscale.train.objectives import Counts, mean_losses, training_loss

PACKED: dict[str, Any] = {"samples": {"kind": "packed"}, "objectives": {"clm": 2.0}}


def config_of(data: Path | str, **changes: Any) -> PretrainConfig:
    return pretrain_config(data, "run", **{**PACKED, **changes})


def batches_of(config: PretrainConfig, data: Path, step: int = 1) -> list[MicroBatch]:
    tokenizer = load_tokenizer(open_dataset(data).tokenizer_path)
    return make_loader(config, tokenizer, "train").step(step)


# ------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("kind", ["packed", "document"])
def test_each_token_predicts_the_next_one_of_its_sequence(tiny_data: Path, kind: str) -> None:
    causal = batches_of(config_of(tiny_data, samples={"kind": kind}), tiny_data)
    masked = batches_of(pretrain_config(tiny_data, "run", samples={"kind": kind}), tiny_data)
    for batch, other in zip(causal, masked, strict=True):
        assert batch.causal
        assert not other.causal
        assert batch.lengths == other.lengths
        text = other.tokens.index_copy(0, other.target_positions, other.targets)
        assert batch.tokens.equal(text)  # nothing is masked
        places: list[int] = []
        targets: list[int] = []
        begin = 0
        for sequence in torch.split(text, list(batch.lengths)):
            places += range(begin, begin + len(sequence) - 1)  # from [CLS] on; [SEP] predicts nothing
            targets += sequence[1:].tolist()
            begin += len(sequence)
        assert batch.target_positions.tolist() == places
        assert batch.targets.tolist() == targets
        assert batch.num_targets == len(batch.tokens) - len(batch.lengths)


def test_targets_may_have_a_fixed_number(tiny_data: Path) -> None:
    usual, static = (
        batches_of(config_of(tiny_data, train={"static_targets": fixed}), tiny_data)
        for fixed in (False, True)
    )
    for one, other in zip(usual, static, strict=True):
        assert len(other.targets) == 128  # of two samples of 48 tokens
        assert other.num_targets == one.num_targets
        assert other.targets[: one.num_targets].equal(one.targets)
        assert (other.targets[one.num_targets :] == -1).all()


# ----------------------------------------------------------------------------------- attention on a GPU


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("half_window", [None, 2])
def test_the_kernel_of_gpus_is_asked_for_the_same_window(
    half_window: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, *_: Any, window_size: tuple[int, int]
    ) -> Tensor:
        """torch's documented meaning of the window, of one sample: (left, right), -1 for no limit."""
        left, right = (1000 if side < 0 else side for side in window_size)
        place = torch.arange(len(query))
        ahead = place - place[:, None]
        scores = torch.einsum("qad,kad->aqk", query, key) / query.shape[-1] ** 0.5
        scores = scores.masked_fill((ahead < -left) | (ahead > right), -torch.inf)
        return torch.einsum("aqk,kad->qad", scores.softmax(-1), value)

    packed = torch.randn(9, 2, 3, 4)
    packing = Packing.of((9,), packed.device, causal=causal)
    expected = attend(packed, packing, 0.0, half_window)
    monkeypatch.setattr(kernels, "uses_varlen", lambda *_: True)
    monkeypatch.setattr(kernels, "varlen_attn", varlen_attn, raising=False)
    torch.testing.assert_close(attend(packed, packing, 0.0, half_window), expected)


@pytest.mark.parametrize("kernel", [attend, kernels._attend_padded])
@pytest.mark.parametrize("half_window", [None, 2, 6])  # 2: in blocks
def test_with_dropout_no_token_depends_on_those_behind_it(
    half_window: int | None, kernel: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    packed = torch.randn(2 * 11, 2, 3, 4, requires_grad=True)
    attended = kernel(packed, Packing.of((11, 11), packed.device, causal=True), 0.3, half_window)
    (gradient,) = torch.autograd.grad(attended[11:16].square().sum(), packed)
    reached = gradient.flatten(1).abs().sum(1) > 0  # [22] by tokens 0 to 4 of the second sample
    assert reached[11:16].all()
    assert not reached[:11].any()
    assert not reached[16:].any()


# ------------------------------------------------------------------------------------------- figures


class Engine:
    """What evaluation asks of an engine, with a dense model."""

    def __init__(self, config: PretrainConfig, model: Any) -> None:
        self.config, self.model = config, model
        alone = {"data": 1, "data_rank": 0, "device": torch.device("cpu")}
        self.ranks = SimpleNamespace(**alone, sum_over_data=lambda *sums: list(sums))

    def __call__(self, batch: MicroBatch) -> Any:
        return self.model(batch)


def test_held_out_sets_are_not_masked_and_have_a_perplexity(tiny_data: Path, tmp_path: Path) -> None:
    model = native_model(open_checkpoint(write_run(tmp_path / "run", tiny_data)))
    config = config_of(tiny_data).model_copy(update={"heldout": {"web": str(tiny_data)}})
    data, ranks = [open_dataset(tiny_data)], None
    loaders = heldout_loaders(config, load_tokenizer(tiny_data), data, ranks)  # type: ignore[arg-type]
    engine: Any = Engine(config, model)
    figures = evaluate(engine, loaders, {}, 8, 1)
    loss = count = 0.0
    with torch.no_grad():
        for batch in loaders["heldout/web"].step(0):
            for tokens in torch.split(batch.tokens, list(batch.lengths)):  # each alone
                sample = torch.zeros_like(tokens), torch.arange(len(tokens)), (len(tokens),)
                hidden, _ = model.encoder(tokens, *sample, causal=True)
                logits = model.predictions.logits(hidden[:-1])
                loss += float(F.cross_entropy(logits, tokens[1:], reduction="sum"))
                count += len(tokens) - 1
    assert figures["heldout/web/clm_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert figures["heldout/web/perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert figures["heldout/web/loss"] == pytest.approx(2 * loss / count, rel=1e-5)
    assert not [key for key in figures if "mlm" in key or "masked" in key]
    assert heldout_brief(figures) == (
        f"CLM loss {figures['heldout/clm_loss']:.4f}; of web {figures['heldout/web/clm_loss']:.4f}"
    )


def test_figures_have_the_objectives_name() -> None:
    config = config_of("data")
    ranks: Any = SimpleNamespace(sum_over_data=lambda *sums: list(sums))
    sums = torch.tensor([30.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    figures = mean_losses("train", config, sums, Counts(10, 8, 12), ranks)
    assert figures == {"train/loss": 6.0, "train/clm_loss": 3.0, "train/clm_accuracy": 0.4}
    assert training_loss(config.objectives, sums.tolist(), Counts(10, 8, 12)) == 6.0
    speeds = {"speed/tokens_per_second": 5.0, "speed/mfu": 0.5}
    assert brief({**figures, **speeds})["CLM"] == "3.000"


def test_half_of_the_attention_counts_as_work() -> None:
    config = config_of("data", model={"preset": "modern", "num_hidden_layers": 3, "local_attention": 8})
    both, causal = (Rate(config.model, 330, 1.0, causal=causal) for causal in (False, True))
    for rate in (both, causal):
        rate.add((48, 20), 60)
    assert (both.pairs, causal.pairs) == (48 * 48 + 20 * 20, 48 * 49 // 2 + 20 * 21 // 2)
    assert both.local_pairs == 48 * 9 - 20 + 20 * 9 - 20
    assert causal.local_pairs == 48 * 5 - 10 + 20 * 5 - 10


# --------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"clm": 1, "mlm": 0.5}}, "clm=1 and mlm=0.5: a token is predicted from those before"),
        (
            {"samples": {"kind": "nsp"}},
            "objectives.clm=2 predicts next tokens of running text, and samples.kind=nsp makes sentence "
            "pairs; take samples.kind=packed or document",
        ),
        (
            {"model": {"generator_size": 0.5}},
            "objectives.clm=2 and model.generator_size=0.5: a generator learns from masked tokens; take "
            "objectives.clm=0, or remove it with model.generator_size=null",
        ),
        ({"train": {"fills": ["a [MASK]"]}}, "objectives.mlm is 0, as objectives.clm is not"),
        ({"train": {"pseudo_perplexity": 8}}, "train.pseudo_perplexity needs masked tokens to be learnt"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="objectives") as caught:
        config_of("data", **changes)
    assert message in str(caught.value)


def test_masked_tokens_come_back_when_next_ones_go(tmp_path: Path) -> None:
    """As in a chain of phases."""
    path = tmp_path / "phases.yaml"
    phases = {"causal": {"objectives": {"clm": 1}}, "masked": {"objectives": {"clm": 0}}}
    values = {"run": "r", "data": "d", "samples": {"kind": "packed"}, "train": {"steps": 1}, "phases": phases}
    path.write_text(json.dumps(values))
    causal, masked = load_phases(path, []).values()
    assert causal.trained == ("clm", None, None)
    assert masked.trained == ("mlm", None, None)
    assert (causal.objectives.mlm, masked.objectives.mlm) == (0.0, 1.0)


# --------------------------------------------------------------------------------------------- weights


@pytest.fixture
def causal_run(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str) -> Path:
        return write_run(tmp_path / name, tiny_data, causal=True, **PACKED)

    return make


def test_an_export_says_that_it_is_read_from_both_sides(
    causal_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(causal_run("run"), tmp_path / "hf", ConvertOptions())
    said = capsys.readouterr().out.splitlines()
    said = said[next(number for number, line in enumerate(said) if line.startswith("converted")) :]
    assert said[1] == "note      trained causally; these weights are read with bidirectional attention"
    assert said[-2].startswith("verified  logits of the native and the exported model differ by at most ")
    assert said[-1:] == ["masks     not tried: the last training was causal (objectives.clm), without masks"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"]
    assert not config.get("is_decoder")
    assert "causal" not in json.dumps(config).lower()


def test_an_average_of_causal_weights_is_one(causal_run: Callable[..., Path], tmp_path: Path) -> None:
    average([causal_run("a"), causal_run("b")], tmp_path / "out", Options())
    assert open_checkpoint(tmp_path / "out").causal
