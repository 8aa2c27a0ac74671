import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tameformer.data.documents import read_documents
from tameformer.data.text import num_bytes, read_lines, read_text
from tameformer.errors import DataError


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_comes_back_as_it_was_written(tmp_path, name):
    text = "äpfel\r\n\x0c\u2028\u0085 \U0001f600\n\n"
    raw = text.encode("utf-8")
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    assert read_text(tmp_path / name) == text


def test_a_byte_order_mark_is_left_out_at_the_start_only(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    assert read_text(tmp_path / "a") == "a\ufeff"


@pytest.mark.parametrize(
    ("raw", "name", "message"),
    [
        (b"abc\xe4pfel", "a.txt", r"a\.txt is not UTF-8: byte 0xe4 at offset 3 .*WINDOWS-1252"),
        (b"\xff\xfea\x00", "a.txt", r"a\.txt is not UTF-8: byte 0xff at offset 0 .*UTF-16"),
        (gzip.compress(b"abc", mtime=0), "a.txt", r"a\.txt is not UTF-8: byte 0x8b at offset 1 .*ends in \.gz"),
        (gzip.compress(b"\xe4", mtime=0), "a.txt.gz", r"a\.txt\.gz is not UTF-8: byte 0xe4 at offset 0"),
        (b"", "a.txt", r"a\.txt is empty; expected UTF-8 text"),
        (b"", "a.txt.gz", r"a\.txt\.gz is empty"),
        (gzip.compress(b"", mtime=0), "a.txt.gz", r"a\.txt\.gz is empty"),
        (b"\xef\xbb\xbf", "a.txt", r"a\.txt is empty"),
        (b"abc", "a.txt.gz", r"a\.txt\.gz is not a whole gzip file: .*rename it without \.gz"),
        (gzip.compress(b"abc" * 999, mtime=0)[:-12], "a.txt.gz", r"a\.txt\.gz is not a whole gzip file"),
        (None, "a.txt", r"a\.txt does not exist; check the path"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, raw, name, message):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_text(tmp_path / name)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder; expected a text file"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\nb", ["a", "b"]),
        ("a\nb\n", ["a", "b"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("a\n\n", ["a", ""]),
        ("\n", [""]),
        ("a\u2028b\x0cc\x85d\x1ce\rf\ng", ["a\u2028b\x0cc\x85d\x1ce\rf", "g"]),
    ],
)
def test_lines_end_at_newlines_only(tmp_path, text, lines):
    (tmp_path / "a").write_bytes(text.encode("utf-8"))
    assert read_lines(tmp_path / "a") == lines


@given(st.text())
def test_num_bytes_is_the_length_in_utf8(text):
    assert num_bytes(text) == len(text.encode("utf-8"))


def test_a_text_file_is_one_document_or_cut_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\ntwo\n\n \t\n\nthree\r\n\r\nfour\n")
    assert read_documents(path) == ["\n\none\ntwo\n\n \t\n\nthree\r\n\r\nfour\n"]
    assert read_documents(path, blank_lines_separate=True) == ["one\ntwo", "three", "four"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_give_their_field(tmp_path, name, caplog):
    raw = b'{"text": "one\\u2028\\n", "x": 1}\n\n{"text": "  "}\n{"text": "\xc3\xa4"}\n'
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    assert read_documents(tmp_path / name) == ["one\u2028\n", "ä"]
    assert "left out 1 of 3 documents" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "b", "id": 1}', r"a\.jsonl, line 2: no field 'text'; the fields are \['body', 'id'\]"),
        ('{"text": "b"', r"a\.jsonl, line 2: not JSON"),
        ('["b"]', r"a\.jsonl, line 2: expected an object such as"),
        ('{"text": 3}', r"a\.jsonl, line 2: field 'text' must be text, got 3"),
        (
            '{"text": "a\\ud800"}',
            r"a\.jsonl, line 2: field 'text' holds half a surrogate pair \(\\ud800\) at character 1",
        ),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / "a.jsonl")


def test_a_folder_gives_its_text_files_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a", mtime=0))
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / "notes.md").write_text("not this")
    assert read_documents(tmp_path) == ["a", "b", "c"]


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no \.txt or \.txt\.gz file"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="has 1 documents, none with any text"):
        read_documents(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="expected one JSON object a line"):
        read_documents(tmp_path / "a.json")
    with pytest.raises(DataError, match="does not exist"):
        read_documents(tmp_path / "b.jsonl")


def test_real_books(shared_data):
    path = shared_data / "classic_books" / "valid.jsonl.gz"
    books = read_documents(path)
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        expected = [json.loads(line)["text"] for line in file]
    assert books == expected
    assert len(books) == 2
    assert sum(map(len, books)) == 537_624
