"""The wheel: every module and nothing else, and a command that works far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from bertscale import cli

ROOT = Path(__file__).parents[1]
PACKAGES = ("bertscale", "data_prep", "launcher")
# Beside the packages stands what a checkout has: none of it may be taken for a package.
BESIDE = ("benchmarks", "configs", "docs", "slurm", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, *BESIDE):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "tree"))
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--disable-pip-version-check"], check=True)


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert names == modules


def test_help_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--target", str(installed), str(wheel))
    # -S: the dependencies of this interpreter, but not the checkout, which an editable install points to.
    libraries = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *libraries])}

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-S", *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    for name in PACKAGES:
        assert run("-c", f"import {name}; print({name}.__file__)").startswith(str(installed))
    command = str(installed / "bin" / "bertscale")
    assert run(command, "--help").startswith("usage: bertscale COMMAND")
    for name in cli.COMMANDS:
        assert run(command, name, "--help").startswith(f"usage: bertscale {name}")
    # These two read configs that only a checkout has.
    for name in ("bench", "quickstart"):
        assert "there is no configs/pretrain/quickstart.yaml here" in run(command, name, code=2)
    assert run("-m", "data_prep.docstrings", "--help").startswith("The English documentation")
