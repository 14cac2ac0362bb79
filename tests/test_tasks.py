"""Fine-tunings beside a pretraining: what is queued, what is made of their ends, resume, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from dist import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import pretrain_config

from bertscale.checks import check_tasks
from bertscale.config import UserError
from bertscale.pretrain.tasks import Tasks, check_encoder, only_tasks
from bertscale.run_folder import (
    METRICS,
    TABLE,
    TASKS,
    TENSORBOARD,
    checkpoint_folder,
    checkpoints,
    read_metrics,
)
from bertscale.train.checkpoint import prune
from launcher.child import NICENESS, start_child

RESULT = {"metric": "accuracy", "pretrained": {"dev": {"accuracy": {"mean": 0.75}}}}
GOOD = f"mkdir -p $O/model && echo '{json.dumps(RESULT)}' > $O/result.json"


class Begin:
    """Starts a shell script in place of each fine-tuning, by the name of its task; `O` is its output."""

    def __init__(self, **scripts: str) -> None:
        self.scripts, self.calls = scripts, []  # type: ignore[var-annotated]

    def __call__(self, words: list[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
        self.calls.append(words)
        output = next(yaml.safe_load(word[7:]) for word in words if word.startswith("output="))
        script = f"O='{output}'; {self.scripts.get(Path(output).name, GOOD)}"
        with log.open("ab") as file:
            return subprocess.Popen(["sh", "-c", script], stdout=file, stderr=file)

    @property
    def made(self) -> list[str]:
        """What was begun, as step-0000002/one."""
        outputs = [word for words in self.calls for word in words if word.startswith("output=")]
        return ["/".join(Path(word.strip('"')).parts[-2:]) for word in outputs]


def write_tasks(folder: Path, *names: str, **changes: Any) -> dict[str, list[str]]:
    """The section `train` of a pretraining with tasks of these names, whose files are there."""
    examples = folder / "examples.jsonl"
    rows = [
        {"text": f"The {'cat' if n % 2 else 'dog'} finds an answer at {n}.", "label": n % 2}
        for n in range(24)
    ]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data": {"train": str(examples), "dev_share": 0.25},
        "samples": {"max_length": 24},
        "train": {"steps": 2, "global_batch": 4, "precision": "float32"},
        **changes,
    }
    for name in names:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return {"tasks": [str(folder / f"{name}.yaml") for name in names]}


def make_tasks(
    run: Path, begin: Begin, steps: list[int], train: dict[str, Any], device: str = "cpu", **how: bool
) -> Tasks:
    """The tasks of a run with empty checkpoints of `steps`."""
    for step in steps:
        checkpoint_folder(run, step).mkdir(parents=True, exist_ok=True)
        (checkpoint_folder(run, step) / TABLE).touch()
    config = pretrain_config("data", run, train={"save_every": 2, "steps": None, "tokens": 1e6, **train})
    ranks = SimpleNamespace(rank=0, device=torch.device(device), sum=lambda *values: list(values))
    return Tasks(config, ranks, begin, **how)  # type: ignore[arg-type]


GOING_ON = SimpleNamespace(asked=False)


def test_each_becomes_a_figure_at_the_step_of_its_checkpoint_once(tmp_path: Path) -> None:
    train, begin = write_tasks(tmp_path, "one", "two"), Begin()
    run = tmp_path / "run"
    tasks = make_tasks(run, begin, [2, 4], train)
    assert tasks.finish(GOING_ON)  # type: ignore[arg-type]
    assert begin.made == [f"step-000000{step}/{name}" for step in (2, 4) for name in ("one", "two")]
    assert [entry for entry in read_metrics(run) if entry["step"] == 4] == [
        {"step": 4, f"tasks/{name}/accuracy": 0.75} for name in ("one", "two")
    ]
    events = EventAccumulator(str(run / TENSORBOARD / "run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("tasks/one/accuracy")] == [
        (2, 0.75),
        (4, 0.75),
    ]
    assert not (run / TASKS / "step-0000004" / "one" / "model").exists()
    assert (run / TASKS / "step-0000004" / "one" / "result.json").exists()

    again = Begin()
    more = make_tasks(run, again, [6], write_tasks(tmp_path, "one", "two", "three"))
    assert more.finish(GOING_ON)  # type: ignore[arg-type]
    assert again.made == ["step-0000002/three", "step-0000004/three"] + [
        f"step-0000006/{name}" for name in ("one", "two", "three")
    ]


def test_they_begin_at_chosen_steps_and_at_the_end(tmp_path: Path) -> None:
    tasks = make_tasks(
        tmp_path / "run", Begin(), [2, 4, 6], {**write_tasks(tmp_path, "one"), "tasks_every": 4}
    )
    tasks.add(8)
    tasks.add(10)
    tasks.add(14, last=True)
    assert [tuning.step for tuning in tasks.waiting] == [4, 8, 14]


def test_one_that_fails_is_one_line_and_the_next_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_tasks(tmp_path, "bad", "dead", "empty", "good")
    begin = Begin(
        bad="echo 'bertscale finetune: error: no room' >&2; exit 2", dead="kill -9 $$", empty="true"
    )
    tasks = make_tasks(tmp_path / "run", begin, [2], train)
    assert tasks.finish(GOING_ON)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    folder = tmp_path / "run" / TASKS / "step-0000002"
    assert f"step 2: the task bad failed: no room ({folder}/bad.log)" in said
    assert f"step 2: the task dead failed: exit code -9 ({folder}/dead.log)" in said
    assert "step 2: the task empty has left no figure" in said
    assert [list(entry)[1] for entry in read_metrics(tmp_path / "run")] == ["tasks/good/accuracy"]


def test_the_checkpoint_that_one_reads_stays_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    tasks = make_tasks(run, Begin(one="sleep 100"), [2, 4, 6], write_tasks(tmp_path, "one"))
    tasks.look(print)
    tasks.add(8, say=print)
    prune(run, 1, read=tasks.read)
    assert [folder.name for folder in checkpoints(run)] == ["step-0000002", "step-0000006"]
    assert tasks.process is not None
    tasks.process.kill()
    tasks.begin = Begin()
    assert tasks.finish(GOING_ON)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "step 8: the task one of step 2 is at work; 2 more wait" in said
    assert "step 4: no figure of the task one: the checkpoint was deleted before its turn" in said
    assert [entry["step"] for entry in read_metrics(run)] == [6]


def test_a_signal_stops_the_one_that_runs_and_it_goes_on_later(tmp_path: Path) -> None:
    begin = Begin(one="trap 'exit 75' TERM; while true; do sleep 0.05; done")
    tasks = make_tasks(tmp_path / "run", begin, [2], write_tasks(tmp_path, "one"))
    assert not tasks.finish(SimpleNamespace(asked=True))  # type: ignore[arg-type]
    assert tasks.process is not None
    assert tasks.process.returncode in (75, -15)  # before it has set its trap
    assert tasks.read == {2}


def test_gpus_belong_to_the_training_unless_the_task_asks_for_one(tmp_path: Path) -> None:
    begin = Begin()
    train = write_tasks(tmp_path, "auto")
    train["tasks"] += write_tasks(tmp_path, "asks", device="cuda")["tasks"]
    assert make_tasks(tmp_path / "run", begin, [2], train, "cuda").finish(GOING_ON)  # type: ignore[arg-type]
    assert ["device=cpu" in words for words in begin.calls] == [True, False]
    encoder = checkpoint_folder(tmp_path / "run", 2)
    assert begin.calls[0][:3] == ["finetune", train["tasks"][0], f'encoder="{encoder}"']


def test_the_last_ones_may_be_left_to_a_later_start(tmp_path: Path) -> None:
    train, begin = write_tasks(tmp_path, "one"), Begin(one="sleep 100")
    tasks = make_tasks(tmp_path / "run", begin, [2, 4], train, leave=True)
    tasks.look(print)
    assert tasks.finish(GOING_ON)  # type: ignore[arg-type]
    assert tasks.process is not None
    assert tasks.process.returncode == -15
    assert begin.made == ["step-0000002/one"]


def test_a_child_beside_a_rank_is_no_rank_and_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "2")
    # As a rank of two it would want MASTER_ADDR.
    child = start_child(["finetune", "none.yaml"], tmp_path / "log", threads=3)
    assert child.wait() == 2
    assert (tmp_path / "log").read_text().startswith("bertscale finetune: error: cannot read the config none")
    code = "import os; os.execv = lambda *words: print(os.nice(0), words[1][1:]); give_way()"
    command = [sys.executable, "-c", f"from launcher.child import *; {code}", str(os.getpid()), "a", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{min(19, os.nice(0) + NICENESS)} ['-m', 'bertscale', 'a', 'b']\n"


def test_mistakes_in_tasks_are_found_before_the_training_begins(tmp_path: Path) -> None:
    def config(**train: Any) -> Any:
        return pretrain_config("data", tmp_path / "run", train=train)

    with pytest.raises(ValueError, match="tasks_every=15 is no multiple of save_every=10"):
        config(tasks_every=15)
    with pytest.raises(ValueError, match="tasks: two files are called a, the name of the curve"):
        config(tasks=["x/a.yaml", "y/a.yaml"])
    with pytest.raises(UserError, match=r"train.tasks: cannot read the config none.yaml: No such file"):
        check_tasks(config(tasks=["none.yaml"]))
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"trian": {}}, r"train.tasks: .*one.yaml: unknown key trian; did you mean train\?"),
        ({"init": "x"}, "train.tasks: .*one.yaml: a run starts from encoder or from init, and not both"),
        (
            {"samples": {"max_length": 64}},
            "train.tasks: one: samples.max_length=64 is longer than the encoder",
        ),
        (
            {"data": {"train": "missing.csv", "dev_share": 0.1}},
            "train.tasks: one: data.train=missing.csv: there is",
        ),
        ({"data": {"train": "missing.csv"}}, "train.tasks: .*one.yaml: there is no dev to follow"),
    ]
    for changes, message in mistakes:
        with pytest.raises(UserError, match=message):
            check_tasks(config(**write_tasks(tmp_path, "one", **changes)))
    with pytest.raises(UserError, match=r"train.tasks: samples.max_length=64 is longer"):
        check_encoder(config(**write_tasks(tmp_path, "one", samples={"max_length": 64})))
    check_tasks(config(**write_tasks(tmp_path, "one", encoder="runs/other", output="runs/elsewhere")))


# ------------------------------------------------------------------------------------- in a training


def train_thrice(data: str, folder: str) -> list[Any]:
    """On a rank: a run with a task, stopped after three steps, resumed to its end, and started again."""
    from test_checkpoint import StopAfter

    from bertscale.pretrain.pretrain import train
    from bertscale.train.device import local_device
    from bertscale.train.parallel import start_ranks

    run = Path(folder) / "run"
    run.mkdir()
    tasks = write_tasks(Path(folder), "one")
    config = pretrain_config(data, run, train={"steps": 6, "save_every": 2, "keep_checkpoints": 2, **tasks})
    found: list[Any] = []
    for stop in (3, 10**6, 10**6):
        begin = Begin()
        ranks = start_ranks(1, local_device())
        code = train(config, ranks, StopAfter(stop), begin)  # type: ignore[arg-type]
        found.append([code, begin.made])
    (run / METRICS).unlink()
    begin = Begin()
    found.append([only_tasks(config, begin), begin.made])
    return found


@pytest.mark.slow
def test_a_run_makes_each_figure_once_whenever_it_is_stopped(tiny_data: Path, tmp_path: Path) -> None:
    [(first, second, third, alone)] = run_ranks(
        __file__, "train_thrice", world=1, data=str(tiny_data), folder=str(tmp_path)
    )
    assert (first[0], second[0], third) == (75, 0, [0, []])
    # Steps of this model take milliseconds: that of a checkpoint may be over before its turn.
    assert {"step-0000004/one", "step-0000006/one"} <= {*first[1], *second[1]}
    assert alone == [0, ["step-0000004/one", "step-0000006/one"]]


def train_with_a_real_one(data: str, folder: str) -> int:
    """On a rank: a run whose task is a fine-tuning."""
    from test_checkpoint import StopAfter

    from bertscale.pretrain.pretrain import train
    from bertscale.train.device import local_device
    from bertscale.train.parallel import start_ranks
    from launcher.child import start_child

    run = Path(folder) / "run"
    run.mkdir()
    config = pretrain_config(
        data, run, train={"steps": 2, "save_every": 2, **write_tasks(Path(folder), "one")}
    )
    return train(config, start_ranks(1, local_device()), StopAfter(10**6), start_child)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_fine_tuning_beside_the_training_brings_its_figure(tiny_data: Path, tmp_path: Path) -> None:
    code = run_ranks(__file__, "train_with_a_real_one", world=1, data=str(tiny_data), folder=str(tmp_path))
    log = tmp_path / "run" / TASKS / "step-0000002" / "one.log"
    assert code == [0]
    [entry] = [entry for entry in read_metrics(tmp_path / "run") if "tasks/one/accuracy" in entry]
    assert entry["step"] == 2, log.read_text()
    assert 0 <= entry["tasks/one/accuracy"] <= 1
