"""Exit codes: one table, which the documentation repeats word for word and no other code spells."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from bertscale.cli import main
from bertscale.errors import EXIT_CODES, STOPPED_AND_SAVED

ROOT = Path(__file__).parents[1]
PRODUCT = [path for room in ("bertscale", "data_prep", "launcher") for path in (ROOT / room).rglob("*.py")]
NAMED = set(EXIT_CODES) - {0, 1}
# Names that hold an exit code, and calls that take one.
HOLDERS = re.compile(r"code|returncode")
ENDS = {"sys.exit", "os._exit", "SystemExit", "give_up", "self.give_up", "job.give_up", "self.requeue"}


@pytest.mark.parametrize("page", ["docs/pretrain.md", "docs/slurm.md"])
def test_the_documentation_has_the_table(page: str) -> None:
    rows = "".join(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items())
    assert f"| --- | --- |\n{rows}| other | " in (ROOT / page).read_text(encoding="utf-8")


def test_help_names_the_code_of_a_run_that_was_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    assert f"exits with {STOPPED_AND_SAVED}:" in " ".join(capsys.readouterr().out.split())


def spelled(tree: ast.AST) -> list[int]:
    """Lines that spell the number of an exit code: as a result, a constant, beside a `code`, at an end."""
    lines = []
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        match node:
            case ast.Return(value=ast.IfExp(body=body, orelse=orelse)):
                parts = [body, orelse]
            case ast.Return(value=ast.expr() as value) | ast.Assign(targets=[ast.Name()], value=value):
                parts = [value]
            case ast.Compare(left=left, comparators=others) if HOLDERS.search(ast.unparse(left)):
                parts = [part for other in others for part in (*getattr(other, "elts", ()), other)]
            case ast.Call(func=func, args=args) if ast.unparse(func) in ENDS:
                parts = [part for argument in args for part in (*vars(argument).values(), argument)]
        lines += [
            part.lineno
            for part in parts
            if isinstance(part, ast.Constant) and isinstance(part.value, int) and part.value in NAMED
        ]
    return sorted(lines)


def test_the_numbers_are_spelled_in_the_table_alone() -> None:
    commands = ("cli", "console", "quickstart", "pretrain", "collect")
    for path in PRODUCT:
        if (path.stem in commands and path.parent.name != "config") or path.parent == ROOT / "launcher":
            assert not spelled(ast.parse(path.read_text(encoding="utf-8"))), path
    text = "HUNG = 76\ndef f():\n  if code in (0, 75): sys.exit(130 if a else 0)\n  return 2\n"
    assert spelled(ast.parse(text)) == [1, 3, 3, 4]
