"""The tokenizer of a data set or a model: SentencePiece or WordPiece, behind one interface."""

from bertscale.tokenizer.base import (
    CLS,
    MASK,
    PAD,
    SENTENCE_PIECE_NAME,
    SEP,
    TOKENIZER_NAMES,
    UNK,
    VOCABULARY_NAME,
    Tokenizer,
    han_or_kana,
    is_han_or_kana,
    normalize,
)
from bertscale.tokenizer.load import find_tokenizer, load_tokenizer
from bertscale.tokenizer.wordpiece import CONTINUES, WordPieceTokenizer
