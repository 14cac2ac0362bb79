"""The table of a data set, manifest.json: what must be in it, and that its counts fit together."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bertscale.config.table import Count, FileName, Size, Table

PIECES = {"unknown", "single_bytes", "letters"}  # counters that earlier versions did not have, none of them
SUMS = {"documents": "rows", "sentences": "sentences", "tokens": "tokens"}  # counter -> key of a shard

Split = Literal["train", "validation"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]+$")]


class _Shard(Table):
    name: FileName
    split: Split
    rows: Count
    sentences: Count
    tokens: Count
    bytes: Count
    digest: Digest


class _Sums(Table):
    documents: Count
    sentences: Count
    tokens: Count
    text_bytes: Count
    unknown: Count = 0
    single_bytes: Count = 0
    words: Count = 0


class _Counters(Table):
    records: Count = 0
    cut: Count = 0
    lost_bytes: Count = 0
    joined_lines: Count = 0
    joined_documents: Count = 0
    documents: Count = 0
    sentences: Count = 0
    tokens: Count = 0
    text_bytes: Count = 0
    unknown: Count = 0
    single_bytes: Count = 0
    words: Count = 0
    splits: dict[Split, _Sums] = Field(default_factory=dict)
    bad: dict[str, Count] = Field(default_factory=dict)
    dropped: dict[str, Count] = Field(default_factory=dict)
    letters: dict[str, Count] = Field(default_factory=dict)
    files: dict[str, dict[str, Count]] = Field(default_factory=dict)
    changes: dict[str, Count] = Field(default_factory=dict)


class _Settings(Table):
    input: list[str] = Field(default_factory=list)
    language: str = ""
    tokenizer: str | None = None


class Manifest(Table):
    """What `bertscale prep` writes last; the shards' files are compared with it when they are opened."""

    tokenizer: Literal["tokenizer.model", "tokenizer.json"]
    tokenizer_sha256: Digest
    vocab_size: Size
    settings: _Settings
    counters: _Counters
    shards: list[_Shard]

    @model_validator(mode="after")
    def _check_sums(self) -> Manifest:
        """Raises ValueError where a shard is named twice, out of order or in another split, or the counters
        are not the sums of the shards."""
        (name, times), *_ = Counter(shard.name for shard in self.shards).most_common(1) or [("", 0)]
        if times > 1:
            raise ValueError(f"the shard {name} is there twice")
        for shard in self.shards:
            if not shard.name.startswith(f"{shard.split}-"):
                raise ValueError(f"the shard {shard.name} is not of the split {shard.split}")
        for before, shard in pairwise(self.shards):
            in_order = (len(before.name), before.name) < (len(shard.name), shard.name)  # 99999 before 100000
            if shard.split == before.split and not in_order:
                raise ValueError(f"the shard {shard.name} stands behind {before.name}")
        counted_pieces = PIECES & self.counters.model_fields_set
        if counted_pieces and (missing := PIECES - counted_pieces):
            raise ValueError(f"counters.{min(missing)} is missing")
        if counted_pieces and not self.settings.language:
            raise ValueError("settings.language is missing")
        for key in (*SUMS, "text_bytes", "unknown", "single_bytes", "words"):
            of_splits = {split: getattr(sums, key) for split, sums in self.counters.splits.items()}
            if getattr(self.counters, key) != sum(of_splits.values()):
                raise ValueError(f"counters.{key} is not the sum of its splits")
            for split, counted in of_splits.items():
                shards = [shard for shard in self.shards if shard.split == split]
                if key in SUMS and counted != sum(getattr(shard, SUMS[key]) for shard in shards):
                    raise ValueError(f"counters.splits.{split}.{key} is not the sum of its shards")
        if self.counters.splits and {shard.split for shard in self.shards} - set(self.counters.splits):
            raise ValueError("a split of the shards is not in the counters")
        return self
