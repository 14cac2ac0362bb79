"""The `bertscale` command: reads the command line, checks the arguments and the config, starts the work.

bertscale prep|inspect|pretrain|convert|diff|average|finetune|predict|score|bench|quickstart --help

No large library is imported before the work begins, so that help texts and error messages come at once.
Exit codes are those of bertscale.errors; `bertscale pretrain` passes on the code of a failed rank.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bertscale.console import (
    complain,
    disk_errors_in_one_line,
    figure_lines,
    key_table,
    make_parser,
    reader_left,
)
from bertscale.errors import DIFFERENT, INTERRUPTED, MISTAKE, STOPPED_AND_SAVED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bertscale.config import Device, LaunchConfig, ParallelConfig, PretrainConfig
    from launcher.ranks import Rank


def main(arguments: list[str] | None = None) -> int:
    """Runs the command in `arguments` (default: those of this process) and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else MISTAKE
    if arguments[0] == "--version":
        from bertscale import __version__

        print(f"bertscale {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"bertscale: error: there is no command {name!r}; {hint}", file=sys.stderr)
        return MISTAKE

    from bertscale.config import UserError

    _, command = COMMANDS[name]
    try:
        with disk_errors_in_one_line():
            return command(rest)
    except UserError as error:
        return complain(name, str(error))
    except KeyboardInterrupt:
        print(f"\nbertscale {name}: interrupted; run the same command again", file=sys.stderr)
        return INTERRUPTED


# ----------------------------------------------------------------------------------------- the commands


def prep(arguments: list[str]) -> int:
    """bertscale prep CONFIG [key=value ...] [--replace] [--verify | --tokenizer-only | --finish ...]"""
    from bertscale.checks import array_task, verify_digests
    from bertscale.config import PrepConfig, UserError, load_config

    if any(argument.partition("=")[0] == "--inspect" for argument in arguments):
        raise UserError("--inspect is now a command of its own: bertscale inspect FOLDER")
    parser = _prep_parser()
    options = parser.parse_intermixed_args(arguments)
    config = load_config(PrepConfig, options.config, options.overrides)
    if options.verify:
        verify_digests(config.output)
        return 0
    if options.dry_run is not None:
        from data_prep.dry_run import dry_run

        if options.dry_run < 1:
            parser.error(f"--dry-run must be 1 or more, not {options.dry_run}")
        dry_run(config, options.dry_run)
        return 0
    if options.task_count is not None and options.task_count < 1:
        parser.error(f"--task-count must be 1 or more, not {options.task_count}")

    from data_prep import build

    task = None
    if not options.tokenizer_only and not options.finish:
        task = array_task(options.task_index, options.task_count)
    if options.replace and (options.finish or task):
        raise UserError("--replace is for the whole, or with --tokenizer-only: other parts go on with that")
    if options.tokenizer_only:
        build.prep_tokenizer(config, options.replace)
    elif options.finish:
        build.prep_finish(config, options.task_count)
    elif task:
        build.prep_share(config, *task)
    else:
        build.prep(config, options.replace)
    return 0


def _prep_parser() -> argparse.ArgumentParser:
    from bertscale.config import PrepConfig

    parser = make_parser(
        "prep",
        "Turns raw text into a tokenizer and Arrow token shards. To use several hosts, run --tokenizer-only "
        "once, then --task-index 0, 1, ... at the same time, then --finish once; the output is the same, "
        "byte for byte.",
        PrepConfig,
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--verify",
        action="store_true",
        help="Only compare the files of an existing output with the sizes and digests in its manifest.",
    )
    part.add_argument(
        "--dry-run",
        metavar="N",
        type=int,
        help="Only show what the rules that drop and change text would do to N documents; write nothing.",
    )
    part.add_argument(
        "--tokenizer-only", action="store_true", help="Stop when the plan and the tokenizer are written."
    )
    part.add_argument(
        "--task-index",
        metavar="I",
        type=int,
        help="Build only the work units whose number modulo N is I (default: the index in the Slurm array).",
    )
    part.add_argument(
        "--finish", action="store_true", help="Check that every work unit is built, and write the shards."
    )
    parser.add_argument(
        "--task-count", metavar="N", type=int, help="Number of tasks (default: the size of the Slurm array)."
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="Where OUTPUT is a data set of other settings or input: make the new one, which takes its place "
        "when it is finished; unfinished work is replaced at once. Without it nothing is touched.",
    )
    return parser


def inspect(arguments: list[str]) -> int:
    """bertscale inspect PATH [--tensors] [--json]"""
    from bertscale.config import UserError

    parser = make_parser(
        "inspect",
        "Shows what a folder holds. Of a run, a checkpoint or a model: network, parameters, topology, step, "
        "what it started from, losses, digests, bytes. Of a prepared folder: counts, lengths of documents "
        "and sentences, and samples as the model will see them; every shard is compared with its digest.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="A run, a checkpoint, a model's folder, or the output of `bertscale prep` or `finetune`.",
    )
    parser.add_argument(
        "--tensors",
        action="store_true",
        help="List the parameters: shape, data type, mean, standard deviation, largest absolute value.",
    )
    parser.add_argument("--json", action="store_true", help="Print one value of JSON, for programs.")
    options = parser.parse_args(arguments)

    from bertscale.inspect.facts import describe, is_prepared

    prepared = is_prepared(options.path)
    if prepared and options.tensors:
        raise UserError(f"{options.path} is a data set, which has no parameters")
    if prepared and not options.json:
        from bertscale.data.inspect import inspect as show

        show(options.path)
        return 0
    facts = describe(options.path)
    rows = []
    if options.tensors:
        from bertscale.inspect.tensors import statistics, table_of

        rows = list(statistics(options.path))
    if options.json:
        return _print([json.dumps({**facts, "tensors": rows} if rows else facts, indent=1)])

    from bertscale.inspect.show import lines_of

    return _print([*lines_of(facts), *(["", *table_of(rows)] if rows else [])])


def diff(arguments: list[str]) -> int:
    """bertscale diff A B [--json]"""
    parser = make_parser(
        "diff",
        "Compares the parameters and the settings of two checkpoints, runs (the newest checkpoint of each) "
        f"or models, of any topology. Exit code 0: equal; {DIFFERENT}: not; {MISTAKE}: one of them cannot "
        "be read.",
    )
    for place in ("first", "second"):
        parser.add_argument(place, metavar=place.upper(), type=Path, help="A run, a checkpoint or a model.")
    parser.add_argument("--json", action="store_true", help="Print one value of JSON, for programs.")
    options = parser.parse_args(arguments)

    from bertscale.inspect.diff import diff as compare
    from bertscale.inspect.diff import lines_of

    found = compare(options.first, options.second)
    _print([json.dumps(found, indent=1)] if options.json else lines_of(found))
    return 0 if found["equal"] else DIFFERENT


def _print(lines: list[str]) -> int:
    """Prints the lines; returns the exit code, which is another one where nobody reads them."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        return reader_left()
    return 0


def pretrain(arguments: list[str]) -> int:
    """bertscale pretrain CONFIG [key=value ...] [--verify] [--leave-tasks | --tasks-only]"""
    from bertscale.checks import check_tasks
    from bertscale.config import PretrainConfig, load_phases
    from launcher import ranks

    parser = make_parser(
        "pretrain",
        "Trains an encoder on token shards; resumes from the newest complete checkpoint if there is one. "
        "Starts the ranks of this machine; under torchrun or srun each process is one rank. Ctrl-C "
        "finishes the training step, saves a checkpoint and exits with "
        f"{STOPPED_AND_SAVED}: the same command resumes.",
        PretrainConfig,
    )
    parser.add_argument(
        "--verify", action="store_true", help="Compare the shards with their digests before training starts."
    )
    part = parser.add_mutually_exclusive_group()
    text = "Do not await the last tasks (train.tasks) when the training is over."
    part.add_argument("--leave-tasks", action="store_true", help=text)
    text = "Train nothing: make the figures of tasks that checkpoints of the run lack."
    part.add_argument("--tasks-only", action="store_true", help=text)
    options = parser.parse_intermixed_args(arguments)
    if options.tasks_only:
        return ranks.run_as_rank(partial(_only_tasks, options))
    rank = ranks.from_environment()
    if rank is not None:
        return ranks.run_as_rank(partial(_train, options, rank))

    from bertscale.run_folder import LOGS, check_run_folder, checkpoints

    phases = load_phases(options.config, options.overrides)
    runs = {name: Path(config.run) for name, config in phases.items()}
    counts = {}
    for name, config in phases.items():
        counts[name] = _check(config, None, options.verify, made=list(runs.values()))
        check_tasks(config)
        check_run_folder(runs[name])
    again = ["pretrain", options.config, *options.overrides]
    begun = [name for name, run in runs.items() if checkpoints(run)]
    for name, config in phases.items():
        phase = [f"phase={name}"] if name else []
        if name in begun[:-1]:
            print(f"phase {name} is done: {runs[name]}", flush=True)
            continue
        if name:
            print(f"phase {name} (of {', '.join(phases)}): {runs[name]}", flush=True)
        leave = ["--leave-tasks"] if options.leave_tasks else []
        code = _supervised([*again, *phase, *leave], counts[name], config.launch, runs[name], LOGS, again)
        if code:
            return code
    return 0


def _supervised(
    words: list[str], count: int, launch: LaunchConfig, run: Path, logs: str, again: list[str] | None = None
) -> int:
    """Runs the command `words` as `count` ranks of this machine, with logs in the folder `logs` of `run`.

    `again`: the command that goes on where it was stopped, if it is another one.
    """
    from launcher.supervise import Limits, run_here

    limits = Limits(
        start_seconds=launch.start_seconds,
        hang_seconds=launch.hang_seconds,
        restarts=launch.restarts,
        restarts_without_progress=launch.restarts_in_a_row(slurm=False),
    )
    command = [sys.executable, "-m", "bertscale", *words]
    return run_here(command, count, run / logs, limits, run, shlex.join(["bertscale", *(again or words)]))


def _train(options: argparse.Namespace, rank: Rank) -> int:
    verify = options.verify and rank.rank == 0
    config, _ = _checked(options.config, options.overrides, rank.world_size, verify)

    from bertscale.pretrain.pretrain import pretrain as train_as_rank
    from launcher.child import start_child

    with disk_errors_in_one_line():  # here already, so that the rank reports a mistake and is not restarted
        return train_as_rank(config, start_child, leave=options.leave_tasks)


def _only_tasks(options: argparse.Namespace) -> int:
    from bertscale.checks import check_tasks
    from bertscale.config import UserError, load_phases
    from bertscale.run_folder import checkpoints

    phases = load_phases(options.config, options.overrides)
    configs = [config for config in phases.values() if len(phases) == 1 or checkpoints(Path(config.run))]
    for config in configs:
        if not config.train.tasks:
            raise UserError("--tasks-only, and train.tasks names no task")
        check_tasks(config)

    from bertscale.pretrain.tasks import only_tasks
    from launcher.child import start_child

    with disk_errors_in_one_line():
        return next((code for config in configs if (code := only_tasks(config, start_child))), 0)


def bench(arguments: list[str]) -> int:
    """bertscale bench [CONFIG] [key=value ...] [--random] [--against transformers] [--json FILE]"""
    from bertscale.checks import check_comparison
    from bertscale.config import UserError
    from launcher import ranks

    options = _bench_parser().parse_intermixed_args(arguments)
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(options, name)}")
    if "=" in options.config and not Path(options.config).exists():  # an override; CONFIG was left out
        options.overrides.insert(0, options.config)
        options.config = BENCH_CONFIG
    if options.config == BENCH_CONFIG and not Path(BENCH_CONFIG).exists():
        raise UserError(
            f"there is no {BENCH_CONFIG} here: give a CONFIG, or run this in a checkout of bertscale"
        )
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}")
    rank = ranks.from_environment()
    world = rank.world_size if rank else None
    config, count = _checked(options.config, options.overrides, world, False, data=not options.random)
    if options.against:
        check_comparison(config, count)
    if rank is not None:
        return ranks.run_as_rank(lambda: _bench(config, options))

    from launcher.supervise import Limits, run_here

    with tempfile.TemporaryDirectory(prefix="bertscale-bench-") as logs:
        command = [sys.executable, "-m", "bertscale", "bench", *arguments]
        return run_here(command, count, Path(logs), Limits())


def _bench_parser() -> argparse.ArgumentParser:
    from bertscale.config import PretrainConfig

    parser = make_parser(
        "bench",
        "Measures how fast this machine trains a pretraining config: real tokens/s, MFU (the share of the "
        "peak FLOP/s), the time of each part of a step, memory. It trains on the ranks that `bertscale "
        "pretrain` would start, writes no checkpoint and leaves no folder.",
        PretrainConfig,
        default=BENCH_CONFIG,
    )
    parser.add_argument("--steps", metavar="N", type=int, default=5, help="Steps of a round (%(default)s).")
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=int,
        default=5,
        help="Measured rounds, after one of warm-up (%(default)s).",
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="Train on random token ids instead of data, in samples of at most samples.max_length tokens.",
    )
    parser.add_argument(
        "--against",
        choices=["transformers"],
        help="Also train the class of transformers, on the same batches and from the same weights, in turns.",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="Also write the results to this file.")
    return parser


def _bench(config: PretrainConfig, options: argparse.Namespace) -> int:
    from bertscale.bench.bench import Options
    from bertscale.bench.bench import bench as measure

    chosen = Options(options.steps, options.rounds, options.random, options.against, options.json)
    return measure(config, chosen)


def convert(arguments: list[str]) -> int:
    """bertscale convert SOURCE OUTPUT [--as FORM] [--dtype TYPE] [--replace] ..."""
    from bertscale.export.options import FORMS, SHARD_SIZE, ConvertOptions, parse_size

    parser = make_parser(
        "convert",
        "Writes the weights of a run, a checkpoint of any topology, a folder of transformers or of "
        "DeepSpeed, or a file of tensors as a folder of transformers or sentence-transformers, a graph of "
        "ONNX (of a task model too), a checkpoint for any topology, or a universal checkpoint of DeepSpeed. "
        "--as says which. What is written is compared with SOURCE. No GPU is needed.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="A run folder, a checkpoint, a folder of transformers or DeepSpeed, or a file of tensors; for "
        "--as onnx a task model, too.",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="The folder to write.")
    parser.add_argument(
        "--as",
        dest="as_",
        metavar="FORM",
        choices=FORMS,
        help=f"What to write: {'; '.join(f'{name}, {what}' for name, what in FORMS.items())}. By default a "
        "run or a checkpoint becomes a folder for pretraining, and all else a checkpoint.",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="The data type of the weights (%(default)s). float16 is refused where values are beyond its "
        "range.",
    )
    parser.add_argument(
        "--clamp",
        action="store_true",
        help="Write the largest number of the data type where a value is beyond its range.",
    )
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        type=parse_size,
        default=SHARD_SIZE,
        help="The size of a file of weights, such as 2GB; larger models get several, with an index (50GB).",
    )
    parser.add_argument(
        "--pooler",
        action=argparse.BooleanOptionalAction,
        help="Whether an encoder keeps the layer over its first token; by default where it was trained.",
    )
    parser.add_argument(
        "--pooling",
        choices=["mean", "first"],
        help="What becomes the vector of a text: the mean of its tokens' states, or that of its first token.",
    )
    parser.add_argument("--normalize", action="store_true", help="Make the vector of a text one of length 1.")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Load what was written and compare its outputs with the source's, in sentences of the model's "
        "language and on random ids.",
    )
    parser.add_argument(
        "--show",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Show how well an exported model fills masks in sentences of its validation data.",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="Delete all that is in OUTPUT, whoever wrote it, but never a run's checkpoints.",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="Export the moving average of the weights that a run with train.average has kept.",
    )
    for name, default, meaning in (
        ("--tensor-parallel", 1, "Tensor-parallel size of the run that the checkpoint is for"),
        ("--data-parallel", 1, "Data-parallel ranks of that run"),
        ("--zero-stage", 0, "Its ZeRO stage"),
    ):
        parser.add_argument(
            name,
            metavar="N",
            type=int,
            help=f"{meaning} (default: as in SOURCE, if that is a checkpoint; else {default}).",
        )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        help="The tokenizer of a SOURCE that has none beside it.",
    )
    parser.add_argument(
        "model",
        metavar="model.KEY=VALUE",
        nargs="*",
        default=[],
        help="The shape of a SOURCE that does not tell it, such as model.num_attention_heads=12.",
    )
    options = parser.parse_intermixed_args(arguments)
    chosen = {key: value for key, value in vars(options).items() if key not in ("source", "output")}
    chosen["model"] = tuple(options.model)

    from bertscale.export.convert import convert as convert_folder

    convert_folder(options.source, options.output, ConvertOptions(**chosen))
    return 0


def average(arguments: list[str]) -> int:
    """bertscale average FOLDER FOLDER ... --output FOLDER [--weights W ...] [--method ties --base FOLDER]"""
    parser = make_parser(
        "average",
        "Averages the weights of checkpoints, of runs (the newest checkpoint of each) or of Hugging Face "
        "folders, all of one shape and one vocabulary. The result is a checkpoint without optimizer state, "
        "for convert, for finetune and for init.from of a pretraining.",
    )
    parser.add_argument(
        "sources",
        metavar="FOLDER",
        nargs="+",
        type=Path,
        help="A run folder, a checkpoint or a Hugging Face folder; two or more.",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, required=True, help="The checkpoint folder to make."
    )
    parser.add_argument(
        "--weights",
        metavar="W",
        nargs="+",
        type=float,
        default=[],
        help="The weight of each folder, in their order, in any unit (default: equal ones).",
    )
    parser.add_argument(
        "--method",
        choices=["mean", "ties"],
        default="mean",
        help="The mean of the weights, or the base with what the folders have learnt merged by TIES "
        "(%(default)s).",
    )
    parser.add_argument(
        "--base", metavar="FOLDER", type=Path, help="ties: what the folders were trained from."
    )
    parser.add_argument(
        "--density",
        metavar="SHARE",
        type=float,
        help="ties: the share of each folder's differences to the base that is kept, the largest ones "
        "(default 0.2).",
    )
    parser.add_argument(
        "--scale",
        metavar="X",
        type=float,
        help="ties: the factor of the merged difference that is added to the base (default 1.0).",
    )
    options = parser.parse_args(arguments)

    from bertscale.export.average import Options
    from bertscale.export.average import average as average_folders

    chosen = Options(options.weights, options.method, options.base, options.density, options.scale)
    average_folders(options.sources, options.output, chosen)
    return 0


def finetune(arguments: list[str]) -> int:
    """bertscale finetune CONFIG [key=value ...]"""
    from bertscale.checks import check_examples
    from bertscale.config import FinetuneConfig, load_config
    from launcher import ranks

    parser = make_parser(
        "finetune",
        "Fine-tunes an encoder on labelled examples; goes on where an earlier start was stopped. Starts the "
        "ranks of this machine; under torchrun or srun each process is one rank. Ctrl-C finishes the "
        f"training step, saves a checkpoint and exits with {STOPPED_AND_SAVED}: the same command resumes.",
        FinetuneConfig,
    )
    options = parser.parse_intermixed_args(arguments)
    rank = ranks.from_environment()
    if rank is not None:
        return ranks.run_as_rank(partial(_finetune, options, rank))

    from bertscale.run_folder import LOGS

    config = load_config(FinetuneConfig, options.config, options.overrides)
    check_examples(config)
    count = _count_ranks(config.device, config.parallel, None)
    return _supervised(
        ["finetune", options.config, *options.overrides], count, config.launch, Path(config.output), LOGS
    )


def _finetune(options: argparse.Namespace, rank: Rank) -> int:
    from bertscale.config import FinetuneConfig, load_config

    config = load_config(FinetuneConfig, options.config, options.overrides)
    _count_ranks(config.device, config.parallel, rank.world_size)

    from bertscale.finetune.finetune import finetune as finetune_as_rank

    with disk_errors_in_one_line():
        return finetune_as_rank(config)


def predict(arguments: list[str]) -> int:
    """bertscale predict MODEL --input FILE [--output FILE] [--score] [key=value ...], or MODEL --text TEXT"""
    from bertscale.checks import check_predictions

    options = _predict_parser().parse_intermixed_args(arguments)
    check_predictions(options)

    from bertscale.finetune.predict import load_task_model
    from bertscale.finetune.predict_file import as_json, data_of, predict_file, predict_text

    model = load_task_model(options.model, options.device, options.precision)
    if options.text is not None:
        sys.stdout.write(as_json(predict_text(model, options.text, options.text_pair)).decode())
        return 0
    data = data_of(model, options.input, options.overrides)
    try:
        figures = predict_file(
            model,
            options.input,
            data,
            options.output,
            score=options.score,
            say=lambda line: print(f"bertscale predict: {line}", file=sys.stderr),
        )
    except BrokenPipeError:
        return reader_left()
    if figures:
        print(figure_lines(figures), file=sys.stderr)
    return 0


def _predict_parser() -> argparse.ArgumentParser:
    from bertscale.config import describe_fields
    from bertscale.config.examples import NOT_OF_INPUTS, ExamplesConfig

    parser = make_parser(
        "predict",
        "Predicts with a fine-tuned model: each row of a file of any size, or one text. Writes a line of "
        "JSON for each row, in the order of the file: its own columns and `prediction`; where that is null, "
        "`error` tells why the row cannot be predicted.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="The output of `bertscale finetune`, its folder `model`, or a task model of transformers.",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="The form of FILE, where it is another than that of the files of the fine-tuning, such as "
        "text=body.",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="A table (csv, tsv, jsonl, json, parquet), CoNLL columns, or SQuAD json; plain or compressed.",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="The file to write, whole or not at all (default: the standard output). Answers go to a .json "
        "as one object {id: answer}.",
    )
    parser.add_argument("--text", help="Predict this text, or the first one of a pair, or this question.")
    parser.add_argument(
        "--text-pair", metavar="TEXT", help="The second text of a pair, or the context of the question."
    )
    parser.add_argument(
        "--score", action="store_true", help="FILE has labels: show figures of the predictions at the end."
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="Where to run (%(default)s)."
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "bfloat16", "float32"],
        default="float32",
        help="Numbers to compute with (%(default)s); auto is bfloat16 where the device has it.",
    )
    keys = [row for row in describe_fields(ExamplesConfig) if row[0] not in NOT_OF_INPUTS]
    parser.epilog = key_table("keys", keys)
    return parser


def score(arguments: list[str]) -> int:
    """bertscale score KIND GOLD PREDICTIONS [--no-answer FILE] [--chinese | --no-chinese] [--json]"""
    parser = make_parser(
        "score",
        "Scores a file of predictions, of bertscale or of any other program, against the gold answers: "
        "squad by the rules of SQuAD v1.1 and v2.0, or of CMRC 2018 where the answers are Chinese; tokens as "
        "seqeval counts entities.",
    )
    parser.add_argument(
        "kind", metavar="KIND", choices=["squad", "tokens", "classification"], help="%(choices)s."
    )
    parser.add_argument(
        "gold",
        metavar="GOLD",
        help="SQuAD json, CoNLL columns, or a table: jsonl, json, csv, tsv, parquet.",
    )
    parser.add_argument(
        "predictions",
        metavar="PREDICTIONS",
        help="A json object {id: answer}, or a table: of answers with the columns id and answer, of labels "
        "with a column predicted, prediction or label, matched by a column id or by order; CoNLL columns of "
        "the same words, or lists of tags.",
    )
    parser.add_argument(
        "--no-answer", metavar="FILE", help="squad: a json object {id: how likely there is no answer}."
    )
    parser.add_argument(
        "--chinese",
        action=argparse.BooleanOptionalAction,
        help="squad: the rules for Chinese, or those for English (default: by the gold answers).",
    )
    parser.add_argument(
        "--label", metavar="COLUMN", default="label", help="classification: column in GOLD (%(default)s)."
    )
    parser.add_argument(
        "--salvage", action="store_true", help="squad: take the whole articles of a GOLD that is cut off."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(arguments)

    from bertscale.examples.score import score_files

    figures = score_files(
        options.kind,
        options.gold,
        options.predictions,
        no_answer=options.no_answer,
        chinese=options.chinese,
        label=int(options.label) if options.label.isdecimal() else options.label,
        salvage=options.salvage,
        say=lambda line: print(line, file=sys.stderr),
    )
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    print(figure_lines(figures))
    return 0


def glue(arguments: list[str]) -> int:
    """bertscale glue MODEL FOLDER [--output RUN] [--seeds N ...] [--tasks NAME ...] [key=value ...]"""
    from bertscale.checks import array_task, check_glue
    from bertscale.config import UserError
    from bertscale.config.glue import from_options
    from launcher import ranks

    options = _glue_parser().parse_intermixed_args(arguments)
    config = from_options(options)
    rank = ranks.from_environment()
    if rank is not None and rank.world_size > 1:
        raise UserError(
            f"{rank.world_size} processes would each run all tasks: start glue once, without torchrun; it "
            "starts the ranks of each fine-tuning itself"
        )
    check_glue(config)

    from bertscale.finetune.glue import Part
    from bertscale.finetune.glue import glue as run_tasks
    from launcher.child import run_child

    part: Part = "all"
    if options.intermediate_only:
        part = "intermediate"
    elif options.finish:
        part = "finish"
    elif task := array_task(options.task_index, options.task_count):
        part = task
    return run_tasks(config, run_child, part)


def _glue_parser() -> argparse.ArgumentParser:
    from bertscale.config.glue import add_arguments

    parser = make_parser(
        "glue",
        "Fine-tunes a model on every task of a GLUE- or CLUE-like folder, one after another, and shows one "
        "table of the dev figures beside published ones. What is finished is used again: the same command "
        "goes on where it was stopped. To use several hosts, run --intermediate-only once, then "
        "--task-index 0, 1, ... at the same time, then --finish once; `bertscale submit glue` does.",
    )
    add_arguments(parser)
    part = parser.add_mutually_exclusive_group()
    text = "Only run the tasks that others start from, which is MNLI."
    part.add_argument("--intermediate-only", action="store_true", help=text)
    text = "Of the other tasks run only those whose number modulo N is I (default: the index in the array)."
    part.add_argument("--task-index", metavar="I", type=int, help=text)
    part.add_argument("--finish", action="store_true", help="Only make the table.")
    text = "Number of tasks of the array (default: the size of the Slurm array)."
    parser.add_argument("--task-count", metavar="N", type=int, help=text)
    return parser


def quickstart(arguments: list[str]) -> int:
    """bertscale quickstart [--run FOLDER] [--minutes M]"""
    from bertscale.quickstart import DEFAULT_RUN, MINUTES

    parser = make_parser(
        "quickstart",
        "Runs every stage on the documentation of this machine's Python packages: text, shards, pretraining, "
        "Hugging Face folder, classifier. Output that is already complete is reused.",
    )
    parser.add_argument("--run", type=Path, default=DEFAULT_RUN, help="Folder for all output (%(default)s).")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="Minutes of pretraining, more than 0 (%(default)g)."
    )
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, not {options.minutes:g}")

    from bertscale.gpus import count_gpus
    from bertscale.quickstart import quickstart as run_stages

    return run_stages(options.run, count_gpus("auto"), options.minutes)


def submit(arguments: list[str]) -> int:
    """bertscale submit STAGE ..."""
    from launcher.submit.command import main as submit_stage
    from launcher.terminal import outlive_readers

    outlive_readers()  # of a pipeline all is queued or nothing, whoever reads what is said of it
    return submit_stage(arguments)


def ask(name: str, arguments: list[str]) -> int:
    """bertscale status [RUN], or logs, cancel or resume RUN"""
    from launcher.status.commands import main as answer
    from launcher.terminal import outlive_readers

    if name in ("cancel", "resume"):
        outlive_readers()
    try:
        code = answer(name, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return reader_left()
    return code


BENCH_CONFIG = "configs/pretrain/quickstart.yaml"  # by default
COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "prep": ("raw text -> tokenizer and token shards", prep),
    "inspect": ("what a data set, run, checkpoint or model holds", inspect),
    "pretrain": ("token shards -> checkpoints", pretrain),
    "convert": ("weights from and to checkpoints, transformers, ONNX, DeepSpeed", convert),
    "diff": ("what differs between two checkpoints or models", diff),
    "average": ("several checkpoints or models of one shape -> one checkpoint", average),
    "finetune": ("encoder and labelled examples -> task model", finetune),
    "predict": ("task model and a file, or a text -> its predictions", predict),
    "score": ("a file of predictions -> its figures: answers or labels, of any program", score),
    "glue": ("model and a folder of tasks -> a table of dev figures, beside published ones", glue),
    "bench": ("how fast a training config runs on this machine, and where its time goes", bench),
    "submit": ("any of these as a Slurm job: checked, frozen, queued, requeued, resumed", submit),
    "status": ("what is queued or running, how far, how fast, and why it waits", partial(ask, "status")),
    "logs": ("what a job's ranks have written", partial(ask, "logs")),
    "cancel": ("ends a job for good", partial(ask, "cancel")),
    "resume": ("queues a stopped job again, to continue its work", partial(ask, "resume")),
    "quickstart": ("every stage in a row, small, on text that every machine has", quickstart),
}


# -------------------------------------------------------------------------------------- help


def _overview() -> str:
    lines = ["usage: bertscale COMMAND ...", "", "From raw text to a fine-tuned BERT-family model.", ""]
    lines += [f"  {name:<12}{sentence}" for name, (sentence, _) in COMMANDS.items()]
    return "\n".join([*lines, "", "bertscale COMMAND --help tells more, with every key of its config."])


# -------------------------------------------------------------------------------- checks before a start


def _checked(
    path: str, overrides: list[str], world_size: int | None, verify: bool, data: bool = True
) -> tuple[PretrainConfig, int]:
    """Returns the config and the number of ranks, after every check that needs no torch.

    `world_size` is the number of running ranks, None where they are not yet started. The shards are opened
    if `data`, and compared with their digests if `verify`.
    """
    from bertscale.config import PretrainConfig, load_config

    config = load_config(PretrainConfig, path, overrides)
    return config, _check(config, world_size, verify, data)


def _check(
    config: PretrainConfig,
    world_size: int | None,
    verify: bool,
    data: bool = True,
    made: Sequence[Path] = (),
) -> int:
    """Makes the checks of `_checked` and returns the number of ranks. `made`: runs that come before."""
    from bertscale.checks import check_init
    from bertscale.data.samples import check_batches
    from bertscale.data.shards import check_tokenizers, open_dataset

    count = _count_ranks(config.device, config.parallel, world_size)
    check_batches(config, count // config.parallel.tensor)
    check_init(config, made)
    if data:
        datasets = [open_dataset(corpus.path, "train", verify=verify) for corpus in config.corpora]
        for corpus in config.corpora:
            open_dataset(corpus.path, "validation", verify=verify)
        check_tokenizers(datasets)
        for name, folder in config.heldout.items():
            check_tokenizers(
                [datasets[0], open_dataset(folder, "validation", verify=verify)], f"heldout.{name}"
            )
    return count


def _count_ranks(device: Device, parallel: ParallelConfig, world_size: int | None) -> int:
    """Returns the number of ranks, `world_size` where they are running. Raises UserError where they cannot be
    grouped."""
    from bertscale.config import UserError
    from bertscale.gpus import count_gpus, hide_gpus

    hide_gpus(device)
    gpus = 0 if world_size else count_gpus(device)  # running ranks ask torch
    count = world_size or parallel.ranks or gpus or parallel.tensor
    if count % parallel.tensor:
        raise UserError(
            f"{count} rank{'s' if count > 1 else ''} cannot be grouped by "
            f"parallel.tensor={parallel.tensor}: the number of ranks (parallel.ranks, or one for "
            "each GPU) must be a multiple of it"
        )
    return count
