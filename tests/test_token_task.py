"""Words with tags -> pieces of running text -> tags and entities of the raw text, for every tokenizer."""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig, ExamplesConfig
from bertscale.examples.conll import read_token_examples
from bertscale.tasks.tags import Scheme, entities_of, tags_of
from bertscale.tasks.task import NO_TARGET, Floats, Samples, TokenExample
from bertscale.tasks.tokens import TokenTask
from bertscale.tasks.windows import cut_windows, most_context
from bertscale.tasks.words import join_tokens, split_words, words_of_pieces
from bertscale.tokenizer import Tokenizer, load_tokenizer
from data_prep.train_tokenizer import train_tokenizer

DATA = os.environ.get("BERTSCALE_DATA", "")  # the fixture of all tests takes such variables away
TOPICS = [line for topic in pydoc_data.topics.topics.values() for line in topic.split("\n") if len(line) > 40]
LINES = ["The apple isn't red, and the river is long.", "Where is Paris? A dog and a cat live there."] * 50
HAN = ["北京是中国的首都。", "东京是日本的首都，我们学习日本語とカタカナ。", "株式会社の名前 2008年"] * 150
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "Paris", "paris", "app", "##le", "北", "京"]
PIECES += [prefix + c for c in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
PIECES += [*".,'-!?[]#", *(prefix + c for c in "ABCDEFGHIJKLMNOPRST" for prefix in ("", "##"))]
KINDS = [
    "unigram identity",
    "bpe identity",
    "unigram nfkc",
    "unigram chinese",
    "wordpiece lower",
    "wordpiece cased",
]

# White space, dropped and zero-width characters, marks, symbols, scripts of all kinds.
NASTY = [
    "The",
    " apple",
    "is",
    "n't",
    ".",
    "red,",
    "(",
    " ",
    "  ",
    "\n",
    "\u3000",
    "\u00a0",
    "Paris",
    "[MASK]",
]
NASTY += [*"\x00\x07\u00ad\ufeff\u200b\u200d\u2060\u0301\u0323\u0338\u3099\ufe0f\u0e33\u0bcb\ufffd\ue000"]
NASTY += ["e\u0301", "a\u0323\u0301", "😀", "👩\u200d💻", "🇩🇪", "❤\ufe0f", "①", "ﬁ", "㍿", "½", "ß", "İ", "Å"]
NASTY += [
    "北京",
    "日本",
    "カ",
    "ｶﾞ",
    "가",
    "\u1112\u1161\u11ab",
    "<0x41>",
    "हिन्दी",
    "x" * 40,
    "2008",
    "，",
    "。",
]
nasty_texts = st.lists(st.sampled_from(NASTY) | st.characters(exclude_categories=["Cs"]), max_size=12).map(
    "".join
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    kind, rule = request.param.split()
    if kind == "wordpiece":
        pieces = [p for p in PIECES if rule == "cased" or p == p.lower() or p.startswith("[")]
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
        return load_tokenizer(folder / "vocab.txt", lowercase=rule == "lower")
    lines = HAN + TOPICS[:100] if rule == "chinese" else LINES + HAN + TOPICS[:1000]
    (folder / "lines.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    settings: dict[str, Any] = {"rule": "nfkc" if rule == "nfkc" else "identity"}
    settings["space_before_text"] = rule != "chinese"
    model: Any = kind
    train_tokenizer([folder / "lines.txt"], folder / "tokenizer.model", model, 450, **settings)
    return load_tokenizer(folder / "tokenizer.model")


def example(text: str, spans: Sequence[tuple[int, int, str]] = (), scheme: Scheme = "bio") -> TokenExample:
    """Of words as `split_words` makes them, and spans that begin and end with words."""
    words = split_words(text, [edge for start, end, _ in spans for edge in (start, end)])
    first = {start: i for i, (start, _) in enumerate(words)}
    last = {end: i + 1 for i, (_, end) in enumerate(words)}
    entities = [(first[start], last[end], label) for start, end, label in spans]
    return TokenExample(place="x", text=text, words=words, tags=tuple(tags_of(entities, len(words), scheme)))


def gold_logits(task: TokenTask, samples: Samples) -> Floats:
    """What a model says that has learnt all targets, and else says the first tag."""
    logits = np.zeros((len(samples.tokens), task.outputs), np.float32)
    logits[:, 0] = 1
    assert samples.targets is not None
    known = np.flatnonzero(samples.targets != NO_TARGET)
    logits[known, samples.targets[known]] = 9
    return logits


def answers(task: TokenTask, examples: list[TokenExample], tokenizer: Tokenizer, **settings: Any) -> Any:
    samples = task.encode(examples, tokenizer, EncodingConfig(**settings))
    return task.predict(examples, samples, gold_logits(task, samples))


@st.composite
def spans_of(draw: st.DrawFn, text: str) -> list[tuple[int, int, str]]:
    """Spans of a text that do not overlap, with no white space at their ends."""
    edges = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans = []
    for start, end in zip(edges[::2], edges[1::2], strict=False):
        inner = text[start:end].strip()
        if inner:
            start += text[start:end].index(inner)
            spans.append((start, start + len(inner), draw(st.sampled_from(["PER", "LOC"]))))
    return spans


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), text=nasty_texts, scheme=st.sampled_from(["bio", "bioes", "bmes"]))
def test_spans_come_back_from_pieces(
    tokenizer: Tokenizer, data: st.DataObject, text: str, scheme: Scheme
) -> None:
    spans = data.draw(spans_of(text))
    ours = example(text, spans)
    assert [text[start:end] for start, end in ours.words] == ["".join(p.split()) for p in words_texts(ours)]
    [(ids, places)] = tokenizer.encode_with_offsets([text])
    task = TokenTask(["O", *(f"{c}-{x}" for x in ("PER", "LOC") for c in "BIMES")], scheme)
    if not ids:
        with pytest.raises(UserError, match="x: the tokenizer has no piece"):
            task.encode([ours], tokenizer, EncodingConfig())
        return
    settings = EncodingConfig(max_length=data.draw(st.sampled_from([8, 16, 512])))
    samples = task.encode([ours], tokenizer, settings)
    # Running text, as it stands, whatever the words are.
    if len(samples) == 1:
        assert samples.tokens.tolist()[1:-1] == tokenizer.encode([tokenizer.normalize(text)])[0]
    assert samples.words is not None
    given_words = [word for first, end in samples.words.tolist() for word in range(first, end)]
    assert len(given_words) == len(set(given_words))  # each in one window only
    [prediction] = task.predict([ours], samples, gold_logits(task, samples))
    assert len(prediction["tags"]) == len(prediction["words"]) == len(ours.words)
    ranges = words_of_pieces(ours.words, places)
    if len(ranges) == len(ours.words):  # each word has a piece of its own
        assert [(e["start"], e["end"], e["label"]) for e in prediction["entities"]] == spans
        assert prediction["tags"] == task.gold(ours)
    for entity in prediction["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"] == entity["text"].strip()
        assert entity["score"] == pytest.approx(1, abs=0.01)


def words_texts(ours: TokenExample) -> list[str]:
    return [ours.text[start:end] for start, end in ours.words]


def test_the_first_piece_of_a_word_has_its_tag(tokenizer: Tokenizer) -> None:
    text = "The apple is Parisienne, " + "x" * 30 + " 北京."
    [(ids, places)] = tokenizer.encode_with_offsets([text])
    start = text.index("北")
    ours = example(text, [(0, 3, "A"), (start, start + 1, "A"), (start + 1, start + 2, "B")])
    task = TokenTask.of([ours], ExamplesConfig(train="x"), EncodingConfig())
    assert task.labels == ["O", "B-A", "I-A", "B-B", "I-B"]
    samples = task.encode([ours], tokenizer, EncodingConfig())
    assert samples.targets is not None
    assert (samples.targets[0], samples.targets[-1]) == (NO_TARGET, NO_TARGET)
    learnt = np.flatnonzero(samples.targets != NO_TARGET) - 1
    begins = [places[piece][0] for piece in learnt]
    assert begins[0] == 0
    assert samples.targets[learnt[0] + 1] == 1
    assert sum(text.index("x" * 30) <= begin < start - 1 for begin in begins) == 1  # of thirty pieces, one
    assert len(set(begins)) == len(begins)
    assert len(ids) > len(learnt)


def test_a_piece_of_two_words() -> None:
    """A word that owns no piece goes with the one whose piece covers it."""
    words = ((0, 2), (2, 4), (5, 7))
    assert words_of_pieces(words, [(0, 4), (5, 6), (6, 7)]) == [(0, 0, 2), (1, 2, 3)]
    assert words_of_pieces(words, [(0, 1), (1, 4), (5, 7)]) == [(0, 0, 2), (2, 2, 3)]
    assert words_of_pieces(words, [(0, 3), (3, 4), (5, 7)]) == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert words_of_pieces(words, [(0, 2), (4, 4), (5, 7)]) == [(0, 0, 1), (2, 2, 3)]  # one is dropped
    assert words_of_pieces(words, []) == []


class OnePieceEach(Tokenizer):
    """Runs without spaces are one piece each, and "\\x00" is none."""

    cls_id, sep_id, unk_id = 1, 2, 3

    def __init__(self) -> None:
        pass

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        result = []
        for text in texts:
            places, place = [], 0
            for run in text.split(" "):
                if run.strip("\x00"):
                    places.append((place, place + len(run)))
                place += len(run) + 1
            result.append(([9] * len(places), places))
        return result

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    __str__ = normalize = encode = token_starts = decode = piece = spelling = _unused
    export_hugging_face = _starts_word = _unused


OnePieceEach.__abstractmethods__ = frozenset()


@pytest.mark.parametrize("scheme", ["bio", "bioes", "bmes"])
@pytest.mark.parametrize(
    ("tokens", "entities", "expected"),
    [
        # "ab" is one piece for the words a and b.
        (["a", "b", " ", "c"], [(0, 2, "X")], [(0, 2, "X")]),
        (["a", "b", " ", "c"], [(0, 3, "X")], [(0, 3, "X")]),
        (["c", " ", "a", "b"], [(0, 3, "X")], [(0, 3, "X")]),
        (["a", "b"], [(0, 1, "X")], [(0, 2, "X")]),  # cannot be told apart
        (["a", "b"], [(0, 1, "X"), (1, 2, "Y")], [(0, 2, "X")]),
        # A control character between two words, at the end of an entity, and alone.
        (["a", " ", "\x00", " ", "b"], [(0, 3, "X")], [(0, 3, "X")]),
        (["a", " ", "\x00", " ", "b"], [(0, 2, "X")], [(0, 1, "X")]),
        (["a", " ", "\x00", " ", "b"], [(0, 1, "X"), (2, 3, "X")], [(0, 1, "X"), (2, 3, "X")]),
        (["a", " ", "\x00", " ", "b"], [(1, 2, "X")], []),
    ],
)
def test_words_without_a_piece(scheme: Scheme, tokens: list[str], entities: Any, expected: Any) -> None:
    text, words = "".join(tokens), []
    for place, token in enumerate(tokens):
        if token != " ":
            words.append((place, place + 1))
    tags = tuple(tags_of(entities, len(words), "bio"))
    ours = TokenExample(place="x", text=text, words=tuple(words), tags=tags)
    task = TokenTask(["O", *(f"{c}-{x}" for x in "XY" for c in "BIMES")], scheme)
    [prediction] = answers(task, [ours], OnePieceEach())
    assert entities_of(prediction["tags"]) == expected
    assert task.score([ours], [prediction])["entity_f1"] == float(entities == expected)


def test_windows() -> None:
    assert cut_windows(5, 6, 2) == [(0, 5)]
    assert cut_windows(6, 6, 2) == [(0, 6)]
    assert cut_windows(7, 6, 2) == [(0, 6), (1, 7)]
    assert cut_windows(15, 6, 2) == [(0, 6), (4, 10), (8, 14), (9, 15)]
    assert cut_windows(9, 6, 9) == [(0, 6), (3, 9)]
    windows = cut_windows(10, 6, 2)
    assert windows == [(0, 6), (4, 10)]
    # Of the shared tokens 4 and 5, each has the more context in the window where it is further inside.
    assert [best.astype(int).tolist() for best in most_context(windows)] == [
        [1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1],
    ]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 300), room=st.integers(2, 60), overlap=st.integers(0, 40))
def test_every_token_is_answered_once(tokens: int, room: int, overlap: int) -> None:
    windows = cut_windows(tokens, room, overlap)
    times = np.zeros(tokens, int)
    for (begin, end), best in zip(windows, most_context(windows), strict=True):
        assert 0 < end - begin <= room
        times[begin:end] += best
    assert (times == 1).all()


def test_long_texts(tokenizer: Tokenizer) -> None:
    text = " ".join(f"The apple {i} is red." for i in range(40))
    spans = [(text.index(f"apple {i} "), text.index(f"apple {i} ") + 5, "FRUIT") for i in range(40)]
    ours = example(text, spans)
    task = TokenTask.of([ours], ExamplesConfig(train="x"), EncodingConfig())
    samples = task.encode([ours], tokenizer, EncodingConfig(max_length=32))
    assert len(samples) > 5
    assert samples.lengths.max() <= 32
    assert samples.cut == 0
    [prediction] = task.predict([ours], samples, gold_logits(task, samples))
    assert [(e["start"], e["end"], e["label"]) for e in prediction["entities"]] == spans
    cut = task.encode([ours], tokenizer, EncodingConfig(max_length=32, long_texts="cut"))
    assert (len(cut), cut.cut) == (1, 1)
    [prediction] = task.predict([ours], cut, gold_logits(task, cut))
    found = [(e["start"], e["end"], e["label"]) for e in prediction["entities"]]
    assert found
    assert found == spans[: len(found)]
    assert set(prediction["tags"][-50:]) == {"O"}
    recall = task.score([ours], [prediction])["entity_recall"]
    assert recall == len(found) / 40  # what lies behind the cut counts as missed


def test_scores_are_mean_probabilities() -> None:
    ours = TokenExample(place="x", text="a b", words=((0, 1), (2, 3)), tags=None)
    task = TokenTask(["O", "B-X", "I-X"])
    samples = task.encode([ours], OnePieceEach(), EncodingConfig())
    assert samples.targets is None
    logits = np.log(np.array([[1, 1, 1], [0.2, 0.7, 0.1], [0.3, 0.2, 0.5], [1, 1, 1]], np.float32))
    [prediction] = task.predict([ours], samples, logits)
    assert prediction == {
        "entities": [{"start": 0, "end": 3, "label": "X", "text": "a b", "score": pytest.approx(0.6)}],
        "tags": ["B-X", "I-X"],
        "words": ["a", "b"],
    }


def test_schemes_and_labels() -> None:
    def task(tags: str, labels: list[str] | None = None, **settings: Any) -> TokenTask:
        ours = TokenExample(place="f, line 1", text="", words=(), tags=tuple(tags.split()))
        return TokenTask.of([ours], ExamplesConfig(train="x", labels=labels), EncodingConfig(**settings))

    assert task("B-X I-X O").metric == "entity_f1"
    iob1 = task("I-X I-X B-X O I-Y")
    assert (iob1.scheme, iob1.labels) == ("bio", ["O", "B-X", "I-X", "B-Y", "I-Y"])
    assert task("B-X L-X U-Y").labels == ["O", *(f"{c}-{x}" for x in "XY" for c in "BIES")]
    assert task("S-X").scheme == "bioes"
    assert task("B-X O", tag_scheme="bmes").labels == ["O", "B-X", "M-X", "E-X", "S-X"]
    assert task("B-X O", labels=["B-X", "O", "I-X"]).labels == ["B-X", "O", "I-X"]
    assert task("B-X O", labels=["Y", "X"]).labels == ["O", "B-Y", "I-Y", "B-X", "I-X"]
    words = task("NN VB NN O")
    assert (words.scheme, words.labels, words.metric) == ("none", ["NN", "O", "VB"], "token_accuracy")
    assert task("B-X I-X", tag_scheme="none").labels == ["B-X", "I-X"]
    with pytest.raises(UserError, match="all 2 words of the training examples have the tag 'O'"):
        task("O O")
    # What a saved model knows.
    assert TokenTask(["O", "B-X", "I-X"]).scheme == "bio"
    assert TokenTask(["LABEL_0", "LABEL_1"]).scheme == "none"


def test_notes() -> None:
    def note(tags: str, **settings: Any) -> str:
        ours = [TokenExample(place="f", text="", words=(), tags=tuple(tags.split()))]
        return TokenTask.of(ours, ExamplesConfig(train="x"), EncodingConfig(**settings)).note(ours)

    assert note("B-X I-X O") == "tags are in the scheme bio: 3 tags"
    assert note("I-X B-X") == (
        "tags are in the scheme iob1 (B only between entities of one label), and are learnt as bio: 3 tags"
    )
    assert note("B-X", tag_scheme="bioes") == "tags are in the scheme bio, and are learnt as bioes: 5 tags"
    assert note("NN VB") == "tags are classes of words, 2 of them"


def test_a_tag_that_training_never_had() -> None:
    task = TokenTask(["O", "B-X", "I-X"])
    ours = TokenExample(place="dev.txt, line 7", text="a", words=((0, 1),), tags=("B-Y",))
    with pytest.raises(UserError, match=r"dev\.txt, line 7: the tag 'B-Y' is none of O, B-X, I-X"):
        task.encode([ours], OnePieceEach(), EncodingConfig())
    untagged = TokenExample(place="x, line 2", text="a", words=((0, 1),), tags=None)
    with pytest.raises(UserError, match="x, line 2: no tags"):
        TokenTask.of([untagged], ExamplesConfig(train="x"), EncodingConfig())


def test_figures_for_reports() -> None:
    ours = [TokenExample(place="x", text="a b", words=((0, 1), (2, 3)), tags=("I-X", "B-X"))]
    task = TokenTask(["O", "B-X", "I-X", "B-Y", "I-Y"])
    assert task.label_counts(ours) == {"X": 2, "Y": 0}
    assert task.majority(ours, ours)["entity_f1"] == 0
    assert task.per_label(ours, [{"tags": ["B-X", "O"]}]) == [
        {"label": "X", "precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    ]
    classes = TokenTask(["NN", "VB"])
    words = [TokenExample(place="x", text="a b c", words=((0, 1), (2, 3), (4, 5)), tags=("NN", "VB", "NN"))]
    assert classes.label_counts(words) == {"NN": 2, "VB": 1}
    assert classes.majority(words, words)["token_accuracy"] == pytest.approx(2 / 3)
    [prediction] = answers(classes, words, OnePieceEach())
    assert prediction == {"entities": [], "tags": ["NN", "VB", "NN"], "words": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["EU", "rejects", "."], "EU rejects ."),
        (["北京", "大学", "，", "2008", "年"], "北京大学， 2008 年"),
        (["用", "Python", "写"], "用 Python 写"),
        (["カ", "ナ"], "カナ"),
    ],
)
def test_text_of_tokens(tokens: list[str], text: str) -> None:
    joined, words = join_tokens(tokens)
    assert joined == text
    assert [joined[start:end] for start, end in words] == tokens
    assert join_tokens(tokens, spaces=False)[0] == "".join(tokens)


def test_words_of_text() -> None:
    def words(text: str, *cuts: int) -> list[str]:
        return [text[start:end] for start, end in split_words(text, cuts)]

    assert words("It's 3.5 (Paris)\n北京 カナx") == [
        *["It", "'", "s", "3", ".", "5", "(", "Paris", ")"],
        *["北", "京", "カ", "ナ", "x"],
    ]
    assert words("e\u0301a 👩\u200d💻 हिन्दी") == ["e\u0301a", "👩\u200d", "💻", "हिन्दी"]
    assert words("Parisian", 5) == ["Paris", "ian"]
    assert words(" \u3000") == []
    assert words("\u0301 a") == ["\u0301", "a"]


@pytest.mark.skipif(not DATA, reason="BERTSCALE_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("file", "vocabulary", "strip", "lost"),
    [
        ("conll2003/valid.txt", "cased", None, 0),
        ("conll2003/valid.txt", "uncased", None, 0),
        ("wnut17/wnut17train.conll", "cased", None, 0),
        ("wnut17/emerging.dev.conll", "uncased", None, 0),
        ("resume_ner/dev.char.bmes", "chinese", None, 0),
        # Latin letters are tagged one by one: the end of an entity inside of one piece cannot be told.
        ("weibo_ner/weiboNER_2nd_conll.train", "chinese", "[0-9]$", 1),
        ("weibo_ner/weiboNER_2nd_conll.dev", "chinese", None, 0),
    ],
)
def test_gold_tags_of_real_sets_come_back(file: str, vocabulary: str, strip: str | None, lost: int) -> None:
    path = str(Path(DATA) / "tasks" / file)
    data = ExamplesConfig(train=path, strip_tokens=strip)
    examples, broken = read_token_examples(path, data)
    assert broken == []
    tokenizer = load_tokenizer(Path(DATA) / "vocab" / f"bert-base-{vocabulary}-vocab.txt")
    task = TokenTask.of(examples, data, EncodingConfig())
    predictions = answers(task, examples, tokenizer, max_length=48)
    pairs = zip(examples, predictions, strict=True)
    assert sum(task.gold(ours) != prediction["tags"] for ours, prediction in pairs) == lost
    if not lost:
        assert task.score(examples, predictions)["entity_f1"] == 1
