"""Everything that can be known to go wrong with a job, before it is queued: all of it at once.

report = check([job], after=("17",))
for line in report.problems: ...     # each names the key or the thing, its value and the remedy

A job that is refused costs a second; one that dies after a night in the queue costs the night. Nothing is
written but files without a name, which vanish, and the folder of the logs is made when the job is frozen.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from bertscale.config import (
    FinetuneConfig,
    GlueConfig,
    ModelConfig,
    PrepConfig,
    PretrainConfig,
    TokenizerTraining,
    UserError,
    overridden,
    with_model_of,
)
from bertscale.config.glue_tasks import find_tasks, settings_for, task_values
from bertscale.data.samples import check_batches
from bertscale.data.shards import Dataset, check_tokenizers, open_dataset
from bertscale.examples.read import read_task_data
from bertscale.run_folder import EVENTS, TABLE, TASKS, check_run_folder, checkpoints, read_events
from launcher import slurm
from launcher.history import slurm_ids
from launcher.job import JobSpec, render
from launcher.queue_jobs import jobs_of, own_jobs
from launcher.runs import read_spec, shown
from launcher.submit import partitions
from launcher.submit.memory import checkpoint_bytes, estimate_memory, gb, what_would_fit
from launcher.submit.pipeline import StageJob, folder_of, matches, quoted
from launcher.submit.source import shape_of, source_of

Found = TypeVar("Found")

LOCAL = ("/tmp", "/var/tmp", "/dev/shm")  # of each node its own, as a rule
NO_NODES = re.compile(r"node configuration is not available|node not available|nodes are busy|DRAINED")
FAILED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass
class Report:
    """Lines for the person: `problems` stop the submission, `warnings` do not, `facts` were asked for."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


@dataclass
class Promises:
    """What earlier jobs will have made when a job begins: these inputs need not be here yet."""

    targets: set[str] = field(default_factory=set)
    anything: bool = False  # a job that bertscale knows nothing of comes first
    vocab_size: int | None = None  # of the tokenizer that a prep among them trains
    positions: dict[str, int] = field(default_factory=dict)  # tokens that the encoder in a target takes
    models: dict[str, ModelConfig] = field(default_factory=dict)  # the network in a target
    averages: dict[str, bool] = field(default_factory=dict)  # whether a target has one of its weights

    def hold(self, path: str) -> bool:
        """Whether `path` is, or lies in, what is yet to be made."""
        return self.anything or any(Path(path).is_relative_to(target) for target in self.targets)


def check(
    jobs: Sequence[StageJob],
    after: Sequence[str] = (),
    left_out: Mapping[str, Sequence[str]] | None = None,
    mistakes: Sequence[str] = (),
) -> Report:
    """Checks jobs that run one after another, the first of them after the jobs `after`.

    `left_out` has for a job folder the nodes that its job does without; with `mistakes`, problems that are
    known already, jobs are missing in the pipeline, and so nobody knows what they would make.
    """
    report, promises = Report(problems=[*mistakes]), Promises(anything=bool(mistakes))
    begun: set[str] = set()
    answers = True
    try:
        slurm.partitions.cache_clear()
        slurm.nodes.cache_clear()
        slurm.partitions()
        _check_after(after, promises, report)
        check_not_queued(jobs, report)
    except UserError as error:
        report.problems.append(str(error))
        answers = False
    for job in jobs:
        report_of_job, without = Report(), (left_out or {}).get(job.spec.folder, ())
        if job.spec.target not in begun:  # else a further part of the same stage, which needs nothing else
            _check_job(job, promises, report_of_job)
        begun.add(job.spec.target)
        if answers:
            report_of_job.warnings += partitions.warnings(job.spec)
            if impossible := partitions.problems(job.spec, without):
                report_of_job.problems += impossible
            else:
                _try_sbatch(job.spec, without, report_of_job, waits=bool(after) or job is not jobs[0])
        label = f"{job.spec.name}: " if len(jobs) > 1 else ""
        for name in ("problems", "warnings", "facts"):
            getattr(report, name).extend(f"{label}{line}" for line in getattr(report_of_job, name))
        _promise(job, promises)
    folders = [job.spec.folder for job in jobs]
    report.problems += [
        f"two stages of this pipeline would use {shown(folder)}: give one another output"
        for folder in sorted(set(folders))
        if folders.count(folder) > 1
    ]
    return report


def _promise(job: StageJob, promises: Promises) -> None:
    target, config = job.spec.target, job.config
    promises.targets.add(target)
    if isinstance(config, PrepConfig):
        training = config.train_tokenizer
        if config.tokenizer is None or training.extend_to is not None:
            promises.vocab_size = training.extend_to or training.vocab_size
    if isinstance(config, PretrainConfig):
        promises.averages[target] = config.train.average > 0
        model = None
        with contextlib.suppress(UserError):  # which the check of that job has told
            model = _shape(config, promises)
        if model is not None:
            promises.models[target], promises.positions[target] = model, model.max_position_embeddings
    elif job.source is not None and (longest := _positions_of(job.source, promises)):
        promises.positions[target] = longest


# ------------------------------------------------------------------------------------ what a stage needs


def _check_job(job: StageJob, promises: Promises, report: Report) -> None:
    spec, config = job.spec, job.config
    if isinstance(config, PretrainConfig):
        if spec.stage != TASKS:  # whose pretraining is checked before it
            _check_pretrain(job, config, promises, report)
    elif isinstance(config, PrepConfig):
        _check_prep(config, promises, report)
    elif isinstance(config, FinetuneConfig):
        _check_finetune(job, config, promises, report)
    elif isinstance(config, GlueConfig):
        _check_glue(config, promises, report)
    elif job.source is not None:
        _check_weights("SOURCE", job.source, promises, report)
        if "--average" in spec.command and not _keeps_average(Path(job.source), promises):
            report.problems.append(
                f"average: SOURCE={job.source} keeps no average of the weights; a run with train.average does"
            )
        _check_convert_output(Path(spec.target), report)
    key = {"pretrain": "run", "convert": "OUTPUT"}.get(spec.stage, "output")
    _check_writable(f"{key}={spec.target}", Path(spec.target), report)
    _check_writable(f"job folder {spec.folder}", Path(spec.folder), report)
    if job.cluster.log_root is not None:
        _check_writable(f"log_root={job.cluster.log_root}", Path(spec.logs), report)
    if any(Path(spec.target).is_relative_to(place) for place in LOCAL):
        report.warnings.append(f"{key}={spec.target}: nodes seldom share that folder, but must see it")
    _check_python(job, report)


def _shape(config: PretrainConfig, promises: Promises) -> ModelConfig | None:
    """The network of a pretraining, of what it starts from where the config leaves keys out; None where that
    is not known here."""
    if config.init is None:
        return config.model
    source = source_of(config.init, Path(config.run))
    of_source = next((m for t, m in promises.models.items() if source.is_relative_to(t)), None)
    if of_source is None:
        of_source = shape_of(source, config.init.step if source != Path(config.run) else None)
    return with_model_of(config, of_source).model if of_source else None


def _check_pretrain(job: StageJob, config: PretrainConfig, promises: Promises, report: Report) -> None:
    if config.init is not None and not checkpoints(Path(config.run)):
        _check_weights("init.from", config.init.source, promises, report)
    model = _collect(report, partial(_shape, config, promises))
    if model is not None:
        config = config.model_copy(update={"model": model})
    if _check_degree(job, config.parallel.tensor, report):
        _collect(report, lambda: check_batches(config, job.spec.ranks // config.parallel.tensor))
    vocab_size = promises.vocab_size or TokenizerTraining().vocab_size
    data: list[Dataset] = []
    for corpus in config.corpora:
        if promises.hold(corpus.path):
            continue
        dataset = _collect(report, partial(open_dataset, corpus.path, "train"))
        data += [] if dataset is None else [dataset]
        _collect(report, partial(open_dataset, corpus.path, "validation"))
    for name, folder in config.heldout.items():
        held = (
            None if promises.hold(folder) else _collect(report, partial(open_dataset, folder, "validation"))
        )
        if data and held is not None:
            _collect(report, partial(check_tokenizers, [data[0], held], f"heldout.{name}"))
    if data:
        vocab_size = data[0].manifest["vocab_size"]
        _collect(report, lambda: check_tokenizers(data))
    _collect(report, lambda: check_run_folder(Path(config.run)))
    for name, task in job.tasks.items():
        of_task = Report()
        if model is not None:
            _collect(of_task, partial(task.check_encoder, config.model))
        _check_examples(task, promises, of_task)
        report.problems += [f"train.tasks: {name}: {line}" for line in of_task.problems]
    if model is None:
        source = config.init and config.init.source
        report.facts.append(f"memory of a rank: not estimated, the shape of init.from={source} is not known")
        return
    _check_memory(job, config, vocab_size, report)
    size = checkpoint_bytes(config.model, vocab_size, config.train.average > 0)
    there = len(checkpoints(Path(config.run)))
    train, newest, for_good = config.train, f"train.keep_checkpoints={config.train.keep_checkpoints}", 0
    if train.keep_every and train.steps:  # of another budget nobody knows yet how many steps it has
        older = (train.steps - 1) // train.save_every + 1 - train.keep_checkpoints  # than the newest ones
        for_good = max(0, older * train.save_every) // train.keep_every
        newest += f", train.keep_every={train.keep_every}"
    more = max(1, train.keep_checkpoints + for_good + 1 - there)
    keep = f"{newest} and the one being written"
    why = f"{more} checkpoints of {gb(size)} ({keep})"
    _check_space(f"run={config.run}", Path(config.run), more * size, why, report)


def _check_degree(job: StageJob, degree: int, report: Report) -> bool:
    """Checks that the ranks of a job can be grouped to share layers."""
    spec = job.spec
    if spec.ranks % degree:
        report.problems.append(
            f"parallel.tensor={degree} does not divide the {spec.ranks} ranks ({spec.nodes} nodes x "
            f"{spec.tasks_per_node}): ask for another number of nodes, or give another parallel.tensor"
        )
        return False
    if spec.tasks_per_node % degree:
        report.warnings.append(
            f"parallel.tensor={degree} does not divide the {spec.tasks_per_node} ranks of a node: layers "
            "would be shared between nodes, which is slow; a tensor degree within a node is better"
        )
    return True


def _check_memory(job: StageJob, config: PretrainConfig, vocab_size: int, report: Report) -> None:
    spec, cluster = job.spec, job.cluster
    gpu = spec.gpus_per_node > 0
    need = estimate_memory(config, vocab_size, spec.ranks, gpu)
    given, what = None, ""
    if gpu and cluster.gpu_memory_gb:
        given, what = cluster.gpu_memory_gb * 1e9, f"gpu_memory_gb={cluster.gpu_memory_gb:g}"
    elif not gpu and (whole := partitions.node_memory(spec)):
        given, what = whole / spec.tasks_per_node, "its share of a node"
    report.facts.append(f"memory of a rank, estimated: {need}" + (f", of {gb(given)}" if given else ""))
    if given is None or need.total <= given:
        return
    fit = what_would_fit(config, vocab_size, spec.ranks, gpu, given)
    remedy = f"{fit} would fit" if fit else "give it more ranks, or a higher parallel.tensor"
    report.problems.append(f"a rank needs about {need} and has {gb(given)} ({what}): {remedy}")


def _check_prep(config: PrepConfig, promises: Promises, report: Report) -> None:
    size = 0
    for name in config.input:
        if promises.hold(name):
            continue
        paths = matches(name)
        if not paths:
            report.problems.append(f"input: there is no file, folder or match for {name}")
        for path in paths:
            _check_readable(f"input={path}", path, report)
            files = path.rglob("*") if path.is_dir() else [path]
            size += sum(file.stat().st_size for file in files if file.is_file())
    if config.tokenizer is not None and not promises.hold(config.tokenizer):
        _check_readable(f"tokenizer={config.tokenizer}", Path(config.tokenizer), report)
    # About four characters make a token of two bytes; pieces and shards stand side by side for a while.
    why = f"token shards of {gb(size)} of text"
    _check_space(f"output={config.output}", Path(config.output), size, why, report)


def _check_finetune(job: StageJob, config: FinetuneConfig, promises: Promises, report: Report) -> None:
    _check_degree(job, config.parallel.tensor, report)
    _check_weights("encoder" if config.encoder else "init", config.source, promises, report)
    longest = _positions_of(config.source, promises)
    if longest is not None and config.samples.max_length > longest:
        report.problems.append(
            f"samples.max_length={config.samples.max_length} is longer than the encoder {config.source} "
            f"takes: {longest} tokens (its max_position_embeddings)"
        )
    _check_examples(config, promises, report)


def _check_examples(config: FinetuneConfig, promises: Promises, report: Report) -> None:
    data = config.data
    files = [("data.train", file.path) for file in data.training_files]
    files += [(f"data.{name}", path) for name in ("dev", "test") if (path := getattr(data, name)) is not None]
    there = [
        name
        for key, name in files
        if not promises.hold(name) and _check_readable(f"{key}={name}", Path(name), report)
    ]
    if len(there) == len(files):
        _collect(report, lambda: read_task_data(config.task, data, config.samples))


def _check_glue(config: GlueConfig, promises: Promises, report: Report) -> None:
    _check_weights("MODEL", config.model, promises, report)
    for task in find_tasks(Path(config.folder), config.tasks).tasks:
        values = task_values(task, config.recipe or "bert", output=config.target, encoder=config.model)
        settings = settings_for(task.name, config.set)
        tuning = _collect(report, partial(overridden, FinetuneConfig, values, settings, task.name))
        if tuning is not None:
            _collect(report, partial(read_task_data, tuning.task, tuning.data, tuning.samples))


def _check_weights(key: str, name: str, promises: Promises, report: Report) -> None:
    folder = Path(name)
    if promises.hold(name):
        return
    marks = [folder / "config.json", folder / TABLE, *_tables(folder)]
    if not folder.is_dir():
        report.problems.append(f"{key}={name}: there is no such folder")
    elif not any(mark.is_file() for mark in marks):
        report.problems.append(f"{key}={name} holds neither a finished checkpoint nor a Hugging Face folder")
    else:
        _check_readable(f"{key}={name}", folder, report)


def _positions_of(encoder: str, promises: Promises) -> int | None:
    """Tokens that the encoder in a folder takes, there already or promised; None where nobody knows."""
    for target, longest in promises.positions.items():
        if Path(encoder).is_relative_to(target):
            return longest
    folder = Path(encoder)
    for table in [folder / "config.json", folder / TABLE, *_tables(folder)[-1:]]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(table.read_text(encoding="utf-8"))
            return int(values.get("model", values)["max_position_embeddings"])
    return None


def _keeps_average(source: Path, promises: Promises) -> bool:
    """Whether a source has a moving average of the weights, as far as is known here."""
    for target, kept in promises.averages.items():
        if source.is_relative_to(target):
            return kept
    for table in [source / TABLE, *_tables(source)[-1:]]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            parameters = json.loads(table.read_text(encoding="utf-8"))["parameters"]
            return all("average" in entry.get("states", ()) for entry in parameters.values())
    return not (source / "config.json").is_file()  # a Hugging Face folder has none


def _tables(run: Path) -> list[Path]:
    """Of each finished checkpoint of a run, oldest first."""
    return [folder / TABLE for folder in checkpoints(run)]


def _check_convert_output(output: Path, report: Report) -> None:
    ours = ("config.json", TABLE)
    if output.is_dir() and any(output.iterdir()) and not any((output / name).is_file() for name in ours):
        report.problems.append(f"OUTPUT={output} holds something else: choose another folder")


# -------------------------------------------------------------------------------------- paths and space


def _check_readable(what: str, path: Path, report: Report) -> bool:
    try:
        if path.is_dir():
            next(os.scandir(path), None)
        else:
            path.open("rb").close()
    except OSError as error:
        report.problems.append(f"{what}: cannot be read here: {error.strerror}")
        return False
    return True


def _check_writable(what: str, path: Path, report: Report) -> None:
    """Really writes, since access rights alone say little on a network file system."""
    folder = _existing(path)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except NotADirectoryError:
        report.problems.append(f"{what}: {folder} is a file, not a folder; choose another place")
    except OSError as error:
        reason = f"{folder} cannot be written to: {error.strerror}"
        report.problems.append(f"{what}: {reason}; choose another place, or have its rights changed")


def _check_space(what: str, path: Path, need: float, why: str, report: Report) -> None:
    folder = _existing(path)
    free = shutil.disk_usage(folder).free
    if free < need:
        report.problems.append(
            f"{what}: {gb(free)} are free there, {gb(need)} are needed for {why}; free some, or choose "
            "another place"
        )


def _existing(path: Path) -> Path:
    """Returns `path`, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _check_python(job: StageJob, report: Report) -> None:
    """An absolute path is looked for here, unless it is inside a container."""
    cluster, spec = job.cluster, job.spec
    wanted = [("batch_python" if cluster.batch_python else "python", spec.batch_python)]
    if not cluster.container:
        wanted.append(("python", spec.python))
    for key, name in dict.fromkeys(wanted):
        if os.path.isabs(name) and not os.access(name, os.X_OK):
            report.problems.append(f"{key}={name} of the cluster file is no program here")


def _collect(report: Report, look: Callable[[], Found]) -> Found | None:
    """What `look` finds, or None where it complains."""
    try:
        return look()
    except UserError as error:
        report.problems += [line for line in str(error).splitlines() if line not in report.problems]
    except OSError as error:
        report.problems.append(f"{error.filename}: cannot be read here: {error.strerror}")
    return None


# ----------------------------------------------------------------------------------- the jobs around


def _check_after(after: Sequence[str], promises: Promises, report: Report) -> None:
    """A dependency on a job that Slurm does not know would count as fulfilled at once."""
    for job in after:
        record = slurm.show_job(job) if re.fullmatch(r"\d+(_\d+)?", job) else None
        if record is None:
            report.problems.append(
                f"--after {job}: Slurm knows no such job, and would start this one at once; give the id of a "
                "job that waits or runs (`bertscale status`), or leave --after out"
            )
            continue
        folder = folder_of(record)
        if folder is None:
            promises.anything = True
            continue
        spec = read_spec(folder)
        promises.targets.add(spec.target)
        if record.get("JobState") in FAILED:
            report.problems.append(
                f"--after {job}: that job ended as {record['JobState']}, {shown(spec.target)} is not whole; "
                f"`bertscale resume {quoted(spec.target)}` first, and wait for the job that it queues"
            )


def check_not_queued(jobs: Sequence[StageJob], report: Report) -> None:
    """Adds a problem for each job whose folder has one in the queue."""
    queue = [entry for entry in own_jobs() if entry.active]
    for job in jobs:
        target, folder = quoted(job.spec.target), Path(job.spec.folder)
        had = slurm_ids(read_events(folder / EVENTS))
        ids = sorted({entry.number for entry in jobs_of(folder, had, queue)})
        if ids:
            report.problems.append(
                f"job {', '.join(ids)} already makes {target}: `bertscale status {target}` shows it, "
                f"`bertscale cancel {target}` ends it"
            )


def _try_sbatch(spec: JobSpec, exclude: Sequence[str], report: Report, *, waits: bool) -> None:
    """Slurm's own judgement, and when it would start the job, unless that `waits` for another one."""
    options = [f"--exclude={','.join(exclude)}"] if exclude else []
    command, env = ("sbatch", "--test-only", *options), slurm.own_environment()
    done = slurm.ask(*command, text=render(spec), check=False, env=env)
    said = slurm.complaint(done)
    # It refuses for want of nodes that are only away; sbatch itself takes such a job, and it waits.
    if done.returncode and NO_NODES.search(said) and (away := partitions.nodes_away(spec)):
        report.warnings.append(
            f"the job waits until enough nodes are back: {', '.join(away)} "
            f"({said.removeprefix('allocation failure: ')})"
        )
    elif done.returncode:
        report.problems.append(f"sbatch would refuse the job: {said.removeprefix('allocation failure: ')}")
    elif not waits and (expected := re.search(r"to start at (\S+) .*on nodes (\S+)", said)):
        report.facts.append(f"expected start, as of now: {expected[1].replace('T', ' ')} on {expected[2]}")
