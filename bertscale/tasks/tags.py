"""Schemes of tags: entities of words written as a tag for each word, and read again.

    find_scheme(["B-PER", "I-PER", "O"])                     # "bio"
    entities_of(["B-PER", "I-PER", "O"])                     # [(0, 2, "PER")]
    tags_of([(0, 2, "PER")], 3, "bioes")                     # ["B-PER", "E-PER", "O"]

| scheme | tags of an entity of one word, of two, of three                                             |
| ------ | --------------------------------------------------------------------------------------------- |
| bio    | B; B I; B I I (also called BIO2 or IOB2)                                                      |
| bioes  | S; B E; B I E                                                                                 |
| bmes   | S; B E; B M E                                                                                 |
| io     | I; I I; I I I: two entities of one label side by side become one                              |
| none   | no entities: each word has a class of its own, as in part-of-speech tagging                   |

Two more are read, by what their letters mean: BILOU, where L is E and U is S, and IOB1, where B stands only
between two entities of one label.

Entities are read by one of two rules, those of seqeval (https://github.com/chakki-works/seqeval): the lenient
one, which is conlleval's of CoNLL-2000 to 2003 and finds an entity in any tags, and the strict one, by which
tags that break their scheme make no entity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, cast

from bertscale.config import UserError

Scheme = Literal["bio", "bioes", "bmes", "io", "none"]
Entity = tuple[int, int, str]  # first word, the word behind the last one, label

OUTSIDE = "O"
NO_LABEL = "_"  # of the tags "B" and "I", which name no label
_MEANING = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}
_LETTERS = {"bio": "BI", "bioes": "BIES", "bmes": "BMES", "io": "I"}
_tag = re.compile(r"([BIMELSU])(?:-(.+))?")


def split_tag(tag: str) -> tuple[str, str]:
    """Returns what the letter of a tag means, one of "O", "B", "I", "E" and "S", and its label.

    What is no tag of a scheme is outside of entities.
    """
    match = _tag.fullmatch(tag)
    return (_MEANING[match[1]], match[2] or NO_LABEL) if match else (OUTSIDE, "")


def is_tag(tag: str) -> bool:
    """Whether it is a tag of some scheme, "O" among them."""
    return tag == OUTSIDE or _tag.fullmatch(tag) is not None


def find_scheme(tags: Iterable[str]) -> Scheme:
    """Finds the scheme of a set of tags by their letters; "none" where there are tags without such letters.

    IOB1 is "bio", BILOU and IOE are "bioes": `entities_of` reads them, and these write the same entities.
    Raises UserError for letters of which no scheme has all.
    """
    used = set(tags) - {OUTSIDE}
    if not used or not all(map(is_tag, used)):
        return "none"
    letters = {tag[0] for tag in used}
    if letters == {"I"}:
        return "io"
    for scheme, known in (("bio", "BI"), ("bioes", "BIES"), ("bmes", "BMES"), ("bioes", "BILU")):
        if letters <= set(known):
            return cast(Scheme, scheme)
    raise UserError(
        f"tags that begin with {', '.join(sorted(letters))} are in no scheme that is known: set "
        "encoding.tag_scheme to bio, bioes, bmes or io if it is one, or to none if each tag is a class"
    )


def is_iob1(sequences: Iterable[Sequence[str]]) -> bool:
    """Whether tags are in IOB1: entities begin with I, and with B only behind another one of their label."""
    begins_with_i = False
    for tags in sequences:
        before = OUTSIDE, ""
        for tag in map(split_tag, tags):
            letter, label = tag
            if letter == "B" and before[1] != label:
                return False
            begins_with_i |= letter == "I" and before[1] != label
            before = tag
    return begins_with_i


def tags_of_labels(labels: Iterable[str], scheme: Scheme) -> list[str]:
    """Lists all tags that entities with these labels can have: "O", then label by label."""
    if scheme == "none":
        return list(labels)
    return [OUTSIDE, *(_write(letter, label) for label in labels for letter in _LETTERS[scheme])]


def tags_of(entities: Iterable[Entity], count: int, scheme: Scheme) -> list[str]:
    """Writes entities, which do not overlap, as the tags of `count` words."""
    tags = [OUTSIDE] * count
    for first, end, label in entities:
        for i in range(first, end):
            tags[i] = _write(_letter(i - first, end - first, scheme), label)
    return tags


def _letter(place: int, count: int, scheme: Scheme) -> str:
    """The letter of the word at `place` of an entity of `count` words."""
    if scheme == "io":
        return "I"
    if scheme == "bio":
        return "I" if place else "B"
    if count == 1:
        return "S"
    if place in (0, count - 1):
        return "E" if place else "B"
    return "M" if scheme == "bmes" else "I"


def _write(letter: str, label: str) -> str:
    return letter if label == NO_LABEL else f"{letter}-{label}"


def spread(tag: str, count: int, scheme: Scheme) -> list[str]:
    """Writes the tag of several words that have only one together, as that of each of them."""
    letter, label = split_tag(tag)
    if scheme in ("none", "io") or letter == OUTSIDE or count == 1:
        return [tag] * count
    # With a word more at the side where the entity goes on, which is then taken off again.
    before, behind = letter in "IE", letter in "BI" and scheme != "bio"
    tags = tags_of([(0, before + count + behind, label)], before + count + behind, scheme)
    return tags[before : before + count]


def inside_of(before: str, behind: str, scheme: Scheme) -> str:
    """The tag of a word without one, between two: inside of an entity that goes across it, or "O"."""
    (letter, label), (other, other_label) = split_tag(before), split_tag(behind)
    if scheme != "none" and letter in ("B", "I") and other in ("I", "E") and label == other_label:
        return _write("M" if scheme == "bmes" else "I", label)
    return OUTSIDE


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """Reads entities by the lenient rule, that of conlleval.

    An entity begins at B and S, and at an I or E that has no entity of its label before it to go on; it ends
    behind E and S, and before anything that does not go on.
    """
    entities: list[Entity] = []
    first = 0
    before, before_label = OUTSIDE, ""
    for i, tag in enumerate([*tags, OUTSIDE]):
        letter, label = split_tag(tag)
        goes_on = letter in "IE" and before in ("B", "I") and label == before_label
        if not goes_on:
            if before != OUTSIDE:
                entities.append((first, i, before_label))
            first = i
        before, before_label = letter, label
    return entities


def strict_entities_of(tags: Sequence[str], scheme: Scheme) -> list[Entity]:
    """Reads entities by the strict rule: their tags must be those that their scheme writes.

    In bio a run of I behind the end of an entity is none; in bioes and bmes neither is one without its end.
    """
    if scheme in ("io", "none"):
        return entities_of(tags) if scheme == "io" else []
    pattern = "BI*" if scheme == "bio" else "S|BI*E"
    split = [split_tag(tag) for tag in tags]
    entities: list[Entity] = []
    first = 0
    while first < len(tags):
        label = split[first][1]
        if split[first][0] not in ("B", "S"):
            first += 1
            continue
        end = first
        while end < len(tags) and split[end][1] == label and (end == first or split[end][0] in "IE"):
            end += 1
        # The letters of the words of one label, from here on.
        match = re.match(pattern, "".join(letter for letter, _ in split[first:end]))
        if match:
            entities.append((first, first + match.end(), label))
        first += match.end() if match else 1
    return entities
