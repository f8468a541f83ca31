"""tools/measure_emoji.py with a model that draws the real pictures: what it counts, and what it asks a reader."""

import json
import re
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.evaluation.emoji import Cells, EmojiJudge
from tests.img2dataset import add_member, encoded
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import measure_emoji

CONCEPTS, STYLES = tuple(f"a thing {k}" for k in range(12)), ("flat", "glossy")
CAPTIONS = tuple(f"{concept}, {style} style" for concept in CONCEPTS for style in STYLES)


@pytest.fixture
def cells():
    coarse = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 3)).astype(np.uint8)
    return Cells(coarse.repeat(8, axis=1).repeat(8, axis=2), CAPTIONS, np.arange(24) >= 20)


@pytest.fixture
def model(cells):
    return lambda captions, seeds: np.stack([cells.images[CAPTIONS.index(caption)] for caption in captions])


def test_real_pictures_are_right_and_shuffled_captions_are_not(cells, model):
    images, asked = measure_emoji.draw_cells(model, cells, 2)
    assert (images.shape, asked.tolist()) == ((48, 32, 32, 3), list(range(24)) * 2)
    rows = measure_emoji.compare({"pixels": EmojiJudge(cells)}, images, asked)
    assert [row[:2] for row in rows] == [
        ("pixels", "seen"),
        ("pixels", "held out"),
        ("pixels, captions shuffled", "seen"),
        ("pixels, captions shuffled", "held out"),
    ]
    assert all(figure == "1.000" for row in rows[:2] for figure in row[2:])
    assert all(float(row[2]) < 0.5 for row in rows[2:])


def test_the_picture_frames_what_was_held_out(cells, model):
    drawn = np.asarray(measure_emoji.draw_table(model, cells).convert("RGB")).reshape(-1, 3)
    framed = (drawn == measure_emoji._FRAME).all(1).sum()
    # Four cells, four sides of 34 pixels, each pixel twice as large in both directions.
    assert framed == pytest.approx(4 * 4 * 33 * 4, abs=64)


def test_the_quiz_has_one_right_caption_a_picture(cells, model, tmp_path):
    drawn = []

    def noting(captions, seeds):
        drawn.extend(captions)
        return model(captions, seeds)

    measure_emoji.write_quiz(tmp_path / "quiz", noting, cells)
    lines = (tmp_path / "quiz" / "quiz.txt").read_text().splitlines()
    answers = json.loads((tmp_path / "quiz" / "answers.json").read_text())["answers"]
    assert len(lines) == len(answers) == len(set(drawn)) == 20
    for line, answer, caption in zip(lines, answers, drawn, strict=True):
        choices = dict(re.findall(r"([a-e])\) (a thing \d+)", line))
        assert len(set(choices.values())) == 5
        assert choices[answer] == caption.partition(", ")[0]
    with Image.open(tmp_path / "quiz" / "quiz.png") as picture:
        assert picture.size[0] > 5 * 32


def write_tar(file, cells, rows):
    file.parent.mkdir()
    with tarfile.open(file, "w") as tar:
        for i in rows:
            add_member(tar, f"{i:05d}.png", encoded(cells.images[i], "PNG"))
            add_member(tar, f"{i:05d}.txt", cells.captions[i].encode())


def test_the_command_reads_published_weights_and_the_folder_of_data(cells, tmp_path, capsys):
    write_tar(tmp_path / "train" / "00000.tar", cells, range(20))
    write_tar(tmp_path / "held_out" / "00000.tar", cells, range(20, 24))
    weights = f"--workdir={ROOT}/docs/weights/emoji"
    assert measure_emoji.verb([weights, f"--data={tmp_path}", "--count=1", f"--picture={tmp_path}/table.png"]) == 0
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows if row[0].startswith("pixels")] == [
        [name, part] for name in ("pixels", "pixels, captions shuffled") for part in ("seen", "held out")
    ]
    with Image.open(tmp_path / "table.png") as picture:
        assert picture.size[0] > 12 * 32
