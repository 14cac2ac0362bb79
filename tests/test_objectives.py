"""The objectives learn: small models fit 200 sentences; weights, a stop and a resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from tiny import prep_config, pretrain_config
from torch.nn import functional as F

from bertscale.config import PrepConfig, PretrainConfig, SamplesConfig, UserError
from bertscale.convert.weights import native_model
from bertscale.data.loader import Loader
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.mixture import Mixture
from bertscale.data.shards import open_dataset
from bertscale.model.model import replace
from bertscale.run_folder import read_metrics
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint
from data_prep.build import prep

pytestmark = pytest.mark.slow

ORDINALS = ["One", "Two", "Three", "Four", "Five"]
WORDS = [
    *("apple bread chair dream", "eagle flame grape house", "island jungle kettle lemon"),
    *("mirror night ocean paper", "queen river stone table", "uncle valley window yellow"),
    *("anchor basket candle dragon", "engine forest garden hammer", "insect jacket kitten ladder"),
    *("market needle orange pencil", "rabbit saddle tailor velvet", "walnut zipper copper bottle"),
]
MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
    "initializer_range": 0.05,
}


def write_sentences(path: Path) -> None:
    """48 documents of 5 sentences, of which some 40 are for training, and a vocabulary of their words.

    A sentence tells its place in the document, and then the four words of the document's subject from some
    word on, so that every token follows from others.
    """
    with path.open("w") as file:
        for number in range(48):
            words = WORDS[number % 12].split()
            turns = [(place + number // 12) % 4 for place in range(5)]
            sentences = [
                f"{ordinal} {' '.join([*words[turn:], *words[:turn]])}."
                for ordinal, turn in zip(ORDINALS, turns, strict=True)
            ]
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    words = [word for group in WORDS for word in group.split()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, ".", *(ordinal.lower() for ordinal in ORDINALS), *words]
    (path.parent / "vocab.txt").write_text("\n".join(pieces) + "\n")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    write_sentences(folder / "corpus.jsonl")
    vocabulary = str(folder / "vocab.txt")  # each word is a piece
    values = prep_config(folder, tokenizer=vocabulary, validation_fraction=0.15)
    prep(PrepConfig.model_validate(values))
    return folder / "data"


CASES: dict[str, dict[str, Any]] = {
    "tokens": {"samples": {"kind": "document"}},
    "words": {"samples": {"kind": "document", "mask_unit": "word"}},
    "spans": {"samples": {"kind": "document", "mask_unit": "span", "span_max": 3}},
    "next": {
        "samples": {"kind": "packed"},
        "model": {"preset": "modern", "local_attention": 8},
        "objectives": {"clm": 1},
    },
    "nsp": {"samples": {"kind": "nsp"}, "objectives": {"mlm": 0}},
    "sop": {"samples": {"kind": "sop"}, "objectives": {"mlm": 0}},
    "rtd": {
        "samples": {"kind": "document", "mask_token_rate": 1.0, "random_token_rate": 0.0},
        "model": {"generator_size": 0.25},
        "learning_rate": 0.0005,  # at ten times that some runs find what is replaced, and some unlearn it
    },
}


def config_of(case: str, data: str, folder: str) -> PretrainConfig:
    changes = CASES[case]
    return pretrain_config(
        data,
        Path(folder) / case,
        model={**MODEL, **changes.get("model", {})},
        samples={"max_length": 32, **changes["samples"]},
        objectives=changes.get("objectives", {}),
        optimizer={"learning_rate": changes.get("learning_rate", 0.005), "gradient_clipping": 1.0},
        train={
            "steps": {"nsp": 300, "sop": 300, "next": 100}.get(case, 600),
            "global_batch": 16,
            "micro_batch": 16,
            "log_every": 25,
            "eval_every": 1000,
            "eval_samples": 16,
            "save_every": 1000,
        },
        parallel={"zero_stage": 0},
    )


def train_each(data: str, folder: str, cases: list[str]) -> None:
    """Runs in a process of its own: one training for each case."""
    from bertscale.pretrain.pretrain import train
    from bertscale.train.device import local_device
    from bertscale.train.parallel import start_ranks
    from bertscale.train.stop import StopSignal

    ranks = start_ranks(1, local_device())
    for case in cases:
        config = config_of(case, data, folder)
        Path(config.run).mkdir()
        assert train(config, ranks, StopSignal()) == 0


@pytest.fixture(scope="module")
def trained(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    run_ranks(__file__, "train_each", world=1, data=str(sentences), folder=str(folder), cases=list(CASES))
    return folder


def last(run: Path, key: str) -> float:
    """Mean over the last three log points."""
    entries = [entry for entry in read_metrics(run) if "train/loss" in entry][-3:]
    return sum(float(entry[key]) for entry in entries) / len(entries)


@pytest.mark.parametrize("case", ["tokens", "words", "spans"])
def test_masked_tokens_are_learnt(trained: Path, case: str) -> None:
    assert last(trained / case, "train/mlm_accuracy") > 0.85
    entries = [entry for entry in read_metrics(trained / case) if "train/loss" in entry]
    assert entries[0]["train/mlm_accuracy"] < 0.1
    assert set(entries[0]) & {"train/nsp_loss", "train/sop_loss", "train/rtd_loss"} == set()


def test_next_tokens_are_learnt(trained: Path) -> None:
    run = trained / "next"
    assert last(run, "train/clm_accuracy") > 0.7  # a document's subject and turn cannot be foretold
    assert last(run, "train/clm_loss") == pytest.approx(last(run, "train/loss"))
    assert json.loads((run / "result.json").read_text())["heldout_clm_accuracy"] > 0.6
    assert "mlm" not in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize("case", ["nsp", "sop"])
def test_pairs_are_learnt_alone(trained: Path, case: str) -> None:
    run = trained / case
    # Not 1: some of the other documents are of the same subject.
    assert last(run, f"train/{case}_accuracy") > 0.85
    assert last(run, f"train/{case}_loss") < 0.4  # chance: 0.69
    assert last(run, f"train/{case}_loss") == pytest.approx(last(run, "train/loss"))
    written = (run / "metrics.jsonl").read_text() + (run / "result.json").read_text()
    assert "mlm" not in written  # nothing is masked
    model = open_checkpoint(run)
    assert not model.tensor("predictions.dense.weight", "exp_avg").any()


def test_replaced_tokens_are_learnt(trained: Path, sentences: Path) -> None:
    run = trained / "rtd"
    checkpoint = open_checkpoint(run)
    model = native_model(checkpoint)
    kinds: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in batches(sentences, config_of("rtd", str(sentences), "")):
            sample = batch.token_types, batch.positions, batch.lengths
            assert model.generator is not None
            assert model.detector is not None
            guessed, _ = model.generator(batch.tokens, *sample, model.encoder.embeddings)
            logits = model.predictions.logits(guessed[batch.target_positions])
            assert batch.uniforms is not None
            drawn = model.parallel.sample(logits, batch.uniforms)
            tokens, replaced = replace(batch.tokens, batch.target_positions, batch.targets, drawn)
            verdict = model.detector(model.encoder(tokens, *sample)[0]) > 0
            kinds.append(torch.bincount(2 * replaced.long() + verdict.long(), minlength=4))
    _, wrongly, missed, found = (int(count) for count in torch.stack(kinds).sum(dim=0))
    assert found + missed > 50  # the generator, a quarter as wide, is not perfect
    assert found / (found + missed) > 0.6
    assert last(run, "train/rtd_recall") == pytest.approx(found / (found + missed), abs=0.1)
    assert found / (found + wrongly) > 0.8
    assert last(run, "train/mlm_accuracy") > 0.3
    rtd = last(run, "train/rtd_loss")
    assert last(run, "train/loss") == pytest.approx(last(run, "train/mlm_loss") + 50 * rtd, rel=1e-5)
    share = (found + missed) / int(torch.stack(kinds).sum())
    chance = F.binary_cross_entropy(torch.tensor(share), torch.tensor(share))
    assert rtd < 0.6 * chance  # the loss of one who knows the share alone


def batches(data: Path, config: PretrainConfig) -> list[MicroBatch]:
    dataset = open_dataset(data, "train")
    mixture = Mixture([dataset], [1.0], config.samples, global_batch=16, seed=3)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    loader = Loader(mixture, tokenizer, micro_batch=16, rank=0, world=1, draws=True)
    return [batch for step in range(10) for batch in loader.step(step)]


# ---------------------------------------------------------------------------------------- the loader


def loaders(data: Path, *, world: int = 1, micro_batch: int = 4, **changes: Any) -> list[Loader]:
    dataset = open_dataset(data, "train")
    mixture = Mixture([dataset], [1.0], SamplesConfig(kind="document"), global_batch=8, seed=7)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    return [
        Loader(mixture, tokenizer, micro_batch=micro_batch, rank=rank, world=world, **changes)
        for rank in range(world)
    ]


def test_chances_belong_to_the_samples_whatever_the_ranks(tiny_data: Path) -> None:
    """So a run draws the same replacements on any number of data-parallel ranks."""

    def of_step(some: list[Loader], step: int) -> set[tuple[int, ...]]:
        found = []
        for loader in some:
            for batch in loader.step(step):
                assert batch.uniforms is not None
                assert batch.uniforms.dtype == torch.float64
                assert len(batch.uniforms) == len(batch.targets)
                found += list(zip(batch.targets.tolist(), batch.uniforms.tolist(), strict=True))
        return set(found)

    one = loaders(tiny_data, draws=True)
    several = loaders(tiny_data, world=2, micro_batch=2, draws=True)
    drawn = [chance for step in range(40) for _, chance in of_step(one, step)]
    assert all(of_step(one, step) == of_step(several, step) for step in range(3))
    assert of_step(one, 0) != of_step(one, 1)
    assert len(set(drawn)) > 0.999 * len(drawn)
    values = torch.tensor(drawn)
    assert 0 < float(values.min()) < float(values.max()) < 1
    deviation = (12 * len(values)) ** -0.5
    assert abs(float(values.mean()) - 0.5) < 5 * deviation
    assert loaders(tiny_data)[0].step(0)[0].uniforms is None


def test_without_masks_tokens_are_the_text(tiny_data: Path) -> None:
    (masked,) = loaders(tiny_data)
    (plain,) = loaders(tiny_data, masks=False)
    for one, other in zip(masked.step(2), plain.step(2), strict=True):
        assert other.targets.tolist() == other.target_positions.tolist() == []
        assert other.tokens.equal(one.tokens.index_copy(0, one.target_positions, one.targets))
        assert other.lengths == one.lengths


# -------------------------------------------------------------------------------------- whole runs


def stop_and_go(data: str, folder: str) -> list[Any]:
    """Runs on each of two ranks: TP 2 x ZeRO-3, once through and once in two parts; what is refused then."""
    from bertscale.pretrain.pretrain import train
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks
    from bertscale.train.stop import StopSignal

    results: list[Any] = []
    changes: dict[str, Any] = {
        "model": {"generator_size": 0.5, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        "parallel": {"tensor": 2, "zero_stage": 3},
    }
    for name, parts in (("whole", [8]), ("parts", [4, 8])):
        run = Path(folder) / name
        run.mkdir(exist_ok=True)
        for steps in parts:
            length = {"steps": steps, "schedule_steps": 8, "save_every": 4, "eval_every": 4}
            ranks = start_ranks(2, local_device())
            assert train(pretrain_config(data, run, train=length, **changes), ranks, StopSignal()) == 0
            leave_subgroups(ranks)
        results.append(
            [{k: v for k, v in entry.items() if not k.startswith("speed/")} for entry in read_metrics(run)]
        )
    length = {"steps": 12, "schedule_steps": 12}
    other = pretrain_config(data, run, train=length, objectives={"rtd": 25.0}, **changes)
    ranks = start_ranks(2, local_device())
    try:
        train(other, ranks, StopSignal())
    except UserError as error:
        results.append(str(error))
    return results


def test_a_resumed_run_is_the_uninterrupted_one_and_keeps_its_weights(
    tiny_data: Path, tmp_path: Path
) -> None:
    whole, parts, refusal = run_ranks(
        __file__, "stop_and_go", world=2, data=str(tiny_data), folder=str(tmp_path)
    )[0]
    assert len([entry for entry in whole if "train/rtd_loss" in entry]) == 8
    assert len([entry for entry in whole if "heldout/rtd_accuracy" in entry]) == 2
    assert parts == whole
    assert refusal.startswith("objectives.rtd=25.0, but ")
    assert "was trained with 50.0; choose another run folder" in refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives": {"mlm": 0}, "model": {"generator_size": 0.5}},
            "objectives.mlm=0 and model.generator_size=0.5: the generator learns from masked tokens only",
        ),
        (
            {"objectives": {"rtd": 0}, "model": {"generator_size": 0.5}},
            "objectives.rtd=0 and model.generator_size=0.5: the generator only makes replaced tokens",
        ),
        (
            {"objectives": {"mlm": 0, "pairs": 0}},
            "nothing is trained: objectives.mlm=0, objectives.pairs=0 with samples.kind=nsp, and no"
            " generator",
        ),
        (
            {"objectives": {"mlm": 0}, "samples": {"kind": "packed"}},
            "nothing is trained: objectives.mlm=0, objectives.pairs=1 with samples.kind=packed",
        ),
        ({"objectives": {"mlm": -1}}, "greater than or equal to 0"),
        (
            {"model": {"generator_size": 0.3}},
            "generator_size=0.3 of num_attention_heads=4 and intermediate_size=64 is not a whole number; "
            "shares that are: 0.25, 0.5, 0.75, 1",
        ),
        (
            {"model": {"generator_size": 0.25, "intermediate_size": 66}},
            "generator_size=0.25 of num_attention_heads=4 and intermediate_size=66 is not a whole number; "
            "shares that are: 0.5, 1",
        ),
        ({"model": {"generator_size": 0.05}}, "is not a whole number; shares that are: 0.25"),
        ({"model": {"generator_size": 1.5}}, "less than or equal to 1"),
        (
            {"model": {"generator_size": 0.5}, "parallel": {"tensor": 4}},
            "parallel.tensor=4 does not divide the generator's num_attention_heads=2; sizes that do: 1, 2",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pretrain_config("data", "run", **changes)
    assert message in str(caught.value)


def test_shares_that_are_shown_are_taken() -> None:
    sizes = {"hidden_size": 36, "num_attention_heads": 12, "intermediate_size": 60}
    config = pretrain_config("data", "run", model=sizes)
    with pytest.raises(ValueError, match="shares that are: ") as caught:
        config.model.model_validate({**config.model.model_dump(), "generator_size": 0.2})
    shares = str(caught.value).partition("shares that are: ")[2].split(" [")[0].split(", ")
    assert shares[0] == "0.08333"  # one head of twelve
    for share in shares:
        model = config.model.model_validate({**config.model.model_dump(), "generator_size": float(share)})
        assert model.generator is not None
        assert model.generator.hidden_size == 3 * model.generator.num_attention_heads


def test_which_objectives_are_trained() -> None:
    def trained_with(**changes: dict[str, Any]) -> tuple[str | None, ...]:
        return pretrain_config("data", "run", **changes).trained

    assert trained_with() == ("mlm", "nsp", None)
    assert trained_with(objectives={"clm": 1}, samples={"kind": "packed"}) == ("clm", None, None)
    assert trained_with(samples={"kind": "packed"}) == ("mlm", None, None)
    assert trained_with(samples={"kind": "sop"}, objectives={"mlm": 0}) == (None, "sop", None)
    assert trained_with(model={"generator_size": 1.0}, objectives={"pairs": 0}) == ("mlm", None, "rtd")
