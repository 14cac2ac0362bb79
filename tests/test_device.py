"""Which device a run takes, and why: each circumstance of GPU, driver, torch and environment, made up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import pretrain_config

from bertscale import cli, gpus
from bertscale.config import FinetuneConfig, PretrainConfig, Section, UserError, load_config
from bertscale.gpus import count_gpus
from bertscale.train.device import device_line, local_device

Machine = Callable[..., None]
CPUS = len(os.sched_getaffinity(0))
CPU = f"device    CPU, {CPUS} core{'s' if CPUS > 1 else ''}"
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
    "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(build, devices, visible, ...)`: torch built for that CUDA, so many GPUs, CUDA_VISIBLE_DEVICES.

    `smi`: whether nvidia-smi is there and works; `failure`: what torch says of a driver that it cannot use.
    """

    def make(
        build: str | None, devices: int, visible: str | None = None, smi: bool = True, failure: str = ""
    ) -> None:
        version = f"debug = False\ncuda: Optional[str] = {build!r}\nhip = None\n"
        (tmp_path / "version.py").write_text(version)
        spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
        monkeypatch.setattr(gpus, "DEVICES", tmp_path)
        for number in range(devices):
            (tmp_path / f"nvidia{number}").touch()
        (tmp_path / "nvidiactl").touch()
        tool = tmp_path / "nvidia-smi"
        lines = "\n".join(f"echo 'GPU {n}: Some GPU (UUID: GPU-{n})'" for n in range(devices))
        tool.write_text(f"#!/bin/sh\n{lines}\n" if smi and devices else "#!/bin/sh\nexit 9\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

        def start() -> None:
            raise RuntimeError(failure)

        works = bool(build and devices and not failure and visible not in ("", "-1"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "init", start)
        monkeypatch.setattr(torch.version, "cuda", build)

    return make


@pytest.mark.parametrize(
    ("build", "devices", "visible", "smi", "count"),
    [
        ("12.8", 4, None, True, 4),
        ("12.8", 4, "2,0", True, 2),
        ("12.8", 4, "", True, 0),
        ("12.8", 4, "1,-1,2", True, 1),
        ("12.8", 4, "NoDevFiles", True, 0),
        ("12.8", 1, "0,1", True, 1),
        ("12.8", 0, None, True, 0),
        ("12.8", 2, None, False, 2),  # in a container without nvidia-smi
        (None, 0, None, True, 0),
    ],
)
def test_the_gpus_of_a_machine_are_counted_without_torch(
    build: str | None, devices: int, visible: str | None, smi: bool, count: int, machine: Machine
) -> None:
    machine(build, devices, visible, smi)
    assert count_gpus("auto") == count
    assert count_gpus("cpu") == 0


def test_a_run_on_gpus_names_them(machine: Machine) -> None:
    machine("12.8", 2)
    os.environ["LOCAL_RANK"] = "1"
    for wanted in ("auto", "cuda"):
        device = local_device(wanted)
        assert device == torch.device("cuda", 1)
        assert device_line(device, wanted, ranks=16) == "device    16 x NVIDIA H100 (CUDA 12.8)"


@pytest.mark.parametrize(
    ("wanted", "build", "devices", "visible", "reason"),
    [
        ("auto", None, 0, None, "no CUDA device: torch is the CPU build"),
        ("auto", "12.8", 2, "", "CUDA_VISIBLE_DEVICES is empty"),
        ("auto", "12.8", 2, "-1", "CUDA_VISIBLE_DEVICES=-1 hides all GPUs"),
        ("auto", None, 2, "", "CUDA_VISIBLE_DEVICES is empty"),
        ("auto", "12.8", 0, None, "the NVIDIA driver is not loaded"),
        ("cpu", "12.8", 2, None, "as configured"),
        ("cpu", None, 2, None, "as configured"),
    ],
)
def test_a_run_on_the_cpu_says_why(
    wanted: str, build: str | None, devices: int, visible: str | None, reason: str, machine: Machine
) -> None:
    machine(build, devices, visible)
    device = local_device(wanted)
    assert device == torch.device("cpu")
    assert device_line(device, wanted) == f"{CPU} ({reason})"


@pytest.mark.parametrize(
    ("wanted", "build", "devices", "visible", "failure", "said"),
    [
        ("cuda", None, 0, None, "", "no CUDA device: torch is the CPU build: install a torch"),
        ("cuda", "12.8", 0, None, "", "the NVIDIA driver is not loaded: load it (`nvidia-smi` must"),
        ("cuda", "12.8", 2, "", "", "CUDA_VISIBLE_DEVICES is empty: unset it, or name GPUs in it"),
        ("auto", None, 1, None, "", "torch is the CPU build, and this machine has 1 GPU: install a torch"),
        ("auto", None, 2, "0", "", "torch is the CPU build, and this machine has 2 GPUs: install a torch"),
        ("auto", "12.8", 0, "0,1", "", "not loaded, and CUDA_VISIBLE_DEVICES=0,1 names GPUs: load it"),
        ("auto", "12.8", 2, None, TOO_OLD, "too old (found version 11040)): install a driver for the CUDA"),
        ("cuda", "12.8", 2, None, TOO_OLD, "too old (found version 11040)): install a driver for the CUDA"),
    ],
)
def test_a_gpu_that_was_meant_and_cannot_be_used_is_an_error(
    wanted: str,
    build: str | None,
    devices: int,
    visible: str | None,
    failure: str,
    said: str,
    machine: Machine,
) -> None:
    machine(build, devices, visible, failure=failure)
    with pytest.raises(UserError) as caught:
        local_device(wanted)
    message = str(caught.value)
    assert message.startswith(f"device={wanted}: ")
    assert said in message
    assert message.endswith(", or set device=cpu to go on without a GPU")
    assert "\n" not in message
    assert local_device("cpu") == torch.device("cpu")
    if not failure:  # else torch alone knows
        with pytest.raises(UserError) as caught:
            count_gpus(wanted)
        assert str(caught.value) == message


# --------------------------------------------------------------------------------------- the commands


def test_device_cpu_hides_the_gpus_from_ranks_and_torch(machine: Machine, tmp_path: Path) -> None:
    machine("12.8", 4)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(pretrain_config("data", "run").model_dump()))
    _, count = cli._checked(str(config), [], None, verify=False, data=False)
    assert (count, os.environ.get("CUDA_VISIBLE_DEVICES")) == (4, None)
    _, count = cli._checked(str(config), ["device=cpu"], None, verify=False, data=False)
    assert (count, os.environ.get("CUDA_VISIBLE_DEVICES")) == (1, "")


@pytest.mark.parametrize("command", ["pretrain", "bench"])
def test_a_gpu_that_cannot_be_used_ends_a_command_before_ranks_start(
    command: str, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_data: Path
) -> None:
    machine(None, 1)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(pretrain_config(tiny_data, tmp_path / "run").model_dump()))
    assert cli.main([command, str(config)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"bertscale {command}: error: device=auto: no CUDA device: torch is")


@pytest.mark.parametrize(
    ("section", "override", "said"),
    [
        (PretrainConfig, "train.device=cpu", "unknown key train.device; did you mean device?"),
        (PretrainConfig, "parallel.device=cpu", "unknown key parallel.device; did you mean device?"),
        (PretrainConfig, "train.use_cpu=true", "unknown key train.use_cpu; did you mean device?"),
        (PretrainConfig, "no_cuda=true", "unknown key no_cuda; did you mean device?"),
        (PretrainConfig, "device=gpu", "device='gpu': input should be 'auto', 'cpu' or 'cuda'"),
        (FinetuneConfig, "model.device=cpu", "unknown key model.device; did you mean device?"),
    ],
)
def test_a_device_in_the_wrong_place_names_the_right_one(
    section: type[Section], override: str, said: str, tmp_path: Path
) -> None:
    data = {"data": {"train": "a", "test": "b"}, "encoder": "c", "output": "d"}
    values = data if section is FinetuneConfig else pretrain_config("data", "run").model_dump()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as caught:
        load_config(section, config, [override])
    assert str(caught.value) == f"{config}: {said}"
