"""Tasks of texts, pairs and choices: samples, windows, predictions, and figures as scikit-learn has them."""

from __future__ import annotations

import string
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics
from tokenizers import Tokenizer as Fast

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig
from bertscale.tasks.choice import ChoiceTask
from bertscale.tasks.task import ChoiceExample, Samples, TextExample
from bertscale.tasks.texts import text_task
from bertscale.tasks.windows import cut_to, longest_first, windows_of
from bertscale.tokenizer import Tokenizer, load_tokenizer

WORDS = [*string.ascii_lowercase]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Whose pieces are the letters, from id 5 on."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return load_tokenizer(path)


def example(*texts: str, target: Any = None) -> TextExample:
    return TextExample(place="a.tsv, line 1", texts=texts, target=target)


def encoding(max_length: int, **keys: Any) -> EncodingConfig:
    return EncodingConfig(max_length=max_length, **keys)


def samples_of(examples: list[int]) -> Samples:
    """Samples of one token each, whose examples these are."""
    count = len(examples)
    starts, second = np.arange(count + 1), np.ones(count, np.int64)
    return Samples(np.zeros(count, np.int32), starts, second, np.array(examples), None)


def text_of(samples: Samples, tokenizer: Tokenizer) -> list[str]:
    return [
        " ".join(tokenizer.piece(int(i)) for i in samples.tokens[begin:end])
        for begin, end in pairwise(samples.starts)
    ]


# --------------------------------------------------------------------------------------------- samples


def test_samples_of_texts_and_pairs(tokenizer: Tokenizer) -> None:
    task = text_task("classification", ["n", "y"])
    samples = task.encode(
        [example("a b", target="y"), example("c", "d é", target="n")], tokenizer, encoding(8)
    )
    assert text_of(samples, tokenizer) == ["[CLS] a b [SEP]", "[CLS] c [SEP] d e [SEP]"]
    assert samples.second.tolist() == [4, 3]
    assert samples.targets is not None
    assert samples.targets.tolist() == [1, 0]
    assert (samples.cut, samples.unknown) == (0, 0)
    long = task.encode([example("a b c d e f g"), example("a b c", "d e f !")], tokenizer, encoding(8))
    assert text_of(long, tokenizer) == ["[CLS] a b c d e f [SEP]", "[CLS] a b [SEP] d e f [SEP]"]
    assert long.targets is None
    assert long.cut == 2
    assert task.encode([example("a !")], tokenizer, encoding(8)).unknown == 1
    with pytest.raises(UserError, match="line 1: a text of which the tokenizer leaves nothing"):
        task.encode([example("a", "\u200b")], tokenizer, encoding(8))
    with pytest.raises(UserError, match="line 1: the label 'z' is none of 'n', 'y'"):
        task.encode([example("a", target="z")], tokenizer, encoding(8))


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(8, 30))
def test_pairs_are_cut_as_by_hugging_face(first: int, second: int, length: int) -> None:
    kept = longest_first(first, second, length - 3)
    fast = Fast.from_str(FAST)
    fast.enable_truncation(length, strategy="longest_first")
    pair = fast.encode(" ".join(["a"] * first), " ".join(["b"] * second))
    assert kept == (pair.tokens.count("a"), pair.tokens.count("b"))
    samples, cut = cut_to([[1] * first, [2] * second], length)
    assert [tuple(len(part or ()) for part in sample) for sample in samples] == [kept]
    assert cut == (kept != (first, second))


# A tokenizer of the words a and b, with the special pieces of a pair around them.
FAST = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": {"type": "Whitespace"}, "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3],
"cls": ["[CLS]", 2]}, "decoder": null, "model": {"type": "WordLevel", "unk_token": "[UNK]",
"vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5}}}"""


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(8, 40), st.data())
def test_windows_show_all_of_a_text(count: int, length: int, draw: st.DataObject) -> None:
    overlap = draw.draw(st.integers(0, length // 2))
    text = list(range(count))
    first = list(range(draw.draw(st.integers(0, 60))))
    ids = [first, text] if first else [text]
    windows, lost = windows_of(ids, length, overlap)
    parts = [b if b is not None else a for a, b in windows]
    assert sorted({token for part in parts for token in part}) == text
    assert all(list(part) == list(range(part[0], part[0] + len(part))) for part in parts)
    assert all(len(a) + len(b or ()) + len(ids) + 1 <= length for a, b in windows)
    assert len({len(part) for part in parts}) == 1
    if len(parts) > 1 and not first:
        assert {a[-1] + 1 - b[0] for a, b in pairwise(parts[:-1])} <= {min(overlap, (length - 2) // 2)}
    if first:
        assert {len(a) for a, _ in windows} == {len(first) if not lost else len(windows[0][0])}
        assert lost == (len(windows[0][0]) < len(first))


def test_windows_of_one_example_share_its_target(tokenizer: Tokenizer) -> None:
    task = text_task("regression", [])
    texts = [example(" ".join(WORDS[:10]), target=3.5), example("a", target=1.0)]
    samples = task.encode(texts, tokenizer, encoding(8, long_texts="windows", overlap=2))
    assert text_of(samples, tokenizer) == [
        "[CLS] a b c d e f [SEP]",
        "[CLS] e f g h i j [SEP]",
        "[CLS] a [SEP]",
    ]
    assert samples.example.tolist() == [0, 0, 1]
    assert samples.targets is not None
    assert samples.targets.tolist() == [3.5, 3.5, 1.0]
    assert samples.cut == 0
    logits = np.array([[1.0], [2.0], [7.0]], np.float32)
    assert task.predict(texts, samples, logits) == [{"score": 1.5}, {"score": 7.0}]


# ------------------------------------------------------------------------------------ predictions, figures


def test_predictions_of_classification() -> None:
    task = text_task("classification", ["x", "y", "z"])
    logits = np.log(np.array([[1, 1, 2], [6, 2, 2], [6, 2, 2]], np.float32))
    first, second = task.predict([example("a")] * 2, samples_of([0, 1, 1]), logits)
    assert first["label"] == "z"
    assert first["probability"] == pytest.approx(0.5)
    assert second["probabilities"] == pytest.approx({"x": 0.6, "y": 0.2, "z": 0.2})


def test_predictions_of_several_labels() -> None:
    task = text_task("multi_label", ["x", "y"])
    samples = samples_of([0, 1])
    first, second = task.predict([example("a")] * 2, samples, np.array([[0, -2000], [-1, 1]], np.float32))
    assert first["labels"] == ["x"]
    assert first["probabilities"] == pytest.approx({"x": 0.5, "y": 0})
    assert second["labels"] == ["y"]


@settings(deadline=None)
@given(st.integers(2, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_figures_of_classification(count: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    labels = [f"l{i}" for i in range(count)]
    task = text_task("classification", labels)
    examples = [example("a", target=labels[a]) for a, _ in pairs]
    predictions = [{"label": labels[b]} for _, b in pairs]
    truth, said = [a for a, _ in pairs], [b for _, b in pairs]
    figures = task.score(examples, predictions)
    assert task.metric in figures
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(truth, said))
    for name in ("macro", "micro"):
        theirs = metrics.f1_score(truth, said, average=name, zero_division=0)
        assert figures[f"{name}_f1"] == pytest.approx(theirs)
    assert ("f1" in figures) == (count == 2)
    if count == 2:
        assert figures["f1"] == pytest.approx(metrics.f1_score(truth, said, labels=[0, 1], zero_division=0))
    if len({*truth, *said}) > 1:  # of one label alone theirs warns
        assert figures["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, said))
    counted = task.confusion(examples, predictions)
    assert counted is not None
    numbers = list(range(count))
    assert counted[1].tolist() == metrics.confusion_matrix(truth, said, labels=numbers).tolist()
    table = metrics.precision_recall_fscore_support(truth, said, labels=numbers, zero_division=0)
    for row, *theirs in zip(task.per_label(examples, predictions), *table, strict=True):
        assert [row[name] for name in ("precision", "recall", "f1", "support")] == pytest.approx(theirs)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.tuples(st.booleans(), st.floats(0, 1))] * 3), min_size=1, max_size=20))
def test_figures_of_several_labels(rows: list[tuple[tuple[bool, float], ...]]) -> None:
    labels = ["x", "y", "z"]
    task = text_task("multi_label", labels)
    truth = np.array([[cell[0] for cell in row] for row in rows])
    chances = np.array([[cell[1] for cell in row] for row in rows])
    said = chances >= 0.5

    def names(row: Any) -> list[str]:
        return [label for label, has in zip(labels, row, strict=True) if has]

    examples = [example("a", target=tuple(names(row))) for row in truth]
    predictions = [
        {"labels": names(row), "probabilities": dict(zip(labels, chance, strict=True))}
        for row, chance in zip(said, chances.tolist(), strict=True)
    ]
    figures = task.score(examples, predictions)
    assert task.metric in figures
    for name in ("macro", "micro"):
        theirs = metrics.f1_score(truth, said, average=name, zero_division=0)
        assert figures[f"{name}_f1"] == pytest.approx(theirs)
    assert figures["exact_match"] == pytest.approx(metrics.accuracy_score(truth, said))
    if truth.any(0).all():
        theirs = metrics.average_precision_score(truth, chances, average="macro")
        assert figures["average_precision"] == pytest.approx(theirs)
        theirs = metrics.average_precision_score(truth, chances, average="micro")
        assert figures["micro_average_precision"] == pytest.approx(theirs)
    assert [row["support"] for row in task.per_label(examples, predictions)] == truth.sum(0).tolist()


numbers = st.integers(-3, 3).map(float)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=20))
def test_figures_of_regression(pairs: list[tuple[float, float]]) -> None:
    task = text_task("regression", [])
    figures = task.score([example("a", target=a) for a, _ in pairs], [{"score": b} for _, b in pairs])
    truth, said = [a for a, _ in pairs], [b for _, b in pairs]
    if len(set(truth)) > 1 and len(set(said)) > 1:
        assert figures["pearson"] == pytest.approx(pearsonr(truth, said).statistic)
        assert figures["spearman"] == pytest.approx(spearmanr(truth, said).statistic)
        assert figures[task.metric] == pytest.approx((figures["pearson"] + figures["spearman"]) / 2)
    else:
        assert figures == {"pearson": 0, "spearman": 0, "pearson_spearman": 0}


def test_figures_of_one_answer_for_all() -> None:
    task = text_task("classification", ["x", "y"])
    train = [example("a", target=label) for label in "xxy"]
    assert task.label_counts(train) == {"x": 2, "y": 1}
    assert task.majority(train, train)["accuracy"] == pytest.approx(2 / 3)
    assert task.majority(train, train)["f1"] == 0
    numbers = [example("a", target=value) for value in (1.0, 2.0)]
    assert text_task("regression", []).majority(numbers, numbers)["pearson"] == 0
    several = text_task("multi_label", ["x", "y"])
    both = [example("a", target=("x", "y")), example("b", target=("y",)), example("b", target=())]
    assert several.majority(both, both)["micro_f1"] == pytest.approx(4 / 6)
    assert several.label_counts(both) == {"x": 1, "y": 2}


# --------------------------------------------------------------------------------------------- choices


def test_choices(tokenizer: Tokenizer) -> None:
    task = ChoiceTask()
    examples = [
        ChoiceExample(place="a, line 1", text="a b c d e", options=("f", "g h i j k"), target=1),
        ChoiceExample(place="a, line 2", text="a", options=("b", "c", "d e f g h i"), target=0),
    ]
    samples = task.encode(examples, tokenizer, encoding(8))
    assert text_of(samples, tokenizer) == [
        "[CLS] a b c d [SEP] f [SEP]",
        "[CLS] a b [SEP] g h i [SEP]",
        "[CLS] a [SEP] b [SEP]",
        "[CLS] a [SEP] c [SEP]",
        "[CLS] a [SEP] d e f g [SEP]",
    ]
    assert samples.example.tolist() == [0, 0, 1, 1, 1]
    assert samples.targets is not None
    assert samples.targets.tolist() == [1, 0]
    assert samples.cut == 2
    logits = np.log(np.array([[1], [3], [1], [1], [2]], np.float32))
    first, second = task.predict(examples, samples, logits)
    assert first == {"choice": 1, "probabilities": pytest.approx([0.25, 0.75])}
    assert second["choice"] == 2
    assert task.score(examples, [first, second]) == {"accuracy": 0.5}
    assert task.majority(examples[:1], examples) == {"accuracy": 0.5}
    assert task.label_counts(examples) == {"0": 1, "1": 1, "2": 0}
