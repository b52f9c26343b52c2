"""Texts out of files: what is read, and the one error for each way in which a file is not what it should be."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from eqx_transformers.training.text import DataError, Records, read_text, read_texts

SNIPPETS = Path(__file__).parent.parent / "data" / "movie_snippets"


def written(directory, name, content):
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- what is read


def test_a_tsv_with_other_columns():
    found = read_texts(SNIPPETS / "train.tsv", label="label")
    lines = (SNIPPETS / "train.tsv").read_text().split("\n")
    assert isinstance(found, Records) and found.names == ("0", "1") and found.labels.dtype == np.int32
    for i in (0, 1, len(found) - 1):
        label, _, text = lines[found.lines[i] - 1].split("\t")
        assert (found.names[found.labels[i]], found.texts[i]) == (label, text)
    test = read_texts(SNIPPETS / "test.tsv", label="label", labels=found.names)
    assert test.names == found.names and test.place(0) == f"{SNIPPETS / 'test.tsv'}, line 2"


def test_a_tsv_quotes_nothing_and_ends_lines_as_windows_does(tmp_path):
    path = written(tmp_path, "a.tsv", b'\xef\xbb\xbftext\tlabel\r\n"so\tx\r\n\r\n\xe2\x80\xa8 two\ty\r\n')
    found = read_texts(path, label="label")
    assert found.texts == ['"so', "\u2028 two"] and found.lines == [2, 4] and found.blank == 1


def test_a_csv_quotes_and_has_line_breaks_in_fields(tmp_path):
    path = written(tmp_path, "a.csv", 'id,text,label\n1,"a ""b"", c\nd",10\n2,e,9\n')
    found = read_texts(path, label="label")
    assert found.texts == ['a "b", c\nd', "e"] and found.lines == [2, 4]
    assert found.names == ("9", "10") and found.labels.tolist() == [1, 0]  # numbers are sorted as such


def test_json_lines_and_pairs(tmp_path):
    rows = [{"a": "x", "b": "y", "gold": True}, {"gold": False, "b": "ü", "a": "z"}]
    path = written(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    found = read_texts(path, text=("a", "b"), label="gold", labels={"true": 0, "false": 1})
    assert found.texts == [("x", "y"), ("z", "ü")] and found.labels.tolist() == [0, 1] and found.blank == 1


def test_plain_lines_and_a_directory_of_all_kinds(tmp_path):
    written(tmp_path, "b.txt", "  three \n\n\nfour")
    written(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    written(tmp_path, "picture.png", b"\xff")
    written(tmp_path, ".hidden.txt", "not this")
    found = read_texts(tmp_path)
    assert found.texts == ["one", "two", "three", "four"] and found.labels is None and found.blank == 2
    assert [found.place(i) for i in (1, 3)] == [f"{tmp_path}/a.jsonl, line 2", f"{tmp_path}/b.txt, line 4"]
    assert read_texts(tmp_path, pattern="*.txt").texts == ["three", "four"]
    assert read_text(tmp_path) == "  three \n\n\nfour"


# ---- what is not as it should be

TSV = "label\ttext\n1\tgood\n0\tbad\n"
BAD = {
    "empty": ("a.tsv", "", {}, "a.tsv is empty: it has 0 bytes"),
    "blank": ("a.txt", "\n \n", {}, "a.txt has no text: its lines are blank"),
    "header only": ("a.tsv", "label\ttext\n", {}, "a.tsv, line 1: a header ('label', 'text') with no line of data"),
    "wrong column": (
        "a.tsv",
        TSV,
        {"text": "texts"},
        "a.tsv, line 2: there is no column 'texts', but 'label', 'text'. The nearest is 'text'.",
    ),
    "wrong label column": ("a.tsv", TSV, {"label": "Label"}, "no column 'Label', but 'label', 'text'. The nearest is"),
    "no header": ("a.tsv", "1\tgood\n0\tbad\n", {}, "no column 'text', but '1', 'good'. Is the first line a header?"),
    "other separator": ("a.csv", TSV, {}, "the header is one field, 'label\\ttext': another separator"),
    "too few fields": ("a.tsv", TSV + "\n1\n", {}, "a.tsv, line 5: 1 fields, but the header has 2 ('label', 'text')"),
    "too many fields": (
        "a.tsv",
        TSV + "1\ta\tb\n",
        {},
        "line 4: 3 fields, but the header has 2 ('label', 'text'). A sep",
    ),
    "empty field": ("a.tsv", TSV + "\tc\n", {"label": "label"}, "a.tsv, line 4: the field 'label' is empty"),
    "label outside": (
        "a.tsv",
        TSV + "Good\tc\n",
        {"label": "label", "labels": ["0", "1", "good"]},
        "a.tsv, line 4: the label 'Good' is none of '0', '1', 'good'. The nearest is 'good'.",
    ),
    "one class": (
        "a.tsv",
        TSV.replace("0", "1"),
        {"label": "label"},
        "line 2 to {}/a.tsv, line 3: all 2 texts have the label '1', but at least 2 classes are needed",
    ),
    "two classes of three": (
        "a.tsv",
        TSV,
        {"label": "label", "least_classes": 3},
        "have labels of '0', '1', but at lea",
    ),
    "latin-1": (
        "a.tsv",
        TSV.encode() + b"1\tcaf\xe9\n",
        {},
        "a.tsv, line 4: byte 0xe9, number 6 of the line, is not UTF",
    ),
    "latin-1 behind a mark": ("a.txt", b"\xef\xbb\xbfab\n\xe9", {}, "a.txt, line 2: byte 0xe9, number 1 of the line"),
    "utf-16": (
        "a.txt",
        "hello".encode("utf-16"),
        {},
        "line 1: byte 0xff, number 1 of the line, is not UTF-8 (invalid sta",
    ),
    "gzip": ("a.tsv", b"\x1f\x8b\x08" + 9 * b"\xff", {}, "The file is likely gzip: unpack it."),
    "json": (
        "a.jsonl",
        '{"text": "a"}\n{"text": }\n',
        {},
        "a.jsonl, line 2: not JSON: Expecting value at character 10",
    ),
    "json list": ("a.jsonl", "[1]\n", {}, "a.jsonl, line 1: must be a JSON object with named fields, but it is [1]"),
    "json field": (
        "a.jsonl",
        '{"text": "a"}\n{"txt": "b"}',
        {},
        "line 2: there is no column 'text', but 'txt'. The nea",
    ),
    "json value": (
        "a.jsonl",
        '{"text": ["a"]}',
        {},
        "line 1: the field 'text' must be text or a number, but it is ['a']",
    ),
    "duplicate": (
        "a.csv",
        "text,text\na,b\n",
        {},
        "a.csv, line 1: the header has 'text' more than once: 'text', 'text'",
    ),
    "open quote": (
        "a.csv",
        'text\na\n"b\nc\n',
        {},
        "a.csv, line 3: the record that begins here is not CSV: unexpected",
    ),
    "label of plain lines": (
        "a.txt",
        "a\nb\n",
        {"label": "gold"},
        "is read as plain lines, which have no column 'gold'",
    ),
    "not the named file": (
        "train.tsv",
        TSV,
        {"open": "tran.tsv"},
        "There is no file {}/tran.tsv. The nearest is 'train.",
    ),
    "no text files": ("a.png", b"\x00", {"open": ""}, "has no files that end in .tsv, .csv, .jsonl, .ndjson, .txt"),
    "nothing matches": ("a.txt", "a", {"open": "", "pattern": "*.py"}, "has no files that match '*.py'."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_clear_error(case, tmp_path):
    name, content, options, message = BAD[case]
    options = dict(options)
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=re.escape(message.format(tmp_path))) as found:
        read_texts(tmp_path / options.pop("open", path.name), **options)
    assert str(tmp_path) in str(found.value) and isinstance(found.value, ValueError)


def test_labels_that_are_given_are_names_with_numbers(tmp_path):
    path = written(tmp_path, "a.tsv", TSV)
    for labels in ("01", ["0", "0"], {"0": 1, "1": 2}):
        with pytest.raises(ValueError, match="labels = "):
            read_texts(path, label="label", labels=labels)
    with pytest.raises(DataError, match="has no text: there is nothing but white space"):
        read_text(written(tmp_path, "b.txt", "\n\t\n"))
