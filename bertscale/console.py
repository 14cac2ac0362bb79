"""Help and error messages of the command line."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from bertscale.errors import MISTAKE

if TYPE_CHECKING:
    from bertscale.config import Section

# The first of them that a config has is shown in its help.
EXAMPLES = (("train.steps", "100"), ("train.epochs", "3"), ("workers", "4"))


def make_parser(
    name: str, description: str, section: type[Section] | None = None, default: str | None = None
) -> argparse.ArgumentParser:
    """The parser of one command; with `section`, of CONFIG and overrides, its keys listed in the help.

    CONFIG may be left out where it has a `default`.
    """
    width = shutil.get_terminal_size().columns - 2
    parser = argparse.ArgumentParser(
        prog=f"bertscale {name}",
        description=textwrap.fill(description, width),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if section is not None:
        from bertscale.config import describe_fields

        rows = describe_fields(section)
        if default is None:
            parser.add_argument("config", metavar="CONFIG", help="A YAML file.")
        else:
            text = f"A YAML file; without it {default}."
            parser.add_argument("config", metavar="CONFIG", nargs="?", default=default, help=text)
        parser.add_argument(
            "overrides",
            metavar="key=value",
            nargs="*",
            help=f"A value, read as YAML, that replaces the file's, such as {_example(rows)}.",
        )
        column = max(len(key) for key, _ in rows) + 4
        parser.epilog = "keys of CONFIG:\n" + "\n".join(
            textwrap.fill(
                text, width, initial_indent=f"  {key}".ljust(column), subsequent_indent=" " * column
            )
            for key, text in rows
        )
    return parser


def _example(rows: list[tuple[str, str]]) -> str:
    keys = [key for key, _ in rows]
    return next(f"{key}={value}" for key, value in EXAMPLES if key in keys)


def complain(name: str, message: str) -> int:
    """A mistake of the person, in one line or several; returns the exit code."""
    for line in message.splitlines():
        print(f"bertscale {name}: error: {line}", file=sys.stderr)
    return MISTAKE


def disk_full(error: OSError) -> str:
    """What to say where there is no space left."""
    where = f" while writing {error.filename}" if error.filename else ""
    return f"{error.strerror}{where}; free some space and run the same command again"
