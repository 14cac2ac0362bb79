"""docs/sizes.md: its tables are what the configs, the estimate of memory and the measured rates give."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import ROOT

from bertscale.bench.timed_steps import PUBLISHED_VOCAB
from bertscale.config import PretrainConfig, load_config
from bertscale.model.model import attended_pairs, model_flops_per_token
from launcher.submit.memory import count_parameters, estimate_memory

PAGE = ROOT / "docs/sizes.md"
# Measured on one H100 (the page tells when and how): the share of its peak that BERT-large reaches with
# samples of 128 and of 512 tokens, and the micro-batches a second of the quickstart's model, the smallest.
PEAK, SHARE_128, SHARE_512, MICRO_BATCHES = 989e12, 0.415, 0.405, 22
# Tokens/s of one core, bfloat16 and float32, the better of two rounds.
CORE = {
    "bert-tiny": (10_833, 8_036),
    "bert-mini": (3_815, 2_279),
    "bert-small": (1_190, 715),
    "bert-base": (224, 131),
    "modern-tiny": (4_916, 2_722),
    "modern-mini": (2_019, 1_149),
    "modern-small": (684, 363),
    "modern-base": (143, 74),
}


def shown(value: float) -> str:
    """Two significant digits, with a comma in thousands."""
    rounded = float(f"{value:.1e}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.2g}"


def counted(value: float) -> str:
    """Two significant digits, or three above 100, of millions or billions."""
    unit, name = (1e9, "B") if value >= 1e9 else (1e6, "M")
    number = value / unit
    return f"{number:.1f} {name}" if number < 10 else f"{float(f'{number:.3g}'):,.0f} {name}"


def span(low: float, high: float) -> str:
    return shown(low) if shown(high) == shown(low) or high <= low else f"{shown(low)} to {shown(high)}"


def facts(path: Path) -> tuple[PretrainConfig, int, float, float, float]:
    """(config, vocabulary, parameters, tokens at most, FLOPs of a token in a sample of full length)."""
    config = load_config(PretrainConfig, path, [])
    vocab_size, length, train = PUBLISHED_VOCAB[config.model.preset], config.samples.max_length, config.train
    half = config.model.half_window
    local = attended_pairs(length, half) / length if half else None
    flops = model_flops_per_token(config.model, vocab_size, length, config.samples.mask_rate, local)
    tokens = train.tokens or (train.steps or 0) * train.global_batch * length
    return config, vocab_size, sum(count_parameters(config.model, vocab_size)), tokens, flops


def config_row(path: Path) -> str:
    config, vocab_size, parameters, tokens, flops = facts(path)
    share = SHARE_128 if config.samples.max_length <= 128 else SHARE_512
    hours = tokens * flops / (share * PEAK) / 3600
    micro_batches = tokens / (config.train.micro_batch * config.samples.max_length)
    longest = max(hours, micro_batches / MICRO_BATCHES / 3600)
    memory = [estimate_memory(config, vocab_size, ranks, gpu=True).total / 1e9 for ranks in (1, 8)]
    cells = [
        path.stem,
        counted(parameters),
        counted(tokens),
        shown(tokens / parameters),
        f"{flops / 1e9:.2g}",
        span(hours, longest),
        span(hours / 8 / 24, longest / 8 / 24),
        " / ".join(f"{size:.0f}" for size in memory),
    ]
    return f"| {' | '.join(cells)} |"


def laptop_row(name: str) -> str:
    _, _, _, tokens, _ = facts(ROOT / f"configs/pretrain/{name}.yaml")
    rates = CORE[name]
    nights = [counted(rate * 2 * 8 * 3600) for rate in rates]
    days = span(*(tokens / (2 * rate) / 86_400 for rate in rates))
    return f"| {name} | {rates[0]:,} | {rates[1]:,} | {nights[0]} | {nights[1]} | {days} |"


def shipped() -> list[Path]:
    """The configs of runs in earnest: more than a billion tokens."""
    return [path for path in sorted(ROOT.glob("configs/pretrain/*.yaml")) if facts(path)[3] > 1e9]


def lines() -> list[str]:
    return PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_the_row_of_a_config(path: Path) -> None:
    rows = [line for line in lines() if line.startswith(f"| {path.stem} |")]
    assert rows[:1] == [config_row(path)]


@pytest.mark.parametrize("name", CORE)
def test_the_row_of_a_laptop(name: str) -> None:
    rows = [line for line in lines() if line.startswith(f"| {name} |")]
    assert rows[1:] == [laptop_row(name)]


def test_there_is_no_row_of_another_config() -> None:
    names = {path.stem for path in shipped()}
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines() if line.startswith("| ")]
    like_configs = {row for row in rows if row.split("-")[0] in ("bert", "megatron", "modern", "electra")}
    assert like_configs == names


def test_the_share_of_the_peak_gives_the_measured_rate() -> None:
    """BERT-large, lengths of 32 to 128 tokens spread evenly, ran at 219,551 tokens/s."""
    config, vocab_size, *_ = facts(ROOT / "configs/pretrain/bert-large.yaml")
    lengths = range(32, 129)
    attended = sum(length**2 for length in lengths) / sum(lengths)
    flops = model_flops_per_token(config.model, vocab_size, attended, config.samples.mask_rate)
    assert SHARE_128 * PEAK / flops == pytest.approx(219_551, rel=0.01)


def test_the_estimate_of_memory_is_near_what_was_measured() -> None:
    """512 such samples in a micro-batch: torch had allocated 39.7 GB, which leaves out CUDA's own memory."""
    path = ROOT / "configs/pretrain/bert-large.yaml"
    changes = ["samples.max_length=80", "train.global_batch=512", "train.micro_batch=512"]
    estimate = estimate_memory(load_config(PretrainConfig, path, changes), 30_522, 1, gpu=True)
    assert 39.7 < (estimate.total - estimate.base) / 1e9 < 1.1 * 39.7
