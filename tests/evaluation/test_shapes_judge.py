"""The judge of drawn shapes: right on what was drawn, also blurred and noisy, and wrong where the picture is."""

import dataclasses
import types

import numpy as np
import pytest

from gigagan_jax.data.sources.shapes_drawing import draw_scene
from gigagan_jax.data.sources.shapes_scenes import (
    ALL_PAIRS,
    COLORS,
    SCENE_RADII,
    SHAPES,
    SINGLE_RADII,
    Drawn,
    Scene,
    judged_scenes,
)
from gigagan_jax.evaluation.shapes import ATTRIBUTES, QUESTIONS, ShapesJudge, judge_scene, size_word
from gigagan_jax.evaluation.shapes_reader import nearest_color, read_objects, to_lab
from tools import measure_judge


def share_right(count, most, side, **damage):
    right = []
    for i, (scene, _) in enumerate(judged_scenes(count, most, ALL_PAIRS, seed=7)):
        image = draw_scene(scene, side)
        if damage:
            image = measure_judge.damage(image, seed=i, **damage)
        right.append(judge_scene(read_objects(image), scene, most)["all"])
    return np.mean(right)


def test_right_on_drawn_pictures():
    assert share_right(48, 1, 16) >= 0.97
    assert share_right(48, 1, 32) >= 0.99
    assert share_right(16, 3, 64) >= 0.99


def test_right_on_blurred_and_noisy_pictures():
    assert share_right(48, 1, 16, blur=0.5, noise=5) >= 0.95
    assert share_right(32, 1, 32, blur=0.7, noise=9) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "most, side, damage, least",
    [
        (1, 16, {}, 0.97),
        (1, 32, {}, 0.99),
        (3, 64, {}, 0.99),
        (1, 16, {"blur": 0.5, "noise": 5}, 0.95),
        (1, 32, {"blur": 0.7, "noise": 9}, 0.95),
        (3, 64, {"blur": 0.7, "noise": 9}, 0.95),
    ],
)
def test_right_on_many_pictures(most, side, damage, least):
    assert share_right(200 if most == 1 else 60, most, side, **damage) >= least


SCENE = Scene((Drawn("star", "red", "large", "plain", 0.5, 0.5, 0.35, COLORS["red"]),), "single", "", 30)


def with_object(**fields):
    return dataclasses.replace(SCENE, objects=(dataclasses.replace(SCENE.objects[0], **fields),))


@pytest.mark.parametrize(
    "fields, wrong",
    [
        ({"shape": "circle"}, {"shape", "pair"}),
        ({"color": "blue", "rgb": COLORS["blue"]}, {"color", "pair"}),
        ({"size": "small", "radius": 0.2}, {"size"}),
        ({"material": "striped"}, {"material"}),
    ],
)
def test_each_attribute_is_judged_by_itself(fields, wrong):
    answers = judge_scene(read_objects(draw_scene(with_object(**fields), 32)), SCENE, 1)
    assert {name for name, right in answers.items() if not right} == wrong | {"all"}


def test_pictures_without_an_object():
    for image in (np.full((32, 32, 3), 40, np.uint8), np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)):
        answers = judge_scene(read_objects(image), SCENE, 1)
        assert not answers["all"]
        assert not answers["shape"]


def test_number_and_relation():
    red = SCENE.objects[0]
    left = dataclasses.replace(red, x=0.25, radius=0.16)
    right = dataclasses.replace(red, shape="ring", color="blue", rgb=COLORS["blue"], x=0.75, radius=0.16)
    scene = Scene((left, right), "pair", "left of", 30)
    assert judge_scene(read_objects(draw_scene(scene, 64)), scene, 3)["all"]
    turned = Scene((dataclasses.replace(left, x=0.75), dataclasses.replace(right, x=0.25)), "pair", "", 30)
    answers = judge_scene(read_objects(draw_scene(turned, 64)), scene, 3)
    assert not answers.pop("relation")
    assert not answers.pop("all")
    assert all(answers.values())
    one = Scene((left,), "single", "", 30)
    answers = judge_scene(read_objects(draw_scene(one, 64)), scene, 3)
    assert not answers["count"]
    assert not answers["shape"]
    assert not answers["relation"]
    # One too many is wrong as well.
    answers = judge_scene(read_objects(draw_scene(scene, 64)), one, 3)
    assert not answers["count"]


def test_words():
    assert all(nearest_color(np.array(rgb)) == word for word, rgb in COLORS.items())
    for most, radii in ((1, SINGLE_RADII), (3, SCENE_RADII)):
        assert all(size_word(r, most) == word for word, ends in radii.items() for r in ends)
    # Published values of pure sRGB red, and white.
    np.testing.assert_allclose(to_lab(np.array([255, 0, 0])), [53.24, 80.09, 67.20], atol=0.05)
    np.testing.assert_allclose(to_lab(np.array([255, 255, 255])), [100, 0, 0], atol=1e-6)


def test_report():
    judge = ShapesJudge(1, seen=40, held_out=16)
    assert len(judge.captions) == 56
    drawn = np.stack([draw_scene(scene, 16) for scene in judge.scenes])
    other = np.stack([draw_scene(scene, 16) for scene in ShapesJudge(1, seen=40, held_out=16, seed=1).scenes])
    report = judge.judge_images(drawn, again=other)
    figures = report.to_dict()
    assert figures["seen/all"] >= 0.97
    assert figures["held_out/pair"] >= 0.93
    assert figures["seen_shuffled/pair"] < 0.15
    assert figures["seen_shuffled/shape"] < 0.4
    assert figures["held_out_shuffled/pair"] < 0.4
    assert figures["position_variance"] == pytest.approx(1)
    assert figures["frechet"] == pytest.approx(0, abs=1e-6)
    # Two draws of one caption have places of their own.
    assert 0.6 < figures["caption_variance"] < 1.4
    assert "seen/relation" not in figures
    assert "relation" not in report.format_table()
    # One picture for every caption: everything that varies is gone.
    same = judge.judge_images(np.repeat(drawn[:1], 56, axis=0), again=drawn).to_dict()
    assert same["position_variance"] < 1e-9
    assert same["frechet"] > 5
    assert same["seen/pair"] < 0.1
    with pytest.raises(ValueError, match="the judge asked for 56 pictures, got 3"):
        judge.judge_images(drawn[:3])
    with pytest.raises(ValueError, match="scenes are read from uint8"):
        read_objects(drawn[0].astype(np.float32))


def test_every_question_has_an_answer():
    scene = next(s for s, _ in judged_scenes(50, 3, ALL_PAIRS) if s.kind == "trio")
    assert tuple(judge_scene([], scene, 3))
    assert set(judge_scene([], scene, 3)) == set(QUESTIONS)
    assert set(ATTRIBUTES) < set(QUESTIONS)
    assert len(SHAPES) == 6
    # An unreadable region is no object.
    blob = types.SimpleNamespace(readable=False)
    assert not judge_scene([blob], SCENE, 1)["count"]


def test_variances_are_within_a_size():
    """One object of the wrong size varies more than all radii of a size do."""
    judge = ShapesJudge(1, seen=80, held_out=0)

    def collapsed(wrong):
        """One place, one radius a size; every so many pictures have the other size."""
        scenes = []
        for i, scene in enumerate(judge.scenes):
            o = scene.objects[0]
            large = (o.size == "large") != (wrong and i % wrong == 0)
            scenes.append(
                dataclasses.replace(
                    scene, objects=(dataclasses.replace(o, x=0.5, y=0.5, radius=0.34 if large else 0.2),)
                )
            )
        return judge.judge_images(np.stack([draw_scene(scene, 32) for scene in scenes]))

    right, some = collapsed(0), collapsed(10)
    assert right.seen["size"] == 1
    assert some.seen["size"] == pytest.approx(0.9)
    for report in (right, some):
        assert report.position_variance < 0.1
        assert report.size_variance < 0.1
        assert report.radius_variance == pytest.approx(1, abs=0.2)
