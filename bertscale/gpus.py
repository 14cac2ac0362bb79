"""The GPUs of this machine as they are found without the seconds that importing torch takes.

count_gpus("auto")    # how many ranks they are worth; 0 where a run takes the CPU

What torch alone can tell, such as a driver that is too old, is told by bertscale.train.device.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bertscale.errors import UserError

DEVICES = Path("/dev")
HIDDEN = ("-1", "nodevfiles")  # CUDA stops reading there; the second is how Slurm says that a job has none
DRIVER = "load it (`nvidia-smi` must list the GPUs; a container needs --nv or --gpus)"
BUILD = "install a torch that is built for CUDA (pytorch.org/get-started/locally)"


@dataclass(frozen=True)
class Obstacle:
    """Why a run can have no CUDA device, what would mend it, and whether somebody meant it to have one."""

    reason: str
    remedy: str
    meant: bool


def count_gpus(wanted: str) -> int:
    """Counts the CUDA devices of a run with `device: wanted` on this machine.

    Raises UserError where it wants a GPU, or this machine has one, that cannot be used.
    """
    if wanted == "cpu":
        return 0
    chosen, gpus = _chosen(), _gpus_here()
    obstacle = _obstacle(chosen, gpus)
    if obstacle is not None:
        refuse(obstacle, wanted)
        return 0
    return gpus if chosen is None else min(gpus, len(chosen))


def hide_gpus(wanted: str) -> None:
    """Hides all GPUs from this process and those that it starts if `device: cpu` is `wanted`.

    Before torch is imported: it, and DeepSpeed, look for GPUs by themselves.
    """
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def refuse(obstacle: Obstacle, wanted: str) -> None:
    """Raises UserError unless a run with `device: wanted` may go on without a GPU."""
    if wanted == "cuda" or obstacle.meant:
        raise UserError(
            f"device={wanted}: {obstacle.reason}: {obstacle.remedy}, or set device=cpu to go on without a GPU"
        )


def find_obstacle() -> Obstacle | None:
    """Tells why torch will see no CUDA device, as far as can be known without it; None: it may see one."""
    return _obstacle(_chosen(), _gpus_here())


def _obstacle(chosen: list[str] | None, gpus: int) -> Obstacle | None:
    build = _torch_build()
    if chosen is not None and not chosen:
        value = os.environ["CUDA_VISIBLE_DEVICES"].strip()
        said = f"CUDA_VISIBLE_DEVICES={value} hides all GPUs" if value else "CUDA_VISIBLE_DEVICES is empty"
        return Obstacle(said, "unset it, or name GPUs in it", meant=False)
    meant = gpus > 0 or bool(chosen)
    here = f", and CUDA_VISIBLE_DEVICES={','.join(chosen)} names GPUs" if chosen else ""
    if gpus:
        here = f", and this machine has {gpus} GPU{'s' if gpus > 1 else ''}"
    if build is None:
        return Obstacle(f"no CUDA device: torch is the CPU build{here}", BUILD, meant)
    if not gpus:
        return Obstacle(f"the NVIDIA driver is not loaded{here}", DRIVER, meant)
    return None


def _chosen() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names; None where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names[: next((at for at, name in enumerate(names) if name.lower() in HIDDEN), len(names))]


def _gpus_here() -> int:
    """Counts the GPUs that nvidia-smi lists; in a container without it, those that have a device file."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in DEVICES.glob("nvidia*"))
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def _torch_build() -> str | None:
    """The version of CUDA that torch is built for; None for the CPU build."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    text = (Path(torch.origin).parent / "version.py").read_text(encoding="utf-8")
    build = re.search(r"^cuda\b[^=]*= *['\"]([^'\"]+)", text, re.MULTILINE)
    return build and build[1]
