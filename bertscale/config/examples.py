"""Sections of a fine-tuning config that say where labelled data is, and how samples are made of it."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bertscale.config.prep import check_encoding
from bertscale.config.section import Section

Column = str | int
TaskKind = Literal[
    "classification", "multi_label", "regression", "tokens", "question_answering", "multiple_choice"
]

# Keys of `data` that are of a fine-tuning, and not of the form of a file that a task model is given.
NOT_OF_INPUTS = ("train", "dev", "dev_share", "dev_seed", "group", "test", "broken_share")


class TrainingFile(Section):
    """One of several files of training examples."""

    path: str = Field(description="File of training examples.")
    weight: float = Field(
        1.0, gt=0, description="How often an epoch sees each of its examples; 0.5: every second one."
    )


class ExamplesConfig(Section):
    """Where the labelled data is. Columns are named, or numbered from 0 where a file has no header."""

    train: str | list[str | TrainingFile] = Field(
        description="Training examples: a file, or several, as paths or as [{path: A, weight: 2}, ...]."
    )
    dev: str | None = Field(
        None, description="Examples that choose the checkpoint; by default those of dev_share."
    )
    dev_share: float = Field(
        0.0, ge=0, lt=1, description="Share of the training examples that is taken from them as dev."
    )
    dev_seed: int = Field(0, ge=0, description="Seed of the draw of dev_share; train.seeds do not move it.")
    group: Column | None = Field(
        None, description="Column of a document or author: dev_share keeps all rows of one on one side."
    )
    test: str | None = Field(None, description="Examples that are looked at once, after training.")
    format: Literal["auto", "csv", "tsv", "jsonl", "json", "parquet", "conll", "squad"] = Field(
        "auto", description="Format of the files; auto: by the ending of the name, and for json by content."
    )
    header: Literal["auto", True, False] = Field(
        "auto", description="Whether the first line of csv and tsv names the columns; auto: if all do."
    )
    separator: str | None = Field(
        None, description="Between columns; by default a comma in csv, a tab in tsv, white space in conll."
    )
    columns: int | None = Field(
        None, ge=2, description="Number of columns; separators behind the last one belong to its text."
    )
    quoting: bool | None = Field(
        None, description="Whether quotation marks enclose columns; by default in csv, and not in tsv."
    )
    encoding: str = Field("utf-8", description="Encoding of text files.")
    text: Column = Field("text", description="Column of the text; of the first text of a pair.")
    text_pair: Column | None = Field(None, description="Column of the second text; by default there is none.")
    label: Column | list[Column] = Field(
        "label", description="Column of the label; for multi_label also a list, one column for each label."
    )
    label_separator: str | None = Field(
        None,
        description="For multi_label, between the labels of a column; else the label is what stands before.",
    )
    labels: list[str] | None = Field(
        None, min_length=2, description="The labels in order; by default those of the training examples."
    )
    skip_labels: list[str] = Field([], description="Labels whose rows are left out.")
    options: list[Column] | Column | None = Field(
        None, description="Columns of the answers of multiple_choice, or the column of their list."
    )
    tokens: Column = Field("tokens", description="Column of the tokens (conll, or a list in other formats).")
    tags: Column = Field("tags", description="Column of the tags (conll: by default the last one).")
    strip_tokens: str | None = Field(
        None,
        description="Regular expression of what is taken out of each token; [0-9]$ for Weibo NER, which has "
        "the place in a word behind each character.",
    )
    spans: Column | None = Field(
        None,
        description="Column of character spans in the text, [{start, end, label}, ...], in place of tags.",
    )
    question: Column = Field("question", description="Column of the question, for question_answering.")
    context: Column = Field("context", description="Column of the text that the answer stands in.")
    answers: Column = Field(
        "answers",
        description="Column of the answers: {text: [...], answer_start: [...]}, or a list of {text, "
        "answer_start}.",
    )
    salvage: bool = Field(
        False, description="Whether the whole articles of a SQuAD file that is cut off are taken."
    )
    broken_share: float = Field(
        0.01, ge=0, lt=1, description="Largest share of rows that may be broken; more end the run."
    )

    @property
    def training_files(self) -> list[TrainingFile]:
        """Lists the training files with their weights, one or several."""
        given = [self.train] if isinstance(self.train, str) else self.train
        return [TrainingFile(path=file) if isinstance(file, str) else file for file in given]

    @field_validator("train")
    @classmethod
    def _check_train(cls, train: str | list[str | TrainingFile]) -> str | list[str | TrainingFile]:
        if not train:
            raise ValueError("no file of training examples; give one or several")
        return train

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str) -> str:
        return check_encoding(encoding)

    @field_validator("strip_tokens")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return pattern

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: list[str] | None) -> list[str] | None:
        if labels is not None and len(set(labels)) < len(labels):
            raise ValueError(f"{labels} names a label twice")
        return labels

    @model_validator(mode="after")
    def _check(self) -> ExamplesConfig:
        if self.dev is not None and self.dev_share:
            raise ValueError(
                f"dev={self.dev} and dev_share={self.dev_share} both give dev examples; drop one"
            )
        return self


class EncodingConfig(Section):
    """How samples are made of examples."""

    max_length: int = Field(128, ge=8, description="Longest sample in tokens, [CLS] and [SEP] included.")
    long_texts: Literal["cut", "windows"] | None = Field(
        None,
        description="What is done with longer texts: cut, or read in overlapping windows; by default cut for "
        "texts with a label, windows for tokens and question_answering.",
    )
    overlap: int = Field(
        32, ge=0, description="Tokens that neighbouring windows share; by default a quarter of max_length."
    )
    answer_length: int = Field(30, ge=1, description="Longest answer in tokens; for question_answering.")
    answers: int = Field(20, ge=1, description="Answers that are kept of a question, the best ones.")
    tag_scheme: Literal["auto", "bio", "bioes", "bmes", "io", "none"] = Field(
        "auto", description="How tags write entities; none: each token has its own class, as in POS."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(longest := values.get("max_length"), int):
            return {"overlap": longest // 4, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> EncodingConfig:
        if self.overlap > self.max_length // 2:
            raise ValueError(f"overlap={self.overlap} is more than half of max_length={self.max_length}")
        return self
