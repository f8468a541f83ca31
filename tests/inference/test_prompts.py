"""Files of prompts: what people have, and one line with file and line number for what is wrong in them."""

import io
import json
import logging
import random
import types

import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference import prompts as prompts_module
from gigagan_jax.inference.prompts import check_names, read_prompts


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(file):
    return [p.text for p in read_prompts(file)]


def wrong(file):
    with pytest.raises(UserError) as e:
        read_prompts(file)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "content",
    [
        'a cat\na dog, "quoted"\n日本の城 🏯\n',
        'a cat\na dog, "quoted"\n日本の城 🏯',
        '\ufeffa cat\r\na dog, "quoted"\r\n日本の城 🏯\r\n',
        ('\ufeffa cat\na dog, "quoted"\n日本の城 🏯\n').encode("utf-16-le"),
        ('\ufeffa cat\na dog, "quoted"\n日本の城 🏯\n').encode("utf-32-le"),
        '  a cat \n\n   \n\ta dog, "quoted"\n日本の城 🏯\n\n',
    ],
    ids=["plain", "no-last-newline", "windows", "utf-16", "utf-32", "blank-lines"],
)
def test_lines_of_text(tmp_path, content):
    file = write(tmp_path, "captions.txt", content)
    assert texts(file) == ["a cat", 'a dog, "quoted"', "日本の城 🏯"]


def test_blank_lines_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = write(tmp_path, "p.list", "a cat\n\n \na dog\n")
    assert [p.line for p in read_prompts(file)] == [1, 4]
    assert "2 blank lines are left out" in caplog.text


def test_a_separator_of_unicode_does_not_cut_a_prompt(tmp_path):
    assert texts(write(tmp_path, "p.txt", "one\u2028and\x0ctwo\n")) == ["one\u2028and\x0ctwo"]


def test_the_standard_input(monkeypatch):
    monkeypatch.setattr(prompts_module.sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"a cat\na dog\n")))
    found = read_prompts("-")
    assert [p.text for p in found] == ["a cat", "a dog"]
    assert found[1].where == "the standard input line 2: "


def test_rows_of_tables(tmp_path):
    rows = [{"caption": "a cat", "seed": 3, "id": 391895}, {"caption": "a dog", "file_name": "val/0001.x.jpg"}]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    for name, content in (
        ("p.jsonl", "\ufeff" + lines + "\n"),
        ("p.json", json.dumps(rows)),
        ("p.csv", 'Caption,seed,id,file_name\n"a cat",3,391895,\na dog,,,val/0001.x.jpg\n'),
        ("q.csv", "caption;seed;id;file_name\na cat;3.0;391895;\na dog;;;val/0001.x.jpg\n"),
        ("p.tsv", "caption\tseed\tid\tfile_name\na cat\t3\t391895\t\na dog\t\t\tval/0001.x.jpg\n"),
    ):
        found = read_prompts(write(tmp_path, name, content))
        assert [(p.text, p.seed, p.name) for p in found] == [("a cat", 3, "391895"), ("a dog", None, "val-0001-x")], (
            name
        )


def test_captions_of_coco_and_lists_of_text(tmp_path):
    coco = {
        "images": [],
        "annotations": [{"image_id": 7, "id": 48, "caption": "A bicycle"}, {"id": 49, "caption": "B"}],
    }
    assert [(p.text, p.name) for p in read_prompts(write(tmp_path, "c.json", json.dumps(coco)))] == [
        ("A bicycle", "48"),
        ("B", "49"),
    ]
    assert texts(write(tmp_path, "l.json", '["a", "b"]')) == ["a", "b"]
    # Classes by number.
    assert texts(write(tmp_path, "l.jsonl", '{"label": 3}\n{"class": "dog"}\n')) == ["3", "dog"]


def test_cells_with_lines_of_their_own(tmp_path):
    file = write(tmp_path, "p.csv", 'text\n"two\nlines"\n""\nlast\n')
    assert texts(file) == ["two\nlines", "last"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"fine\ncaf\xe9\n", "p.txt line 2: this is not UTF-8"),
        ("p.txt", b"fine\n\0\1\2", "p.txt line 2: this is not text"),
        ("p.txt", "\n \n", "there are no prompts in it"),
        ("p.jsonl", '{"text": "a"}\n\n{"text": \n', "p.jsonl line 3: no valid JSON"),
        ("p.jsonl", '{"text": "a"}\n[1]\n', "p.jsonl line 2: expected an object"),
        (
            "p.jsonl",
            '{"text": "a"}\n{"url": "x", "width": 3}\n',
            "p.jsonl line 2: no field is called prompt, text, caption",
        ),
        ("p.jsonl", '{"text": ["a", "b"]}\n', "p.jsonl line 1: text must be text"),
        ("p.jsonl", '{"text": "a", "seed": -1}\n', "p.jsonl line 1: seed '-1' must be a whole number, 0 to 4294967295"),
        ("p.jsonl", '{"text": "a", "seed": "x"}\n', "line 1: seed 'x'"),
        ("p.jsonl", "[" * 100_000, "p.jsonl line 1: no JSON that can be read"),
        ("p.json", '{"text": "a"}', "expected a list"),
        ("p.csv", "url,width\nx,3\n", "p.csv line 1: no column is called prompt, text, caption; there are: url, width"),
        ("p.csv", "text,id\na,7\nb,7\n", "p.csv line 3: its images would be called 7, as those of line 2"),
        ("p.csv", "text,id\na,Cat\nb,cat\n", "as those of line 2"),
        ("p.parquet", "PAR1", ".parquet is no text"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, says):
    assert says in wrong(write(tmp_path, name, content))


def test_names_of_two_files(tmp_path):
    files = [write(tmp_path, name, "text,id\na,7\n") for name in ("a.csv", "b.csv")]
    with pytest.raises(UserError, match=r"b.csv line 2: its images would be called 7, as those of .*a.csv line 2"):
        check_names([p for file in files for p in read_prompts(file)])


def test_a_missing_file_and_a_folder(tmp_path):
    assert "a prompt itself is --prompt" in wrong("a photo of a cat")
    assert "is a folder" in wrong(str(tmp_path))


def test_damaged_files_are_one_line(tmp_path):
    """500 files with bytes cut out, put in and changed: prompts, or a UserError."""
    chance = random.Random(0)
    whole = {
        "p.jsonl": b'{"text": "a cat", "seed": 3, "id": 7}\n{"caption": "b", "file_name": "x/y.png"}\n',
        "p.csv": 'text,seed,id\n"a, ""b""",3,x\n日本,,y\n'.encode(),
        "p.json": b'[{"text": "a"}, "b", {"annotations": []}]',
        "c.json": b'{"annotations": [{"caption": "a", "id": 1}, {"caption": "b", "id": 2}]}',
        "p.txt": "\ufeffa cat\r\n\r\nédog\n".encode(),
    }
    pieces = [
        b'"',
        b"{",
        b"]",
        b",",
        b"\n",
        b"\0",
        b"\xff\xfe",
        b"null",
        b"1e999",
        b"9" * 5000,
        b";",
        b"\\ud800",
        b"x" * 200_000,
    ]
    good, refused = [], []
    for _ in range(500):
        name = chance.choice(sorted(whole))
        data = bytearray(whole[name])
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(data) + 1)
            data[place : place + chance.randint(0, 4)] = chance.choice(pieces)
        try:
            good += texts(write(tmp_path, name, bytes(data)))
        except UserError as e:
            refused.append(str(e))
    assert good
    assert all(text.strip() for text in good)
    assert refused
    assert not any("\n" in line for line in refused)
