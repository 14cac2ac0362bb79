"""`bertscale glue`: which tasks a folder holds, how each is run, what the table says; and shipped configs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_finetune import _one_thread as _one_thread
from test_finetune import world as world

from bertscale.config import FinetuneConfig, GlueConfig, UserError, load_config
from bertscale.config.glue_tasks import (
    RECIPES,
    TASKS,
    FoundTask,
    find_tasks,
    recipe_for,
    settings_for,
    task_values,
)
from bertscale.errors import FAULT, STOPPED_AND_SAVED
from bertscale.examples.read import read_task_data
from bertscale.finetune.glue import Part, glue
from bertscale.finetune.glue_table import REFERENCES, Scores, average_of, markdown

CONFIGS = Path(__file__).parents[1] / "configs/finetune"
DATA = os.environ.get("BERTSCALE_DATA")
PAIRS = [("apple iron nile", "pear"), ("the old book", "tells of a day"), ('a "plum', "zinc and lead")]


def lines(count: int, *columns: str, header: str = "") -> str:
    """Rows of a table whose columns may hold {n}, {one}, {two} (texts), {bit}, {label} and {score}."""
    rows = [header] if header else []
    for number in range(count):
        one, two = PAIRS[number % 3]
        values = {
            "n": number,
            "one": f"{one} {number}",
            "two": f"{two} {number}",
            "bit": number % 2,
            "yes": ("entailment", "not_entailment")[number % 2],
            "label": ("neutral", "contradiction", "entailment")[number % 3],
            "score": f"{number % 6}.000",
        }
        rows.append("\t".join(columns).format(**values))
    return "\n".join(rows) + "\n"


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# The files of the GLUE download: columns as they are there.
MNLI_HEAD = "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label"
MNLI_DEV_HEAD = "index\tpromptID\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label"
MRPC_HEAD = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
STSB_HEAD = "index\tgenre\tsentence1\tsentence2\tscore"
QQP_HEAD = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"


def write_glue(folder: Path) -> Path:
    """Every task of GLUE with a few rows, some without a dev file."""
    for name in ("train", "dev"):
        put(folder / f"CoLA/{name}.tsv", lines(24, "gj04", "{bit}", "*", "{one}"))
        put(folder / f"SST-2/{name}.tsv", lines(24, "{one} ", "{bit}", header="sentence\tlabel"))
        put(folder / f"MRPC/{name}.tsv", lines(24, "{bit}", "1", "2", "{one}", "{two}", header=MRPC_HEAD))
        put(
            folder / f"STS-B/{name}.tsv",
            lines(24, "{n}", "news", "{one}", "{two}", "{score}", header=STSB_HEAD),
        )
        put(
            folder / f"QQP/{name}.tsv", lines(24, "{n}", "1", "2", "{one}", "{two}", "{bit}", header=QQP_HEAD)
        )
        for task, columns in (("QNLI", "question\tsentence"), ("RTE", "sentence1\tsentence2")):
            text = lines(24, "{n}", "{one}", "{two}", "{yes}", header=f"index\t{columns}\tlabel")
            put(folder / f"{task}/{name}.tsv", text)
    rows = ("{n}", "1", "{one}", "{two}", "{label}")
    put(folder / "MNLI/train.tsv", lines(24, *rows, "{label}", header=MNLI_HEAD))
    for name in ("matched", "mismatched"):
        text = lines(24, *rows, "{label}", "{label}", header=MNLI_DEV_HEAD)
        put(folder / f"MNLI/dev_{name}.tsv", text)
    put(
        folder / "WNLI/train.tsv",
        lines(24, "{n}", "{one}", "{two}", "{bit}", header="index\tsentence1\tsentence2\tlabel"),
    )
    return folder


def write_clue(folder: Path) -> Path:
    def rows(*keys: str, label: Callable[[int], str]) -> str:
        made = [
            json.dumps({**{key: f"天气 {key} {number}" for key in keys}, "label": label(number)})
            for number in range(24)
        ]
        return "\n".join(made) + "\n"

    three = ("neutral", "contradiction", "entailment", "-")
    for name in ("train", "dev"):
        pair = ("sentence1", "sentence2")
        put(folder / f"afqmc_public/{name}.json", rows(*pair, label=lambda n: str(n % 2)))
        put(
            folder / f"tnews_public/{name}.json",
            rows("sentence", "label_desc", label=lambda n: str(100 + n % 3)),
        )
        put(folder / f"iflytek_public/{name}.json", rows("sentence", "label_des", label=lambda n: str(n % 3)))
        put(folder / f"cmnli_public/{name}.json", rows(*pair, label=lambda n: three[n % 4]))
        put(
            folder / f"ocnli_public/{name.replace('train', 'train.50k')}.json",
            rows(*pair, label=lambda n: three[n % 4]),
        )
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_glue(tmp_path / "glue")


class Fake:
    """Stands for `bertscale finetune`: notes its words and writes the result that it would."""

    def __init__(self, codes: dict[str, int] | None = None) -> None:
        self.codes = codes or {}
        self.configs: list[FinetuneConfig] = []

    @property
    def names(self) -> list[str]:
        return [Path(config.output).name for config in self.configs]

    def __call__(self, words: list[str]) -> int:
        assert words[0] == "finetune"
        config = load_config(FinetuneConfig, words[1], words[2:])
        self.configs.append(config)
        output = Path(config.output)
        code = self.codes.get(output.name, 0)
        if code == 0:
            names = ("accuracy", "f1", "matthews", "pearson", "spearman")
            spread = 0.01 if len(config.train.seeds) > 1 else None
            figures = {
                name: {"mean": 0.5 + i / 10, "std": spread, "min": 0, "max": 1}
                for i, name in enumerate(names)
            }
            sets = {"dev": figures} | ({"test": figures} if config.data.test else {})
            output.mkdir(parents=True)
            (output / "result.json").write_text(json.dumps({"pretrained": sets}))
        return code


def ask(world: Path, folder: Path, output: Path, **changes: Any) -> GlueConfig:
    values = {"model": str(world / "encoder"), "folder": str(folder), "output": str(output), **changes}
    return GlueConfig.model_validate(values)


# ---------------------------------------------------------------------------------- what a folder holds


def test_every_official_task_is_found_and_read(tmp_path: Path) -> None:
    found = find_tasks(write_glue(tmp_path / "glue"))
    assert [task.name for task in found.tasks] == [
        *("mnli", "cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "rte", "wnli")
    ]
    clue = find_tasks(write_clue(tmp_path / "clue"))
    assert [task.name for task in clue.tasks] == ["afqmc", "tnews", "iflytek", "cmnli", "ocnli"]
    for task in (*found.tasks, *clue.tasks):
        config = FinetuneConfig.model_validate(task_values(task, "bert", output="o", encoder="e"))
        data = read_task_data(config.task, config.data, config.samples)
        assert data.broken == []
        left = 18 if task.name in ("cmnli", "ocnli") else 24
        assert len(data.train) + len(data.dev) == (24 if task.name == "wnli" else 2 * left)
        assert len(data.task.labels) == {
            "stsb": 0,
            "mnli": 3,
            "tnews": 3,
            "iflytek": 3,
            "cmnli": 3,
            "ocnli": 3,
        }.get(task.name, 2)
        assert len(data.test) == (24 if task.name == "mnli" else 0)


def test_names_in_any_spelling_and_what_is_skipped(tmp_path: Path) -> None:
    write_glue(tmp_path)
    (tmp_path / "CoLA").rename(tmp_path / "cola")
    (tmp_path / "SST-2").rename(tmp_path / "sst2")
    (tmp_path / "STS-B").rename(tmp_path / "stsb")
    (tmp_path / "QQP/train.tsv").unlink()
    (tmp_path / "imdb").mkdir()
    found = find_tasks(tmp_path)
    assert {"cola", "sst2", "stsb"} <= {task.name for task in found.tasks}
    assert found.skipped == [
        f"qqp: there is no train.tsv in {tmp_path}/QQP",
        "no tasks of GLUE or CLUE: imdb",
    ]
    assert [task.name for task in find_tasks(tmp_path, ["rte", "cola"]).tasks] == ["cola", "rte"]
    with pytest.raises(UserError, match=r"qqp: there is no train\.tsv in .*QQP"):
        find_tasks(tmp_path, ["rte", "qqp"])
    with pytest.raises(UserError, match="tnews: there is no folder tnews_public in "):
        find_tasks(tmp_path, ["tnews"])
    with pytest.raises(UserError, match=r"holds no task \(it holds no folders\); .* named MNLI, CoLA"):
        find_tasks(tmp_path / "imdb")
    with pytest.raises(UserError, match=r"cannot read the folder .*nowhere"):
        find_tasks(tmp_path / "nowhere")


def test_names_of_tasks_are_checked() -> None:
    assert GlueConfig(model="m", folder="f", tasks=["SST-2", "tnews_public"]).tasks == ["sst2", "tnews"]
    with pytest.raises(ValueError, match="there is no task 'colla'; did you mean cola"):
        GlueConfig(model="m", folder="f", tasks=["colla"])
    with pytest.raises(ValueError, match="is not of the form key=value"):
        GlueConfig(model="m", folder="f", set=["train.epochs"])
    with pytest.raises(ValueError, match="checkpoints=0 is not a number of at least 1"):
        GlueConfig(model="m", folder="f", checkpoints=0)
    assert GlueConfig(model="runs/base/", folder="f").target == "runs/base-glue"


def test_recipes() -> None:
    assert recipe_for("bert", 1024) == recipe_for("megatron-bert", 768) == "bert"
    assert (recipe_for("modern", 768), recipe_for("modern", 1024)) == ("modernbert-base", "modernbert-large")
    found = FoundTask(TASKS["cola"], Path("t"), Path("d"), None, {})
    config = task_values(found, "modernbert-large", output="o", encoder="e")
    assert (config["optimizer"], config["train"]["epochs"]) == (
        {"learning_rate": 3e-5, "weight_decay": 8e-6},
        5,
    )
    for recipe in RECIPES.values():
        assert recipe.tasks.keys() <= TASKS.keys()


def test_settings_of_one_task() -> None:
    settings = ["train.epochs=1", "rte.train.epochs=2", "SST-2.device=cpu", "device=cpu"]
    assert settings_for("rte", settings) == ["train.epochs=1", "train.epochs=2", "device=cpu"]
    assert settings_for("sst2", settings) == ["train.epochs=1", "device=cpu", "device=cpu"]


# -------------------------------------------------------------------------------------------- running


def test_each_task_is_a_fine_tuning(world: Path, tasks: Path, tmp_path: Path, capsys: Any) -> None:
    run = Fake()
    changes = {"seeds": [3, 4], "set": ["train.global_batch=8", "rte.train.epochs=9"]}
    assert glue(ask(world, tasks, tmp_path / "out", **changes), run) == 0
    assert run.names == ["mnli", "cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "rte", "wnli"]
    by_name = dict(zip(run.names, run.configs, strict=True))
    assert {config.train.global_batch for config in run.configs} == {8}
    assert all(config.train.seeds == [3, 4] for config in run.configs)
    assert all(config.samples.max_length == 32 for config in run.configs)  # all that the encoder takes
    assert {name for name, config in by_name.items() if config.init} == {"rte", "mrpc", "stsb"}
    assert by_name["rte"].init == str(tmp_path / "out/mnli")
    assert by_name["cola"].encoder == str(world / "encoder")
    assert (by_name["rte"].train.epochs, by_name["mrpc"].train.epochs) == (9, 5)
    assert by_name["wnli"].data.dev_share == 0.1
    assert by_name["mnli"].data.test == str(tasks / "MNLI/dev_mismatched.tsv")
    said = capsys.readouterr().out
    assert f"tasks     9 in {tasks}: mnli, cola" in said
    assert "dev       wnli: no dev file beside " in said
    assert "start     rte: the model of mnli" in said
    assert f"$ bertscale finetune {tmp_path}/out/rte.yaml train.global_batch=8 train.epochs=9\n" in said
    assert "recipe    bert: examples/pytorch/text-classification" in said


def test_without_the_intermediate_task(world: Path, tasks: Path, tmp_path: Path) -> None:
    run = Fake()
    assert glue(ask(world, tasks, tmp_path / "a", intermediate=False, tasks=["mnli", "rte"]), run) == 0
    assert glue(ask(world, tasks, tmp_path / "b", tasks=["rte"]), run) == 0
    assert run.names == ["mnli", "rte", "rte"]
    assert not any(config.init for config in run.configs)


def test_a_task_that_fails_does_not_end_the_others(
    world: Path, tasks: Path, tmp_path: Path, capsys: Any
) -> None:
    config = ask(world, tasks, tmp_path / "out", tasks=["mnli", "cola", "rte"])
    run = Fake({"mnli": 137})
    assert glue(config, run) == FAULT
    assert run.names == ["mnli", "cola"]
    said = capsys.readouterr().out
    assert "not run: mnli, whose model it starts from, failed" in said
    assert "| failed " in said
    table = json.loads((tmp_path / "out/glue.json").read_text())
    (row,) = table["rows"]
    assert row["tasks"].keys() == {"cola"}
    assert row["failed"]["mnli"].startswith("exit code 137 of `bertscale finetune ")
    assert row["failed"]["rte"] == "mnli, whose model it starts from, failed"
    assert row["average"] == {}
    mended = Fake()
    (tmp_path / "out/cola/result.json").unlink()
    (tmp_path / "out/cola").rmdir()
    assert glue(config, mended) == 0
    (row,) = json.loads((tmp_path / "out/glue.json").read_text())["rows"]
    assert row["failed"] == {}


def test_a_stop_ends_it_at_once(world: Path, tasks: Path, tmp_path: Path) -> None:
    run = Fake({"cola": STOPPED_AND_SAVED})
    assert glue(ask(world, tasks, tmp_path / "out"), run) == STOPPED_AND_SAVED
    assert run.names == ["mnli", "cola"]
    assert not (tmp_path / "out/glue.json").exists()


def test_settings_that_are_wrong_end_it_before_anything_runs(
    world: Path, tasks: Path, tmp_path: Path
) -> None:
    run = Fake()
    with pytest.raises(UserError, match=r"mnli\.yaml: unknown key train\.epoch; did you mean train\.epochs"):
        glue(ask(world, tasks, tmp_path / "out", set=["train.epoch=1"]), run)
    with pytest.raises(UserError, match=r"is for the folder of a run, and .*encoder has no checkpoints"):
        glue(ask(world, tasks, tmp_path / "out", checkpoints="all"), run)
    assert run.configs == []


@pytest.mark.parametrize(
    ("asked", "steps"), [("all", [10, 20, 30, 40]), (2, [20, 40]), (1, [40]), (9, [10, 20, 30, 40])]
)
def test_the_course_of_a_pretraining(
    world: Path, tasks: Path, tmp_path: Path, asked: Any, steps: list[int]
) -> None:
    model = tmp_path / "run"
    for step in (10, 20, 30, 40):
        folder = model / f"checkpoints/step-{step:07d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(world / "encoder"), str(folder)], check=True)
    run, output = Fake(), tmp_path / "out"
    config = ask(world, tasks, output, model=str(model), checkpoints=asked, tasks=["mnli", "rte"])
    assert glue(config, run) == 0
    assert run.names == ["mnli", "rte"] * len(steps)
    assert run.configs[-1].init == str(output / "step-0000040/mnli")
    table = json.loads((output / "glue.json").read_text())
    assert [row["step"] for row in table["rows"]] == steps
    text = (output / "glue.md").read_text()
    assert all(f"| step {step} " in text for step in steps)
    events = EventAccumulator(str(output / "tensorboard/glue"))
    events.Reload()
    assert [event.step for event in events.Scalars("glue/rte")] == steps
    assert events.Tags()["tensors"] == ["glue/text_summary"]


def test_shares_of_the_work(world: Path, tasks: Path, tmp_path: Path) -> None:
    """What the jobs of `bertscale submit glue` do: together the same as the plain command."""
    config = ask(world, tasks, tmp_path / "out", tasks=["mnli", "cola", "sst2", "rte"])
    parts: list[Part] = ["intermediate", (0, 3), (1, 3), (2, 3)]
    done = []
    for part in parts:
        run = Fake()
        assert glue(config, run, part) == 0
        done.append(run.names)
        assert not (tmp_path / "out/glue.json").exists()
    assert done == [["mnli"], ["cola"], ["sst2"], ["rte"]]
    assert glue(config, Fake(), "finish") == 0
    (row,) = json.loads((tmp_path / "out/glue.json").read_text())["rows"]
    assert list(row["tasks"]) == ["mnli", "cola", "sst2", "rte"]
    (tmp_path / "out/cola/result.json").unlink()
    assert glue(config, Fake(), "finish") == FAULT
    assert (
        f"cola: {tmp_path}/out/cola holds no finished fine-tuning" in (tmp_path / "out/glue.md").read_text()
    )


# ------------------------------------------------------------------------------------------- the table


def figure(mean: float, std: float | None = None) -> dict[str, float | None]:
    return {"mean": mean, "std": std, "min": mean, "max": mean}


def test_the_table() -> None:
    ours = Scores("ours", None)
    ours.tasks = {
        "mnli": {"accuracy": figure(0.8), "mismatched": figure(0.82)},
        "mrpc": {"f1": figure(0.9, 0.012), "accuracy": figure(0.86, 0.02)},
        "wnli": {"accuracy": figure(0.5)},
    }
    assert ours.averages() == {"GLUE": pytest.approx((0.81 + 0.88) / 2)}
    text = markdown([ours], ["mnli", "mrpc", "wnli"], ["a note"])
    head, _, first, second, *_ = text.splitlines()
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells == ["GLUE, dev", "MNLI matched/mismatched", "MRPC F1/accuracy", "WNLI", "average"]
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == ["ours", "80.0 / 82.0", "90.0 ± 1.2 / 86.0 ± 2.0", "50.0", "84.5"]
    cells = [cell.strip() for cell in second.strip("|").split("|")]
    assert cells == ["BERT-base-cased (a)", "83.9 / 84.1", "88.8 / 84.1", "56.3", "85.2"]
    assert "| ELECTRA-base (c)" in text
    assert "– / 89.5" in text  # a figure that is not published is not guessed
    assert "\na: transformers, examples/pytorch" in text
    assert text.endswith("- a note\n")
    assert "TNEWS" not in text


def test_published_figures_are_of_known_tasks_and_metrics() -> None:
    for reference in REFERENCES:
        assert reference.source
        for name, figures in reference.figures.items():
            known = {*TASKS[name].figures, *(["mismatched"] if name == "mnli" else [])}
            assert figures.keys() <= known
            assert all(20 < value < 100 for value in figures.values())
    assert average_of(REFERENCES[0], ["cola", "rte", "wnli"], False) == pytest.approx((56.53 + 65.70) / 2)
    assert average_of(REFERENCES[1], ["cola", "mrpc"], False) is None


# ------------------------------------------------------------------------------------------ the command


def test_the_command(world: Path, tasks: Path, tmp_path: Path, bertscale: Any) -> None:
    """A fine-tuning starts from the model of another one."""
    words = [str(world / "encoder"), str(tasks), "--output", str(tmp_path / "out"), "--tasks", "RTE", "mnli"]
    words += ["train.epochs=1", "--seeds", "5", "device=cpu"]
    done = bertscale("glue", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its head is kept" not in done.stdout
    assert f"from {tmp_path}/out/mnli/model; a new head" in done.stdout
    (row,) = json.loads((tmp_path / "out/glue.json").read_text())["rows"]
    assert row["failed"] == {}
    assert row["tasks"]["mnli"]["figures"].keys() == {"accuracy", "mismatched"}
    result = json.loads((tmp_path / "out/rte/result.json").read_text())
    assert row["tasks"]["rte"]["score"] == result["pretrained"]["dev"]["accuracy"]["mean"]


def test_mistakes_of_the_command(
    world: Path, tasks: Path, bertscale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bertscale.cli import main

    def said(*words: str) -> str:
        done = bertscale("glue", *words)
        assert done.returncode == 2
        return str(done.stderr)

    encoder = str(world / "encoder")
    assert "MODEL nowhere: there is no such folder" in said("nowhere", str(tasks))
    assert "FOLDER nowhere: there is no such folder" in said(encoder, "nowhere")
    assert "--seeds x: 'x' is not a number" in said(encoder, str(tasks), "--seeds", "x")
    assert "is not a number, all or last" in said(encoder, str(tasks), "--checkpoints", "some")
    assert main(["glue", encoder, str(tasks), "--tasks", "colla"]) == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "2 processes would each run all tasks: start glue once" in said(encoder, str(tasks))


CHILD = """\
import sys
from launcher.child import run_child
print(run_child(["finetune", sys.argv[1], *sys.argv[2:]]), flush=True)
"""


def test_a_signal_reaches_the_fine_tuning_once(world: Path, tasks: Path, tmp_path: Path) -> None:
    """As a rank of a job gets it: the child trains on ranks of its own, saves, and the code says so."""
    found = find_tasks(tasks, ["rte"]).tasks[0]
    values = task_values(
        found, "bert", output=str(tmp_path / "out"), encoder=str(world / "encoder"), max_length=32
    )
    (tmp_path / "rte.yaml").write_text(yaml.safe_dump(values))
    words = [str(tmp_path / "rte.yaml"), "train.epochs=100000", "device=cpu", "train.save_every=50"]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, **rank}
    )
    while not list((tmp_path / "out/checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    out = ""
    while not out:  # a first signal was lost once, on a busy machine
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1] == str(STOPPED_AND_SAVED)


# -------------------------------------------------------------------------------------- shipped configs


def shipped() -> list[Path]:
    """Configs of one set each; the quickstart's data is made by its run."""
    return [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem != "quickstart"]


def test_the_shipped_tasks_are_those_of_the_command() -> None:
    """configs/finetune/glue/cola.yaml holds what `bertscale glue --recipe bert --tasks cola` runs."""
    names = []
    for path in sorted([*CONFIGS.glob("glue/*.yaml"), *CONFIGS.glob("clue/*.yaml")]):
        task = TASKS[path.stem]
        names.append(task.name)
        layout, folder = task.layouts[0], Path("data", path.parent.name, task.official)
        second = folder / layout.second_dev if layout.second_dev else None
        found = FoundTask(task, folder / layout.train[0], folder / layout.dev[0], second, layout.data)
        encoder = f"runs/{'english' if task.suite == 'GLUE' else 'chinese'}/pretrain"
        wanted = task_values(found, "bert", output=f"runs/{path.parent.name}/{task.name}", encoder=encoder)
        assert load_config(FinetuneConfig, path, []) == FinetuneConfig.model_validate(wanted)
    assert sorted(names) == sorted(TASKS)


def test_every_set_has_a_config() -> None:
    assert [path.stem for path in shipped()] == [
        *("chnsenticorp", "cola", "conll2003", "drcd", "imdb", "mrpc", "ocnli", "resume-ner", "rte"),
        *("sick-entailment", "sick-relatedness", "squad-v1", "squad-v2", "sst2", "stsb-en", "stsb-zh"),
        *("thucnews", "trec", "weibo-ner", "wnli", "wnut17"),
    ]
    for path in shipped():
        config = load_config(FinetuneConfig, path, [])
        assert config.output == f"runs/finetune/{path.stem}"
        assert config.data.dev or config.data.dev_share


@pytest.mark.skipif(DATA is None, reason="BERTSCALE_DATA is not set: no real data")
@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_every_shipped_config_reads_its_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DATA is not None
    monkeypatch.chdir(Path(DATA))
    values = yaml.safe_load(path.read_text(encoding="utf-8").replace("data/tasks/", "tasks/"))
    config = FinetuneConfig.model_validate(values)
    data = read_task_data(config.task, config.data, config.samples)
    assert len(data.train) > 300
    assert len(data.dev) > 30
    assert len(data.broken) <= 3


@pytest.mark.skipif(DATA is None, reason="BERTSCALE_DATA is not set: no real data")
def test_the_real_sets_are_a_folder_of_tasks() -> None:
    found = find_tasks(Path(str(DATA), "tasks"))
    assert [task.name for task in found.tasks] == ["cola", "sst2", "mrpc", "stsb", "rte", "wnli", "ocnli"]
    for task in found.tasks:
        config = FinetuneConfig.model_validate(task_values(task, "bert", output="o", encoder="e"))
        assert len(read_task_data(config.task, config.data, config.samples).dev) > 40
