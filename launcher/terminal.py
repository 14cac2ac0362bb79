"""A terminal that closes (SIGHUP), or a reader that has enough (`| head`): prints go nowhere from then on, so
that a run can save and end, and a pipeline is queued or cancelled as a whole."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO


class _Screen(io.TextIOWrapper):
    """A stream to a terminal or a reader; once that is gone (EIO, EPIPE), it leads to /dev/null."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lead_nowhere(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lead_nowhere(error)

    def _lead_nowhere(self, error: OSError) -> None:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # what the buffer still holds goes there as well
        os.close(nowhere)


def outlive_terminal() -> None:
    """Has stdout and stderr survive the end of the terminal that they lead to."""
    sys.stdout, sys.stderr = (_survivor(stream) for stream in (sys.stdout, sys.stderr))


def outlive_readers() -> None:
    """Has stdout and stderr of this process survive the end of whoever reads them."""
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _screen(sys.stdout)
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _screen(sys.stderr)


def _survivor(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or not stream.isatty():
        return stream
    return _screen(stream)


def _screen(stream: io.TextIOWrapper) -> _Screen:
    encoding, errors = stream.encoding, stream.errors
    return _Screen(stream.detach(), encoding=encoding, errors=errors, line_buffering=True)
