"""Fine-tuning: it learns what words decide, repeats itself, writes what it says, and refuses bad rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from dist import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from bertscale.config import FinetuneConfig, ModelConfig, UserError, load_config
from bertscale.convert.task_models import open_task_model, task_shapes
from bertscale.finetune.by_label import columns, show_tables, tables_of
from bertscale.finetune.card import usage
from bertscale.finetune.finetune import class_weights, fingerprint
from bertscale.finetune.loop import Run
from bertscale.finetune.pictures import draw_tables, labels_as_markdown
from bertscale.finetune.report import table
from bertscale.finetune.start import open_source, scale_of
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.tasks.questions import QuestionTask
from bertscale.tasks.task import QuestionExample, Samples, TextExample
from bertscale.tasks.texts import text_task
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


def tune(configs: list[dict[str, Any]], tensor: int = 1) -> list[Any]:
    """Runs on each rank: one fine-tuning for each config; their results, or the mistake that ended one."""
    from bertscale.finetune.finetune import train_all
    from bertscale.finetune.output import make_folder
    from bertscale.train.device import local_device
    from bertscale.train.parallel import start_ranks
    from bertscale.train.stop import StopSignal

    results: list[Any] = []
    for values in configs:
        config = FinetuneConfig.model_validate(values)
        ranks = start_ranks(tensor, local_device())
        try:
            make_folder(Path(config.output))
            results.append(train_all(config, ranks, StopSignal()))
        except UserError as error:
            results.append({"error": str(error)})
    return results


def run(*configs: FinetuneConfig, world: int = 1) -> list[Any]:
    """The results of fine-tunings, one after another, on `world` ranks."""
    values = [config.model_dump(mode="json") for config in configs]
    tensor = configs[0].parallel.tensor
    results: list[Any] = run_ranks(__file__, "tune", world=world, configs=values, tensor=tensor)[0]
    return results


def plain(result: Row) -> Row:
    """A result without what another run of the same has otherwise: times and digests of files with times."""
    if isinstance(result, dict):
        times = ("seconds", "files", "digest", "tokens_per_second", "mfu")
        return {key: plain(value) for key, value in result.items() if key not in times}
    return [plain(value) for value in result] if isinstance(result, list) else result


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean(result: Row, start: str = "pretrained", figure: str = "accuracy") -> float:
    value: float = result[start]["test"][figure]["mean"]
    return value


# -------------------------------------------------------------------------------------------- the loop


def test_it_learns_and_writes_what_it_says(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "output"
    changes = ["train.epochs=15", f"data.dev={world}/test.jsonl", "train.eval_every=18"]
    (result,) = run(configure(world, output, *changes))
    assert mean(result) > 0.9
    assert result["labels"] == ["fruit", "metal", "river"]
    assert result["examples"] == {"train": 96, "dev": 60, "test": 60}
    assert result["majority"]["test"]["accuracy"] == pytest.approx(1 / 3)
    assert result["pretrained"]["test"]["accuracy"]["std"] is None  # one seed has no spread
    assert json.loads((output / "result.json").read_text()) == result

    test = rows(60, seed=2)
    predictions = read_lines(output / "predictions-test.jsonl")
    assert [(row["text"], row["label"]) for row in predictions] == [(r["text"], r["label"]) for r in test]
    right = np.mean([row["prediction"]["label"] == row["label"] for row in predictions])
    assert right == pytest.approx(mean(result))
    assert read_lines(output / "predictions-dev.jsonl") == predictions

    names = {path.name for path in output.iterdir()}
    assert names == {
        *("config.yaml", "metrics.jsonl", "model", "predictions-dev.jsonl", "predictions-test.jsonl"),
        *("result.json", "runs", "tensorboard"),
    }
    (record,) = result["pretrained"]["runs"]
    assert record["steps"] == 90
    evaluations = record["evaluations"]
    assert [found["step"] for found in evaluations] == [18, 36, 54, 72, 90]
    best = max(evaluations, key=lambda found: found["accuracy"])  # the first of equal ones
    assert record["best_step"] == best["step"]
    assert record["dev"] == {key: pytest.approx(best[key]) for key in record["dev"]}


def test_dev_stops_a_run_and_chooses_its_weights(world: Path, tmp_path: Path) -> None:
    changes = [f"data.dev={world}/test.jsonl", "train.epochs=30", "train.eval_every=6", "train.patience=3"]
    (result,) = run(configure(world, tmp_path, *changes))
    (record,) = result["pretrained"]["runs"]
    assert record["steps"] == record["best_step"] + 18 < 180
    assert max(found["accuracy"] for found in record["evaluations"]) == record["dev"]["accuracy"]


@pytest.mark.parametrize(
    ("preset", "pooling"), [("megatron-bert", "cls"), ("modern", "cls"), ("modern", "mean")]
)
def test_every_preset_learns(world: Path, tmp_path: Path, preset: str, pooling: str) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    shape = ModelConfig.model_validate({**sizes, "preset": preset, "initializer_range": 0.1})
    write_encoder(tmp_path / "encoder", load_tokenizer(world / "tokenizer.model"), shape=shape)
    changes = [f"encoder={tmp_path}/encoder", f"model.pooling={pooling}", "train.epochs=15"]
    (result,) = run(configure(world, tmp_path / "output", *changes))
    assert mean(result) > 0.8


def test_it_repeats_itself_and_compares_with_random_weights(world: Path, tmp_path: Path) -> None:
    changes = ["train.seeds=[3, 4]", "train.epochs=6", "train.compare_random=true"]
    results = run(*(configure(world, tmp_path / name, *changes) for name in "ab"))
    assert plain(results[0]) == plain(results[1])
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for start in ("pretrained", "random"):
        runs = results[0][start]["runs"]
        assert [run["seed"] for run in runs] == [3, 4]
        assert runs[0]["test"] != runs[1]["test"]
        for key in ("accuracy", "macro_f1"):
            values = [run["test"][key] for run in runs]
            figure = results[0][start]["test"][key]
            assert figure["mean"] == pytest.approx(np.mean(values))
            assert figure["std"] == pytest.approx(np.std(values, ddof=1))
            assert (figure["min"], figure["max"]) == (min(values), max(values))


def test_random_weights_have_their_own_learning_rate(world: Path, tmp_path: Path) -> None:
    changes = ["train.compare_random=true", "optimizer.random_learning_rate=1.0e-12", "train.epochs=12"]
    (still,) = run(configure(world, tmp_path, *changes, "model.hidden_dropout_prob=0.0"))
    assert mean(still, "random") < 0.6 < mean(still)


# ------------------------------------------------------------------------------------ what a run starts from


def test_what_a_run_starts_from(world: Path, tmp_path: Path) -> None:
    config = configure(world, tmp_path)
    source, weights = open_source(config), open_checkpoint(world / "encoder")
    task = text_task("classification", ["fruit", "metal", "river"])

    def values(seed: int, start: str) -> dict[str, Tensor]:
        first = source.first_values(task, Run(seed, start, 0, 0))
        shapes = task_shapes(source.model, source.vocab_size, source.head(config, task))
        return {name: first(name, list(shape)) for name, shape in shapes.items()}

    pretrained, other = values(0, "pretrained"), values(1, "pretrained")
    random = values(0, "random")
    for name, value in pretrained.items():
        constant = name.endswith("bias") or "LayerNorm" in name
        if name.startswith("head."):
            assert torch.equal(value, random[name])
            assert torch.equal(value, other[name]) == constant
        else:
            assert torch.equal(value, weights.tensor(name))
            assert torch.equal(value, random[name]) == constant
    # A head begins as transformers', whatever range the encoder was pretrained with (here 0.1).
    assert pretrained["head.output.weight"].std().item() == pytest.approx(0.02, rel=0.25)


def test_learning_rates_of_layers_and_head(world: Path, tmp_path: Path) -> None:
    names = [
        "encoder.embeddings.LayerNorm.bias",
        "encoder.layers.0.x",
        "encoder.layers.1.x",
        "head.output.bias",
    ]

    def scales(*changes: str) -> list[float]:
        scale = scale_of(configure(world, tmp_path, *changes), SHAPE)
        return [scale(name) for name in [*names, "encoder.pooler.bias"]]

    assert scales() == [1, 1, 1, 1, 1]
    assert scales("optimizer.layer_decay=0.5") == [0.125, 0.25, 0.5, 1, 1]
    assert scales("optimizer.head_learning_rate=0.02") == [1, 1, 1, 2, 2]
    assert scales("model.freeze_layers=1") == [0, 0, 1, 1, 1]
    assert scales("model.freeze_layers=2") == scales("model.freeze_layers=all") == [0, 0, 0, 1, 1]


def test_frozen_layers_stay_and_others_move(world: Path, tmp_path: Path) -> None:
    changes = ["model.freeze_layers=1", "parallel.zero_stage=1"]
    still, whole = run(
        configure(world, tmp_path / "one", *changes),
        configure(world, tmp_path / "all", "model.freeze_layers=all"),
    )
    weights = open_checkpoint(world / "encoder")
    for folder, frozen in (("one", 1), ("all", 2)):
        found = open_task_model(tmp_path / folder / "model")
        for name in found.names:
            below = name.startswith(("encoder.embeddings.", *(f"encoder.layers.{n}." for n in range(frozen))))
            if not name.startswith("head."):
                assert torch.equal(found.tensor(name), weights.tensor(name)) == below, name
    assert still["pretrained"]["runs"][0]["steps"] == whole["pretrained"]["runs"][0]["steps"]


def test_a_task_model_is_a_start(world: Path, tmp_path: Path) -> None:
    """Its head is kept where the labels are the same, and is a new one where they are others."""
    run(configure(world, tmp_path / "first", "train.epochs=12"))
    init = ["encoder=null", f"init={tmp_path}/first", "optimizer.learning_rate=1.0e-12"]
    others = write_rows(
        tmp_path / "others.jsonl", [{**row, "label": row["label"] + "s"} for row in rows(48, 1)]
    )
    same, other = run(
        configure(world, tmp_path / "same", *init),
        configure(world, tmp_path / "other", *init, f"data.train={others}", "data.test=null"),
    )
    assert mean(same) > 0.8
    first, second, third = (open_task_model(tmp_path / name / "model") for name in ("first", "same", "other"))
    assert third.labels == ["fruits", "metals", "rivers"]
    for name in first.names:
        assert torch.allclose(first.tensor(name), second.tensor(name), rtol=0, atol=1e-8)
        if not name.startswith("head.output."):
            assert torch.allclose(first.tensor(name), third.tensor(name), rtol=0, atol=1e-8)
    assert not torch.allclose(first.tensor("head.output.weight"), third.tensor("head.output.weight"))
    assert "error" not in other


# ------------------------------------------------------------------------------------------- used again


def test_a_finished_output_is_used_again(world: Path, tmp_path: Path) -> None:
    config = configure(world, tmp_path)
    first, again = run(config, config)
    assert first == again  # the seconds too
    with (tmp_path / "predictions-test.jsonl").open("a") as file:
        file.write("changed\n")
    (repaired,) = run(config)
    assert plain(repaired) == plain(first)
    assert "changed" not in (tmp_path / "predictions-test.jsonl").read_text()
    (other,) = run(configure(world, tmp_path, "train.global_batch=32"))
    assert plain(other) != plain(first)


def test_another_encoder_or_other_examples_are_another_task(world: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(world / "tokenizer.model")
    write_encoder(tmp_path / "same", tokenizer)
    write_encoder(tmp_path / "other", tokenizer, seed=8)
    changed = write_rows(tmp_path / "train.jsonl", rows(97, seed=1))

    def made_of(encoder: Path, *changes: str) -> dict[str, str]:
        config = configure(world, tmp_path / "output", f"encoder={encoder}", *changes)
        return fingerprint(config, open_source(config))

    before = made_of(world / "encoder")
    assert made_of(tmp_path / "same") == before
    assert made_of(tmp_path / "other") != before
    assert made_of(tmp_path / "same", f"data.train={changed}") != before
    # What moves no figure makes no other task.
    assert made_of(tmp_path / "same", "train.log_every=7", "device=cpu", "parallel.ranks=2") == before


# ----------------------------------------------------------------------------------------- bad input


def test_what_does_not_fit(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = run(
        configure(world, tmp_path / "a", f"encoder={tmp_path}/none"),
        configure(world, tmp_path / "b", "samples.max_length=33", "samples.overlap=4"),
        configure(world, tmp_path / "file"),
        configure(world, tmp_path / "c", "model.pooling=mean"),
        configure(world, tmp_path / "d", "model.freeze_layers=3"),
        configure(world, tmp_path / "e", "encoder=null", f"init={world}/encoder"),
        configure(world, tmp_path / "f", "model.class_weights={iron: 2}"),
    )
    for said, wanted in zip(
        found,
        [
            "there is no folder .*none: .* nothing is downloaded",
            "samples.max_length=33 is longer than .*: 32 tokens",
            "cannot make the folder",
            "model.pooling=mean is for preset modern; .* is bert",
            "model.freeze_layers=3, and the encoder .* has 2 layers",
            "init=.*encoder is no task model",
            "model.class_weights names the label 'iron'; the labels are fruit, metal, river",
        ],
        strict=True,
    ):
        assert re.search(wanted, said["error"]), said
        assert "\n" not in said["error"]


def test_gradients_that_are_not_finite_end_a_run(world: Path, tmp_path: Path) -> None:
    changes = ["optimizer.learning_rate=1.0e+30", "train.epochs=40"]
    (said,) = run(configure(world, tmp_path, *changes))
    assert re.search(r"the gradient was not finite.* lower optimizer\.learning_rate", said["error"])
    assert not (tmp_path / "result.json").exists()


def test_an_unfinished_output_of_other_settings_is_kept(world: Path, tmp_path: Path) -> None:
    config = configure(
        world, tmp_path, "train.save_every=3", "optimizer.learning_rate=1.0e+30", "train.epochs=9"
    )
    run(config)
    assert list((tmp_path / "checkpoints").glob("step-*"))
    (said,) = run(configure(world, tmp_path))
    assert "holds an unfinished fine-tuning of other settings" in said["error"]


def test_class_weights(world: Path, tmp_path: Path) -> None:
    task = text_task("classification", ["a", "b", "c"])
    targets = np.array([0, 0, 0, 1, 1, 2])
    nothing = np.zeros(1, np.int64)
    samples = Samples(np.zeros(1, np.int32), nothing, nothing, nothing, targets)

    def weights(given: str) -> list[float]:
        found = class_weights(configure(world, tmp_path, f"model.class_weights={given}"), task, samples)
        assert found is not None
        return found.tolist()

    assert weights("balanced") == pytest.approx([6 / 9, 1, 2])
    assert weights("{b: 3}") == [1, 3, 1]


def test_command(world: Path, tmp_path: Path, bertscale: Any) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("samples: {max_length: 32}\ntrain: {epochs: 1}\n")
    paths = [f"data.{key}={world / key}.jsonl" for key in ("train", "test")]
    ends = [f"encoder={world}/encoder", f"output={tmp_path}/output"]
    done = bertscale("finetune", str(config), *paths, *ends)
    assert done.returncode == 0, done.stderr
    assert "pretrained" in done.stdout
    assert done.stderr == ""
    write_rows(tmp_path / "bad.jsonl", [*rows(3, seed=1), {"text": "a", "label": "new"}])
    paths[1] = f"data.test={tmp_path / 'bad.jsonl'}"
    refused = bertscale("finetune", str(config), *paths, *ends)
    assert refused.returncode == 2
    assert "bad.jsonl, line 4: the label 'new' is none of" in refused.stderr
    assert refused.stderr.strip().count("\n") == 0
    missing = bertscale("finetune", str(config), *paths, ends[1], "encoder=nowhere")
    assert missing.returncode == 2
    assert "encoder=nowhere: there is no such folder" in missing.stderr


# ------------------------------------------------------------------------------------ tables of the labels


def many_labels(count: int) -> tuple[Any, list[TextExample], list[Row]]:
    """A task of so many labels; each example is right but those of the last label, taken for the first."""
    labels = [f"label {number}" for number in range(count)]
    examples = [TextExample(place="", texts=(label,), target=label) for label in labels * 2]
    said = [{"label": labels[0] if label == labels[-1] else label} for label in labels * 2]
    return text_task("classification", labels), examples, said


@pytest.mark.parametrize("count", [2, 20, 300])
def test_tables_of_labels_fit_the_screen(count: int) -> None:
    tables = tables_of(*many_labels(count))
    assert tables is not None
    assert len(tables["per_label"]) == count
    assert {"label": f"label {count - 1}", "predicted": "label 0", "count": 2} in tables["confusion"]
    lines = show_tables("test", tables)
    assert max(map(len, lines)) < 80
    assert len(lines) < 50
    if count > 20:
        assert re.match(f"label {count - 1} +0.000 +0.000 +0.000 +2", lines[1])  # the worst one first
        assert f"       2   label {count - 1} taken for label 0" in lines
    pictures = draw_tables(tables)
    assert all(picture.shape[2] == 3 and max(picture.shape) < 1300 for picture in pictures.values())
    assert list(pictures) == ["labels", "confusion"]
    assert labels_as_markdown(tables["per_label"]).count("\n") == count + 1


def test_labels_of_any_script_keep_their_columns() -> None:
    labels = ["财经", "x" * 60, "e\u0301" * 10]
    examples = [TextExample(place="", texts=("a",), target=label) for label in labels]
    task = text_task("classification", labels)
    tables = tables_of(task, examples, [{"label": label} for label in labels])
    assert tables is not None
    head, *rows = show_tables("test", tables)[:4]
    assert {columns(row) for row in rows} == {columns(head)}
    assert draw_tables(tables)["labels"].dtype == np.uint8


def test_tensorboard_shows_the_outcome(world: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (result,) = run(configure(world, tmp_path, "train.steps=2", "train.epochs=null", "data.dev_share=0.2"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "seed-0"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {f"{s}/{t}" for s in ("dev", "test") for t in ("labels", "confusion")}
    assert {"train/loss", "dev/accuracy", "result/dev_accuracy", "result/test_macro_f1"} <= {*tags["scalars"]}
    shown = events.Scalars("result/test_accuracy")[-1].value
    assert shown == pytest.approx(result["pretrained"]["runs"][0]["test"]["accuracy"])
    rows = result["by_label"]["test"]["per_label"]
    assert [row["label"] for row in rows] == ["fruit", "metal", "river"]
    assert sum(cell["count"] for cell in result["by_label"]["test"]["confusion"]) == 60
    assert "test, by label" in table(result)


def test_a_metric_that_does_not_exist_is_one_line(world: Path, tmp_path: Path) -> None:
    changes = ["data.dev_share=0.2", "train.metric=acuracy", "train.steps=1", "train.epochs=null"]
    (said,) = run(configure(world, tmp_path, *changes))
    assert said["error"].startswith("train.metric=acuracy is no figure")
    assert "accuracy, macro_f1" in said["error"]


def test_dev_chooses_the_threshold_of_no_answer() -> None:
    examples = [
        QuestionExample(place="", identity="a", question="?", context="x y", answers=(("x", 0),)),
        QuestionExample(place="", identity="b", question="?", context="x y", answers=()),
    ]
    task = QuestionTask(unanswerable=True)
    best = {"nbest": [{"text": "x", "start": 0, "end": 1, "score": 1.0}], "answer": ""}
    figures = task.score(examples, [{**best, "no_answer_score": 1.0}, {**best, "no_answer_score": 2.0}])
    assert figures["f1"] == 0.5
    tuned = task.tuned(figures)
    assert 1.0 <= tuned.threshold < 2.0
    assert QuestionTask(unanswerable=False).tuned({"f1": 1.0}).threshold == 0.0


@pytest.mark.parametrize("kind", ["classification", "multi_label", "regression", "tokens", "multiple_choice"])
def test_the_card_shows_code_for_every_kind(kind: str) -> None:
    compile(usage(kind, pair=False), "card", "exec")
    assert "text_pair" in usage("classification", pair=True)
    assert "pipeline" not in usage("question_answering", pair=False)  # which transformers has no more
