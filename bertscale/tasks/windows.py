"""Long texts are cut, or read in windows; and which of these shows most of what is around a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Sequences = list[tuple[Sequence[int], Sequence[int] | None]]


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


def cut_to(ids: Sequence[Sequence[int]], max_length: int) -> tuple[Sequences, bool]:
    """Returns the sample of one text or a pair, cut to `max_length` tokens, and whether it was cut."""
    if len(ids) == 1:
        room = max_length - 2
        return [(ids[0][:room], None)], len(ids[0]) > room
    first, second = ids
    room = max_length - 3
    keep = longest_first(len(first), len(second), room)
    return [(first[: keep[0]], second[: keep[1]])], len(first) + len(second) > room


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Returns how many tokens are kept of each text of a pair, `room` at most.

    Of two texts that both have more than half of it each keeps half; a token that is over goes to the longer
    one, or to the second. Formula of `truncate_encodings` in https://github.com/huggingface/tokenizers.
    """
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    if short > room // 2:
        short = room // 2
    long = room - short
    return (long, short) if first > second else (short, long)


def windows_of(ids: Sequence[Sequence[int]], max_length: int, overlap: int) -> tuple[Sequences, bool]:
    """Returns samples that show all of the last text, neighbours sharing `overlap` of its tokens.

    The first text of a pair is in each of them; where that leaves less than half of the room, and not enough,
    it is cut, and the second value says so.
    """
    if sum(map(len, ids)) <= max_length - len(ids) - 1:
        return cut_to(ids, max_length)
    text = ids[-1]
    room = max_length - len(ids) - 1
    first: Sequence[int] = []
    if len(ids) == 2:
        first = ids[0][: max(room // 2, room - len(text))]
        room -= len(first)
    parts = [text[begin:end] for begin, end in cut_windows(len(text), room, overlap)]
    if len(ids) == 1:
        return [(part, None) for part in parts], False
    return [(first, part) for part in parts], len(first) < len(ids[0])
