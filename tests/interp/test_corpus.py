import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heredity.interp.corpus import MAX_CHARS, Corpus, Text, corpus_of, read_corpus
from heredity.interp.errors import CorpusError


def texts(corpus: Corpus) -> list[str]:
    return [text.text for text in corpus.texts]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(path: Path, **columns: list | pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_txt_of_paragraphs(tmp_path):
    corpus = read_corpus([write(tmp_path / "a.txt", "\n\none\r\nstill one\n \t\n\ntwo\n\n")])
    assert texts(corpus) == ["one\nstill one", "two"]
    assert [text.source for text in corpus.texts] == [f"{tmp_path}/a.txt:3", f"{tmp_path}/a.txt:7"]


def test_txt_of_lines(tmp_path):
    # Blank lines at the ends separate nothing; U+2028 and form feeds do not end a line.
    corpus = read_corpus([write(tmp_path / "a.txt", "\ufeff\none\ntwo\u2028\x0c\x85two\n\n\n")])
    assert texts(corpus) == ["one", "two\u2028\x0c\x85two"]


def test_three_formats_agree(tmp_path):
    wanted = ["one", "<script>alert(1)</script>", "\x1b[31mred\x1b[0m", "nul \x00 here", "日本 🙂‍↕️"]
    read = [
        read_corpus([write(tmp_path / "a.txt", "\n".join(wanted))]),
        read_corpus([write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t, "n": 1}) for t in wanted))]),
        read_corpus([parquet(tmp_path / "a.parquet", n=[1] * 5, text=wanted)]),
        corpus_of(wanted, "here"),
    ]
    assert [texts(corpus) for corpus in read] == [wanted] * 4
    assert len({corpus.digest for corpus in read}) == 1


def test_directory_is_read_in_order_of_names(tmp_path):
    write(tmp_path / "b.txt", "two")
    parquet(tmp_path / "a.parquet", text=["one"])
    write(tmp_path / "c.jsonl", '{"text": "three"}')
    write(tmp_path / "README.md", "not read")
    (tmp_path / "sub.txt").mkdir()
    assert texts(read_corpus([tmp_path])) == ["one", "two", "three"]
    assert texts(read_corpus([str(tmp_path / "c.jsonl"), tmp_path], max_texts=3)) == ["three", "one", "two"]


def test_another_field(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}')
    assert texts(read_corpus([path], field="body")) == ["yes"]


def test_max_texts_stops_before_later_faults(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\nbroken')
    assert texts(read_corpus([path], max_texts=1)) == ["one"]


@pytest.mark.parametrize("unit", ["word ", "x", "日本語 ", " \n"])
def test_long_texts_become_pieces_that_add_up(tmp_path, unit):
    long = "start" + unit * (100_003 // len(unit)) + "end"
    corpus = read_corpus([write(tmp_path / "a.jsonl", json.dumps({"text": long}) + '\n{"text": "after"}')])
    *pieces, after = texts(corpus)
    assert "".join(pieces) == long and after == "after"
    assert max(len(piece) for piece in pieces) <= MAX_CHARS and len(pieces) >= 6
    assert [text.id for text in corpus.texts] == list(range(len(corpus.texts)))
    assert {text.source for text in corpus.texts[:-1]} == {f"{tmp_path}/a.jsonl:1"}
    if unit == "word ":
        assert all(piece.startswith(" word") for piece in pieces[1:])


def test_whitespace_alone_is_no_text(tmp_path):
    assert texts(read_corpus([write(tmp_path / "a.jsonl", '{"text": " \\n"}\n\n{"text": "x"}\n{"text": ""}')])) == ["x"]


def test_sample_is_seeded_and_keeps_numbers():
    corpus = corpus_of([f"t{i}" for i in range(50)], "s")
    sample = corpus.sample(10, 3)
    ids = [text.id for text in sample.texts]
    assert sample == corpus.sample(10, 3) != corpus.sample(10, 4)
    assert ids == sorted(ids) and len(set(ids)) == 10
    assert all(corpus.texts[text.id] == text for text in sample.texts)
    assert corpus.sample(99, 0) is corpus
    assert sample.digest != corpus.digest


def test_digest_is_of_texts_and_their_borders():
    assert corpus_of(["ab", "c"], "s").digest == corpus_of(["ab", "c"], "elsewhere").digest
    assert corpus_of(["ab", "c"], "s").digest != corpus_of(["a", "bc"], "s").digest
    assert Corpus((Text(0, "a", ""),)).digest != Corpus((Text(1, "a", ""),)).digest


FAULTS = {
    "bad.jsonl": ('{"text": "x"}\n{"text": ', "bad.jsonl:2", "not a JSON value"),
    "deep.jsonl": ("[" * 100_000, "deep.jsonl:1", "not a JSON value"),
    "digits.jsonl": ('{"text": ' + "9" * 5000 + "}", "digits.jsonl:1", "not a JSON value"),
    "array.jsonl": ("[1]", "array.jsonl:1", "a JSON list, not an object"),
    "absent.jsonl": ('\n{"txt": "x"}', "absent.jsonl:2", "no field 'text' (fields: 'txt')"),
    "number.jsonl": ('{"text": 3}', "number.jsonl:1", "field 'text' is int"),
    "null.jsonl": ('{"text": null}', "null.jsonl:1", "field 'text' is NoneType"),
    "half.jsonl": ('{"text": "ab\\ud800"}', "half.jsonl:1", "lone surrogate at character 2"),
    "latin.txt": (b"fine\ncaf\xe9\n", "latin.txt:2", "invalid UTF-8 at byte 3"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "latin.jsonl:1", "invalid UTF-8"),
    "wide.txt": ("abc".encode("utf-16"), "wide.txt:1", "invalid UTF-8"),
    "noise.parquet": (b"PAR1 this is not parquet PAR1", "noise.parquet", "cannot be read"),
    "empty.parquet": (b"", "empty.parquet", "cannot be read"),
    "empty.txt": ("", "empty.txt", "no text but whitespace"),
    "blank.jsonl": ('\n{"text": " "}\n', "blank.jsonl", "no text but whitespace"),
    "model.bin": (b"x", "model.bin", "cannot read files that end in '.bin'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_place(tmp_path, name):
    content, where, what = FAULTS[name]
    with pytest.raises(CorpusError) as caught:
        read_corpus([write(tmp_path / name, content)])
    assert caught.value.where == f"{tmp_path}/{where}"
    assert what in str(caught.value) and "\n" not in str(caught.value)


def test_faults_in_parquet_name_the_row(tmp_path):
    latin = pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe9"))
    cases = [
        (parquet(tmp_path / "a.parquet", body=["x"]), "", "no field 'text' (fields: 'body')"),
        (parquet(tmp_path / "b.parquet", text=["x", None]), ":2", "is NoneType"),
        (parquet(tmp_path / "c.parquet", text=[1]), ":1", "is int"),
        (parquet(tmp_path / "d.parquet", text=latin), ":2", "invalid UTF-8"),
    ]
    for path, place, what in cases:
        with pytest.raises(CorpusError) as caught:
            read_corpus([path])
        assert caught.value.where == f"{path}{place}" and what in caught.value.what


def test_damaged_parquet_page(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[f"text {i} " * 50 for i in range(500)])
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(CorpusError, match="cannot be read"):
        read_corpus([path])


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for a writer
    cases = {
        "absent.txt": "no such file",
        "empty": "no .txt, .jsonl or .parquet file in it",
        "pipe.txt": "not a regular file",
        "a\0b.txt": "no such file",
        "n" * 300 + ".txt": "name too long",
    }
    for name, what in cases.items():
        with pytest.raises(CorpusError) as caught:
            read_corpus([tmp_path / name])
        assert what in str(caught.value).lower()
    with pytest.raises(CorpusError, match="no text"):
        read_corpus([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    path.chmod(0)
    with pytest.raises(CorpusError, match="Permission denied"):
        read_corpus([path])
