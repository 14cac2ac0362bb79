"""Hands the script of a job folder to Slurm, from a login node or from inside a job.

number = queue(spec, after=["17"])

Only the standard library: a batch host may have nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertscale.errors import UserError
from bertscale.run_folder import EVENTS, SCRIPT, Events
from launcher import slurm
from launcher.job import JobSpec


def queue(
    spec: JobSpec, after: Sequence[str] = (), exclude: Sequence[str] = (), *options: str, **facts: Any
) -> str:
    """Submits the script in `spec.folder`, writes the event, with `facts`, and returns the job's id.

    It begins when the jobs `after` have ended, on none of the nodes `exclude`; `options` are for sbatch.
    Freezes nothing. Raises UserError when Slurm refuses.
    """
    words = ["sbatch", "--parsable", *options]
    if after:
        words.append(f"--dependency=afterany:{':'.join(after)}")
    if exclude:
        words.append(f"--exclude={','.join(exclude)}")
    done = slurm.ask(*words, f"{spec.folder}/{SCRIPT}", env=slurm.own_environment())
    job = job_id(done.stdout)
    Events(Path(spec.folder, EVENTS)).write("queued", job=job, after=list(after), **facts)
    return job


def job_id(said: str) -> str:
    """The job's id in what `sbatch --parsable` wrote; a site's sbatch may greet before and after it.

    Raises UserError where there is none.
    """
    # The cluster's name may follow.
    ids = re.findall(r"^\s*(\d+)(?:;[\w.-]+)?\s*$|^Submitted batch job (\d+)", said, re.MULTILINE)
    if not ids:
        raise UserError(
            f"sbatch took the job, but told no job id (it said {said.strip()[:200]!r}): `squeue --me` shows "
            "it, and `scancel` ends it"
        )
    return str(ids[-1][0] or ids[-1][1])
