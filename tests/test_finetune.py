"""Fine-tuning: it learns what words decide, repeats itself, writes what it says, and refuses bad rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torch import Tensor

from bertscale.cli import main
from bertscale.config import FinetuneConfig, ModelConfig, UserError, load_config
from bertscale.finetune.finetune import encoder_tensors, finetune, fingerprint, load_classifier, make_model
from bertscale.finetune.tasks import encode, find_classes, read_examples, score, training_batches
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.checkpoint import open_checkpoint, write_whole

SHAPE = ModelConfig(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    initializer_range=0.1,  # 0.02 is for wide models: here little of a word would arrive at the first token
)
WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape"],
    "metal": ["iron", "copper", "silver", "lead", "zinc"],
    "river": ["nile", "rhine", "volga", "danube", "amazon"],
}
FILLERS = ["the", "old", "book", "tells", "of", "a", "day", "when", "people", "saw", "some", "and", "more"]
Row = dict[str, Any]


def rows(count: int, seed: int) -> list[Row]:
    """Sentences of three to twelve words, one of which decides the label."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        label = list(WORDS)[number % 3]
        words = random.choice(FILLERS, random.integers(2, 12)).tolist()
        words.insert(int(random.integers(len(words) + 1)), str(random.choice(WORDS[label])))
        made.append({"text": " ".join(words), "label": label})
    return made


def write_rows(path: Path, examples: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder that was never trained, and the examples."""
    folder = tmp_path_factory.mktemp("world")
    write_rows(folder / "train.jsonl", rows(96, seed=1))
    write_rows(folder / "test.jsonl", rows(60, seed=2))
    sentences = [row["text"] for row in rows(600, seed=3)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        pad_id=0,
        pad_piece="[PAD]",
        unk_id=1,
        unk_piece="[UNK]",
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    write_encoder(folder / "encoder", load_tokenizer(folder / "tokenizer.model"))
    return folder


def write_encoder(folder: Path, tokenizer: Tokenizer, seed: int = 7, shape: ModelConfig = SHAPE) -> None:
    model = PretrainingModel(shape, tokenizer.vocab_size)
    tensors: dict[str, Tensor] = {
        name: initial_value(name, list(value.shape), shape, tokenizer.vocab_size, seed)
        for name, value in model.named_parameters()
    }
    table = {
        "model": shape.model_dump(),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
    }
    write_whole(folder, table, tensors.items(), tokenizer.path)


def configure(world: Path, output: Path, *overrides: str) -> FinetuneConfig:
    values = {
        "encoder": str(world / "encoder"),
        "output": str(output),
        "data": {split: str(world / f"{split}.jsonl") for split in ("train", "test")},
        "samples": {"max_length": 32},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"epochs": 1, "global_batch": 16},
    }
    path = world / "finetune.yaml"
    path.write_text(json.dumps(values))
    return load_config(FinetuneConfig, path, list(overrides))


def without_time(result: Row) -> Row:
    return {key: value for key, value in result.items() if key not in ("seconds", "files", "digest")}


# -------------------------------------------------------------------------------------------- the loop


def test_it_learns_and_writes_what_it_says(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "output"
    result = finetune(configure(world, output, "train.epochs=15"))
    assert result["pretrained"]["accuracy"] > 0.9
    assert result["classes"] == ["fruit", "metal", "river"]
    assert (result["train_examples"], result["test_examples"]) == (96, 60)
    assert result["majority_accuracy"] == pytest.approx(1 / 3)
    assert result["pretrained"]["accuracy_std"] is None  # one seed has no spread
    assert json.loads((output / "result.json").read_text()) == result

    test = rows(60, seed=2)
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [(row["text"], row["label"]) for row in predictions] == [(r["text"], r["label"]) for r in test]
    right = np.mean([row["predicted"] == row["label"] for row in predictions])
    assert right == pytest.approx(result["pretrained"]["accuracy"])

    model = output / "model"
    files = ["config.json", "model.safetensors", "tokenizer.model"]
    assert sorted(path.name for path in model.iterdir()) == files
    assert sorted(path.name for path in output.iterdir()) == [
        "config.yaml",
        "model",
        "predictions.jsonl",
        "result.json",
    ]
    assert "encoder.layers.1.feed_forward.dense.weight" in load_file(model / "model.safetensors")
    answers = load_classifier(model)([row["text"] for row in test])
    assert [label for label, _ in answers] == [row["predicted"] for row in predictions]
    given = [row["probability"] for row in predictions]
    assert [probability for _, probability in answers] == pytest.approx(given, abs=1e-5)


@pytest.mark.parametrize(
    ("preset", "pooling"), [("megatron-bert", "first"), ("modern", "first"), ("modern", "mean")]
)
def test_every_preset_learns(world: Path, tmp_path: Path, preset: str, pooling: str) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    shape = ModelConfig.model_validate({**sizes, "preset": preset, "initializer_range": 0.1})
    write_encoder(tmp_path / "encoder", load_tokenizer(world / "tokenizer.model"), shape=shape)
    output = tmp_path / "output"
    changes = [f"encoder={tmp_path}/encoder", f"model.pooling={pooling}", "train.epochs=15"]
    result = finetune(configure(world, output, *changes))
    assert result["pretrained"]["accuracy"] > 0.8
    test = rows(60, seed=2)
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    answers = load_classifier(output / "model")([row["text"] for row in test])
    assert [label for label, _ in answers] == [row["predicted"] for row in predictions]


def test_it_starts_from_the_encoder_and_repeats_itself(world: Path, tmp_path: Path) -> None:
    results = [
        finetune(
            configure(
                world, tmp_path / name, "train.seeds=[3, 4]", "train.epochs=6", "train.compare_random=true"
            )
        )
        for name in "ab"
    ]
    assert without_time(results[0]) == without_time(results[1])
    one, other = results[0]["pretrained"]["per_seed"]
    assert one["accuracy"] != other["accuracy"]
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)

    # Steps too small to move it leave the encoder's own weights.
    finetune(configure(world, tmp_path / "c", "optimizer.learning_rate=1.0e-12"))
    still = load_file(tmp_path / "c" / "model" / "model.safetensors")
    encoder = open_checkpoint(world / "encoder")
    for name in ("encoder.layers.1.attention.query_key_value.weight", "encoder.pooler.weight"):
        assert torch.allclose(still[name], encoder.tensor(name), rtol=0, atol=1e-8)


def test_compared_with_random_weights(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finetune(configure(world, tmp_path, "train.seeds=[0, 1, 2]", "train.compare_random=true"))
    for start in ("pretrained", "random"):
        runs = result[start]["per_seed"]
        assert [run["seed"] for run in runs] == [0, 1, 2]
        for key in ("accuracy", "macro_f1"):
            values = [run[key] for run in runs]
            assert result[start][key] == pytest.approx(np.mean(values))
            assert result[start][f"{key}_std"] == pytest.approx(np.std(values, ddof=1))
    screen = capsys.readouterr().out
    row = f"{result['random']['accuracy']:.3f} ± {result['random']['accuracy_std']:.3f}"
    assert any(line.startswith("random weights") and row in line for line in screen.splitlines())
    assert "majority class  0.333" in screen


def test_random_weights_have_their_own_learning_rate(world: Path, tmp_path: Path) -> None:
    still = finetune(
        configure(
            world,
            tmp_path,
            "train.compare_random=true",
            "optimizer.random_learning_rate=1.0e-12",
            "train.epochs=12",
            "model.hidden_dropout_prob=0.0",
        )
    )
    assert still["random"]["accuracy"] < 0.6 < still["pretrained"]["accuracy"]


def test_random_start_has_nothing_of_the_encoder(world: Path, tmp_path: Path) -> None:
    weights = open_checkpoint(world / "encoder")
    config = configure(world, tmp_path, "model.hidden_dropout_prob=0.25")
    model = make_model(config, weights, classes=3, seed=0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    own = dict(model.named_parameters())
    pretrained = encoder_tensors(weights)
    assert pretrained.keys() == {name for name in own if name.startswith("encoder.")}
    for name, value in pretrained.items():
        alike = torch.equal(own[name], value)
        assert alike == (name.endswith("bias") or "LayerNorm" in name)


# ------------------------------------------------------------------------------------------- used again


def test_a_finished_output_is_used_again(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = finetune(configure(world, tmp_path))
    capsys.readouterr()
    assert finetune(configure(world, tmp_path)) == first  # the seconds too
    assert "already fine-tuned" in capsys.readouterr().out

    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write("changed\n")
    assert without_time(finetune(configure(world, tmp_path))) == without_time(first)
    assert "already" not in capsys.readouterr().out
    assert "changed" not in (tmp_path / "predictions.jsonl").read_text()

    finetune(configure(world, tmp_path, "train.global_batch=32"))
    assert "already" not in capsys.readouterr().out


def test_another_encoder_or_other_examples_are_another_task(world: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(world / "tokenizer.model")
    write_encoder(tmp_path / "same", tokenizer)
    write_encoder(tmp_path / "other", tokenizer, seed=8)
    changed = write_rows(tmp_path / "train.jsonl", rows(97, seed=1))

    def made_of(encoder: Path, *changes: str) -> dict[str, str]:
        return fingerprint(configure(world, tmp_path / "output", *changes), open_checkpoint(encoder))

    before = made_of(world / "encoder")
    assert made_of(tmp_path / "same") == before
    assert made_of(tmp_path / "other") != before
    assert made_of(tmp_path / "same", f"data.train={changed}") != before


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json}", "not JSON"),
        ('["a list"]', "not a JSON object"),
        ('{"text": "an apple"}', "no field 'label'"),
        ('{"body": "an apple", "label": "fruit"}', "no field 'text'; the fields are: body, label"),
        ('{"text": " \\u0000\\t", "label": "fruit"}', "'text' is blank"),
        ('{"text": 7, "label": "fruit"}', "'text' is not text but 7"),
        ('{"text": "an apple", "label": 1.5}', "'label' is 1.5"),
        ('{"text": "an apple", "label": true}', "'label' is True"),
        ('{"text": "an apple", "label": " "}', "'label' is blank"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a pear", "label": "fruit"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: ") as raised:
        read_examples(path, "text", "label")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_without_examples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the examples .*none\.jsonl: No such file"):
        read_examples(tmp_path / "none.jsonl", "text", "label")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl has no examples"):
        read_examples(tmp_path / "empty.jsonl", "text", "label")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9", "label": 0}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl are not UTF-8"):
        read_examples(tmp_path / "latin.jsonl", "text", "label")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": 0}) + "\n" for text in ("a pear", "a plum", "\ufeffa grape")]
    (tmp_path / "marked.jsonl").write_text("\ufeff" + lines[0] + lines[1] + "\ufeff" + lines[2], "utf-8")
    examples = read_examples(tmp_path / "marked.jsonl", "text", "label")
    assert [example.text for example in examples] == ["a pear", "a plum", "\ufeffa grape"]


def test_a_text_that_leaves_no_token_gets_no_answer(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    finetune(configure(world, output, "train.epochs=1"))
    classifier = load_classifier(output / "model")
    for blank in ("", " \n", "\ufeff", "\u00ad\x00"):
        with pytest.raises(UserError, match=r"text 2 of 3 is blank \(.*\): leave it out"):
            classifier(["a pear", blank, "iron"])
        with pytest.raises(UserError, match="text 1 of 1 is blank"):
            classifier(blank)
    with pytest.raises(UserError, match="text 2 of 2 is not text but nan"):
        classifier(["a pear", float("nan")])  # type: ignore[list-item]  # as pandas gives an empty cell
    assert classifier([]) == []
    assert len(classifier(np.array(["a pear", "iron"]))) == 2  # type: ignore[arg-type]


def test_a_row_of_which_the_tokenizer_leaves_nothing_is_named(world: Path, tmp_path: Path) -> None:
    """WordPiece drops more characters than SentencePiece: a zero-width space is blank to it."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pear", "iron"]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    write_encoder(tmp_path / "encoder", load_tokenizer(tmp_path / "vocab.txt"))
    write_rows(
        tmp_path / "train.jsonl", [{"text": text, "label": text} for text in ("pear", "iron", "\u200b")]
    )
    overrides = [f"encoder={tmp_path / 'encoder'}", f"data.train={tmp_path / 'train.jsonl'}"]
    overrides.append(f"data.test={tmp_path / 'train.jsonl'}")
    with pytest.raises(UserError, match=r"train\.jsonl, line 3: 'text' is blank \('\\u200b'\)"):
        finetune(configure(world, tmp_path / "output", *overrides))
    assert not (tmp_path / "output").exists()


def test_classes(tmp_path: Path) -> None:
    def examples(*labels: str | int) -> Any:
        path = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": label} for label in labels])
        return read_examples(path, "text", "label")

    assert find_classes(examples(10, 2, 2, 1), examples(2)) == [1, 2, 10]
    assert find_classes(examples("b", "a"), []) == ["a", "b"]
    with pytest.raises(UserError, match=r"line 2: no training example has the label 'c'; they have 'a', 'b'"):
        find_classes(examples("b", "a"), examples("a", "c"))
    with pytest.raises(UserError, match="every training example has the label 'a'"):
        find_classes(examples("a", "a"), [])


def test_an_encoder_that_does_not_fit(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*none: .* nothing is downloaded"):
        finetune(configure(world, tmp_path, f"encoder={tmp_path}/none"))
    with pytest.raises(UserError, match=r"samples\.max_length=33 is longer than .*: 32 tokens"):
        finetune(configure(world, tmp_path, "samples.max_length=33"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        finetune(configure(world, tmp_path / "file"))


def test_a_loss_that_is_not_finite_is_said(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the loss is nan at step \d+ .*take a lower optimizer\.learning_rate"
    ):
        finetune(configure(world, tmp_path, "optimizer.learning_rate=1.0e+30", "train.epochs=4"))
    assert not (tmp_path / "result.json").exists()


def test_command(world: Path, tmp_path: Path, bertscale: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("samples: {max_length: 32}\ntrain: {epochs: 1}\n")
    paths = [f"data.{key}={world / key}.jsonl" for key in ("train", "test")]
    done = bertscale("finetune", str(config), *paths, f"encoder={world}/encoder", f"output={tmp_path}/output")
    assert done.returncode == 0, done.stderr
    assert "pretrained" in done.stdout
    assert done.stderr == ""
    write_rows(tmp_path / "bad.jsonl", [*rows(3, seed=1), {"text": "a", "label": "new"}])
    paths[1] = f"data.test={tmp_path / 'bad.jsonl'}"
    assert (
        main(["finetune", str(config), *paths, f"encoder={world}/encoder", f"output={tmp_path}/output"]) == 2
    )
    complaint = capsys.readouterr().err
    assert "bad.jsonl, line 4: no training example has the label 'new'" in complaint
    assert complaint.count("\n") == 1


# -------------------------------------------------------------------------------------- batches, metrics


def test_batches(world: Path) -> None:
    tokenizer = load_tokenizer(world / "tokenizer.model")
    texts = [row["text"] for row in rows(50, seed=5)]
    samples = encode(texts, tokenizer, 8, texts)
    assert max(map(len, samples)) == 8
    assert all((ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id) for ids in samples)
    batches = list(training_batches(samples, 16, seed=0, epoch=0))
    assert [len(batch.rows) for batch in batches] == [16, 16, 16, 2]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(50))
    for batch in batches:
        assert list(batch.lengths) == sorted(len(samples[row]) for row in batch.rows)
        pieces = torch.split(batch.tokens, list(batch.lengths))
        assert [piece.tolist() for piece in pieces] == [samples[row] for row in batch.rows]
        counted = [list(range(length)) for length in batch.lengths]
        assert [p.tolist() for p in torch.split(batch.positions, list(batch.lengths))] == counted
    again, other, later = (
        [batch.rows for batch in training_batches(samples, 16, seed, epoch)]
        for seed, epoch in ((0, 0), (1, 0), (0, 1))
    )
    assert again == [batch.rows for batch in batches]
    assert again not in (other, later)


def test_score() -> None:
    # Class 0: precision 2/3, recall 1 -> 0.8; class 1: 1, 1/2 -> 2/3; class 2: 1.
    scored = score(np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 2]))
    assert scored["accuracy"] == pytest.approx(0.8)
    assert scored["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 1) / 3)
