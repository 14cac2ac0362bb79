"""`bertscale submit`: what is made of configs and cluster files, frozen, queued, and taken back."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import pretrain_config, write_corpus
from virtual import Cluster

from bertscale.config import FinetuneConfig, PipelineStage, PrepConfig, PretrainConfig, UserError, load_tasks
from bertscale.config.glue import add_arguments, from_options
from bertscale.run_folder import read_events
from launcher.job import JobSpec
from launcher.submit import freeze as freezing
from launcher.submit.command import main
from launcher.submit.freeze import about_now, config_text, freeze
from launcher.submit.pipeline import StageJob, folder_of, stage_jobs, unfinished

ROOT = Path(__file__).parents[1]


def write(path: Path, values: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def prep_values(folder: Path) -> dict[str, Any]:
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"text": "One sentence. Another one."}\n' * 20)
    return {"input": [str(corpus)], "output": str(folder / "data")}


def one_job(folder: Path, data: Path, site: dict[str, Any] | None = None, **stage: Any) -> StageJob:
    """The job of a tiny pretraining."""
    config = write(folder / "run.yaml", pretrain_config(data, folder / "run").model_dump())
    cluster = write(folder / "site.yaml", site or {})
    jobs, mistakes = stage_jobs([PipelineStage(pretrain=config, **stage)], cluster)
    assert mistakes == []
    return jobs[0]


# --------------------------------------------------------------------------------------- stages to jobs


def test_a_pretraining_takes_the_nodes_and_the_site(tmp_path: Path) -> None:
    site = {
        "partition": "h100",
        "account": "us",
        "gpus_per_node": 8,
        "cpus_per_task": 12,
        "time": "1-00:00:00",
        "environment": {"NCCL_DEBUG": "WARN"},
        "container": ["apptainer", "exec", "a.sif"],
        "python": "python3",
        "batch_python": "/usr/bin/python3",
        "log_root": str(tmp_path / "logs"),
    }
    job = one_job(tmp_path, tmp_path / "data", site, nodes=4, spares=1)
    spec = job.spec
    assert (spec.nodes, spec.spares, spec.tasks_per_node, spec.ranks) == (4, 1, 8, 32)
    assert (spec.cpus_per_task, spec.gpus_per_node) == (12, 8)
    assert (spec.partition, spec.account, spec.time) == ("h100", "us", "1-00:00:00")
    assert spec.environment == {"NCCL_DEBUG": "WARN"}
    assert spec.container == ("apptainer", "exec", "a.sif")
    assert (spec.python, spec.batch_python) == ("python3", "/usr/bin/python3")
    assert spec.folder == str(tmp_path / "run/job")
    assert spec.logs == str(tmp_path / "logs/pretrain-run")
    assert spec.command == ("-m", "bertscale", "pretrain", f"{spec.folder}/config.yaml")
    assert (spec.start_seconds, spec.restarts_without_progress) == (1800, 2)
    assert one_job(tmp_path, tmp_path / "data", site, time="2:00:00").spec.time == "2:00:00"


def test_a_pretraining_may_ask_for_some_of_a_node_s_gpus(tmp_path: Path) -> None:
    spec = one_job(tmp_path, tmp_path / "data", {"gpus_per_node": 8}, nodes=2, ranks_per_node=2).spec
    assert (spec.nodes, spec.tasks_per_node, spec.gpus_per_node, spec.ranks) == (2, 2, 2, 4)
    spec = one_job(tmp_path, tmp_path / "data", {"tasks_per_node": 4}, ranks_per_node=3).spec
    assert (spec.tasks_per_node, spec.gpus_per_node) == (3, 0)

    config = str(tmp_path / "run.yaml")
    site = write(tmp_path / "site.yaml", {"tasks_per_node": 4})
    jobs, mistakes = stage_jobs([PipelineStage(pretrain=config, ranks_per_node=5)], site)
    assert jobs == []
    assert mistakes == ["ranks_per_node=5, and the cluster file has tasks_per_node=4: ask for less"]
    with pytest.raises(ValueError, match="ranks_per_node=2 is for pretrain and finetune, not convert"):
        PipelineStage(convert=["run", "hf"], ranks_per_node=2)


@pytest.mark.parametrize(("gpus", "device", "other"), [(4, "cuda", "cpu"), (0, "cpu", "cuda")])
def test_a_job_takes_the_device_of_its_site(gpus: int, device: str, other: str, tmp_path: Path) -> None:
    """So it fails at once on a node that does not show its GPUs, and takes none that it was not given."""
    finetune = {"encoder": "hf", "data": {"train": "train.jsonl", "test": "test.jsonl"}, "output": "out"}
    config = pretrain_config(tmp_path / "data", tmp_path / "run").model_dump()
    stages = [
        PipelineStage(pretrain=write(tmp_path / "run.yaml", config)),
        PipelineStage(finetune=write(tmp_path / "finetune.yaml", finetune)),
    ]
    site = write(tmp_path / "site.yaml", {"gpus_per_node": gpus})
    jobs, mistakes = stage_jobs(stages, site)
    assert (mistakes, [job.config.device for job in jobs]) == ([], [device, device])  # type: ignore[union-attr]

    asked = [stage.model_copy(update={"set": [f"device={other}"]}) for stage in stages]
    jobs, mistakes = stage_jobs(asked, site)
    assert jobs == []
    assert len(mistakes) == 1
    assert mistakes[0].startswith(f"device={other}, and the cluster file has gpus_per_node={gpus}: set")


def test_other_stages_are_one_task_with_all_cores_and_fine_tuning_takes_ranks(tmp_path: Path) -> None:
    finetune = {"encoder": "hf", "data": {"train": "train.jsonl", "test": "test.jsonl"}, "output": "out"}
    stages = [
        PipelineStage(prep=write(tmp_path / "prep.yaml", prep_values(tmp_path))),
        PipelineStage(convert=["run", "hf"]),
        PipelineStage(finetune=write(tmp_path / "finetune.yaml", finetune), nodes=2, ranks_per_node=3),
    ]
    site = write(tmp_path / "site.yaml", {"gpus_per_node": 4, "cpus_per_task": 6})
    jobs, mistakes = stage_jobs(stages, site, "chain")
    assert mistakes == []
    shapes = [(s.ranks, s.cpus_per_task, s.gpus_per_node) for s in (job.spec for job in jobs)]
    assert shapes == [(1, 24, 0), (1, 24, 0), (6, 6, 3)]
    assert [job.spec.name for job in jobs] == ["chain-prep", "chain-convert", "chain-finetune"]
    config = jobs[2].config
    assert isinstance(config, FinetuneConfig)
    assert (config.encoder, config.data.test) == (os.path.abspath("hf"), os.path.abspath("test.jsonl"))
    waits = [job.spec.start_seconds for job in jobs]
    assert waits == [0, 0, config.launch.start_seconds]  # the others have no steps to wait for
    assert jobs[2].spec.folder == os.path.abspath("out.job")


def test_paths_are_taken_from_where_submit_was_called(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    prep = {"input": ["texts/*.txt"], "output": "data", "tokenizer": "old.model"}
    stages = [PipelineStage(prep=write(tmp_path / "prep.yaml", prep)), PipelineStage(convert=["run", "hf"])]
    jobs, _ = stage_jobs(
        stages, write(tmp_path / "site.yaml", {"bad_nodes": "bad", "python": "venv/bin/python"})
    )
    config = jobs[0].config
    assert isinstance(config, PrepConfig)
    assert config.input == [str(tmp_path / "texts/*.txt")]
    assert (config.output, config.tokenizer) == (str(tmp_path / "data"), str(tmp_path / "old.model"))
    assert jobs[0].spec.folder == str(tmp_path / "data.job")
    assert jobs[0].spec.bad_nodes == str(tmp_path / "bad")
    assert jobs[0].spec.python == str(tmp_path / "venv/bin/python")
    words = ("convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--no-show")
    assert jobs[1].spec.command[2:] == words
    [job], _ = stage_jobs([PipelineStage(convert=["run", "hf"], average=True)], str(tmp_path / "site.yaml"))
    assert job.spec.command[2:] == (*words, "--average")
    with pytest.raises(ValueError, match="average=true is for convert, not prep"):
        PipelineStage(prep="prep.yaml", average=True)


def test_paths_of_several_corpora_too(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    values = pretrain_config("one", "run").model_dump() | {"data": [{"path": "one", "weight": 2}, "/two"]}
    values["heldout"] = {"web": "three"}
    stages = [PipelineStage(pretrain=write(tmp_path / "run.yaml", values))]
    jobs, mistakes = stage_jobs(stages, write(tmp_path / "site.yaml", {}))
    assert mistakes == []
    config = jobs[0].config
    assert isinstance(config, PretrainConfig)
    assert [(c.path, c.weight) for c in config.corpora] == [(str(tmp_path / "one"), 2.0), ("/two", 1.0)]
    assert config.heldout == {"web": str(tmp_path / "three")}
    assert PretrainConfig.model_validate(yaml.safe_load(config_text(config))) == config


def test_a_prep_array_is_three_jobs(tmp_path: Path) -> None:
    prep = write(tmp_path / "prep.yaml", prep_values(tmp_path))
    jobs, _ = stage_jobs([PipelineStage(prep=prep, array=3)], write(tmp_path / "site.yaml", {}))
    folders = [tmp_path / name for name in ("data.tokenizer.job", "data.job", "data.finish.job")]
    assert [job.spec.folder for job in jobs] == list(map(str, folders))
    assert [job.spec.array for job in jobs] == [0, 3, 0]
    assert [job.spec.command[4:] for job in jobs] == [
        ("--tokenizer-only",),
        ("--task-count", "3"),
        ("--finish", "--task-count", "3"),
    ]
    assert {job.spec.target for job in jobs} == {str(tmp_path / "data")}


def test_replace_is_for_who_makes_the_plan(tmp_path: Path) -> None:
    prep, site = write(tmp_path / "prep.yaml", prep_values(tmp_path)), write(tmp_path / "site.yaml", {})
    [alone], _ = stage_jobs([PipelineStage(prep=prep, replace=True)], site)
    assert alone.spec.command[4:] == ("--replace",)
    jobs, _ = stage_jobs([PipelineStage(prep=prep, array=3, replace=True)], site)
    assert ["--replace" in job.spec.command for job in jobs] == [True, False, False]
    with pytest.raises(ValueError, match="replace=true is for prep, not convert"):
        PipelineStage(convert=["run", "hf"], replace=True)


def glue_folder(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for file in ("train.tsv", "dev.tsv", "dev_matched.tsv"):
            head = "sentence1\tsentence2\tlabel\tgold_label\n"
            (folder / name / file).write_text(head + "a dog\tan animal\tno\tno\na cat\ta dog\tyes\tyes\n" * 9)
    return folder


def test_glue_is_its_first_task_an_array_and_a_table(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    glue_folder(tmp_path / "glue", "MNLI", "RTE", "WNLI")
    site = write(tmp_path / "site.yaml", {"gpus_per_node": 4, "cpus_per_task": 6})
    stage = PipelineStage.model_validate(
        {"glue": {"model": "runs/base", "folder": "glue", "seeds": [1, 2]}, "set": ["train.epochs=1"]}
    )
    jobs, mistakes = stage_jobs([stage], site, "night")
    assert mistakes == []
    target = str(tmp_path / "runs/base-glue")
    assert [job.spec.folder for job in jobs] == [
        f"{target}{end}" for end in (".first.job", ".job", ".finish.job")
    ]
    assert [job.spec.name for job in jobs] == ["night-glue-first", "night-glue", "night-glue-finish"]
    assert [job.spec.array for job in jobs] == [0, 2, 0]
    assert [(job.spec.ranks, job.spec.cpus_per_task, job.spec.gpus_per_node) for job in jobs] == [
        *((1, 6, 1), (1, 6, 1), (1, 6, 0))
    ]
    assert {job.spec.target for job in jobs} == {target}
    words: tuple[str, ...] = ("-m", "bertscale", "glue", str(tmp_path / "runs/base"), str(tmp_path / "glue"))
    words += ("train.epochs=1", "device=cuda", "--output", target, "--tasks", "mnli", "rte", "wnli")
    words += ("--seeds", "1", "2", "--checkpoints", "last")
    ends = [("--intermediate-only",), ("--task-count", "2"), ("--finish",)]
    assert [job.spec.command for job in jobs] == [(*words, *end) for end in ends]

    # What the words ask for is what the config says.
    for job in jobs:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        options, _ = parser.parse_known_intermixed_args(list(job.spec.command[3:]))
        assert from_options(options) == job.config


def test_glue_without_a_first_task(tmp_path: Path) -> None:
    folder = glue_folder(tmp_path / "glue", "MNLI", "RTE")
    site = write(tmp_path / "site.yaml", {"tasks_per_node": 4, "cpus_per_task": 2})
    model = {"model": str(tmp_path / "base"), "folder": str(folder)}
    stages = [PipelineStage.model_validate({"glue": {**model, "intermediate": False}})]
    jobs, _ = stage_jobs(stages, site)
    assert [(job.spec.array, job.spec.cpus_per_task) for job in jobs] == [(2, 8), (0, 8)]
    assert "--no-intermediate" in jobs[0].spec.command
    assert "device=cpu" in jobs[0].spec.command
    stages = [PipelineStage.model_validate({"glue": {**model, "folder": "/nowhere"}})]
    assert stage_jobs(stages, site)[1] == ["cannot read the folder /nowhere: No such file or directory"]
    stages = [PipelineStage.model_validate({"glue": {**model, "set": ["device=cuda"]}})]
    assert stage_jobs(stages, site)[1][0].startswith("device=cuda, and the cluster file has gpus_per_node=0")
    with pytest.raises(ValueError, match="glue takes no array, nodes and spares"):
        PipelineStage.model_validate({"glue": model, "nodes": 2})


def test_tasks_of_a_pretraining_are_a_job_at_the_end(tmp_path: Path) -> None:
    values = {"data": {"train": "a.csv", "dev_share": 0.1}}
    files = [write(tmp_path / f"{name}.yaml", values) for name in ("one", "two")]
    pretrain = write(tmp_path / "run.yaml", pretrain_config("data", tmp_path / "run").model_dump())
    stages = [
        PipelineStage(pretrain=pretrain, nodes=2, spares=1, set=[f"train.tasks={files}"]),
        PipelineStage(convert=[str(tmp_path / "run"), "hf"]),
    ]
    site = {"gpus_per_node": 8, "cpus_per_task": 12}
    jobs, mistakes = stage_jobs(stages, write(tmp_path / "site.yaml", site), "night")
    assert mistakes == []
    training, converting, tasks = (job.spec for job in jobs)
    assert converting.stage == "convert"
    assert training.command[3:] == (f"{training.folder}/config.yaml", "--leave-tasks")
    assert tasks.folder == f"{tmp_path}/run/tasks.job"
    assert tasks.command[2:] == ("pretrain", f"{tasks.folder}/config.yaml", "--tasks-only")
    assert (tasks.stage, tasks.name, tasks.target) == (
        "tasks",
        "night-pretrain-tasks",
        f"{tmp_path}/run/tasks",
    )
    assert (tasks.nodes, tasks.spares, tasks.tasks_per_node) == (1, 0, 1)
    assert (tasks.cpus_per_task, tasks.gpus_per_node, tasks.start_seconds) == (12, 1, 0)
    config = jobs[2].config
    assert isinstance(config, PretrainConfig)
    assert config.train.tasks == [f"{tasks.folder}/tasks/{name}.yaml" for name in ("one", "two")]
    jobs, _ = stage_jobs(stages[:1], write(tmp_path / "site.yaml", {"tasks_per_node": 4, "cpus_per_task": 3}))
    assert (jobs[1].spec.cpus_per_task, jobs[1].spec.gpus_per_node) == (12, 0)


def test_mistakes_of_all_files_come_together(tmp_path: Path) -> None:
    prep = write(tmp_path / "prep.yaml", {"output": "data", "workers": -1})
    finetune = write(tmp_path / "finetune.yaml", {"encoder": "a", "epoch": 3})
    site = write(tmp_path / "site.yaml", {"partitions": "main"})
    stages = [PipelineStage(prep=prep), PipelineStage(finetune=finetune), PipelineStage(pretrain="no.yaml")]
    jobs, mistakes = stage_jobs(stages, site)
    assert jobs == []
    text = "\n".join(mistakes)
    assert text.count(f"{site}: unknown key partitions; did you mean partition?") == 1
    assert f"{prep}: input is missing" in text
    assert "workers=-1" in text
    assert "unknown key epoch; did you mean train.epochs?" in text
    assert "cannot read the config no.yaml" in text


# --------------------------------------------------------------------------------------------- freezing


def test_the_job_folder_holds_code_config_script_and_environment(tmp_path: Path, tiny_data: Path) -> None:
    values = {"data": {"train": "a.csv", "dev_share": 0.1}, "train": {"epochs": 2}}
    task = write(tmp_path / "one.yaml", values)
    tasks = {"set": [f"train.tasks=[{task}]"]}
    job = one_job(tmp_path, tiny_data, {"environment": {"OMP_NUM_THREADS": "1"}}, **tasks)
    freeze(job.spec, job.config, about_now(job.spec.environment), job.tasks)
    folder = tmp_path / "run/job"
    assert sorted(path.name for path in folder.iterdir()) == sorted((*freezing.FROZEN, "logs"))
    for package in freezing.PACKAGES:
        sources = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        assert {
            path.relative_to(folder / "code") for path in (folder / "code" / package).rglob("*")
        } >= sources
    assert PretrainConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())) == job.config
    assert job.config.train.tasks == [f"{folder}/tasks/one.yaml"]
    [frozen] = load_tasks(job.config).values()
    assert (frozen.data.training_files[0].path, frozen.train.epochs) == (str(Path("a.csv").absolute()), 2)
    assert JobSpec.from_json((folder / "job.json").read_text()) == job.spec
    assert os.access(folder / "script.sh", os.X_OK)
    about = json.loads((folder / "environment.json").read_text())
    assert about["environment"] == {"OMP_NUM_THREADS": "1"}
    assert about["python"]["executable"] == sys.executable
    assert {"torch", "numpy", "pydantic"} <= about["distributions"].keys()


def test_the_code_comes_from_the_packages_wherever_one_stands(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "bertscale").mkdir()  # a folder of that name here means nothing
    (tmp_path / "bertscale/errors.py").write_text("other")
    monkeypatch.chdir(tmp_path)
    job = one_job(tmp_path, tmp_path / "data")
    freeze(job.spec, job.config, {})
    assert (tmp_path / "run/job/code/bertscale/errors.py").read_text() != "other"


def test_freezing_again_keeps_the_history_and_drops_the_markers(tmp_path: Path) -> None:
    job = one_job(tmp_path, tmp_path / "data")
    freeze(job.spec, job.config, {})
    folder = tmp_path / "run/job"
    for name in ("events.jsonl", "done.json", "done-3.json", "cancelled", "code/bertscale/gone.py"):
        (folder / name).write_text("{}\n")
    (folder / "logs/slurm-1.out").write_text("before\n")
    freeze(job.spec, job.config, {"again": True})
    assert {path.name for path in folder.iterdir()} == {*freezing.FROZEN, "logs", "events.jsonl"} - {"tasks"}
    assert (folder / "logs/slurm-1.out").read_text() == "before\n"
    assert not (folder / "code/bertscale/gone.py").exists()
    assert json.loads((folder / "environment.json").read_text()) == {"again": True}
    assert [path.name for path in folder.parent.iterdir()] == ["job"]


def test_a_job_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    job = one_job(tmp_path, tmp_path / "data")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write the job folder .*/run/job: "):
        freeze(job.spec, job.config, {})


def test_the_commit_of_a_checkout_is_recorded(tmp_path: Path, monkeypatch: Any) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@b.example")
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    monkeypatch.setattr(freezing, "SOURCE", tmp_path)
    assert freezing.commit() is None
    for package in freezing.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    git("init")
    assert freezing.commit() is None  # a checkout of something else
    git("add", ".")
    git("commit", "-m", "first")
    found = freezing.commit()
    assert found is not None
    assert not found["dirty"]
    assert freezing.version().endswith(f"commit {found['commit'][:10]}")
    (tmp_path / "launcher/__init__.py").write_text("changed")
    assert freezing.version().endswith("(dirty)")


# --------------------------------------------------------------------------------------------- finished


def test_what_is_done_is_not_queued_again(tmp_path: Path, tiny_data: Path, capsys: Any) -> None:
    job = one_job(tmp_path, tiny_data)
    freeze(job.spec, job.config, {})
    assert unfinished([job]) == [job]
    (tmp_path / "run/job/done.json").write_text("{}")
    assert unfinished([job]) == [job]  # what it made is gone
    (tmp_path / "run/result.json").write_text("{}")
    assert unfinished([job]) == []
    assert f"pretrain of {tmp_path}/run is finished" in capsys.readouterr().out
    more = one_job(tmp_path, tiny_data, set=["train.steps=20"])
    assert unfinished([more]) == [more]
    # Without Slurm: there is nothing to ask it.
    assert main(["pretrain", str(tmp_path / "run.yaml"), "--cluster", str(tmp_path / "site.yaml")]) == 0


def test_a_job_behind_an_unfinished_one_runs_again(tmp_path: Path) -> None:
    prep = write(tmp_path / "prep.yaml", prep_values(tmp_path))
    stages = [PipelineStage(prep=prep, array=2), PipelineStage(convert=["run", str(tmp_path / "hf")])]
    jobs, _ = stage_jobs(stages, write(tmp_path / "site.yaml", {}))
    for job in jobs:
        freeze(job.spec, job.config, {})
    (tmp_path / "hf").mkdir()
    for name in ("data.tokenizer.job/done", "data.job/done-0", "data.finish.job/done", "hf.job/done"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text("{}")
    assert unfinished(jobs) == jobs  # task 1 of the array is not done
    (tmp_path / "data.job/done-1.json").write_text("{}")
    assert unfinished(jobs) == []
    (tmp_path / "hf.job/done.json").unlink()
    assert unfinished(jobs) == jobs[3:]


def test_new_input_is_a_new_job(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    source, output = tmp_path / "run", tmp_path / "hf"
    stage = PipelineStage(convert=[str(source), str(output)])
    jobs, _ = stage_jobs([stage], write(tmp_path / "site.yaml", {}))
    freeze(jobs[0].spec, None, {})
    output.mkdir()
    (tmp_path / "hf.job/done.json").write_text("{}")
    assert unfinished(jobs) == []
    table = source / "checkpoints/bertscale.json"
    table.write_text("{}")
    later = (tmp_path / "hf.job/done.json").stat().st_mtime + 1
    os.utime(table, (later, later))
    assert unfinished(jobs) == jobs


# ---------------------------------------------------------------------------------------- the command line


def test_help_and_mistakes_of_the_command_line(capsys: Any) -> None:
    assert main(["--help"]) == 0
    assert "pipeline PIPELINE" in capsys.readouterr().out
    with pytest.raises(UserError, match="'train' is none of prep, pretrain"):
        main(["train", "a.yaml"])
    with pytest.raises(SystemExit):
        main(["pretrain", "a.yaml"])
    assert "--cluster" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pretrain", "a.yaml", "--cluster", "b.yaml", "--nodes", "0"])
    assert "'0' is not a number of at least 1" in capsys.readouterr().err


def test_every_stage_takes_a_cluster_file(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for stage in ("prep", "pretrain", "convert", "finetune", "glue", "pipeline"):
        with pytest.raises(SystemExit):
            main([stage, "--help"])
        assert "--cluster FILE" in capsys.readouterr().out
    stages = [{"convert": ["a", "b"]}, {"convert": ["b", "c"], "cluster": "own.yaml"}]
    asked: list[list[str | None]] = []

    def fake_jobs(stages: Any, cluster: str, chain: str) -> tuple[list[StageJob], list[str]]:
        asked.append([chain, *(stage.cluster or cluster for stage in stages)])
        return [], ["enough"]

    monkeypatch.setattr("launcher.submit.command.stage_jobs", fake_jobs)
    monkeypatch.setattr("launcher.submit.command.submit", lambda *_, **__: 0)
    chain = write(tmp_path / "chain.yaml", {"name": "two", "cluster": "theirs.yaml", "stages": stages})
    assert main(["pipeline", chain]) == 0
    assert main(["pipeline", chain, "--cluster", "site: 1.yaml"]) == 0
    nameless = write(tmp_path / "nameless.yaml", {"name": "two", "stages": stages})
    assert main(["pipeline", nameless, "--cluster", "site.yaml"]) == 0
    assert asked == [["two", site, "own.yaml"] for site in ("theirs.yaml", "site: 1.yaml", "site.yaml")]


def test_help_loads_neither_torch_nor_pyarrow(bertscale: Any) -> None:
    code = "import sys; from launcher.submit.command import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pyarrow", "numpy"} & set(done.stdout.split())
    assert bertscale("submit", "pretrain", "--help").returncode == 0


# ------------------------------------------------------------------------------------ on a virtual cluster

STUB = """\
# In place of the supervisor: says which code ran, and fails where the config has the word for it.
import os, pathlib, sys
job = pathlib.Path(sys.argv[1])
(job / "ran").write_text(f"{VERSION} code, {os.environ.get('RANK')} of {os.environ['SLURM_NTASKS']}")
sys.exit(1 if "fail" in (job / "config.yaml").read_text() else 0)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code whose supervisor is a stub, version `old`."""
    copy = tmp_path / "checkout"
    for package in freezing.PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "launcher/watch.py").write_text(STUB.replace("VERSION", "'old'"))
    return copy


class Desk:
    """Where a person submits from: a checkout, a config, a cluster file."""

    def __init__(self, cluster: Cluster, checkout: Path, folder: Path, data: Path) -> None:
        self.cluster, self.checkout, self.folder = cluster, checkout, folder
        self.config = write(folder / "run.yaml", pretrain_config(data, folder / "run").model_dump())
        self.site = write(folder / "site.yaml", {"node_check": False, "signal_seconds": 10})

    def submit(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        env = ("env", f"PYTHONPATH={self.checkout}", "SLURM_NTASKS=64", "RANK=3", "SBATCH_PARTITION=no")
        command = (*env, sys.executable, "-m", "bertscale", "submit", *words)
        return self.cluster.run(*command, check=check, cwd=self.folder)

    def queued(self, folder: str) -> list[dict[str, Any]]:
        events = read_events(self.folder / folder / "events.jsonl")
        return [event for event in events if event["event"] == "queued"]


@pytest.fixture
def desk(cluster: Cluster, checkout: Path, tmp_path: Path, tiny_data: Path) -> Desk:
    return Desk(cluster, checkout, tmp_path, tiny_data)


@pytest.mark.slurm
def test_the_job_runs_the_code_and_config_that_were_submitted(desk: Desk) -> None:
    blocker = desk.cluster.sbatch("#!/bin/bash\nsleep 600\n")
    done = desk.submit("pretrain", desk.config, "--cluster", desk.site, "--after", blocker)
    (event,) = desk.queued("run/job")
    assert event["after"] == [blocker]
    assert f"job {event['job']} (pretrain-run: 1 node x 1 rank, after job {blocker}) is queued" in done.stdout
    for command in ("status", "logs --follow", "cancel"):
        assert f"  bertscale {command} run\n" in done.stdout
    assert desk.cluster.job(event["job"])["Dependency"].startswith(f"afterany:{blocker}")

    (desk.checkout / "launcher/watch.py").write_text(STUB.replace("VERSION", "'new'"))
    shutil.rmtree(desk.checkout / "bertscale")
    Path(desk.config).write_text("fail")
    desk.cluster.run("scancel", blocker)
    desk.cluster.wait(event["job"], "COMPLETED")
    assert (desk.folder / "run/job/ran").read_text() == "old code, None of 1"
    log = desk.folder / f"run/job/logs/slurm-{event['job']}.out"
    assert log.is_file()


@pytest.mark.slurm
def test_the_same_folder_is_not_submitted_twice_at_once(desk: Desk) -> None:
    desk.submit("pretrain", desk.config, "--cluster", desk.site, "--after", desk.cluster.sbatch(SLEEP))
    before = (desk.folder / "run/job/job.json").stat().st_mtime_ns
    again = desk.submit("pretrain", desk.config, "--cluster", desk.site, check=False)
    assert again.returncode == 2
    (event,) = desk.queued("run/job")
    assert f"job {event['job']} already makes run: `bertscale status run` shows it" in again.stderr
    assert (desk.folder / "run/job/job.json").stat().st_mtime_ns == before


SLEEP = "#!/bin/bash\nsleep 600\n"


def three_jobs(desk: Desk, *, middle: str = "plain") -> str:
    """A chain of three pretrainings, the second of which has `middle` in the name of its folder."""
    stages = [{"pretrain": desk.config, "set": [f"run={name}"]} for name in ("first", middle, "last")]
    return write(desk.folder / "chain.yaml", {"name": "three", "cluster": desk.site, "stages": stages})


@pytest.mark.slurm
def test_a_chain_is_told_of_its_jobs(desk: Desk) -> None:
    blocker = desk.cluster.sbatch(SLEEP)
    desk.submit("pipeline", three_jobs(desk, middle="fail"), "--after", blocker)
    folders = [str(desk.folder / name / "job") for name in ("first", "fail", "last")]
    specs = [JobSpec.from_json((Path(folder) / "job.json").read_text()) for folder in folders]
    assert [spec.previous for spec in specs] == [(), (folders[0],), (folders[1],)]
    assert [spec.following for spec in specs] == [tuple(folders[1:]), (folders[2],), ()]
    jobs = [desk.queued(folder)[0]["job"] for folder in folders]
    assert [desk.queued(folder)[0]["after"] for folder in folders] == [[blocker], [jobs[0]], [jobs[1]]]
    desk.cluster.run("scancel", blocker)
    # The stub looks at no marker: the last begins although the one in the middle fails. It waits for none.
    assert [desk.cluster.wait(job, "COMPLETED FAILED") for job in jobs] == [
        "COMPLETED",
        "FAILED",
        "COMPLETED",
    ]


@pytest.mark.slurm
def test_the_rest_of_a_chain_is_cancelled_when_its_middle_fails(desk: Desk) -> None:
    """With the real supervisor: preparations, the second of which has nothing but broken records."""
    shutil.copyfile(ROOT / "launcher/watch.py", desk.checkout / "launcher/watch.py")
    stages = []
    for name in ("first", "middle", "last"):
        corpus = desk.folder / f"{name}.jsonl"
        write_corpus(corpus, 60)
        if name == "middle":
            corpus.write_text("{broken\n" * 50)
        tokenizer = {"vocab_size": 300, "sample_documents": 50}
        values = {"input": [str(corpus)], "output": name, "workers": 1, "train_tokenizer": tokenizer}
        stages.append({"prep": write(desk.folder / f"{name}.yaml", values)})
    chain = {"name": "three", "cluster": desk.site, "stages": stages}
    desk.submit("pipeline", write(desk.folder / "chain.yaml", chain))
    jobs = [desk.queued(f"{name}.job")[0]["job"] for name in ("first", "middle", "last")]
    states = [desk.cluster.wait(job, "COMPLETED FAILED CANCELLED", 120) for job in jobs]
    assert states == ["COMPLETED", "FAILED", "CANCELLED"]
    assert (desk.folder / "first.job/done.json").exists()
    assert not (desk.folder / "middle.job/done.json").exists()
    assert read_events(desk.folder / "last.job/events.jsonl")[-1]["event"] == "cancelled"
    # Mended and submitted again, the pipeline begins where it stopped.
    shutil.copyfile(desk.folder / "first.jsonl", desk.folder / "middle.jsonl")
    again = desk.submit("pipeline", str(desk.folder / "chain.yaml"))
    assert again.stdout.startswith("prep of first is finished: bertscale status first\n")
    jobs = [desk.queued(f"{name}.job")[-1]["job"] for name in ("middle", "last")]
    states = [desk.cluster.wait(job, "COMPLETED FAILED CANCELLED", 120) for job in jobs]
    assert states == ["COMPLETED", "COMPLETED"]
    assert len(desk.queued("first.job")) == 1


@pytest.mark.slurm
def test_behind_a_job_of_ours_its_done_marker_is_looked_for(desk: Desk) -> None:
    desk.submit("pretrain", desk.config, "--cluster", desk.site, "--after", desk.cluster.sbatch(SLEEP))
    job = desk.queued("run/job")[0]["job"]
    desk.submit("convert", "run", "hf", "--cluster", desk.site, "--after", job)  # run is yet to be made
    spec = JobSpec.from_json((desk.folder / "hf.job/job.json").read_text())
    assert spec.previous == (str(desk.folder / "run/job"),)
    assert desk.queued("hf.job")[0]["after"] == [job]


@pytest.mark.slurm
def test_links_are_taken_back_when_a_later_one_is_refused(desk: Desk, tmp_path: Path) -> None:
    # An sbatch that refuses the second script, after all checks: what a full queue does.
    tools = tmp_path / "bin"
    tools.mkdir()
    real = desk.cluster.run("which", "sbatch").stdout.strip()
    refuse = 'case "$*" in *parsable*/plain/*) echo "sbatch: error: QOSMaxSubmitJob" >&2; exit 1;; esac'
    (tools / "sbatch").write_text(f'#!/bin/sh\n{refuse}\nexec {real} "$@"\n')
    (tools / "sbatch").chmod(0o755)
    blocker = desk.cluster.sbatch(SLEEP)
    env = ("env", f"PYTHONPATH={desk.checkout}", f"PATH={tools}:{os.environ['PATH']}")
    words = (sys.executable, "-m", "bertscale", "submit", "pipeline", three_jobs(desk), "--after", blocker)
    done = desk.cluster.run(*env, *words, check=False, cwd=desk.folder)
    assert done.returncode == 2
    assert "QOSMaxSubmitJob" in done.stderr
    job = desk.queued("first/job")[0]["job"]
    assert f"job {job} (three-pretrain) was cancelled: a later job could not be queued" in done.stderr
    assert desk.cluster.wait(job, "CANCELLED")
    assert (desk.folder / "first/job/cancelled").exists()
    assert not desk.queued("last/job")


@pytest.mark.slurm
def test_nodes_are_left_out(desk: Desk, tmp_path: Path) -> None:
    from launcher.nodes.check import remember_bad

    bad = tmp_path / "bad-nodes"
    remember_bad(bad, "node2", "slow")
    site = write(tmp_path / "site.yaml", {"node_check": False, "signal_seconds": 10, "bad_nodes": str(bad)})
    blocker = desk.cluster.sbatch(SLEEP)
    words = ("pretrain", desk.config, "--cluster", site, "--after", blocker, "--exclude", "node[3-4]")
    done = desk.submit(*words, "--nodes", "2", "train.micro_batch=1", check=False)
    assert (
        "nodes=2: partition main has 4 nodes that would do but for node2,node3,node4, left out" in done.stderr
    )
    desk.submit(*words)
    shown = desk.cluster.job(desk.queued("run/job")[0]["job"])
    assert shown["ExcNodeList"] == "node[2-4]"


@pytest.mark.slurm
def test_a_dry_run_shows_all_and_leaves_nothing(desk: Desk) -> None:
    before = sorted(desk.folder.rglob("*"))
    jobs = desk.cluster.jobs()
    done = desk.submit("pretrain", desk.config, "--cluster", desk.site, "--nodes", "4", "--dry-run")
    for part in (
        "#SBATCH --nodes=4",
        f"-m bertscale pretrain {desk.folder}/run/job/config.yaml",
        "pretrain-run: 4 nodes x 1 rank",
        "memory of a rank, estimated: ",
        "expected start, as of now: 20",
        "nothing was queued",
    ):
        assert part in done.stdout
    left = [path for path in sorted(desk.folder.rglob("*")) if "__pycache__" not in str(path)]
    assert left == before
    assert desk.cluster.jobs() == jobs
    done = desk.submit(
        "pretrain", desk.config, "--cluster", desk.site, "--nodes", "9", "--dry-run", check=False
    )
    assert done.returncode == 2
    assert "nodes=9: partition main has 4 nodes that would do; ask for fewer" in done.stderr


def test_only_jobs_of_ours_have_a_folder(tmp_path: Path) -> None:
    assert folder_of({"Comment": f"bertscale {tmp_path}"}) is None  # it is gone
    (tmp_path / "job.json").write_text("{}")
    assert folder_of({"Comment": f"bertscale {tmp_path}"}) == tmp_path
    assert folder_of({"Comment": f"{tmp_path}"}) is None
    assert folder_of({}) is None
    job = tmp_path / "job"
    job.mkdir()
    (job / "job.json").write_text("{}")
    assert folder_of({"Comment": "of the site", "Command": f"{job}/script.sh"}) == job
    assert folder_of({"Comment": "of the site", "Command": "/some/script.sh"}) is None


def test_the_config_is_whole(tiny_data: Path) -> None:
    config = pretrain_config(tiny_data, "ein/Lauf/größer")
    assert PretrainConfig.model_validate(yaml.safe_load(config_text(config))) == config
    assert "größer" in config_text(config)
