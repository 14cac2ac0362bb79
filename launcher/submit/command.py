"""A stage as a Slurm job: checked, frozen into its job folder, queued; several of them as a pipeline.

bertscale submit prep CONFIG [key=value ...] --cluster FILE [--array N]
bertscale submit pretrain CONFIG [key=value ...] --cluster FILE --nodes N [--spares K]
bertscale submit convert SOURCE OUTPUT --cluster FILE [--average]
bertscale submit finetune CONFIG [key=value ...] --cluster FILE [--nodes N] [--spares K]
bertscale submit glue MODEL FOLDER [key=value ...] --cluster FILE
bertscale submit pipeline PIPELINE [key=value ...] [--cluster FILE]

Each takes --time T, --after JOB, --exclude NODES and --dry-run.

The jobs of a pipeline begin in any case when the one before has ended (afterany), and look for its
done-marker themselves: a dependency on success would wait for ever behind a job that failed. A mistake of
the person is shown with every line that the checks found.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bertscale.config import PipelineConfig, PipelineStage, UserError, load_config
from bertscale.config.glue import add_arguments, from_options
from bertscale.errors import MISTAKE
from bertscale.files import HeldError, alone
from bertscale.run_folder import CANCELLED, EVENTS, LOCK, SCRIPT, TASKS, Events
from launcher import slurm
from launcher.enqueue import queue
from launcher.job import STAGES, TRAINING, JobSpec, render
from launcher.nodes.check import bad_nodes
from launcher.runs import shown
from launcher.submit.freeze import about_now, freeze
from launcher.submit.pipeline import StageJob, folder_of, quoted, stage_jobs, unfinished

OVERVIEW = """\
usage: bertscale submit STAGE ... --cluster FILE [--dry-run]

Checks all that can be checked now, freezes code and config, and queues the stage with Slurm.

  prep CONFIG             raw text -> token shards; with --array N on N nodes at the same time
  pretrain CONFIG         token shards -> checkpoints, on --nodes N
  convert SOURCE OUTPUT   checkpoint <-> Hugging Face folder
  finetune CONFIG         encoder and labelled examples -> task model, on --nodes N
  glue MODEL FOLDER       a model and a folder of tasks -> a table of dev figures, each task a job
  pipeline PIPELINE       several of these, one after another

bertscale submit STAGE --help tells more; examples are in configs/cluster and configs/pipeline."""


def main(arguments: list[str]) -> int:
    """Runs `bertscale submit ...`; raises UserError with one line for each thing that is wrong."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW)
        return 0 if arguments else MISTAKE
    stage, rest = arguments[0], arguments[1:]
    if stage not in (*STAGES, "pipeline"):
        raise UserError(f"{stage!r} is none of {', '.join(STAGES)} and pipeline")
    options = _parser(stage).parse_intermixed_args(rest)
    after = tuple(job for text in options.after for job in text.split(",") if job)
    exclude = [node for text in options.exclude for node in slurm.hosts(text)]
    if stage == "pipeline":
        site = [f"cluster={json.dumps(options.cluster)}"] if options.cluster else []
        config = load_config(PipelineConfig, options.pipeline, [*options.overrides, *site])
        jobs, mistakes = stage_jobs(config.stages, config.cluster, config.name)
    else:
        given = {key: value for key, value in vars(options).items() if key in PipelineStage.model_fields}
        given |= {stage: _what(stage, options), "set": getattr(options, "overrides", [])}
        wanted = PipelineStage.model_validate(given)
        jobs, mistakes = stage_jobs([wanted], options.cluster)
    return submit(jobs, mistakes, after, exclude, dry_run=options.dry_run)


def _what(stage: str, options: argparse.Namespace) -> Any:
    """What a stage is told beside its settings."""
    if stage == "convert":
        return [options.source, options.output]
    return from_options(options) if stage == "glue" else options.config


# ----------------------------------------------------------------------------------- check, freeze, queue


def submit(
    jobs: list[StageJob], mistakes: list[str], after: Sequence[str], exclude: Sequence[str], *, dry_run: bool
) -> int:
    """Checks `jobs`, freezes each of them, and queues them, one after another, behind the jobs `after`.

    `mistakes` are those that were found on the way here. Raises UserError with a line for each of all.
    """
    if not mistakes:
        jobs = unfinished(jobs)
        if not jobs:
            return 0
    # Not at the top: it brings pyarrow, which help can do without.
    from launcher.submit.preflight import Report, check, check_not_queued

    jobs = _in_order(jobs, after)
    report = check(jobs, after, {job.spec.folder: left_out(job.spec, exclude) for job in jobs}, mistakes)
    for line in report.warnings:
        print(f"bertscale submit: warning: {line}", file=sys.stderr)
    if dry_run:
        _show(jobs, report.facts, after, exclude)
    if report.problems:
        raise UserError("\n".join(report.problems))
    if dry_run:
        print("\nnothing was queued: this was a dry run")
        return 0
    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(making(Path(job.spec.folder)))
        again = Report()
        check_not_queued(jobs, again)  # by another one, since the checks above
        if again.problems:
            raise UserError("\n".join(again.problems))
        for job in jobs:
            freeze(job.spec, job.config, about_now(job.spec.environment), job.tasks)
        _queue_all(jobs, after, exclude)
    last = [job for job in jobs if job.spec.stage != TASKS] or jobs  # tasks belong to a stage before them
    target = quoted(last[-1].spec.target)
    print(f"\n  bertscale status {target}\n  bertscale logs --follow {target}\n  bertscale cancel {target}")
    return 0


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Keeps other processes from freezing or queueing the job of `folder` meanwhile. Raises UserError."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(folder / LOCK, str(os.getpid())))
        except HeldError as error:
            words = (
                f"another command is just queueing the job of {shown(folder)}: `bertscale status` shows it"
            )
            raise UserError(words) from error
        except OSError as error:
            raise UserError(f"cannot write the job folder {folder}: {error.strerror or error}") from error
        yield


def _queue_all(jobs: Sequence[StageJob], after: Sequence[str], exclude: Sequence[str]) -> None:
    """Queues all, each behind the one before it, or none."""
    queued: list[tuple[str, JobSpec]] = []
    try:
        for job in jobs:
            before = [queued[-1][0]] if queued else after
            queued.append((queue(job.spec, before, left_out(job.spec, exclude)), job.spec))
            _announce(job.spec, queued[-1][0], before)
            if _cannot_be_requeued(queued[-1][0]):
                print(
                    "  the site lets no job be requeued: at its time limit this one queues another",
                    flush=True,
                )
    except BaseException:
        _take_back(queued)
        raise


def _cannot_be_requeued(job: str) -> bool:
    """Whether a site's settings have taken back the --requeue of the script."""
    with contextlib.suppress(UserError):
        return (slurm.show_job(job) or {}).get("Requeue") == "0"
    return False


def _take_back(queued: Sequence[tuple[str, JobSpec]]) -> None:
    """Cancels the first jobs of a pipeline whose later one could not be queued."""
    for job, spec in reversed(queued):
        folder = Path(spec.folder)
        (folder / CANCELLED).touch()  # before it ends: it is not to queue itself again
        with contextlib.suppress(UserError):
            slurm.ask("scancel", job)
        Events(folder / EVENTS).write("cancelled", job=job, reason="a later job was refused")
        print(f"job {job} ({spec.name}) was cancelled: a later job could not be queued", file=sys.stderr)


def _in_order(jobs: list[StageJob], after: Sequence[str]) -> list[StageJob]:
    """Each spec told of the job folders before and after it."""
    folders = [job.spec.folder for job in jobs]
    first: list[str] = []
    with contextlib.suppress(UserError):  # the checks say that Slurm does not answer
        records = [slurm.show_job(job) for job in after if job.isdecimal()]
        first = [str(folder) for record in records if record and (folder := folder_of(record))]
    return [
        dataclasses.replace(
            job,
            spec=dataclasses.replace(
                job.spec,
                previous=tuple(folders[i - 1 : i] if i else first),
                following=tuple(folders[i + 1 :]),
            ),
        )
        for i, job in enumerate(jobs)
    ]


def left_out(spec: JobSpec, exclude: Sequence[str] = ()) -> list[str]:
    """The nodes that the person does not want, and those that failed a check lately."""
    bad = bad_nodes(Path(spec.bad_nodes), spec.bad_node_hours) if spec.bad_nodes else {}
    return list(dict.fromkeys([*exclude, *bad]))


# ------------------------------------------------------------------------------------------------ words


def _announce(spec: JobSpec, job: str, after: Sequence[str]) -> None:
    behind = f", after job {', '.join(after)}" if after else ""
    print(f"job {job} ({spec.name}: {_size(spec)}{behind}) is queued: {shown(spec.folder)}", flush=True)


def _size(spec: JobSpec) -> str:
    if spec.array:
        return f"an array of {spec.array}"
    nodes = f"{spec.nodes} node{'s' if spec.nodes > 1 else ''}"
    spares = f" and {spec.spares} to spare" if spec.spares else ""
    return f"{nodes} x {spec.tasks_per_node} rank{'s' if spec.tasks_per_node > 1 else ''}{spares}"


def _show(jobs: list[StageJob], facts: Sequence[str], after: Sequence[str], exclude: Sequence[str]) -> None:
    """The dry run: scripts, what a rank runs, the order of the jobs, and what the checks have learnt."""
    for job in jobs:
        spec = job.spec
        print(f"--- {spec.folder}/{SCRIPT}\n{render(spec)}")
        words = [*spec.container, spec.python, *spec.command]
        print(f"--- a rank of {spec.name} runs\n{shlex.join(words)}\n")
    print("--- the jobs in their order")
    before = f"job {', '.join(after)}" if after else ""
    for job in jobs:
        out = left_out(job.spec, exclude)
        without = f", without {','.join(out)}" if out else ""
        behind = f", after {before}" if before else ""
        print(f"{job.spec.name}: {_size(job.spec)}{behind}{without}")
        before = job.spec.name
    print("\n--- found out")
    print("\n".join(facts))


def _parser(stage: str) -> argparse.ArgumentParser:
    what = {
        "prep": "Queues a data preparation.",
        "pretrain": "Queues a pretraining over one or many nodes.",
        "convert": "Queues a conversion.",
        "finetune": "Queues a fine-tuning.",
        "glue": "Queues the fine-tunings on a folder of tasks, and a job for their table.",
        "pipeline": "Queues several stages, each of which begins when the one before it is done.",
    }[stage]
    parser = argparse.ArgumentParser(
        prog=f"bertscale submit {stage}",
        description=textwrap.fill(
            f"{what} All mistakes are told at once, before anything is queued. The job runs the code and the "
            "config of this moment, saves and queues itself again when it is stopped, and resumes.",
            100,
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if stage == "convert":
        parser.add_argument("source", help="A run folder, a checkpoint or a Hugging Face folder.")
        parser.add_argument("output", help="The folder to write.")
        text = "Export the moving average of the weights that a run with train.average has kept."
        parser.add_argument("--average", action="store_true", help=text)
    elif stage == "glue":
        add_arguments(parser)
    elif stage == "pipeline":
        parser.add_argument("pipeline", metavar="PIPELINE", help="A YAML file of stages.")
    else:
        parser.add_argument("config", metavar="CONFIG", help=f"A YAML file, as for `bertscale {stage}`.")
    if stage not in ("convert", "glue"):
        text = "A value, read as YAML, that replaces the file's."
        parser.add_argument("overrides", metavar="key=value", nargs="*", help=text)
    text = "The facts of the cluster or partition, a YAML file."
    if stage == "pipeline":
        text = f"{text[:-1]}, instead of the pipeline's own; stages that name one keep theirs."
    parser.add_argument("--cluster", metavar="FILE", required=stage != "pipeline", help=text)
    if stage != "pipeline":
        text = "The time limit, such as 12:00:00 or 1-12, instead of the cluster file's."
        parser.add_argument("--time", metavar="T", help=text)
    if stage in TRAINING:
        parser.add_argument("--nodes", metavar="N", type=_positive, default=1, help="Nodes (%(default)s).")
        text = "Ranks on each node, if not all of its GPUs, or tasks, of the cluster file."
        parser.add_argument("--ranks-per-node", metavar="N", type=_positive, help=text)
        text = "Further nodes that stand by and replace those that fail."
        parser.add_argument("--spares", metavar="K", type=_natural, default=0, help=text)
    if stage == "prep":
        text = "Share the work between N jobs of one node each; two short jobs come before and after them."
        parser.add_argument("--array", metavar="N", type=_positive, default=0, help=text)
        text = "Make the data set anew where the output holds one of other settings or input."
        parser.add_argument("--replace", action="store_true", help=text)
    text = "Begin when the job with this id has ended; may be given several times."
    parser.add_argument("--after", metavar="JOB", action="append", default=[], help=text)
    text = "Nodes to avoid, beside those that failed a check; names with commas between them."
    parser.add_argument("--exclude", metavar="NODES", action="append", default=[], help=text)
    text = "Check everything and show what would be queued; queue nothing and write nothing."
    parser.add_argument("--dry-run", action="store_true", help=text)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)
