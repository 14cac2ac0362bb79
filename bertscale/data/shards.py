"""THE contract between prep and training: Arrow token shards, their manifest, their writer and reader.

A data set is a folder:

    manifest.json           written last: format version, tokenizer digest, settings, counters, shard list,
                            and its own digest
    tokenizer.model         or tokenizer.json: what made the tokens
    train-00000.arrow ...   and validation-00000.arrow ...

A shard is an uncompressed Arrow IPC file of one record batch with a row for each document:

    tokens            list<uint16>   pieces of all its sentences (uint32 above 65,535 pieces)
    sentence_lengths  list<uint32>   tokens in each sentence; they add up to the row's tokens
    document          uint64         split number * 2**32 + number of the record in its split
    word_starts       list<bool>     whether each token begins a word; only in data sets prepared with `words`

    dataset = open_dataset("runs/quickstart/data", "train", verify=True)
    shard = dataset.shards[0]
    first = shard.tokens[shard.token_offsets[0] : shard.token_offsets[1]]

Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from bertscale.config import WORK_FOLDER, UserError
from bertscale.config.table import check_table, damaged, read_object
from bertscale.data.manifest import Manifest, Split
from bertscale.files import file_digest, json_digest, whole_file, write_json
from bertscale.tokenizer import find_tokenizer

FORMAT_VERSION = 2
WORDS_VERSION = 3  # with the column `word_starts`; all else is as in version 2
MANIFEST_NAME = "manifest.json"
DIGEST = "digest"  # of all the rest of the manifest; those of earlier versions have none
LARGEST_SHARD = 2**31 - 1  # tokens: list offsets are int32

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Document = tuple[int, Sequence[Sequence[int]]]  # (document, its sentences as lists of piece ids)


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; `bytes` and `digest` (xxh3-128, hex) are the file's."""

    name: str
    split: str
    rows: int
    sentences: int
    tokens: int
    bytes: int
    digest: str


# --------------------------------------------------------------------------------------------- write


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of the stored tokens: uint16 as long as every piece of the vocabulary fits."""
    return np.dtype(np.uint16 if vocab_size <= 65_535 else np.uint32)


def write_shard(
    path: str | Path, documents: Iterable[Document], dtype: npt.DTypeLike, split: str = "train"
) -> ShardEntry:
    """Writes `documents` as the shard `path` and returns its manifest entry.

    Raises OverflowError for an id that `dtype` cannot hold. For tests and small sets; `write_columns` does
    the work.
    """
    rows = list(documents)
    sentences = [sentence for _, document in rows for sentence in document]
    return write_columns(
        path,
        split,
        documents=np.array([number for number, _ in rows], np.uint64),
        tokens=np.array([i for sentence in sentences for i in sentence], np.dtype(dtype)),
        token_offsets=_offsets([sum(map(len, document)) for _, document in rows]),
        sentence_lengths=np.array([len(sentence) for sentence in sentences], np.uint32),
        sentence_offsets=_offsets([len(document) for _, document in rows]),
    )


def write_columns(
    path: str | Path,
    split: str,
    *,
    documents: npt.NDArray[np.uint64],
    tokens: Ids,
    token_offsets: npt.NDArray[np.int32],
    sentence_lengths: npt.NDArray[np.uint32],
    sentence_offsets: npt.NDArray[np.int32],
    word_starts: npt.NDArray[np.bool_] | None = None,
) -> ShardEntry:
    """Writes a shard of these columns (as in `Shard`) without a copy of them; returns its manifest entry.

    It appears under its name only when it is whole and on the disk. Raises OSError.
    """
    path = Path(path)
    columns = [
        pa.ListArray.from_arrays(pa.array(token_offsets), pa.array(tokens)),
        pa.ListArray.from_arrays(pa.array(sentence_offsets), pa.array(sentence_lengths)),
        pa.array(documents),
    ]
    if word_starts is not None:
        columns.append(pa.ListArray.from_arrays(pa.array(token_offsets), pa.array(word_starts)))
    batch = pa.record_batch(columns, schema=_schema(tokens.dtype, words=word_starts is not None))
    with whole_file(path) as file:
        sink = _DigestingFile(file)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
    return ShardEntry(
        name=path.name,
        split=split,
        rows=len(documents),
        sentences=len(sentence_lengths),
        tokens=len(tokens),
        bytes=sink.size,
        digest=sink.hash.hexdigest(),
    )


def write_manifest(
    folder: str | Path,
    *,
    tokenizer_sha256: str,
    vocab_size: int,
    settings: dict[str, Any],
    counters: dict[str, Any],
    shards: Sequence[ShardEntry],
    words: bool = False,
) -> dict[str, Any]:
    """Writes manifest.json, which makes `folder` a data set; returns its content without its digest.

    `words`: whether the shards have the column `word_starts`. Call it last, when every shard lies under its
    name and the tokenizer's file is there.
    """
    manifest = {
        "format_version": WORDS_VERSION if words else FORMAT_VERSION,
        "tokenizer": find_tokenizer(folder).name,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "settings": settings,
        "counters": counters,
        "shards": [asdict(entry) for entry in shards],
    }
    write_json(Path(folder) / MANIFEST_NAME, {**manifest, DIGEST: json_digest(manifest)})
    return manifest


# ---------------------------------------------------------------------------------------------- read


class Shard:
    """One shard on a memory map, as flat numpy views (nothing is copied, nothing is read yet).

    Row i, a document, has tokens[token_offsets[i] : token_offsets[i + 1]] and
    sentence_lengths[sentence_offsets[i] : sentence_offsets[i + 1]]. Views, because they cost 200 ns a row:
    pyarrow's `slice` costs 4,130 and `as_py` 2,630.
    """

    tokens: Ids  # [tokens]
    token_offsets: npt.NDArray[np.int32]  # [rows + 1]
    sentence_lengths: npt.NDArray[np.uint32]  # [sentences]
    sentence_offsets: npt.NDArray[np.int32]  # [rows + 1]
    documents: npt.NDArray[np.uint64]  # [rows]
    # Whether each token begins a word, a bit each, the lowest first [ceil(tokens / 8)]; None where not kept.
    word_bits: npt.NDArray[np.uint8] | None

    def __init__(self, path: str | Path, entry: ShardEntry) -> None:
        """Raises UserError for a missing or damaged file, or one that is not what `entry` says."""
        self.path, self.entry = Path(path), entry
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"the shard {self.path} is missing; {_REMEDY}") from None
        except OSError as error:
            raise UserError(f"cannot read the shard {self.path}: {error.strerror}") from error
        if size != entry.bytes:
            raise UserError(
                f"the shard {self.path} has {size:,} bytes instead of {entry.bytes:,}: "
                f"it was truncated or replaced; {_REMEDY}"
            )
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            batch = reader.get_batch(0)
            if reader.num_record_batches != 1 or batch.schema not in _SCHEMAS:
                raise pa.ArrowInvalid("unknown columns")
            batch.validate()  # that no column reaches over its buffers; reads none of them
            if any(column.null_count for column in batch.columns):
                raise pa.ArrowInvalid("a row without a value")
            tokens, lengths, documents, *words = batch.columns
            if words and len(words[0].values) != len(tokens.values):
                raise pa.ArrowInvalid("not a bit for each token")
            sizes = (batch.num_rows, len(lengths.values), len(tokens.values))
        except (pa.ArrowException, ValueError, IndexError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the shard {self.path} is damaged ({reason}); {_REMEDY}") from error
        if sizes != (entry.rows, entry.sentences, entry.tokens):
            raise UserError(f"the shard {self.path} has other rows than its manifest says; {_REMEDY}")
        self.tokens, self.token_offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
        self.sentence_lengths, self.sentence_offsets = lengths.values.to_numpy(), lengths.offsets.to_numpy()
        self.documents = documents.to_numpy()
        # numpy has no bits: a view of their bytes.
        self.word_bits = np.frombuffer(words[0].values.buffers()[1], np.uint8) if words else None

    def verify(self) -> None:
        """Reads the whole file; raises UserError if one bit of it changed since it was written.

        Arrow itself sees a file that was truncated, but no flipped bit.
        """
        digest = file_digest(self.path)
        if digest != self.entry.digest:
            raise UserError(
                f"the shard {self.path} has the digest {digest} instead of {self.entry.digest}: "
                "its bytes changed since it was written; delete it and run `bertscale prep` again"
            )


class Dataset:
    """The shards of one split of a prepared folder; made by `open_dataset`."""

    def __init__(self, folder: Path, split: Split, manifest: dict[str, Any], shards: list[Shard]) -> None:
        self.folder, self.split, self.manifest, self.shards = folder, split, manifest, shards
        self.manifest_digest = json_digest(manifest)
        self.tokenizer_path = find_tokenizer(folder)
        self.num_documents = sum(shard.entry.rows for shard in shards)
        self.num_tokens = sum(shard.entry.tokens for shard in shards)


def open_dataset(folder: str | Path, split: Split = "train", verify: bool = False) -> Dataset:
    """Opens the `split`, train or validation, of a folder written by `bertscale prep`.

    `num_documents` and `num_tokens` count the whole split; each of its `shards`, of which there may be none,
    has `tokens` [tokens] and `token_offsets` [rows + 1] as numpy views of the file (see `Shard`). `verify`
    also reads every byte and compares digests.

    Raises UserError that names what is missing, truncated, changed or does not fit, and what to do.

        shard = open_dataset("runs/quickstart/data", "validation").shards[0]
    """
    folder = Path(folder)
    if split not in get_args(Split):
        raise UserError(f"split={split!r}: a data set has the splits {' and '.join(get_args(Split))}")
    manifest = read_manifest(folder)
    tokenizer = find_tokenizer(folder)
    if not tokenizer.is_file():
        raise UserError(f"the tokenizer {tokenizer} is missing; {_REMEDY}")
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    if sha256 != manifest["tokenizer_sha256"]:
        raise UserError(
            f"the tokenizer {tokenizer} (sha256 {sha256[:12]}...) is not the one that made the shards "
            f"(sha256 {manifest['tokenizer_sha256'][:12]}...); put that file back "
            "or run `bertscale prep` again"
        )
    entries = [ShardEntry(**entry) for entry in manifest["shards"] if entry["split"] == split]
    shards = [Shard(folder / entry.name, entry) for entry in entries]
    if verify:
        for shard in shards:
            shard.verify()
    return Dataset(folder, split, manifest, shards)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data set, checked, without its digest; raises UserError where `folder` is none."""
    if not folder.is_dir():
        raise UserError(f"there is no data folder {folder}; `bertscale prep` makes one")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        names = sorted(file.name for file in folder.iterdir())
        if names and WORK_FOLDER not in names and not any(name.endswith(".arrow") for name in names):
            raise UserError(
                f"{folder} is not a data set, it holds {names[0]}{' and more' if names[1:] else ''}; if that "
                f"is raw text, prepare it first: bertscale prep configs/prep/english.yaml input={folder}"
            )
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}: prep did not finish here; "
            "run `bertscale prep` again: finished shards are kept"
        )
    remedy = "delete it and run `bertscale prep` again"
    manifest = read_object(path, remedy)
    version = manifest.get("format_version")
    if type(version) is not int:
        raise damaged(path, f"format_version is {version!r}", remedy)
    if version not in (FORMAT_VERSION, WORDS_VERSION):
        raise UserError(
            f"{path} has format version {version}, this bertscale reads {FORMAT_VERSION} and "
            f"{WORDS_VERSION}; run `bertscale prep` again"
        )
    if DIGEST in manifest and manifest.pop(DIGEST) != json_digest(manifest):
        raise damaged(path, "its digest is not that of its content", remedy)
    check_table(Manifest, manifest, path, remedy)
    return manifest


_REMEDY = "run `bertscale prep` again: it makes what is missing or changed"


class _DigestingFile:
    """A file that Arrow writes to and that keeps the digest and the number of bytes: reading the shard again
    for them would double the work of the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.hash, self.closed = file, 0, xxhash.xxh3_128(), False

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        written = self.file.write(data)
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True  # the caller still has to fsync the file


def _schema(dtype: npt.DTypeLike, words: bool = False) -> Any:
    columns = [
        ("tokens", pa.list_(pa.from_numpy_dtype(np.dtype(dtype)))),
        ("sentence_lengths", pa.list_(pa.uint32())),
        ("document", pa.uint64()),
    ]
    return pa.schema([*columns, ("word_starts", pa.list_(pa.bool_()))] if words else columns)


_SCHEMAS = [_schema(dtype, words) for dtype in (np.uint16, np.uint32) for words in (False, True)]


def _offsets(sizes: list[int]) -> npt.NDArray[np.int32]:
    return np.cumsum([0, *sizes]).astype(np.int32)


def check_tokenizers(datasets: Sequence[Dataset], key: str = "data") -> None:
    """Raises UserError where two data sets have different tokenizers: their ids mean different pieces.

    `key`: the setting that names those after the first.
    """
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest["tokenizer_sha256"] != first.manifest["tokenizer_sha256"]:
            raise UserError(
                f"{key}: {other.folder} was made with another tokenizer than {first.folder}; run `bertscale "
                f"prep` for it with tokenizer={first.tokenizer_path}"
            )
