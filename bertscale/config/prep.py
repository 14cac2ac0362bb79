"""Sections of a config of data preparation."""

from __future__ import annotations

import codecs
import difflib
from encodings.aliases import aliases
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bertscale.config.quality import RULES_OF_WORDS, QualityConfig
from bertscale.config.section import Section
from bertscale.run_folder import PREP_WORK

WORK_FOLDER = PREP_WORK
_ISO_639_1 = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de "
    "dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id "
    "ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu "
    "lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu "
    "rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to "
    "tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
LANGUAGES = (*_ISO_639_1.split(), "lines")
_LANGUAGE_NAMES = {  # what people write for some codes
    "arabic": "ar", "cn": "zh", "chinese": "zh", "dutch": "nl", "english": "en", "french": "fr",
    "german": "de", "hindi": "hi", "italian": "it", "japanese": "ja", "jp": "ja", "korean": "ko",
    "portuguese": "pt", "russian": "ru", "spanish": "es", "swedish": "sv",
}  # fmt: skip


def language_code(language: str) -> str:
    """The code of a language without region or script: pt of pt-BR."""
    return language.lower().replace("_", "-").split("-")[0]


def check_language(language: str) -> str:
    """Returns `language`: an ISO 639-1 code, also with a region or script (pt-BR), or `lines`.

    Raises ValueError that names the nearest codes.
    """
    code = language_code(language)
    if code not in LANGUAGES:
        known = (*LANGUAGES, *_LANGUAGE_NAMES)
        near = [
            _LANGUAGE_NAMES.get(name, name)
            for name in difflib.get_close_matches(code, known, n=3, cutoff=0.6)
        ]
        guess = f"; the nearest known codes: {', '.join(dict.fromkeys(near))}" if near else ""
        raise ValueError(f"{language!r} is neither an ISO 639-1 code, such as en or zh, nor `lines`{guess}")
    return language


SCRIPTS = (
    "latin", "cyrillic", "greek", "han", "kana", "hangul", "arabic", "hebrew", "devanagari", "thai",
)  # fmt: skip


# Languages that are written without spaces: there Unigram's trainer, which works through whole stretches
# between spaces, takes twenty times as long as BPE's, and gives more tokens (docs/log.md).
UNSPACED = ("bo", "dz", "ja", "km", "lo", "my", "th", "zh")

_NO_TEXT = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape")  # Python calls them text


def check_encoding(encoding: str) -> str:
    """Returns `encoding`, a name that Python has for one; raises ValueError that names the nearest ones."""
    try:
        codec = codecs.lookup(encoding)
        "".encode(encoding)  # not of hex and its like, which make bytes of bytes
    except LookupError:
        codec = None
    if codec is None or codec.name.replace("-", "_") in _NO_TEXT:
        name = encoding.lower().replace("-", "_")
        of_text = {alias: of for alias, of in aliases.items() if not of.endswith(("_codec", "rot_13"))}
        near = difflib.get_close_matches(name, [*of_text, *of_text.values()], 1, 0.7)
        hint = f"did you mean {near[0]}?" if near else "some are utf-8, gb18030, big5, shift_jis and latin-1"
        raise ValueError(f"there is no encoding {encoding!r}; {hint}")
    return encoding


def is_utf8(encoding: str) -> bool:
    """Whether it is UTF-8; a byte order mark makes no difference, as readers skip it."""
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


class TokenizerTraining(Section):
    """How a SentencePiece or byte-level model is trained, or a given tokenizer extended."""

    model: Literal["unigram", "bpe", "byte_bpe"] | None = Field(
        None,
        description="Kind of SentencePiece model: by default bpe for a language without spaces (zh, ja, th, "
        "...), else unigram. byte_bpe is byte-level BPE, as that of GPT-2 and ModernBERT, by `tokenizers`.",
    )
    vocab_size: int = Field(32_768, ge=300, description="Number of pieces, special and byte pieces included.")
    sample_documents: int = Field(
        200_000, ge=1, description="Largest number of documents, drawn at random, that train the tokenizer."
    )
    character_coverage: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the text's characters that get pieces; rarer ones are spelled in bytes. By "
        "default 0.9995, for text with Chinese or Japanese characters 0.9998. Not for byte_bpe.",
    )
    extend_to: int | None = Field(
        None,
        ge=1,
        description="Number of pieces, old and new together, to which the given tokenizer, WordPiece or "
        "SentencePiece, is extended by pieces learnt from the input; by default it stays as it is.",
    )

    @model_validator(mode="after")
    def _check_coverage(self) -> TokenizerTraining:
        if self.model == "byte_bpe" and self.character_coverage is not None:
            raise ValueError(
                f"character_coverage={self.character_coverage} is for SentencePiece models; model=byte_bpe "
                "joins bytes, whatever their characters: leave it out"
            )
        return self


class CsvConfig(Section):
    """How .csv files are written; each character is one of ASCII."""

    delimiter: str = Field(",", description="Character between two cells.")
    quote: str | None = Field(
        '"', description="Quotation mark around a cell, doubled inside of it; null: there is none."
    )
    escape: str | None = Field(
        None, description="Character before a quotation mark that is text, such as a backslash."
    )
    quoted_tsv: bool = Field(
        False,
        description="Whether .tsv files have quotation marks too, as a spreadsheet writes them; by default "
        "these are text there, and every line is a row.",
    )

    @model_validator(mode="after")
    def _check_characters(self) -> CsvConfig:
        given = [value for value in (self.delimiter, self.quote, self.escape) if value is not None]
        for value in given:
            if len(value) != 1 or not value.isascii() or value in "\r\n":
                raise ValueError(
                    f"delimiter, quote and escape are one character of ASCII each, not {value!r}"
                )
        if len(set(given)) < len(given):
            raise ValueError("delimiter, quote and escape are to be different characters")
        return self


class PrepConfig(Section):
    """Settings of a data preparation: raw text -> tokenizer and Arrow token shards."""

    input: list[str] = Field(
        min_length=1,
        description="Files, folders or globs, one or a list: .txt, .md, .jsonl, .csv, .tsv, .parquet, .arrow "
        "and WikiExtractor output, each also as .gz, .bz2, .xz or .zst.",
    )
    output: str = Field(description="Folder for the tokenizer, the shards and manifest.json.")
    text_field: str = Field("text", description="Name of the field or column that holds the text.")
    encoding: str = Field(
        "utf-8",
        description="Encoding of the text in the files, such as gb18030, big5, shift_jis, latin-1 or utf-16; "
        ".parquet and .arrow have UTF-8 in any case.",
    )
    csv: CsvConfig = Field(CsvConfig(), description="How .csv files are written.")
    documents: Literal["blank_line", "file"] = Field(
        "blank_line", description="What ends a document in a .txt file: a blank line, or the end of the file."
    )
    language: str = Field(
        "en", description="Language (ISO 639-1), for finding sentences; lines: each line is one."
    )
    wrapped: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="Whether line ends inside of a paragraph are no more than where a line was full, and are "
        "joined; auto: by each document's lines. Never with language=lines.",
    )
    words: Literal["jieba"] | None = Field(
        None,
        description="What finds the words of Chinese text, kept in the shards for masks of whole words "
        "(samples.mask_unit): jieba, which needs the package rjieba. By default each character is a word.",
    )
    normalization: Literal["nfc", "nfkc"] = Field("nfc", description="Unicode normalisation form.")
    min_characters: int = Field(1, ge=1, description="Shorter documents are dropped and counted.")
    max_characters: int | None = Field(None, ge=1, description="Longer documents are dropped and counted.")
    min_letters: float = Field(
        0, ge=0, le=1, description="Documents with a smaller share of letters are dropped and counted."
    )
    scripts: list[str] = Field(
        [], description="Scripts, such as latin or han; documents mostly in others are dropped."
    )
    quality: QualityConfig = Field(
        QualityConfig(), description="Rules that drop documents and lines by how they look; all off."
    )
    mask: list[Literal["mail", "phone", "ip"]] = Field(
        [], description="Personal data that a mark takes the place of: mail, phone and ip addresses."
    )
    deduplicate: bool = Field(True, description="Keep only one of the documents with the same text.")
    decontaminate: list[str] = Field(
        [],
        description="Files of evaluation examples (.jsonl, .json, or text by lines): documents that have a "
        "stretch of words in common with one are dropped.",
    )
    decontaminate_words: int = Field(
        13,
        ge=1,
        description="Words of such a stretch; twice as many characters where there are no spaces.",
    )
    near_duplicates: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Of documents that are as similar (Jaccard similarity of five words in a row), such as "
        "0.8, only the first is kept; by default they are not compared.",
    )
    tokenizer: str | None = Field(
        None,
        description="An existing SentencePiece model, the vocab.txt of a WordPiece tokenizer, or a "
        "tokenizer.json of byte-level BPE, or the folder of one; by default one is trained on the input.",
    )
    lowercase: bool | None = Field(
        None,
        description="Whether a WordPiece tokenizer lowers case and strips accents; by default if no piece of "
        "its vocabulary has a capital letter.",
    )
    train_tokenizer: TokenizerTraining = Field(TokenizerTraining(), description="How a tokenizer is trained.")
    validation_fraction: float = Field(
        0.01, ge=0, lt=1, description="Share of documents held out, chosen by a hash of their text."
    )
    split_bytes: int = Field(
        128 * 2**20, ge=1000, description="Approximate bytes of a work unit, the work of one process."
    )
    shard_bytes: int = Field(128 * 2**20, ge=1000, description="Approximate bytes of tokens in a shard.")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="Largest share of unreadable records; above it the command fails."
    )
    max_lost_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest share of the input's bytes that are lost with unreadable records and damaged "
        "files; above it the command fails.",
    )
    workers: int = Field(0, ge=0, description="Number of worker processes; 0 starts one for each core.")
    seed: int = Field(0, ge=0, description="Seed of the order of documents and of the tokenizer's sample.")

    @property
    def is_spaced(self) -> bool:
        """Whether the language has spaces between its words."""
        return language_code(self.language) not in UNSPACED

    @property
    def tokenizer_model(self) -> Literal["unigram", "bpe", "byte_bpe"]:
        """Kind of the tokenizer that is trained."""
        return self.train_tokenizer.model or ("unigram" if self.is_spaced else "bpe")

    @model_validator(mode="after")
    def _check_quality(self) -> PrepConfig:
        of_words = [rule for rule in RULES_OF_WORDS if getattr(self.quality, rule) is not None]
        if of_words and not self.is_spaced:
            raise ValueError(
                f"quality.{of_words[0]} counts words between spaces, and language={self.language} has none: "
                "leave it out; min_characters, min_letters and the rules of lines are for such text"
            )
        return self

    @model_validator(mode="after")
    def _check_extension(self) -> PrepConfig:
        if self.train_tokenizer.extend_to is not None and self.tokenizer is None:
            raise ValueError(
                f"train_tokenizer.extend_to={self.train_tokenizer.extend_to} extends a given tokenizer: name "
                "it by `tokenizer`, or leave extend_to out"
            )
        return self

    @model_validator(mode="after")
    def _check_wrapped(self) -> PrepConfig:
        if self.wrapped == "yes" and self.language == "lines":
            raise ValueError("wrapped=yes joins lines, and language=lines makes a sentence of each")
        return self

    @field_validator("wrapped", mode="before")
    @classmethod
    def _yes_of_yaml(cls, value: Any) -> Any:
        return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("input", mode="before")
    @classmethod
    def _list_one_input(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str) -> str:
        return check_encoding(encoding)

    @field_validator("language")
    @classmethod
    def _check_language(cls, language: str) -> str:
        return check_language(language)

    @field_validator("scripts")
    @classmethod
    def _check_scripts(cls, scripts: list[str]) -> list[str]:
        for script in scripts:
            if script not in SCRIPTS:
                near = difflib.get_close_matches(script.lower(), SCRIPTS, 1)
                hint = f"did you mean {near[0]}?" if near else f"the scripts are {', '.join(SCRIPTS)}"
                raise ValueError(f"there is no script {script!r}; {hint}")
        return scripts
