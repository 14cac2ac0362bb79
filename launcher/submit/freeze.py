"""The job folder: code, config, script and environment as they were when the job was submitted.

    freeze(spec, config, about)    # then sbatch SPEC.folder/script.sh, now or by hand in a year

    FOLDER/job.json  config.yaml  script.sh  environment.json  code/{bertscale,data_prep,launcher}/*.py
    FOLDER/tasks/NAME.yaml    of a pretraining with train.tasks

Whatever becomes of the checkout, the config file and the cluster file while the job waits, it runs these.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bertscale import __version__
from bertscale.config import PretrainConfig, Section, UserError
from bertscale.run_folder import (
    CANCELLED,
    CODE,
    CONFIG,
    ENVIRONMENT,
    JOB_SPEC,
    SCRIPT,
    TASKS,
    existing_marks,
)
from launcher.job import JobSpec, render

PACKAGES = ("bertscale", "data_prep", "launcher")
SOURCE = Path(__file__).absolute().parents[2]  # the folder that the packages are imported from
FROZEN = (CODE, CONFIG, TASKS, ENVIRONMENT, JOB_SPEC, SCRIPT)


def freeze(
    spec: JobSpec, config: Section | None, about: dict[str, Any], tasks: Mapping[str, Section] = {}
) -> None:
    """Makes `spec.folder` the job's; events and logs of an earlier job in it stay.

    `tasks` are configs of fine-tunings beside a pretraining, by name. Everything is written beside it first,
    so that a full disk leaves the folder as it was. Raises UserError where it cannot be written.
    """
    folder = Path(spec.folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        Path(spec.logs).mkdir(parents=True, exist_ok=True)  # without it Slurm ends the job without a message
        shutil.rmtree(partial, ignore_errors=True)
        _write(partial, spec, config, about, tasks)
        _put_in_place(partial, folder)
    except OSError as error:
        raise UserError(f"cannot write the job folder {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def config_text(config: Section) -> str:
    """The resolved config as YAML: what config.yaml holds.

    Keys of the network that a run takes from what it starts from stay open: it may not be there yet.
    """
    values = config.model_dump()
    if isinstance(config, PretrainConfig) and config.init:
        values["model"] = config.model.model_dump(exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _write(
    partial: Path,
    spec: JobSpec,
    config: Section | None,
    about: dict[str, Any],
    tasks: Mapping[str, Section],
) -> None:
    for package in PACKAGES:
        for source in sorted((SOURCE / package).rglob("*.py")):
            copy = partial / CODE / source.relative_to(SOURCE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    if config is not None:
        (partial / CONFIG).write_text(config_text(config), encoding="utf-8")
    for name, task in tasks.items():
        (partial / TASKS).mkdir(exist_ok=True)
        (partial / TASKS / f"{name}.yaml").write_text(config_text(task), encoding="utf-8")
    (partial / ENVIRONMENT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (partial / JOB_SPEC).write_text(spec.to_json(), encoding="utf-8")
    script = partial / SCRIPT
    script.write_text(render(spec), encoding="utf-8")
    script.chmod(0o755)


def _put_in_place(partial: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for mark in (*existing_marks(folder), folder / CANCELLED):  # of an earlier job of the same folder
        mark.unlink(missing_ok=True)
    old = partial / "old"
    old.mkdir()
    for name in FROZEN:
        # A folder cannot be renamed onto one that is not empty.
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder / name, old / name)
        if (partial / name).exists():
            os.rename(partial / name, folder / name)


# ------------------------------------------------------------------------------------------- what it is


def about_now(cluster_environment: dict[str, str]) -> dict[str, Any]:
    """What environment.json records: Python, installed versions, commit, who submits, where and when.

    The versions are those of the submitting Python; with a container or another `python` in the cluster file
    the ranks have their own.
    """
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "user": _user(),
        "host": socket.gethostname(),
        "folder": os.getcwd(),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "source": str(SOURCE),
        "commit": commit(),
        "environment": cluster_environment,
        "distributions": dict(sorted(installed.items(), key=lambda item: item[0].lower())),
    }


def version() -> str:
    """Says `0.1.0, commit 1a2b3c4`, with `dirty` where files of the checkout differ from that commit."""
    checkout = commit()
    if checkout is None:
        return __version__
    return f"{__version__}, commit {checkout['commit'][:10]}{' (dirty)' if checkout['dirty'] else ''}"


def commit() -> dict[str, Any] | None:
    """Returns {"commit": hash, "dirty": whether tracked code differs}; None outside a git checkout."""
    if _git("ls-files", "--error-unmatch", "bertscale/__init__.py") is None:
        return None  # no checkout, or one of something else that these packages were installed into
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", *PACKAGES)
    return {"commit": head.strip(), "dirty": bool(changed)} if head else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(SOURCE), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name
        return str(os.getuid())
