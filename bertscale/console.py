"""Help texts and error messages of the command line."""

from __future__ import annotations

import argparse
import errno
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from bertscale.errors import MISTAKE, UserError

if TYPE_CHECKING:
    from bertscale.config import Section

# A help text shows the first of these keys that its config has.
EXAMPLES = (("train.steps", "100"), ("train.epochs", "3"), ("workers", "4"))


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
        column = max(len(key) for key, _ in rows) + 4
        parser.epilog = "keys of CONFIG:\n" + "\n".join(
            textwrap.fill(
                text, width, initial_indent=f"  {key}".ljust(column), subsequent_indent=" " * column
            )
            for key, text in rows
        )
    return parser


def complain(name: str, message: str) -> int:
    """Prints a mistake of the user, in one line or several; returns the exit code."""
    for line in message.splitlines():
        print(f"bertscale {name}: error: {line}", file=sys.stderr)
    return MISTAKE


@contextmanager
def full_disk_in_one_line() -> Iterator[None]:
    """Turns the OSError of a full disk or quota, which a user can mend, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        raise UserError(f"{error.strerror}{where}; free some space and run the same command again") from error
