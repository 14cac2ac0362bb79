"""The tokenizer of a data set or a model: SentencePiece, WordPiece or BPE of bytes, behind one interface."""

from bertscale.tokenizer.base import (
    CLS,
    DROPPED_RULE,
    FAST_NAME,
    MASK,
    PAD,
    SENTENCE_PIECE_NAME,
    SEP,
    SPACES_RULE,
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
