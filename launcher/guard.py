"""Misses the supervisor of a job with spares: it requeues the job when the batch host is down.

python -m launcher.guard JOB_FOLDER JOB BATCH_HOST    # started by launcher.watch, on another node of the job

A job with spares outlives the loss of a node (sbatch --no-kill), also of its first one, and with that of the
supervisor: its other nodes would stay allocated, with nothing to do, until the time limit. Slurm's own word
that the node is down is what counts here: a supervisor that is merely slow is not missed.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from bertscale.errors import MISTAKE
from bertscale.run_folder import CANCELLED, EVENTS, JOB_SPEC, Events, newest_step
from launcher import slurm
from launcher.enqueue import queue
from launcher.job import TRAINING, JobSpec

LOOK_SECONDS = 10.0  # between two looks at the node
RETRY_SECONDS = 5.0  # between two questions to a controller that does not answer


def main(arguments: list[str]) -> int:
    """Returns when the job of the folder is queued again; until then Slurm ends this step with the job."""
    if len(arguments) != 3:
        print("usage: python -m launcher.guard JOB_FOLDER JOB BATCH_HOST", file=sys.stderr)
        return MISTAKE
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # they are for the ranks
        signal.signal(number, signal.SIG_IGN)
    folder, job, host = Path(arguments[0]), arguments[1], arguments[2]
    print(f"guards job {job}, whose supervisor is on {host}", flush=True)
    while not slurm.is_down(host):
        time.sleep(LOOK_SECONDS)
    if (folder / CANCELLED).exists():
        slurm.insist("scancel", job, pause=RETRY_SECONDS)
    else:
        queue_again(folder, job, f"{host} is down, on which its supervisor was", host)
    return 0


def queue_again(folder: Path, job: str, reason: str, host: str) -> None:
    """Requeues the job, or queues another one in its place where the site lets none be requeued."""
    spec = JobSpec.from_json((folder / JOB_SPEC).read_text(encoding="utf-8"))
    reached = newest_step(Path(spec.target)) if spec.stage in TRAINING else 0
    # Before Slurm is asked, since it ends what runs in a requeued job, this process too.
    Events(folder / EVENTS, job=job).write("requeued", reason=reason, checkpoint=reached, saved=False)
    if slurm.insist("scontrol", "requeue", job, pause=RETRY_SECONDS).returncode > 0:
        queue(spec, [job], [host], succeeds=job)
        slurm.insist("scancel", job, pause=RETRY_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
