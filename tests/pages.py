"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("slurm/*.md")])


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block of a page."""
    parts = page.read_text(encoding="utf-8").split("```")[1::2]
    return [(language, text) for language, _, text in (part.partition("\n") for part in parts)]


def run_python(page: Path) -> dict[str, Any]:
    """Runs the Python blocks of a page, one after another; what they leave."""
    notebook: dict[str, Any] = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), notebook)
    return notebook


def has_python(page: Path) -> bool:
    """Tells whether a page has a Python block."""
    return any(language == "python" for language, _ in blocks(page))
