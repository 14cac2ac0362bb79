"""Rules of data preparation that drop documents and lines by how their text looks; all of them off."""

from __future__ import annotations

from pydantic import Field

from bertscale.config.section import Section

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


class QualityConfig(Section):
    """Documents that break a rule are dropped and counted by it. Words are what stands between white space;
    lines are the paragraphs of a cleaned text."""

    # Lines, before the documents are judged (C4: Raffel et al. 2020, section 2.2).
    line_ends: bool = Field(False, description="Keep only lines that end as sentences do, such as in C4.")
    min_line_words: int | None = Field(None, ge=1, description="Lines of fewer words are left out; C4: 3.")
    drop_lines_with: list[str] = Field(
        [],
        description="Lines with one of these are left out, in any case; C4: [javascript].",
    )
    # Documents, as in C4.
    drop_documents_with: list[str] = Field(
        [], description='Documents with one of these are dropped; C4: ["lorem ipsum", "{"].'
    )
    min_sentences: int | None = Field(
        None, ge=1, description="Smallest number of sentence ends in a document; C4: 3."
    )
    # Documents, as in Gopher (Rae et al. 2021, appendix A.1.1).
    min_words: int | None = Field(None, ge=1, description="Smallest number of words; Gopher: 50.")
    max_words: int | None = Field(None, ge=1, description="Largest number of words; Gopher: 100,000.")
    min_word_length: float | None = Field(
        None, gt=0, description="Smallest mean length of the words, in characters; Gopher: 3."
    )
    max_word_length: float | None = Field(
        None, gt=0, description="Largest mean length of the words, in characters; Gopher: 10."
    )
    max_symbols: float | None = Field(
        None, ge=0, description="Most hash signs, or ellipses, for each word; Gopher: 0.1."
    )
    max_bullet_lines: float | None = Field(
        None, ge=0, le=1, description="Largest share of lines that begin with a bullet; Gopher: 0.9."
    )
    max_ellipsis_lines: float | None = Field(
        None, ge=0, le=1, description="Largest share of lines that end with an ellipsis; Gopher: 0.3."
    )
    min_alphabetic_words: float | None = Field(
        None, ge=0, le=1, description="Smallest share of words with a letter; Gopher: 0.8."
    )
    min_stop_words: int | None = Field(
        None, ge=1, description="How many of `stop_words` a document must have, each once; Gopher: 2."
    )
    stop_words: list[str] = Field(
        list(STOP_WORDS),
        description="Frequent words of the language, in lower case; English ones.",
    )
    # Repetition, as in Gopher: shares of the characters, or of the lines.
    max_repeated_lines: float | None = Field(
        None, ge=0, le=1, description="Largest share of lines that stood there before; Gopher: 0.3."
    )
    max_repeated_line_characters: float | None = Field(
        None, ge=0, le=1, description="Largest share of characters in such lines; Gopher: 0.2."
    )
    max_top_2_grams: float | None = Field(
        None, ge=0, le=1, description="Of characters in the most frequent two words in a row; Gopher: 0.2."
    )
    max_top_3_grams: float | None = Field(
        None, ge=0, le=1, description="Of characters in the most frequent three words; Gopher: 0.18."
    )
    max_top_4_grams: float | None = Field(
        None, ge=0, le=1, description="Of characters in the most frequent four words; Gopher: 0.16."
    )
    max_repeated_5_grams: float | None = Field(
        None, ge=0, le=1, description="Of characters in five words that stood there before; Gopher: 0.15."
    )
    max_repeated_10_grams: float | None = Field(
        None, ge=0, le=1, description="Of characters in ten words that stood there before; Gopher: 0.1."
    )


# Rules that count words: a text without spaces has none.
RULES_OF_WORDS = (
    "min_line_words", "min_words", "max_words", "min_word_length", "max_word_length", "max_symbols",
    "min_alphabetic_words", "min_stop_words", "max_top_2_grams", "max_top_3_grams", "max_top_4_grams",
    "max_repeated_5_grams", "max_repeated_10_grams",
)  # fmt: skip
