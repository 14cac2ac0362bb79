"""Windows of a long text, and which of them shows most of what is around a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def cut_windows(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Returns begin and end of each window of `room` tokens; neighbours share `overlap`, at most half.

    The last window ends with the text and is as long as the others.
    """
    if tokens <= room:
        return [(0, tokens)]
    step = room - min(overlap, room // 2)
    begins = [*range(0, tokens - room, step), tokens - room]
    return [(begin, begin + room) for begin in begins]


def most_context(windows: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.bool_]]:
    """Tells for each token of each window whether this is the one that shows most context on both sides.

    Context is the lesser of the tokens before and behind it in the window; at the ends of the text none is
    missing. Of equal windows it is the first.
    """
    tokens = windows[-1][1]
    place = np.arange(tokens)
    context = np.full((len(windows), tokens), -1)
    for row, (begin, end) in zip(context, windows, strict=True):
        before = place[begin:end] - (begin if begin else -tokens)
        behind = (end - 1 if end < tokens else 2 * tokens) - place[begin:end]
        row[begin:end] = np.minimum(before, behind)
    owner = context.argmax(0)
    return [owner[begin:end] == number for number, (begin, end) in enumerate(windows)]
