"""The judge of emoji: real pictures, damaged and moved ones, and pictures of other cells."""

import dataclasses

import numpy as np
import pytest
import scipy.ndimage

from configs import emoji
from gigagan_jax.config import from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import Record
from gigagan_jax.data.source import Source
from gigagan_jax.evaluation.emoji import EmojiJudge, read_cells
from gigagan_jax.evaluation.judges import make_judge

CONCEPTS, STYLES = ("a disc", "a bar", "a frame"), ("flat", "outlined")


def draw(concept, style, side=32):
    """A dark shape on white; outlined ones are red inside."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    distance = {
        "a disc": np.hypot(x, y) - 0.35,
        "a bar": np.maximum(np.abs(x) - 0.45, np.abs(y) - 0.15),
        "a frame": np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.32) - 0.1,
    }[concept]
    picture = np.full((side, side, 3), 255, np.uint8)
    picture[distance < 0] = (20, 20, 120)
    if style == "outlined":
        picture[distance < -0.05] = (220, 60, 40)
    return picture


class Drawn(Source):
    def __init__(self, cells, side=32):
        self.cells, self.side = cells, side

    def __len__(self):
        return len(self.cells)

    def read(self, i):
        concept, style = self.cells[i]
        captions = (f"{concept}, {style} style", f"{style} style: {concept}")
        return Record(draw(concept, style, self.side), captions, -1, self.name(i))

    def name(self, i):
        return str(i)

    def identity(self):
        return "drawn"


CELLS = [(c, s) for c in CONCEPTS for s in STYLES]


@pytest.fixture
def judge():
    return EmojiJudge(read_cells(Drawn(CELLS[1:]), Drawn(CELLS[:1])))


def test_cells(judge):
    assert judge.cells.concepts[0] == "a disc"
    assert judge.cells.styles[:2] == ["outlined style", "flat style"]
    assert judge.cells.held_out.tolist() == [False] * 5 + [True]


def test_real_pictures_are_their_own_cells(judge):
    report = judge.judge_images(judge.cells.images, np.arange(6))
    assert report.seen == report.held_out == {"concept": 1, "style": 1, "both": 1}


def test_blurred_noisy_and_moved_pictures_too(judge):
    rng = np.random.default_rng(0)
    soft = scipy.ndimage.gaussian_filter(judge.cells.images.astype(float), (0, 1, 1, 0))
    rough = (np.roll(soft, 1, axis=2) + rng.normal(0, 15, soft.shape)).clip(0, 255).astype(np.uint8)
    assert judge.judge_images(rough, np.arange(6)).to_dict() == dict.fromkeys(
        [f"{part}/{name}" for part in ("seen", "held_out") for name in ("concept", "style", "both")], 1.0
    )


def test_concept_and_style_are_judged_apart(judge):
    # The other style of each concept is drawn.
    other = np.stack([draw(c, STYLES[1 - STYLES.index(s)]) for c, s in [*CELLS[1:], CELLS[0]]])
    report = judge.judge_images(other, np.arange(6))
    assert report.seen == {"concept": 1, "style": 0, "both": 0}
    # Another concept in the same style.
    wrong = np.stack([draw(CONCEPTS[CONCEPTS.index(c) - 1], s) for c, s in [*CELLS[1:], CELLS[0]]])
    report = judge.judge_images(wrong, np.arange(6))
    assert report.held_out == {"concept": 0, "style": 1, "both": 0}
    assert "held out" in report.format_table()


def test_other_features(judge):
    """Of the mean color alone: concepts are lost, and what remains is what the features tell."""
    mean = lambda x: x.reshape(len(x), -1, 3).mean(axis=1).astype(float)
    report = EmojiJudge(judge.cells, mean).judge_images(judge.cells.images[:, ::-1, ::-1], np.arange(6))
    assert report.seen["both"] == 1


def test_bad_input(tmp_path):
    class Other(Drawn):
        def read(self, i):
            return Record(draw(*CELLS[0]), ("a photo of a cat",), -1, "x")

    with pytest.raises(UserError, match="'a photo of a cat' is not 'CONCEPT, STYLE style'"):
        read_cells(Other(CELLS), Drawn(CELLS))
    with pytest.raises(UserError, match="several sizes: prepare them anew"):
        read_cells(Drawn(CELLS[1:]), Drawn(CELLS[:1], side=16))

    class Broken(Drawn):
        def read(self, i):
            return dataclasses.replace(super().read(i), image=b"no picture")

    with pytest.raises(UserError, match=r"emoji 0 cannot be read \(image_undecodable.*prepare them anew"):
        read_cells(Broken(CELLS), Drawn(CELLS))
    config = emoji.get_config()
    (tmp_path / "train").mkdir()
    for path in ("train", "train/*.tar"):
        config.data.path = str(tmp_path / path)
        with pytest.raises(UserError, match=r"needs the held-out pictures in .*/held_out, beside the folder") as error:
            make_judge("emoji", from_dict(config), tmp_path)
        assert f"{tmp_path}/held_out," in str(error.value)
    config.data.path = ""
    with pytest.raises(UserError, match=r"needs the held-out pictures, beside the folder of config.data.path"):
        make_judge("emoji", from_dict(config), tmp_path)
    # A folder without pictures is found at the start too.
    (tmp_path / "held_out").mkdir()
    config.data.path = str(tmp_path / "train")
    with pytest.raises(UserError, match="tar"):
        make_judge("emoji", from_dict(config), tmp_path)
