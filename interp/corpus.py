"""Texts to measure on, read from plain text, JSON lines or Parquet and kept exactly as they stand.

A text is data: markup, terminal escapes and NULs pass through untouched. A text of more than ``MAX_CHARS`` characters
becomes several, cut before whitespace, whose concatenation is the original; texts of whitespace alone are left out.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import CorpusError

MAX_CHARS = 20_000
SUFFIXES = (".txt", ".jsonl", ".parquet")
_FORMATS = "Give .txt, .jsonl or .parquet files, or a directory of these."


@dataclass(frozen=True)
class Text:
    """One text: its number in the corpus as read (kept by sampling), the characters, and where they stood."""

    id: int
    text: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Texts in a fixed order."""

    texts: tuple[Text, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over the numbers and characters of the texts (not over where they stood), in order."""
        whole = hashlib.sha256()
        for text in self.texts:
            data = text.text.encode()
            whole.update(b"%d:%d:" % (text.id, len(data)) + data)
        return whole.hexdigest()

    def sample(self, n: int, seed: int) -> "Corpus":
        """``n`` texts drawn without replacement (all of them where there are fewer), in corpus order."""
        if n >= len(self.texts):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.texts)), n))
        return Corpus(tuple(self.texts[i] for i in chosen))


def read_corpus(paths: Sequence[str | Path], *, field: str = "text", max_texts: int | None = None) -> Corpus:
    """The texts of files and directories in the order given, at most ``max_texts`` of them.

    ``.txt``: one text per paragraph where a blank line separates two paragraphs, otherwise one per line.
    ``.jsonl`` and ``.parquet``: one text per line or row, its column ``field``. A directory stands for the files
    of these kinds directly in it, sorted by name.

    Raises:
        CorpusError: a path is absent, unreadable or of another kind; a line or row is malformed; no text at all.
    """
    sourced = (item for path in paths for file in _files(Path(path)) for item in _read_file(file, field))
    corpus = Corpus(tuple(islice(_numbered(sourced), max_texts)))
    if not corpus.texts:
        where = ", ".join(str(path) for path in paths) or "corpus"
        raise CorpusError("no text but whitespace", where=where, remedy=_FORMATS)
    return corpus


def corpus_of(texts: Iterable[str], source: str) -> Corpus:
    """A corpus from strings already in memory, each with the place ``source:NUMBER`` (from 1); may be empty."""
    return Corpus(tuple(_numbered((text, f"{source}:{i}") for i, text in enumerate(texts, 1))))


def _numbered(sourced: Iterable[tuple[str, str]]) -> Iterator[Text]:
    number = 0
    for text, source in sourced:
        if not text.strip():
            continue
        for chunk in _chunks(text):
            yield Text(number, chunk, source)
            number += 1


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > MAX_CHARS:
        # Before the whitespace, since most tokenizers join a space to the word after it.
        cut = next((i for i in range(start + MAX_CHARS, start, -1) if text[i].isspace()), start + MAX_CHARS)
        yield text[start:cut]
        start = cut
    yield text[start:]


# --- files ---


def _files(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
            if not found:
                raise CorpusError("no .txt, .jsonl or .parquet file in it", where=str(path), remedy=_FORMATS)
            return found
        if not path.exists():
            raise CorpusError("no such file or directory", where=str(path), remedy="Check the path.")
        if path.suffix not in SUFFIXES:
            raise CorpusError(f"cannot read files that end in {path.suffix!r}", where=str(path), remedy=_FORMATS)
        if not path.is_file():
            raise CorpusError("not a regular file", where=str(path), remedy=_FORMATS)
        return [path]
    except OSError as fault:
        raise _unreadable(path, fault) from fault


def _read_file(file: Path, field: str) -> Iterator[tuple[str, str]]:
    if file.suffix == ".parquet":
        return _read_parquet(file, field)
    return _read_jsonl(file, field) if file.suffix == ".jsonl" else _read_txt(file)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    # Split at \n alone: str.splitlines would also split at form feeds and Unicode separators, which are data here.
    try:
        with file.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                where = f"{file}:{number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as fault:
                    raise CorpusError(
                        f"invalid UTF-8 at byte {fault.start} of the line", where=where, remedy="Save it as UTF-8."
                    ) from fault
                yield text.removesuffix("\n").removesuffix("\r"), where
    except OSError as fault:
        raise _unreadable(file, fault) from fault


def _read_txt(file: Path) -> Iterator[tuple[str, str]]:
    if not _has_paragraphs(file):
        yield from _lines(file)
        return
    paragraph: list[str] = []
    first = ""
    for line, where in _lines(file):
        if line.strip():
            first = first if paragraph else where
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph), first
            paragraph = []
    yield "\n".join(paragraph), first


def _has_paragraphs(file: Path) -> bool:
    """Whether a blank line stands between two lines of text (blank lines at either end separate nothing)."""
    text_seen = gap_seen = False
    for line, _ in _lines(file):
        if not line.strip():
            gap_seen = text_seen
        elif gap_seen:
            return True
        else:
            text_seen = True
    return False


def _read_jsonl(file: Path, field: str) -> Iterator[tuple[str, str]]:
    for line, where in _lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise CorpusError(
                f"not a JSON value ({fault})", where=where, remedy='Give one {"text": …} object per line.'
            ) from fault
        if not isinstance(record, dict):
            raise CorpusError(
                f"a JSON {type(record).__name__}, not an object", where=where, remedy='Give {"text": …} on each line.'
            )
        if field not in record:
            raise _field_absent(field, sorted(record), where)
        yield _string(record[field], field, where), where


def _read_parquet(file: Path, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file) as handle:
            if field not in handle.schema_arrow.names:
                raise _field_absent(field, handle.schema_arrow.names, str(file))
            for batch in handle.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    where = f"{file}:{row}"
                    yield _string(value.as_py(), field, where), where
    except UnicodeDecodeError as fault:
        raise CorpusError("invalid UTF-8", where=f"{file}:{row}", remedy="Store the text as UTF-8.") from fault
    except (OSError, pa.ArrowException) as fault:
        raise _unreadable(file, fault) from fault


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(
            f"field {field!r} is {type(value).__name__}, not a string",
            where=where,
            remedy="Name the field that holds the text.",
        )
    try:
        value.encode()
    except UnicodeEncodeError as fault:  # JSON can spell half a surrogate pair, which is no character
        raise CorpusError(
            f"field {field!r} holds a lone surrogate at character {fault.start}",
            where=where,
            remedy="Replace it by the character that was meant.",
        ) from fault
    return value


def _field_absent(field: str, names: Sequence[str], where: str) -> CorpusError:
    have = ", ".join(repr(str(name)) for name in names[:8]) or "none"
    return CorpusError(
        f"no field {field!r} (fields: {have})", where=where, remedy="Name the field that holds the text."
    )


def _unreadable(path: Path, fault: Exception) -> CorpusError:
    reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
    return CorpusError(f"cannot be read ({reason})", where=str(path), remedy="Check the file and its permissions.")
