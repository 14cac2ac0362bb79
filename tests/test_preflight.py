"""What `bertscale submit` refuses before anything is queued: every message, without Slurm and with it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from damage import change_manifest
from tiny import pretrain_config, write_corpus
from virtual import Cluster

from bertscale.config import ModelConfig, PipelineStage, PretrainConfig, UserError
from bertscale.model.model import PretrainingModel
from bertscale.run_folder import Events
from launcher import slurm
from launcher.submit import command
from launcher.submit.command import main as submit
from launcher.submit.freeze import freeze
from launcher.submit.memory import checkpoint_bytes, count_parameters, estimate_memory, what_would_fit
from launcher.submit.pipeline import stage_jobs
from launcher.submit.preflight import Report, check

PARTITIONS = """\
PartitionName=gpu AllowAccounts=ALL Default=YES MaxNodes=3 MaxTime=1-00:00:00 Nodes=gpu[1-4] State=UP
PartitionName=cpu AllowAccounts=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED Nodes=cpu[1-2] State=DRAIN
"""
NODES = {
    "gpu[1-4]": "".join(
        f"NodeName=gpu{n} Arch=x86_64  CPUTot=64 AvailableFeatures={feature} Gres=gpu:h100:8(S:0-1) "
        "OS=Linux 6.1 #1 SMP  RealMemory=512000 State=IDLE\n"
        for n, feature in ((1, "ib,h100"), (2, "ib,h100"), (3, "h100"), (4, "h100"))
    ),
    "cpu[1-2]": "".join(
        f"NodeName=cpu{n}  CPUTot=16 AvailableFeatures=(null) Gres=(null)  RealMemory=4000 State=IDLE\n"
        for n in (1, 2)
    ),
}
JOBS = {
    "17": "JobId=17 JobName=other JobState=RUNNING Comment=(null)\n",
    "18": "JobId=18 JobName=ours JobState=FAILED Comment=bertscale {tmp}/run/job\n",
    "19": "JobId=19 JobName=ours JobState=PENDING Comment=bertscale {tmp}/run/job\n",
}


class Slurm:
    """Answers as Slurm's commands do, for partitions `gpu` (4 nodes of 8 GPUs) and `cpu` (2 nodes)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.queue = ""
        self.verdict = (
            0,
            "sbatch: Job 5 to start at 2026-01-02T03:04:05 using 8 processors on nodes gpu[1-2]",
        )

    def ask(self, *command: str, check: bool = True, **_: Any) -> subprocess.CompletedProcess[str]:
        out, err, code = "", "", 0
        if command[:3] == ("scontrol", "show", "partition"):
            out = PARTITIONS
        elif command[:3] == ("scontrol", "show", "node"):
            out = NODES[command[-1]]
        elif command[:3] == ("scontrol", "show", "job"):
            out = JOBS.get(command[-1], "").format(tmp=self.folder)
            code = int(not out)
        elif command[0] == "squeue":
            out = self.queue
        elif command[0] == "sbatch":
            assert command[1] == "--test-only"
            code, err = self.verdict
        return subprocess.CompletedProcess(command, code, out, err)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made_up = Slurm(tmp_path)
    monkeypatch.setattr(slurm, "ask", made_up.ask)
    monkeypatch.chdir(tmp_path)
    return made_up


def write(path: Path, values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


class Desk:
    """Makes jobs of a tiny pretraining and says what the checks find."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def report(
        self,
        facts: dict[str, Any],
        *,
        after: tuple[str, ...] = (),
        out: list[str] | None = None,
        **stage: Any,
    ) -> Report:
        config = write(self.folder / "run.yaml", pretrain_config(self.data, self.folder / "run").model_dump())
        return self.check([PipelineStage(pretrain=config, **stage)], facts, out)

    def check(
        self,
        stages: list[PipelineStage],
        facts: dict[str, Any],
        out: list[str] | None = None,
    ) -> Report:
        jobs, mistakes = stage_jobs(stages, write(self.folder / "site.yaml", facts), "night")
        left_out = {job.spec.folder: out or [] for job in jobs}
        return check(jobs, (), left_out, mistakes)


@pytest.fixture
def desk(tmp_path: Path, tiny_data: Path) -> Desk:
    return Desk(tmp_path, tiny_data)


GPU: dict[str, Any] = {"gpus_per_node": 8, "cpus_per_task": 8, "gpu_memory_gb": 80, "time": "12:00:00"}
FIT = ["train.global_batch=32", "train.micro_batch=1"]  # for 8 or 16 ranks


SHIPPED = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("pipeline", sorted(SHIPPED.glob("pipeline/*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("shipped", sorted(SHIPPED.glob("cluster/*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_pipeline_fits_each_shipped_cluster(
    pipeline: Path,
    shipped: Path,
    site: Slurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`submit pipeline --dry-run`, as documented, on a site that has what the cluster file says of it."""
    shutil.copytree(SHIPPED, tmp_path / "configs")
    (tmp_path / "runs/quickstart/task").mkdir(parents=True)
    write_corpus(tmp_path / "runs/quickstart/corpus.jsonl", 20)
    (tmp_path / "runs/quickstart/corpus").mkdir()
    shutil.move(tmp_path / "runs/quickstart/corpus.jsonl", tmp_path / "runs/quickstart/corpus")
    for split in ("train", "test"):
        rows = '{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n'
        (tmp_path / f"runs/quickstart/task/{split}.jsonl").write_text(rows)
    facts = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    places = {key: str(tmp_path / key) for key in ("log_root", "bad_nodes") if key in facts}
    places |= {key: sys.executable for key in ("python", "batch_python") if key in facts}
    write(tmp_path / "site.yaml", facts | places)
    one = f"PartitionName={facts['partition']} AllowAccounts=ALL Default=YES Nodes=n[1-4] State=UP\n"
    gpus = f"gpu:{facts.get('gpus_per_node', 0)}"
    node = (
        f"CPUTot=128 AvailableFeatures={facts.get('constraint')} Gres={gpus} RealMemory=1000000 State=IDLE\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PARTITIONS", one)
    monkeypatch.setitem(NODES, "n[1-4]", "".join(f"NodeName=n{n} {node}" for n in range(1, 5)))

    arguments = ["pipeline", f"configs/pipeline/{pipeline.name}", "--cluster", "site.yaml", "--dry-run"]
    assert submit(arguments) == 0
    assert "nothing was queued: this was a dry run" in capsys.readouterr().out


def test_a_sound_job_has_no_problem(site: Slurm, desk: Desk) -> None:
    report = desk.report(GPU, nodes=2, set=FIT)
    assert report.problems == []
    memory, start = report.facts
    assert memory.startswith("memory of a rank, estimated: 2.")
    assert memory.endswith("of 80.0 GB")
    assert start == "expected start, as of now: 2026-01-02 03:04:05 on gpu[1-2]"
    assert not (desk.folder / "run").exists()


@pytest.mark.parametrize(
    ("facts", "stage", "message"),
    [
        (
            {"partition": "gpus"},
            {},
            "partition=gpus: no such partition; the cluster has gpu, cpu",
        ),
        (
            {"time": "1-01"},
            {},
            "time=1-01 is more than partition gpu allows (1-00:00:00): the job would never start; ask for "
            "less, since a job that reaches its limit saves, queues itself again and resumes",
        ),
        (
            {"time": "tomorrow"},
            {},
            "time=tomorrow is not as Slurm writes it, such as 90 (minutes), 12:00:00 or 1-12 (days)",
        ),
        (
            {"time": "00:05:00"},
            {},
            "time=00:05:00 is no longer than signal_seconds=300, which are kept for saving; ask for more "
            "time, or lower signal_seconds in the cluster file",
        ),
        (
            {},
            {"spares": 2},
            "nodes=2 and spares=2: partition gpu gives at most 3 nodes to a job",
        ),
        (
            {"constraint": "ib"},
            {"spares": 1},
            "nodes=2 and spares=1: partition gpu with the feature ib has 2 nodes that would do; ask for "
            "fewer",
        ),
        (
            {"constraint": "a100"},
            {},
            "constraint=a100: no node of partition gpu has that feature; `sinfo --partition=gpu "
            "--format='%N %f'` shows what they have",
        ),
        (
            {"cpus_per_task": 9},
            {},
            "cpus_per_task=9 for each of 8 ranks: the nodes of partition gpu have 64 cores; ask for less, or "
            "another partition",
        ),
        (
            {"gpus_per_node": 16, "cpus_per_task": 1},
            {"set": ["train.global_batch=32", "train.micro_batch=1"]},
            "gpus_per_node=16: the nodes of partition gpu have 8 GPUs; ask for less, or another partition",
        ),
        (
            {"memory_per_node": "600G"},
            {},
            "memory_per_node=600G: the nodes of partition gpu have 500 GiB; ask for less, or another "
            "partition",
        ),
        (
            {"memory_per_node": "lots"},
            {},
            "memory_per_node=lots is no size as sbatch reads it, such as 200G",
        ),
    ],
)
def test_what_the_partition_cannot_give(
    site: Slurm, desk: Desk, facts: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    report = desk.report({**GPU, **facts}, **{"nodes": 2, "set": FIT, **stage})
    assert report.problems == [message]


def test_of_several_partitions_one_that_fits_is_enough(site: Slurm, desk: Desk) -> None:
    assert desk.report({**GPU, "partition": "cpu,gpu"}, nodes=2, set=FIT).problems == []
    cpu = {"partition": "cpu", "tasks_per_node": 2, "cpus_per_task": 8}
    report = desk.report(cpu, nodes=2)
    assert report.problems == []
    assert "partition cpu is DRAIN: jobs wait until it is UP" in report.warnings


def test_nodes_that_are_left_out_count(site: Slurm, desk: Desk) -> None:
    report = desk.report({**GPU, "constraint": "ib"}, nodes=2, set=FIT, out=["gpu2", "gpu3"])
    assert report.problems == [
        "nodes=2: partition gpu with the feature ib has 2 nodes that would do but for gpu2, "
        "left out; ask for fewer"
    ]


def test_what_sbatch_says_is_passed_on(site: Slurm, desk: Desk) -> None:
    site.verdict = (1, "allocation failure: Invalid qos specification")
    report = desk.report(GPU, nodes=2, set=FIT)
    assert report.problems == ["sbatch would refuse the job: Invalid qos specification"]


def test_a_job_for_nodes_that_are_drained_waits(
    site: Slurm, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch takes it, although `sbatch --test-only` refuses it, in the words of what no node has."""
    site.verdict = (1, "allocation failure: Requested node configuration is not available")
    report = desk.report(GPU, nodes=2, set=FIT)
    assert report.problems == ["sbatch would refuse the job: Requested node configuration is not available"]
    drained = NODES["gpu[1-4]"].replace("State=IDLE", "State=IDLE+DRAIN", 1)
    monkeypatch.setitem(NODES, "gpu[1-4]", drained)
    report = desk.report(GPU, nodes=2, set=FIT)
    assert report.problems == []
    assert report.warnings[1:] == [
        "the job waits until enough nodes are back: gpu1 (IDLE+DRAIN) (Requested node configuration is not "
        "available)"
    ]


def test_ranks_batch_and_tensor_degree(site: Slurm, desk: Desk) -> None:
    report = desk.report(GPU, nodes=2, set=["train.global_batch=32", "train.micro_batch=3"])
    (line,) = report.problems
    assert line.startswith("train.global_batch=32 is not a multiple of 48 (16 data-parallel rank(s) x")
    three = {**GPU, "gpus_per_node": 3}
    report = desk.report(three, nodes=3, set=["parallel.tensor=4"])
    assert report.problems == [
        "parallel.tensor=4 does not divide the 9 ranks (3 nodes x 3): ask for another number of nodes, or "
        "give another parallel.tensor"
    ]
    report = desk.report(
        three, nodes=2, set=["parallel.tensor=2", "train.global_batch=6", "train.micro_batch=1"]
    )
    assert report.problems == []
    assert (
        "parallel.tensor=2 does not divide the 3 ranks of a node: layers would be shared between nodes, "
        "which is slow; a tensor degree within a node is better"
    ) in report.warnings
    jobs, mistakes = stage_jobs(
        [PipelineStage(pretrain=str(desk.folder / "run.yaml"), set=["parallel.tensor=3"])],
        str(desk.folder / "site.yaml"),
    )
    assert jobs == []
    assert (
        "parallel.tensor=3 does not divide model.num_attention_heads=4; sizes that do: 1, 2, 4" in mistakes[0]
    )


LARGE = [
    "model.hidden_size=4096",
    "model.num_attention_heads=32",
    "model.intermediate_size=16384",
    "model.num_hidden_layers=48",
    *FIT,
]


def test_memory(site: Slurm, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 10**15))
    report = desk.report(GPU, nodes=2, set=LARGE)
    (line,) = report.problems
    assert line.startswith("a rank needs about ")
    assert line.endswith("and has 80.0 GB (gpu_memory_gb=80): parallel.zero_stage=2 would fit")
    assert desk.report(GPU, nodes=2, set=[*LARGE, "parallel.zero_stage=2"]).problems == []
    cpu = {"partition": "cpu", "tasks_per_node": 2, "cpus_per_task": 8}
    (line,) = desk.report(cpu, nodes=2, set=LARGE).problems
    assert "and has 2.1 GB (its share of a node): give it more ranks, or a higher parallel.tensor" in line
    (line,) = desk.report({**cpu, "memory_per_node": "1G"}, nodes=2).problems
    assert "and has 0.5 GB (its share of a node)" in line


def test_data_that_is_missing_or_damaged(site: Slurm, desk: Desk, tiny_data: Path) -> None:
    gone = desk.folder / "gone"
    report = desk.report(GPU, nodes=2, set=[*FIT, f"data={gone}"])
    assert report.problems == [f"there is no data folder {gone}; `bertscale prep` makes one"]
    broken = desk.folder / "broken"
    shutil.copytree(tiny_data, broken)
    shard = next(broken.glob("train-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (line,) = desk.report(GPU, nodes=2, set=[*FIT, f"data={broken}"]).problems
    assert f"the shard {shard} has " in line
    assert "run `bertscale prep` again" in line


def test_corpora_of_two_tokenizers_are_a_problem(site: Slurm, desk: Desk) -> None:
    other = desk.folder / "other"
    shutil.copytree(desk.data, other)
    model = other / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b" ")
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    change_manifest(other, lambda manifest: manifest.update(tokenizer_sha256=sha256))
    for key, value in (("data", f"[{desk.data},{other}]"), ("heldout.web", str(other))):
        report = desk.report(GPU, nodes=2, set=[*FIT, f"{key}={value}"])
        assert report.problems == [
            f"{key}: {other} was made with another tokenizer than {desk.data}; run `bertscale prep` for it "
            f"with tokenizer={desk.data}/tokenizer.model"
        ]


def test_places_that_cannot_be_written(site: Slurm, desk: Desk) -> None:
    (desk.folder / "file").write_text("")
    report = desk.report(
        {**GPU, "log_root": "/proc/logs"}, nodes=2, set=[*FIT, f"run={desk.folder}/file/run"]
    )
    run, job, logs = report.problems
    place = desk.folder / "file"
    assert run == f"run={place}/run: {place} is a file, not a folder; choose another place"
    assert job == f"job folder {place}/run/job: {place} is a file, not a folder; choose another place"
    assert logs.startswith("log_root=/proc/logs: /proc cannot be written to: ")
    assert logs.endswith("; choose another place, or have its rights changed")


def test_space_for_checkpoints_and_shards(site: Slurm, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 10_000_000))
    large = ["model.hidden_size=512", "model.intermediate_size=2048", *FIT]
    (line,) = desk.report(GPU, nodes=2, set=[*large, "train.keep_checkpoints=4"]).problems
    assert line.startswith(
        f"run={desk.folder}/run: 0.0 GB are free there, 0.4 GB are needed for 5 checkpoints"
    )
    assert line.endswith(
        " of 0.1 GB (train.keep_checkpoints=4 and the one being written); free some, or choose another place"
    )
    every = ["train.steps=100", "train.save_every=5", "train.keep_checkpoints=4", "train.keep_every=20"]
    (line,) = desk.report(GPU, nodes=2, set=[*large, *every]).problems  # 100, 95, 90, 85; 80, 60, 40, 20
    assert " are needed for 9 checkpoints of " in line
    assert "(train.keep_checkpoints=4, train.keep_every=20 and the one being written)" in line
    corpus = desk.folder / "corpus.txt"
    with corpus.open("wb") as file:
        file.truncate(3 * 10**9)
    prep = write(desk.folder / "prep.yaml", {"input": [str(corpus)], "output": str(desk.folder / "data")})
    (line,) = desk.check([PipelineStage(prep=prep)], {"cpus_per_task": 8}).problems
    assert "3.0 GB are needed for token shards of 3.0 GB of text" in line


def test_a_python_that_is_not_there(site: Slurm, desk: Desk) -> None:
    report = desk.report({**GPU, "python": "/no/python"}, nodes=2, set=FIT)
    assert report.problems == ["python=/no/python of the cluster file is no program here"]
    inside = {**GPU, "python": "/no/python", "container": ["apptainer", "exec", "a.sif"]}
    assert desk.report({**inside, "batch_python": sys.executable}, nodes=2, set=FIT).problems == []


def test_jobs_that_come_before(site: Slurm, desk: Desk) -> None:
    jobs, _ = stage_jobs([PipelineStage(convert=["run", "hf"])], write(desk.folder / "site.yaml", {}))
    report = check(jobs, ("99", "abc"))
    assert report.problems[0] == (
        "--after 99: Slurm knows no such job, and would start this one at once; give the id of a job that "
        "waits or runs (`bertscale status`), or leave --after out"
    )
    assert report.problems[1].startswith("--after abc: Slurm knows no such job")
    assert report.problems[2] == f"SOURCE={desk.folder}/run: there is no such folder"
    assert check(jobs, ("17",)).problems == []  # what that one makes is its own affair

    desk.report(GPU)
    (first,), _ = stage_jobs(
        [PipelineStage(pretrain=str(desk.folder / "run.yaml"))], str(desk.folder / "site.yaml")
    )
    freeze(first.spec, first.config, {})
    assert check(jobs, ("19",)).problems == []  # it makes run
    other, _ = stage_jobs([PipelineStage(convert=["walk", "hf"])], str(desk.folder / "site.yaml"))
    assert check(other, ("19",)).problems == [f"SOURCE={desk.folder}/walk: there is no such folder"]
    assert check(jobs, ("18",)).problems == [
        "--after 18: that job ended as FAILED, run is not whole; `bertscale resume run` first, and wait for "
        "the job that it queues"
    ]


def test_a_job_of_the_same_folder_is_in_the_queue(site: Slurm, desk: Desk) -> None:
    site.queue = f"41|PENDING|2||N/A|N/A||Priority|bertscale {desk.folder}/run/job\n"
    report = desk.report(GPU, nodes=2, set=FIT)
    assert report.problems == [
        "job 41 already makes run: `bertscale status run` shows it, `bertscale cancel run` ends it"
    ]
    # The same where the site's own comment has taken the place of ours: the events tell.
    site.queue = "41|PENDING|2||N/A|N/A||Priority|project 12\n"
    assert desk.report(GPU, nodes=2, set=FIT).problems == []
    (desk.folder / "run/job").mkdir(parents=True)
    Events(desk.folder / "run/job/events.jsonl").write("queued", job="41")
    Events(desk.folder / "run/job/events.jsonl").write("queued", job="42")
    assert desk.report(GPU, nodes=2, set=FIT).problems == report.problems


def test_two_submissions_at_the_same_moment(site: Slurm, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(desk.folder / "run.yaml", pretrain_config(desk.data, desk.folder / "run").model_dump())
    jobs, _ = stage_jobs([PipelineStage(pretrain=config, set=FIT)], write(desk.folder / "site.yaml", GPU))
    folder = desk.folder / "run/job"
    with command.making(folder), pytest.raises(UserError, match="is just queueing the job of run/job"):
        command.submit(jobs, [], (), (), dry_run=False)

    def one_came_first(*_: object) -> Report:
        site.queue = f"41|PENDING|2||N/A|N/A||Priority|bertscale {folder}\n"
        return Report()

    monkeypatch.setattr("launcher.submit.preflight.check", one_came_first)
    with pytest.raises(UserError, match="job 41 already makes run"):
        command.submit(jobs, [], (), (), dry_run=False)
    assert not (folder / "script.sh").exists()


EXAMPLES = '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n'


def finetune_values(folder: Path, keep: bool = False) -> dict[str, Any]:
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(EXAMPLES)
    (folder / "hf").mkdir(exist_ok=True)
    if not keep:
        (folder / "hf/config.json").write_text("{}")
    return {
        "encoder": str(folder / "hf"),
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")},
        "output": str(folder / "classifier"),
    }


def test_inputs_of_the_other_stages(site: Slurm, desk: Desk) -> None:
    folder = desk.folder
    finetune = write(folder / "finetune.yaml", finetune_values(folder))
    assert desk.check([PipelineStage(finetune=finetune)], {"cpus_per_task": 2}).problems == []
    (folder / "train.jsonl").write_text(f"\ufeff{EXAMPLES}", "utf-8")
    assert desk.check([PipelineStage(finetune=finetune)], {"cpus_per_task": 2}).problems == []
    (folder / "train.jsonl").write_text('{"text": "a", "class": 1}\n')
    (folder / "test.jsonl").unlink()
    (folder / "hf/config.json").unlink()
    report = desk.check([PipelineStage(finetune=finetune)], {"cpus_per_task": 2})
    assert report.problems == [
        f"encoder={folder}/hf holds neither a finished checkpoint nor a Hugging Face folder",
        f"data.test={folder}/test.jsonl: cannot be read here: No such file or directory",
    ]
    (folder / "test.jsonl").write_text(EXAMPLES)
    (folder / "hf/config.json").write_text("{}")
    stage = PipelineStage(finetune=finetune, nodes=3, set=["parallel.tensor=2"])
    degree, column = desk.check([stage], {"tasks_per_node": 1}).problems
    assert degree.startswith("parallel.tensor=2 does not divide the 3 ranks (3 nodes x 1)")
    assert f"{folder}/train.jsonl" in column
    assert "'label'" in column
    (folder / "hf/config.json").write_text('{"max_position_embeddings": 100}')
    write(folder / "finetune.yaml", finetune_values(folder, keep=True))
    too_long = f"samples.max_length=128 is longer than the encoder {folder}/hf takes: 100 tokens"
    assert desk.check([PipelineStage(finetune=finetune)], {"cpus_per_task": 2}).problems == [
        f"{too_long} (its max_position_embeddings)"
    ]
    prep = {"input": ["no/*.txt"], "output": "data", "tokenizer": "no.model"}
    stage = PipelineStage(prep=write(folder / "prep.yaml", prep), array=2)
    report = desk.check([stage], {"cpus_per_task": 2})
    assert report.problems == [
        f"night-prep-tokenizer: input: there is no file, folder or match for {folder}/no/*.txt",
        f"night-prep-tokenizer: tokenizer={folder}/no.model: cannot be read here: No such file or directory",
    ]
    (folder / "out").mkdir()
    (folder / "out/thesis.tex").write_text("")
    (folder / "hf/config.json").write_text("{}")
    report = desk.check([PipelineStage(convert=["hf", "out"])], {"cpus_per_task": 2})
    assert report.problems == [f"OUTPUT={folder}/out holds something else: choose another folder"]


def test_glue_behind_a_pretraining(site: Slurm, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    folder = desk.folder
    desk.report(GPU)
    rows = "index\tsentence1\tsentence2\tlabel\n" + "1\ta dog\tan animal\tyes\n2\ta cat\ta dog\tno\n" * 9
    for name in ("RTE", "WNLI"):
        (folder / "glue" / name).mkdir(parents=True)
        (folder / "glue" / name / "train.tsv").write_text(rows)
    ask = {"model": str(folder / "run"), "folder": "glue"}
    stages = [
        PipelineStage(pretrain=str(folder / "run.yaml"), nodes=2, set=FIT),
        PipelineStage.model_validate({"glue": ask}),
    ]
    assert desk.check(stages, GPU).problems == []
    (problem,) = desk.check(stages[1:], GPU).problems  # alone there is no model
    assert problem == f"night-glue: MODEL={folder}/run: there is no such folder"
    # The scripts, without anything queued.
    glue = ["glue", str(folder), "glue", "--cluster", write(folder / "site.yaml", GPU), "--dry-run"]
    (folder / "config.json").write_text("{}")
    assert submit([*glue, "--seeds", "1", "2", "--output", "out"]) == 0
    said = capsys.readouterr().out
    assert "--array=0-1\n" in said
    assert f"-m bertscale glue {folder} {folder}/glue device=cuda --output {folder}/out" in said
    assert "glue-out: an array of 2\nglue-out-finish: 1 node x 1 rank, after glue-out" in said
    # What is wrong with each task is told at once.
    (folder / "glue/RTE/train.tsv").write_text(rows.replace("label", "class"))
    stages[1] = PipelineStage.model_validate({"glue": ask, "set": ["wnli.train.epoch=1"]})
    problems = "\n".join(desk.check(stages, GPU).problems)
    assert "RTE/train.tsv, line 1: there is no column 'label'" in problems
    assert "wnli: unknown key train.epoch; did you mean train.epochs?" in problems


def test_tasks_beside_a_pretraining_are_checked(site: Slurm, desk: Desk) -> None:
    values: dict[str, Any] = finetune_values(desk.folder)
    values |= {"data": {**values["data"], "dev": values["data"].pop("test")}, "samples": {"max_length": 40}}
    tasks = [write(desk.folder / f"{name}.yaml", values) for name in "ab"]
    assert desk.report(GPU, set=[*FIT, f"train.tasks={tasks}"]).problems == []
    write(desk.folder / "a.yaml", {**values, "samples": {"max_length": 64}})
    write(desk.folder / "b.yaml", {**values, "data": {**values["data"], "dev": "no.csv"}})
    long, missing = desk.report(GPU, set=[*FIT, f"train.tasks={tasks}"]).problems
    assert long.startswith("night-pretrain: train.tasks: a: samples.max_length=64 is longer than the encoder")
    path = desk.folder / "no.csv"
    told = f"train.tasks: b: data.dev={path}: cannot be read here: No such file or directory"
    assert missing == f"night-pretrain: {told}"
    write(desk.folder / "a.yaml", {**values, "sample": {}})
    (wrong,) = desk.report(GPU, set=[*FIT, f"train.tasks={tasks}"]).problems
    assert wrong == f"train.tasks: {desk.folder}/a.yaml: unknown key sample; did you mean samples?"


BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def write_source(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Makes `folder` one with the file `name` alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_text(json.dumps(values))


def test_the_shape_is_that_of_what_a_pretraining_starts_from(site: Slurm, desk: Desk, tmp_path: Path) -> None:
    source = tmp_path / "source"
    values = pretrain_config(desk.data, tmp_path / "run").model_dump()
    values |= {"model": {}, "init": str(source)}
    stage = PipelineStage(pretrain=write(tmp_path / "run.yaml", values), set=FIT)

    def memory(*stages: PipelineStage) -> str:
        report = desk.check([*stages, stage], GPU)
        assert report.problems == []
        return next(fact for fact in report.facts[::-1] if "memory of a rank" in fact)

    write_source(source, "bertscale.json", {"model": {**BERT_LARGE, "preset": "bert"}})
    expected = memory()
    assert "weights 1.22" in expected  # GB, of 0.3 G parameters in float32
    write_source(source, "config.json", {"model_type": "bert", **BERT_LARGE})
    assert memory() == expected
    roberta = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 514}
    write_source(source, "config.json", {**roberta, **BERT_LARGE})
    assert memory() == expected
    small = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 512}
    write_source(source, "config.json", {"model_type": "distilbert", **small})
    assert "weights 0.0" in memory()
    write_source(source, "config.json", {"model_type": "t5"})
    assert memory() == f"memory of a rank: not estimated, the shape of init.from={source} is not known"
    # A start that would fail is told now.
    write_source(source, "config.json", {"model_type": "bert", **BERT_LARGE, "max_position_embeddings": 32})
    (problem,) = desk.check([stage], GPU).problems
    assert problem.startswith(f"init.from={source}: samples.max_length=48 is longer than")
    # What an earlier job will have made is known, too.
    shutil.rmtree(source)
    first = {**values, "run": str(source), "init": None, "model": BERT_LARGE}
    of_both = memory(PipelineStage(pretrain=write(tmp_path / "first.yaml", first), set=FIT))
    assert of_both.endswith(expected.partition(": ")[2])


def test_an_average_is_there_to_be_converted(site: Slurm, desk: Desk, tmp_path: Path) -> None:
    source, stage = tmp_path / "source", PipelineStage(convert=["source", "hf"], average=True)
    told = f"average: SOURCE={source} keeps no average of the weights; a run with train.average does"
    for states, problems in (["weight", "average"], []), (["weight", "exp_avg"], [told]):
        write_source(source, "bertscale.json", {"parameters": {"a": {"states": states}}})
        assert desk.check([stage], GPU).problems == problems
    shutil.rmtree(source)
    desk.report(GPU)
    run, settings = str(tmp_path / "run.yaml"), [*FIT, f"run={source}", "train.average=0.9"]
    assert desk.check([PipelineStage(pretrain=run, set=settings), stage], GPU).problems == []
    (problem,) = desk.check([PipelineStage(pretrain=run, set=settings[:-1]), stage], GPU).problems
    assert problem == f"night-convert: {told}"


def test_what_earlier_links_make_need_not_be_there(site: Slurm, desk: Desk) -> None:
    folder = desk.folder
    write_corpus(folder / "corpus.jsonl", 5)
    values = {
        "input": ["corpus.jsonl"],
        "output": "fresh",
        "train_tokenizer": {"vocab_size": 400_000, "sample_documents": 5},
    }
    desk.report(GPU)
    values_of_it = {**finetune_values(folder), "encoder": str(folder / "new"), "samples": {"max_length": 48}}
    finetune = write(folder / "finetune.yaml", values_of_it)
    stages = [
        PipelineStage(prep=write(folder / "prep.yaml", values), array=2),
        PipelineStage(pretrain=str(folder / "run.yaml"), nodes=2, set=[*FIT, "data=fresh"]),
        PipelineStage(convert=["run/checkpoints/step-0000010", "new"]),
        PipelineStage(finetune=finetune),
    ]
    report = desk.check(stages, GPU)
    assert report.problems == []
    assert [line.partition(":")[0] for line in report.facts] == ["night-prep-tokenizer", "night-pretrain"]
    stages[3] = PipelineStage(finetune=finetune, set=["samples.max_length=49"])
    (line,) = desk.check(stages, GPU).problems  # known before there is an encoder
    told = f"samples.max_length=49 is longer than the encoder {folder}/new takes: 48 tokens"
    assert line == f"night-finetune: {told} (its max_position_embeddings)"
    stages[3] = PipelineStage(finetune=finetune)
    # Alone, each of them lacks what it needs.
    assert len(desk.check(stages[1:2], GPU).problems) == 1
    assert len(desk.check(stages[2:3], GPU).problems) == 1
    assert len(desk.check(stages[3:], GPU).problems) == 1
    twice = desk.check([stages[1], stages[1]], {**GPU, "time": "2-0"}).problems
    assert "two stages of this pipeline would use run/job: give one another output" in twice
    assert sum("time=2-0 is more than" in line for line in twice) == 2


def test_mistakes_of_configs_and_of_the_rest_come_together(site: Slurm, desk: Desk) -> None:
    desk.report(GPU)
    broken = write(desk.folder / "broken.yaml", {"output": "data"})
    stages = [
        PipelineStage(prep=broken),
        PipelineStage(pretrain=str(desk.folder / "run.yaml"), nodes=4, set=["data=data", *FIT]),
    ]
    problems = desk.check(stages, GPU).problems
    assert problems == [
        f"{broken}: input is missing",
        "nodes=4: partition gpu gives at most 3 nodes to a job",
    ]


def test_no_slurm(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other problems are told as well."""
    monkeypatch.setenv("PATH", "/nowhere")
    stage: dict[str, Any] = {"nodes": 2, "set": [*FIT, "data=gone"]}
    assert desk.report(GPU, **stage).problems[0] == (
        "scontrol is not installed here: this needs a login node of the cluster (Debian's packages are "
        "slurm-wlm and munge)"
    )
    tool = desk.folder / "scontrol"
    said = "slurm_load_partitions error: Unable to contact slurm controller"
    tool.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{desk.folder}:/bin")
    problems = desk.report(GPU, **stage).problems
    assert problems[0] == (
        f"the Slurm controller does not answer ({said}): try again; `scontrol ping` tells whether it is up"
    )
    assert len(problems) == 2
    assert problems[1].startswith("there is no data folder ")


# --------------------------------------------------------------------------------- numbers and notations


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("preset", ["bert", "megatron-bert", "modern"])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("generator", [None, 0.3333, 1.0])
def test_parameters_are_those_of_the_model(
    layers: int, preset: str, pairs: bool, generator: float | None
) -> None:
    model = ModelConfig.model_validate(
        {
            "preset": preset,
            "sentence_head": pairs,
            "generator_size": generator,
            "num_hidden_layers": layers,
            "hidden_size": 24,
            "num_attention_heads": 3,
            "intermediate_size": 57,
            "max_position_embeddings": 40,
        }
    )
    with torch.device("meta"):
        whole = PretrainingModel(model, 1000)
    assert sum(count_parameters(model, 1000)) == sum(value.numel() for value in whole.parameters())
    assert checkpoint_bytes(model, 1000) == 12 * sum(value.numel() for value in whole.parameters())
    assert checkpoint_bytes(model, 1000, average=True) == 16 * sum(v.numel() for v in whole.parameters())


def large(**parallel: int) -> PretrainConfig:
    config = pretrain_config("data", "run", parallel=dict(parallel), train={"precision": "bfloat16"})
    sizes = {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
    }
    return config.model_copy(update={"model": config.model.model_copy(update=sizes)})


def test_zero_stages_share_what_they_say() -> None:
    size = sum(count_parameters(large().model, 30_000))
    plain, states, gradients, all_of_it = (
        estimate_memory(large(zero_stage=stage), 30_000, ranks=8, gpu=True) for stage in range(4)
    )
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * size, 2 * size, 12 * size)
    assert (states.weights, states.gradients, states.optimizer) == (2 * size, 2 * size, 2 * size)
    assert gradients.gradients == size / 4
    assert size / 4 < all_of_it.weights < size / 2
    halves = estimate_memory(large(tensor=2, zero_stage=1), 30_000, ranks=8, gpu=True)
    assert 0.5 * states.weights < halves.weights < 0.51 * states.weights
    assert halves.activations < 0.7 * states.activations
    wide = large().model_copy(update={"train": large().train.model_copy(update={"precision": "float32"})})
    assert estimate_memory(wide, 30_000, ranks=8, gpu=True).weights == 4 * size


def test_a_generator_takes_memory() -> None:
    config = large()
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 256})})
    with_one = config.model_copy(update={"model": config.model.model_copy(update={"generator_size": 0.25})})
    plain, both = (estimate_memory(each, 30_000, ranks=8, gpu=True) for each in (config, with_one))
    assert 1.05 * plain.weights < both.weights < 1.15 * plain.weights
    assert 1.2 * plain.activations < both.activations < 1.5 * plain.activations


def test_all_positions_of_a_causal_model_take_memory() -> None:
    masked = large()
    samples = masked.samples.model_copy(update={"kind": "packed"})
    objectives = masked.objectives.model_copy(update={"mlm": 0.0, "clm": 1.0})
    causal = masked.model_copy(update={"samples": samples, "objectives": objectives})
    plain, both = (estimate_memory(each, 30_000, ranks=8, gpu=True) for each in (masked, causal))
    tokens = masked.train.micro_batch * masked.samples.max_length
    logits = 0.85 * tokens * 8 * 30_080  # of the positions that masks leave out
    assert both.activations - plain.activations == pytest.approx(logits + tokens * 5 * 2 * 1024)


def test_what_would_fit_changes_as_little_as_possible() -> None:
    config = large(zero_stage=0)
    needs = [estimate_memory(large(zero_stage=stage), 30_000, 8, True).total for stage in range(4)]
    assert needs == sorted(needs, reverse=True)
    assert what_would_fit(config, 30_000, 8, True, needs[0]) == ""
    assert what_would_fit(config, 30_000, 8, True, needs[1]) == "parallel.zero_stage=1"
    assert (
        what_would_fit(config, 30_000, 8, True, needs[3] - 1) == "parallel.zero_stage=3 train.micro_batch=1"
    )
    assert what_would_fit(config, 30_000, 8, True, 1e9) is None
    budget = large(zero_stage=3)
    budget = budget.model_copy(update={"train": budget.train.model_copy(update={"micro_tokens": 65_536})})
    whole = estimate_memory(budget, 30_000, 8, True).total
    assert what_would_fit(budget, 30_000, 8, True, whole) == ""
    assert what_would_fit(budget, 30_000, 8, True, whole - 1) == "train.micro_tokens=32768"
    assert what_would_fit(budget, 30_000, 8, True, needs[3]) == "train.micro_tokens=64"
    assert what_would_fit(budget, 30_000, 8, True, 1e9) is None


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("90:30", 90.5),
        ("12:30:00", 750),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("7-00:00:00", 10080),
        ("UNLIMITED", float("inf")),
        ("1 day", None),
        ("", None),
    ],
)
def test_times_as_slurm_writes_them(time: str, minutes: float | None) -> None:
    assert slurm.minutes_of(time) == minutes
    if minutes and minutes != float("inf"):
        assert slurm.minutes_of(slurm.show_minutes(minutes)) == round(minutes)


def test_sizes_and_gpus_as_slurm_writes_them() -> None:
    assert slurm.bytes_of("200G") == 200 * 2**30
    assert slurm.bytes_of("480000") == 480_000 * 2**20
    assert slurm.bytes_of("0") == 0
    assert slurm.bytes_of("all") is None
    gpus = [
        "gpu:4",
        "gpu:h100:8(S:0-1)",
        "gpu:1g.10gb:7,nvme:2",
        "gpu:a:2,gpu:b:3",
        "(null)",
        "gpu:a100:no_consume:4",
    ]
    assert [slurm.gpus_of(text) for text in gpus] == [4, 8, 7, 5, 0, 4]


def test_a_refusal_is_one_line() -> None:
    done = subprocess.CompletedProcess(
        [], 1, "", "sbatch: error: Batch job submission failed: a\nsbatch: error: b\nsbatch: error: b\n"
    )
    assert slurm.complaint(done) == "Batch job submission failed: a; b"
    with pytest.raises(UserError, match="false: exit code 1"):
        slurm.ask("false")


# ------------------------------------------------------------------------------------ on a virtual cluster


@pytest.mark.slurm
def test_all_at_once_and_nothing_is_left(cluster: Cluster, desk: Desk) -> None:
    desk.report({})
    site = write(
        desk.folder / "site.yaml", {"cpus_per_task": 99, "python": "/no/python", "partition": "debug"}
    )
    words = ("--nodes", "2", "--time", "2:00:00", "--after", "99999", "train.micro_batch=3", "data=gone")
    before = sorted(desk.folder.rglob("*"))
    command = (sys.executable, "-m", "bertscale", "submit", "pretrain", "run.yaml", "--cluster", site, *words)
    done = cluster.run(*command, cwd=desk.folder, check=False)
    assert done.returncode == 2
    starts = (
        "--after 99999: Slurm knows no such job",
        "train.global_batch=8 is not a multiple of 6",
        f"there is no data folder {desk.folder}/gone",
        "python=/no/python of the cluster file is no program here",
        "time=2:00:00 is more than partition debug allows (00:05:00)",
        "cpus_per_task=99: the nodes of partition debug have ",
        "nodes=2: partition debug has 1 node that would do; ask for fewer",
    )
    lines = [line for line in done.stderr.splitlines() if ": error: " in line]
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"bertscale submit: error: {start}")
    assert sorted(desk.folder.rglob("*")) == before


@pytest.mark.slurm
def test_slurm_has_the_last_word(cluster: Cluster, desk: Desk) -> None:
    """What only sbatch knows to be wrong."""
    desk.report({})
    site = write(desk.folder / "site.yaml", {"sbatch": ["--reservation=tea"]})
    command = (sys.executable, "-m", "bertscale", "submit", "pretrain", "run.yaml", "--cluster", site)
    done = cluster.run(*command, cwd=desk.folder, check=False)
    assert done.returncode == 2
    assert "error: sbatch would refuse the job: Requested reservation is invalid" in done.stderr


@pytest.mark.slurm
def test_one_drained_node_of_all(cluster: Cluster, desk: Desk) -> None:
    desk.report({})
    cluster.run("scontrol", "update", "nodename=node4", "state=drain", "reason=a fan")
    command = (sys.executable, "-m", "bertscale", "submit", "pretrain", "run.yaml", "--cluster", "site.yaml")
    done = cluster.run(*command, "--nodes", "4", "--dry-run", cwd=desk.folder)
    cluster.run("scontrol", "update", "nodename=node4", "state=resume")
    assert "warning: the job waits until enough nodes are back: node4 (IDLE+DRAIN)" in done.stderr


@pytest.mark.slurm
def test_a_controller_that_is_down(cluster: Cluster, desk: Desk) -> None:
    desk.report({})
    cluster.fault("kill-ctld")
    command = (sys.executable, "-m", "bertscale", "submit", "pretrain", "run.yaml", "--cluster", "site.yaml")
    done = cluster.run(*command, cwd=desk.folder, check=False)
    assert done.returncode == 2
    assert "error: the Slurm controller does not answer (" in done.stderr
    assert not (desk.folder / "run").exists()
