"""`tools/prepare_data.py check` prints what a path holds, and needs no place beside the data."""

import os

import pytest

from tests.data.survey.folders import write_all
from tools import prepare_data


def test_check_of_tars_where_nothing_can_be_written(tars, monkeypatch, capsys):
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(tars)) and may(path, mode))
    before = sorted(os.listdir(tars))
    assert prepare_data.verb(["check", "--workers=1", f"--path={tars}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"data: {tars}, read as tar: 3 tars (00000.tar ...)")
    assert "24 of 24 examples decoded" in said
    assert sorted(os.listdir(tars)) == before


@pytest.mark.parametrize(("limit", "code"), [("0.2", 1), ("0.3", 0)])
def test_check_counts_pictures_without_captions(tmp_path, capsys, limit, code):
    write_all(tmp_path, {f"{i}.png": None for i in range(4)} | {f"{i}.txt": "a" for i in range(3)})
    arguments = ["--workers=1", "--config.data.captions=required", f"--max_bad_fraction={limit}"]
    assert prepare_data.verb(["check", f"--path={tmp_path}", *arguments]) == code
    said = capsys.readouterr().out
    assert "captions: 3 in .txt, 1 without (3.png)" in said
    assert "bad: caption_missing" in said
