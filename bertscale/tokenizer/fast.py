"""What the tokenizers have in common that are made of a tokenizer.json, by the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bertscale.tokenizer.base import Tokenizer


class FastTokenizer(Tokenizer):
    """A tokenizer of the library, in `_fast`; its pieces and texts are what that says."""

    _fast: Any

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, by the rules of the file; special ids give no text."""
        special = set(self.special_ids)
        text: str = self._fast.decode([int(i) for i in ids if i not in special])
        return text

    def piece(self, piece_id: int) -> str:
        """The piece as it is written in the vocabulary; raises IndexError where there is none."""
        name: str | None = self._fast.id_to_token(int(piece_id))
        if name is None:
            raise IndexError(f"no piece {piece_id}")
        return name
