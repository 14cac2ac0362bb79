"""docs/cluster-first-day.md: its files are valid, it installs as make does."""

from __future__ import annotations

import re

import yaml
from pages import ROOT, blocks

from bertscale.config import ClusterConfig

PAGE = ROOT / "docs/cluster-first-day.md"
RECIPE = (ROOT / "slurm/bertscale.def").read_text(encoding="utf-8")


def recipe(section: str) -> str:
    """The lines of a section of slurm/bertscale.def."""
    [text] = re.findall(rf"^%{section}\n(.*?)(?=^%|\Z)", RECIPE, flags=re.DOTALL | re.MULTILINE)
    return str(text)


def test_every_cluster_file_is_valid() -> None:
    files = [yaml.safe_load(text) for language, text in blocks(PAGE) if language == "yaml"]
    sites = [ClusterConfig.model_validate(values) for values in files]
    assert [site.gpus_per_node for site in sites if site.partition] == [8]
    assert len(sites) == 3


def test_page_and_recipe_install_as_make_does() -> None:
    install = "python -m pip install"
    [on_page] = re.findall(rf"^{install} (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [in_recipe] = re.findall(rf"{install} --no-cache-dir (.*)$", recipe("post"), flags=re.MULTILINE)
    assert on_page == in_recipe == "-c constraints.txt ."
    assert '-c constraints.txt -e ".[dev,chinese]"' in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_recipe_copies_all_that_is_installed() -> None:
    copied = [line.split() for line in recipe("files").splitlines() if line.strip()]
    assert all((ROOT / source).exists() and target == f"/opt/bertscale/{source}" for source, target in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"(\w+)\*"', project)
    named = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", *packages}
    assert {source for source, _ in copied} == named
    assert len(packages) == 3
