"""Schemes of tags: entities -> tags -> entities, seqeval's two rules, the scheme found from the tags."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import UserError
from bertscale.tasks.tags import (
    Entity,
    Scheme,
    entities_of,
    find_scheme,
    inside_of,
    is_iob1,
    spread,
    strict_entities_of,
    tags_of,
    tags_of_labels,
)

SCHEMES: list[Scheme] = ["bio", "bioes", "bmes", "io"]


@st.composite
def entities(draw: st.DrawFn, apart: int = 0) -> list[Entity]:
    """Some that do not overlap, with `apart` words between them at least."""
    result: list[Entity] = []
    place = 0
    for gap, length, label in draw(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(1, 4), st.sampled_from(["PER", "LOC-A", "_"])),
            max_size=6,
        )
    ):
        first = place + gap + (apart if result else 0)
        place = first + length
        result.append((first, place, label))
    return result


any_tags = st.lists(
    st.sampled_from(["O", *(f"{letter}-{label}" for letter in "BIES" for label in ("X", "Y"))]), max_size=12
)


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_entities_come_back_from_their_tags(scheme: Scheme, data: st.DataObject) -> None:
    ours = data.draw(entities(apart=scheme == "io"))
    count = (ours[-1][1] if ours else 0) + data.draw(st.integers(0, 2))
    tags = tags_of(ours, count, scheme)
    assert len(tags) == count
    assert entities_of(tags) == ours
    assert strict_entities_of(tags, scheme) == ours
    assert set(tags) <= set(tags_of_labels(["PER", "LOC-A", "_"], scheme))


def test_how_each_scheme_writes_an_entity() -> None:
    wanted = {"bio": "BII", "bioes": "BIE", "bmes": "BME", "io": "III"}
    for scheme in SCHEMES:
        assert tags_of([(1, 4, "X")], 5, scheme) == ["O", *(f"{c}-X" for c in wanted[scheme]), "O"]
        one = {"bio": "B", "io": "I"}.get(scheme, "S")
        assert tags_of([(0, 1, "_")], 1, scheme) == [one]
    assert tags_of_labels(["X", "Y"], "bmes") == [
        *("O", "B-X", "M-X", "E-X", "S-X"),
        *("B-Y", "M-Y", "E-Y", "S-Y"),
    ]
    assert tags_of_labels(["NN", "VB"], "none") == ["NN", "VB"]


@pytest.mark.parametrize(
    ("tags", "lenient"),
    [
        ("B-PER I-PER O B-LOC", [(0, 2, "PER"), (3, 4, "LOC")]),  # get_entities of seqeval
        ("O O O B-MISC I-MISC I-MISC O B-PER I-PER", [(3, 6, "MISC"), (7, 9, "PER")]),
        ("O O O B I I O O B I O", [(3, 6, "_"), (8, 10, "_")]),
        ("I-A I-A I-B", [(0, 2, "A"), (2, 3, "B")]),  # IOB1
        ("I-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
        ("I-組織 I-組織", [(0, 2, "組織")]),
        ("B-ORG-COMPANY I-ORG-COMPANY", [(0, 2, "ORG-COMPANY")]),
        ("B-A E-A E-A S-A I-A", [(0, 2, "A"), (2, 3, "A"), (3, 4, "A"), (4, 5, "A")]),
        ("B-A M-A E-A S-B", [(0, 3, "A"), (3, 4, "B")]),  # BMES
        ("B-A L-A U-B", [(0, 2, "A"), (2, 3, "B")]),  # BILOU
        ("NN VB O", []),
        ("", []),
    ],
)
def test_lenient_rule(tags: str, lenient: list[Entity]) -> None:
    assert entities_of(tags.split()) == lenient


@pytest.mark.parametrize(
    ("scheme", "tags", "strict"),
    [
        # The tables of seqeval's tests of IOB2 and IOBES.
        ("bio", "B-PER", [(0, 1, "PER")]),
        ("bio", "I-PER", []),
        ("bio", "O B-PER", [(1, 2, "PER")]),
        ("bio", "I-PER I-PER", []),
        ("bio", "I-PER B-PER", [(1, 2, "PER")]),
        ("bio", "I-PER B-ORG", [(1, 2, "ORG")]),
        ("bio", "B-PER I-PER", [(0, 2, "PER")]),
        ("bio", "B-PER I-ORG", [(0, 1, "PER")]),
        ("bio", "B-PER B-PER", [(0, 1, "PER"), (1, 2, "PER")]),
        ("bio", "B-PER B-ORG", [(0, 1, "PER"), (1, 2, "ORG")]),
        ("bioes", "B", []),
        ("bioes", "I E", []),
        ("bioes", "S", [(0, 1, "_")]),
        ("bioes", "B B", []),
        ("bioes", "B E", [(0, 2, "_")]),
        ("bioes", "B S", [(1, 2, "_")]),
        ("bioes", "S I", [(0, 1, "_")]),
        ("bioes", "S S", [(0, 1, "_"), (1, 2, "_")]),
        ("bioes", "B-PER I-ORG E-PER", []),
        ("bioes", "B-PER E-ORG", []),
        ("bioes", "B-A B-A I-A E-A E-A", [(1, 4, "A")]),
        ("bioes", "B-PER L-PER U-PER", [(0, 2, "PER"), (2, 3, "PER")]),
        ("bmes", "B-A M-A E-A M-A", [(0, 3, "A")]),
        ("none", "B-A", []),
    ],
)
def test_strict_rule(scheme: Scheme, tags: str, strict: list[Entity]) -> None:
    assert strict_entities_of(tags.split(), scheme) == strict


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tags=any_tags)
def test_strict_entities_are_among_the_lenient_ones_of_their_tags(tags: list[str]) -> None:
    for scheme in ("bio", "bioes"):
        clean = tags_of(entities_of(tags), len(tags), scheme)
        assert strict_entities_of(clean, scheme) == entities_of(clean) == entities_of(tags)


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("B-X I-X O", "bio"),
        ("B I", "bio"),
        ("I-X O", "io"),
        ("B-X I-X E-X S-X", "bioes"),
        ("B-X E-X", "bioes"),
        ("I-X E-X O", "bioes"),
        ("B-X L-X U-X", "bioes"),
        ("B-X M-X", "bmes"),
        ("B M E S", "bmes"),
        ("NN VB", "none"),
        ("B-X NN", "none"),
        ("O", "none"),
    ],
)
def test_the_scheme_is_found(tags: str, scheme: Scheme) -> None:
    assert find_scheme(tags.split()) == scheme


def test_letters_of_two_schemes_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"tags that begin with I, M are in no scheme .*set encoding\.tag_scheme"
    ):
        find_scheme(["O", "I-X", "M-X"])


def test_iob1() -> None:
    assert is_iob1([["I-A", "I-A", "B-A"], ["O", "I-B"]])
    assert not is_iob1([["I-A", "O", "B-A"]])
    assert not is_iob1([["B-A", "I-A"]])
    assert not is_iob1([["O"]])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_words_that_share_a_tag(scheme: Scheme, count: int) -> None:
    """Of an entity of three units, the one in the middle and so on may stand for `count` words."""
    for units in (1, 2, 3):
        for unit, tag in enumerate(tags_of([(0, units, "X")], units, scheme)):
            tags = tags_of([(0, units, "X")], units, scheme)
            whole = [*tags[:unit], *spread(tag, count, scheme), *tags[unit + 1 :]]
            assert whole == tags_of([(0, units - 1 + count, "X")], units - 1 + count, scheme)
    assert spread("O", 2, scheme) == ["O", "O"]
    assert spread("NN", 2, "none") == ["NN", "NN"]


def test_a_word_without_a_tag_inside_an_entity() -> None:
    assert inside_of("B-X", "I-X", "bio") == "I-X"
    assert inside_of("B-X", "E-X", "bmes") == "M-X"
    assert inside_of("B-X", "B-X", "bio") == "O"
    assert inside_of("B-X", "I-Y", "bio") == "O"
    assert inside_of("E-X", "I-X", "bioes") == "O"
    assert inside_of("NN", "NN", "none") == "O"
