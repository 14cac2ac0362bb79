"""Help texts and error messages of the command line."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from bertscale.errors import BROKEN_PIPE, MISTAKE, UserError

if TYPE_CHECKING:
    from bertscale.config import Section

# A help text shows the first of these keys that its config has.
EXAMPLES = (("train.steps", "100"), ("train.epochs", "3"), ("workers", "4"))

_AWAY = "something else has a name that is needed: move it away"
REMEDIES = {
    errno.EISDIR: _AWAY,
    errno.ENOTDIR: _AWAY,
    errno.EEXIST: _AWAY,
    errno.EACCES: "choose another place, or ask for the permission",
    errno.EPERM: "choose another place, or ask for the permission",
    errno.EROFS: "choose another place, where files can be written",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # With positional arguments on both sides of options, argparse counts those that may be left out too.
        super().error(message.removesuffix(", key=value"))


def make_parser(
    name: str, description: str, section: type[Section] | None = None, default: str | None = None
) -> argparse.ArgumentParser:
    """Makes the parser of one command; with `section` it takes CONFIG and overrides, and its help lists keys.

    CONFIG may be left out where it has a `default`.
    """
    width = shutil.get_terminal_size().columns - 2
    parser = _Parser(
        prog=f"bertscale {name}",
        description=textwrap.fill(description, width),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if section is not None:
        from bertscale.config import describe_fields

        rows = describe_fields(section)
        example = next(f"{key}={value}" for key, value in EXAMPLES if key in dict(rows))
        if default is None:
            parser.add_argument("config", metavar="CONFIG", help="A YAML file.")
        else:
            text = f"A YAML file (default {default})."
            parser.add_argument("config", metavar="CONFIG", nargs="?", default=default, help=text)
        parser.add_argument(
            "overrides",
            metavar="key=value",
            nargs="*",
            help=f"A value, read as YAML, that replaces the one in the file, such as {example}.",
        )
        parser.epilog = key_table("keys of CONFIG", rows)
    return parser


def key_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Lists keys of a config, each with its description, as the end of a help text."""
    width = shutil.get_terminal_size().columns - 2
    column = max(len(key) for key, _ in rows) + 4
    lines = [
        textwrap.fill(text, width, initial_indent=f"  {key}".ljust(column), subsequent_indent=" " * column)
        for key, text in rows
    ]
    return "\n".join([f"{title}:", *lines])


def figure_lines(figures: dict[str, float]) -> str:
    """Lists figures, each with its name in front."""
    width = max(map(len, figures)) + 2
    return "\n".join(f"{name:<{width}}{value:.4f}" for name, value in figures.items())


def reader_left() -> int:
    """Has what is still to be printed go nowhere, since who reads it, such as `head`, has enough; returns the
    exit code for that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def complain(name: str, message: str) -> int:
    """Prints a mistake of the user, in one line or several; returns the exit code."""
    for line in message.splitlines():
        print(f"bertscale {name}: error: {line}", file=sys.stderr)
    return MISTAKE


@contextmanager
def disk_errors_in_one_line() -> Iterator[None]:
    """Turns an OSError that a user can mend, such as that of a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        named = f" {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing{named}" if named else ""
            remedy = "free some space and run the same command again"
            raise UserError(f"{error.strerror}{where}; {remedy}") from error
        if error.errno not in REMEDIES or not named:
            raise
        raise UserError(f"{error.strerror}:{named}; {REMEDIES[error.errno]}") from error
