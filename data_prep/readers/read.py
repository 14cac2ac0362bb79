"""Input files -> records, each a text or the reason why it cannot be read.

    files = find_files(["corpus", "more/*.jsonl.zst"])
    for part in cut_into_units(files, config)[0]:
        for record in read_records(part, config):
            if isinstance(record, Bad):         # counted by record.reason; record.place, record.excerpt
            elif isinstance(record, Dropped):   # counted by record.reason, as what `clean` drops
            else:                               # a text; if it is a Cut, it continues the record before it

.txt (`config.documents`: blank lines or the file's end between documents), .md, WikiExtractor's output (any
name), .jsonl, .ndjson, .json, .csv, .tsv, .parquet and .arrow (`config.text_field`), each also as .gz, .bz2,
.xz or .zst.
However large a file, a line or a document is, memory holds a few MiB of it: a document is cut at paragraphs
or sentences into texts of at most LONGEST characters. Only a line of .jsonl or .tsv, a record of .csv and a
text out of a table are held whole, and are Bad above RECORD_BYTES.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedReader, FileIO
from pathlib import Path

from bertscale.config import WORK_FOLDER, CsvConfig, PrepConfig, UserError, is_utf8
from data_prep.readers import formats, tables
from data_prep.readers.compressed import DAMAGE, compression_of, damage_of, open_stream
from data_prep.readers.encodings import can_be_cut, marked_encoding, open_text, other_encoding
from data_prep.readers.records import INVALID_UTF8, Bad, DamagedFileError, Record, bad, printable

FORMATS = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
ALSO = {".ndjson": ".jsonl"}  # another name of a format
KINDS = f"{', '.join(FORMATS)}, each also as .gz, .bz2, .xz or .zst, and WikiExtractor's <doc> files"
WIKI = "wiki"
UNPACKED = 3  # bytes of text for one of a compressed file, roughly
_DOC = b"<doc "
_GET_THE_RIGHT = "get the right to read it (and of a folder, to enter it), or leave it out of `input`"


@dataclass(frozen=True)
class InputFile:
    name: str
    size: int  # bytes
    mtime_ns: int
    named: bool  # by the user, not found in a folder
    kind: str  # one of FORMATS by its name's end, or WIKI
    digest: str = ""  # of its bytes, once they were read for it


@dataclass(frozen=True)
class Part:
    """A byte range of a file: of .parquet the row groups that begin in it, of other kinds whole documents."""

    name: str
    kind: str  # one of FORMATS, or WIKI; a .txt file that is not cut may still turn out to be WIKI
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Its weight, for progress bars."""
        return self.end - self.start


# ------------------------------------------------------------------------------------------------ find


def find_files(inputs: list[str], field: str = "text", unread: Counter[str] | None = None) -> list[InputFile]:
    """The files that `inputs` name (files, folders searched through, globs), each once, in a fixed order.

    Those that are not read are counted in `unread` by their names' ends, or why. A .json file that was not
    named is read if its first object has the `field`: settings and the like are no text. Hidden files and
    folders count only when named. Raises UserError for one that names nothing that can be read, and for a
    named file of another kind.
    """
    by_path: dict[str, InputFile] = {}
    unread = Counter() if unread is None else unread
    for name in inputs:
        shown, of_name = printable(name), list[InputFile]()
        if os.path.isdir(name):
            of_name += _search(name, field, unread, named=True)
            nothing = f"the folder {shown} has no file of the kinds {KINDS}"
        elif os.path.exists(name):
            of_name += _look_at(name, field, unread, named=True)
            nothing = f"{shown} is none of {KINDS}"
        elif refusal := _refusal(name):
            nothing = f"cannot read {shown}: {refusal}; {_GET_THE_RIGHT}"
        elif matches := sorted(glob.glob(name, recursive=True)):
            for match in filter(os.path.isfile, matches):
                of_name += _look_at(match, field, unread)
            for match in filter(os.path.isdir, matches):
                of_name += _search(match, field, unread)
            nothing = f"no match of {shown} is one of {KINDS}"
        else:
            nothing = f"there is no file, folder or match for {shown}"
        if not of_name:
            raise UserError(f"input: {nothing}")
        for file in of_name:
            by_path.setdefault(os.path.normpath(file.name), file)
    files = list(by_path.values())
    if not sum(file.size for file in files):
        raise UserError(f"input: {', '.join(map(printable, inputs))}: every file is empty")
    return files


def _look_at(name: str, field: str, unread: Counter[str], named: bool = False) -> Iterator[InputFile]:
    """The file, if it is of a kind that can be read."""
    if not (kind := _kind(name)):
        ending = "".join(Path(name.lower()).suffixes[-2 if compression_of(name) else -1 :])
        unread[printable(ending) or "without an ending"] += 1
        return
    if kind == ".json" and not named and not _has_field(name, field):
        unread[f".json without a field {field!r}"] += 1
        return
    try:
        status = os.stat(name)
    except OSError as error:
        raise UserError(f"input: cannot read {printable(name)}: {error.strerror}") from error
    yield InputFile(name, status.st_size, status.st_mtime_ns, named, kind)


def _has_field(name: str, field: str) -> bool:
    """Whether the first object of a .json file has this field, as far as that can be known."""
    try:
        with open_text(name, "utf-8") as stream:
            formats.skip_bom(stream)
            return formats.first_has_field(stream, name, field)
    except (*DAMAGE, UserError):
        return True  # what is wrong with it is told when it is read


def _search(folder: str, field: str, unread: Counter[str], named: bool = False) -> Iterator[InputFile]:
    """The input files in `folder` and in those within it, sorted by path; each folder once.

    Raises UserError where a folder that the user named is closed; others are counted in `unread`.
    """
    seen, names = set[tuple[int, int]](), []

    def note(error: OSError) -> None:
        if named and error.filename == folder:
            why = f"cannot read the folder {printable(folder)}: {error.strerror}"
            raise UserError(f"input: {why}; {_GET_THE_RIGHT}") from error
        unread[f"folder: {error.strerror}"] += 1

    for path, folders, files in os.walk(folder, onerror=note, followlinks=True):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        prepared = WORK_FOLDER in folders  # by us: our output is no input
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [
            os.path.join(path, name)
            for name in files
            if not name.startswith(".") and not (prepared and name.endswith((".arrow", "quarantine.jsonl")))
        ]
    for name in sorted(names, key=lambda name: Path(name).parts):
        if os.path.isfile(name):
            yield from _look_at(name, field, unread)
        elif refusal := _refusal(name):
            unread[f"file: {refusal}"] += 1
        else:
            unread["link to nothing" if os.path.islink(name) else "no file, such as a pipe"] += 1


def _refusal(name: str) -> str:
    """The system's words where it does not even tell what `name` is, as of what lies in a closed folder."""
    try:
        os.stat(name)
    except PermissionError as error:
        return error.strerror or "Permission denied"
    except OSError:
        pass
    return ""


def _kind(name: str) -> str:
    """One of FORMATS by the name's end, WIKI for another file that begins as one, or ""."""
    stem = name.lower().removesuffix(compression_of(name))
    if suffix := next((suffix for suffix in (*FORMATS, *ALSO) if stem.endswith(suffix)), ""):
        return ALSO.get(suffix, suffix)
    if _begins_as_wiki(name):
        return WIKI
    return ".jsonl" if _begins_as_wiki_json(name) else ""


def _begins_as_wiki(name: str) -> bool:
    try:
        with open_text(name, "utf-8") as stream:
            return _is_wiki(stream)
    except (*DAMAGE, UserError):
        return False


def _begins_as_wiki_json(name: str) -> bool:
    """Whether it is the output of WikiExtractor --json: an article a line, with title and text."""
    try:
        with open_text(name, "utf-8") as stream:
            formats.skip_bom(stream)
            if not stream.peek(1).startswith(b"{"):
                return False
            article = json.loads(stream.readline(formats.RECORD_BYTES))
    except (*DAMAGE, UserError, ValueError, RecursionError):
        return False
    return isinstance(article, dict) and article.keys() >= {"id", "title", "text"}


def _is_wiki(stream: BufferedReader) -> bool:
    """Whether what comes is a <doc> block; skips a byte order mark."""
    formats.skip_bom(stream)
    return stream.peek(len(_DOC)).startswith(_DOC)


# ------------------------------------------------------------------------------------------------- cut


def cut_into_units(files: list[InputFile], config: PrepConfig) -> list[list[Part]]:
    """Cuts the input into work units of about `config.split_bytes` bytes, in order and between documents.

    Plain .txt (unless a file is a document), WikiExtractor, .jsonl and .tsv files are cut anywhere between
    documents, .parquet between row groups, others not. Raises UserError for a table without the column
    `config.text_field`, and for a damaged file that the user named; others are left to `read_records`.
    """
    units: list[list[Part]] = [[]]
    room = config.split_bytes
    for file in files:
        start, kind = 0, file.kind
        # Its parts cannot tell by their own beginning that they are of WikiExtractor's output.
        if kind == ".txt" and _is_large(file, config, room) and _begins_as_wiki(file.name):
            kind = WIKI
        for end in _ends(file, kind, config, room):
            weight = end - start
            # A file that cannot be cut begins a unit if it would pass the end of this one by more than half.
            if room <= 0 or (units[-1] and weight > 2 * room):
                units.append([])
                room = config.split_bytes
            units[-1].append(Part(file.name, kind, start, end))
            room -= weight
            start = end
    return [parts for parts in units if parts]


def _is_large(file: InputFile, config: PrepConfig, room: int) -> bool:
    """Whether the file is to be cut: larger than `room` bytes, and of a kind and encoding that can be."""
    quoted = file.kind == ".tsv" and config.csv.quoted_tsv
    whole = compression_of(file.name) or file.kind in (".arrow", ".csv", ".json", ".md") or quoted
    if file.kind != ".parquet" and not can_be_cut(config.encoding):
        return False
    return not whole and file.size > max(room, 1) and not _is_marked(file.name)


def _is_marked(name: str) -> bool:
    """Whether it is UTF-16 or UTF-32, which is not cut."""
    with open_stream(name) as stream:
        return marked_encoding(stream) is not None


def _ends(file: InputFile, kind: str, config: PrepConfig, room: int) -> Iterator[int]:
    """Where the parts of `file` end: the first after about `room` bytes, others after split_bytes."""
    if not file.size:
        return
    table = kind in (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".json")
    large = _is_large(file, config, room)
    if not (table or file.named or large):
        yield file.size
        return
    try:
        _check(file.name, kind, config)
        if not large:
            yield file.size
        elif kind == ".parquet":
            yield from _ends_of_groups(file, config, room)
        else:
            yield from _ends_of_documents(file, kind, config, room)
    except DAMAGE as error:
        if file.named or (isinstance(error, OSError) and error.errno):
            raise UserError(f"input: cannot read {printable(file.name)}: {_one_line(error)}") from error
        yield file.size


def _check(name: str, kind: str, config: PrepConfig) -> None:
    """Opens the file and looks at its beginning."""
    if kind == ".parquet":
        with tables.open_parquet(name) as parquet:
            tables.text_column(parquet.schema_arrow, config.text_field, name)
        return
    if kind == ".arrow":
        with open_stream(name) as stream:
            tables.text_column(tables.open_arrow(stream).schema, config.text_field, name)
        return
    with open_text(name, config.encoding) as stream:
        formats.skip_bom(stream)
        try:
            if dialect := _dialect(kind, config):
                formats.csv_column(stream, name, config.text_field, dialect)
            elif kind == ".tsv":
                formats.tsv_column(stream, name, config.text_field)
            elif kind in (".jsonl", ".json"):
                formats.check_field(stream, name, kind, config.text_field)
        except UserError:
            if advice := other_encoding(name, config.encoding):
                raise UserError(f"input: {advice}") from None
            raise


def _ends_of_groups(file: InputFile, config: PrepConfig, room: int) -> Iterator[int]:
    with tables.open_parquet(file.name) as parquet:
        starts = tables.group_starts(parquet)
    begin, size = 0, max(room, 1)
    for start in starts[1:]:
        if start - begin >= size:
            yield start
            begin, size = start, config.split_bytes
    yield file.size


def _ends_of_documents(file: InputFile, kind: str, config: PrepConfig, room: int) -> Iterator[int]:
    with open_stream(file.name) as stream:
        if kind == ".txt" and config.documents == "file":
            yield file.size
            return
        following = {WIKI: formats.next_article, ".txt": formats.next_paragraph}.get(kind, formats.next_line)
        end = following(stream, max(room, 1))
        while end < file.size:
            yield end
            end = following(stream, end + config.split_bytes)
        yield file.size


# ------------------------------------------------------------------------------------------------ read


def read_records(part: Part, config: PrepConfig) -> Iterator[Record]:
    """The records of `part`, in order.

    Where the file turns out to be damaged the rest of it is one Bad, with the record that the damage broke.
    Raises UserError if it cannot be opened or the disk fails, or if a table lacks the column.
    """
    count, left = 0, part.bytes
    last: Bad | None = None  # which damage may explain
    table = part.kind in (".parquet", ".arrow")
    try:
        for record in _records(part, config):
            if last is not None:
                yield last
                count, last = count + 1, None
            if isinstance(record, Bad):
                lost = min(left, record.lost // (UNPACKED if compression_of(part.name) else 1))
                last, left = replace(_as_encoded(record, part, config.encoding), lost=lost), left - lost
                continue
            yield record
            count += 1
        if last is not None:
            yield last
    except (DamagedFileError, *DAMAGE) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"input: cannot read {printable(part.name)}: {error.strerror}") from error
        if last is not None and table:
            yield last
            count += 1
        share = error.share if isinstance(error, DamagedFileError) else 1.0
        what = "the whole file" if not count else f"all after record {count}"
        what += "" if share else ", where it breaks off"
        cause = _one_line(error.__cause__ or error)
        yield bad("a damaged file, the rest of it lost", part.name, what, cause, round(share * part.bytes))


def undecodable(encoding: str) -> list[str]:
    """The reasons of a Bad whose bytes are no text: of what is UTF-8 in any case, and of other files."""
    return [INVALID_UTF8] if is_utf8(encoding) else [INVALID_UTF8, f"invalid {encoding}"]


def _as_encoded(record: Bad, part: Part, encoding: str) -> Bad:
    """A Bad that was found in the UTF-8 form of a text in another encoding says so."""
    if is_utf8(encoding) or part.kind in (".parquet", ".arrow"):
        return record
    reason = undecodable(encoding)[-1] if record.reason == INVALID_UTF8 else record.reason
    where = record.place
    if part.kind != ".csv":
        where += " of its text as UTF-8"
        where += f", counted from byte {part.start} of the file" if part.start else ""
    return Bad(reason, where, record.excerpt)


def _records(part: Part, config: PrepConfig) -> Iterator[Record]:
    name, kind = part.name, part.kind
    if kind == ".parquet":
        yield from tables.read_parquet(name, part.start, part.end, config.text_field)
        return
    if kind == ".arrow":
        yield from tables.read_arrow(name, config.text_field)
        return
    compressed = bool(compression_of(name))
    with open_text(
        name, config.encoding, part.start, None if compressed else part.end, until_damage=True
    ) as stream:
        # Of every kind it skips a byte order mark; a small .txt file is looked at only here, as it is open.
        if not part.start and _is_wiki(stream) and kind == ".txt":
            kind = WIKI
        end = part.end if isinstance(stream.raw, FileIO) and not compressed else None
        if kind == WIKI:
            yield from formats.read_wiki(stream, name, end)
        elif kind == ".txt" and config.documents == "file":
            yield from formats.read_whole(stream, name)
        elif kind == ".txt":
            yield from formats.read_paragraphs(stream, name, end)
        elif kind == ".md":
            yield from formats.read_markdown(stream, name)
        elif kind == ".jsonl":
            yield from formats.read_jsonl(stream, name, end, config.text_field)
        elif kind == ".json":
            yield from formats.read_json(stream, name, config.text_field)
        elif dialect := _dialect(kind, config):
            yield from formats.read_csv(stream, name, config.text_field, dialect)
        elif kind == ".tsv":
            yield from formats.read_tsv(stream, name, end, _tsv_column(stream, part, config))
        if damage := damage_of(stream):
            raise DamagedFileError(1 - damage.position / max(part.end, 1)) from damage.error


def _dialect(kind: str, config: PrepConfig) -> CsvConfig | None:
    """How a table is quoted; None for a plain .tsv, and for files of other kinds."""
    if kind == ".csv":
        return config.csv
    return (
        config.csv.model_copy(update={"delimiter": "\t"})
        if kind == ".tsv" and config.csv.quoted_tsv
        else None
    )


def _tsv_column(stream: BufferedReader, part: Part, config: PrepConfig) -> tuple[int, int]:
    """The text's column, from the first line of the file; `stream` then stands at a record."""
    if not part.start:
        return formats.tsv_column(stream, part.name, config.text_field)
    with open_text(part.name, config.encoding) as whole:
        return formats.tsv_column(whole, part.name, config.text_field)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
