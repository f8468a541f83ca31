"""Drawn scenes: what a caption says is what was drawn, and the pairs that are held out never come."""

import collections
import dataclasses
import pickle

import numpy as np
import pytest

from configs import shapes
from gigagan_jax.config import DataConfig, ShapesConfig, from_dict, to_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.data import pipeline
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.shapes_drawing import coverage, draw_scene, outline_distance
from gigagan_jax.data.sources.shapes_scenes import (
    ALL_PAIRS,
    COLORS,
    HELD_OUT,
    MATERIALS,
    SEEN,
    SHAPES,
    SIZES,
    judged_scenes,
)
from gigagan_jax.data.tokenizers import ByteTokenizer, make_tokenizer
from gigagan_jax.models.pretrained.text_encoder import tokenizer_options


def open_shapes(**fields):
    return make_source(DataConfig(source="shapes", shapes=ShapesConfig(**fields)))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_examples_are_what_their_captions_say(most):
    source = open_shapes(examples=300, max_objects=most, side=32)
    kinds = collections.Counter()
    for i in range(len(source)):
        scene, record = source.scene(i), source.read(i)
        kinds[scene.kind] += 1
        assert record.image.shape == (32, 32, 3)
        assert record.image.dtype == np.uint8
        assert record.captions == source.captions(i)
        assert len(set(record.captions)) == len(record.captions) >= 3
        first = scene.objects[0]
        assert source.classes[record.label] == f"{first.color} {first.shape}"
        # A group names its objects once.
        named = scene.objects[:1] if scene.kind == "group" else scene.objects
        for caption in record.captions:
            words = caption.replace(",", "").split()
            for attribute, vocabulary in (("color", COLORS), ("size", SIZES), ("material", ("striped", "shiny"))):
                for word in vocabulary:
                    assert words.count(word) == sum(getattr(o, attribute) == word for o in named), (word, caption)
            assert "plain" not in words
            for shape in SHAPES:
                assert caption.count(shape) == sum(o.shape == shape for o in named), caption
        for o in scene.objects:
            assert (o.shape, o.color) in SEEN
            # Inside the picture, whole.
            assert o.radius < min(o.x, o.y, 1 - o.x, 1 - o.y)
    assert set(kinds) == set(("single", "group", "pair", "trio")[: most + (most > 1)])


def test_a_wording_that_turns_the_relation_turns_the_word():
    source = open_shapes(examples=300, max_objects=3)
    scenes = [s for s in map(source.scene, range(300)) if s.kind in ("pair", "trio")]
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene in scenes:
        a, b, *others = scene.objects
        rest = "".join(f", and a {o.noun()}" for o in others)
        x, y = a.x - b.x, a.y - b.y
        true = {"left of": x < 0, "right of": x > 0, "above": y < 0, "below": y > 0}
        assert true[scene.relation]
        assert f"a {a.noun()} {scene.relation} a {b.noun()}{rest}" in scene.captions()
        assert f"a {b.noun()} {opposite[scene.relation]} a {a.noun()}{rest}" in scene.captions()
    assert {s.relation for s in scenes} == set(opposite)


def test_held_out_pairs_are_known_words():
    for i, words in enumerate((SHAPES, COLORS)):
        assert {pair[i] for pair in SEEN} == set(words)
    assert len(SEEN) + len(HELD_OUT) == len(ALL_PAIRS)
    assert not set(SEEN) & set(HELD_OUT)
    source = open_shapes(examples=2000, held_out=False)
    drawn = {(s.objects[0].shape, s.objects[0].color) for s in map(source.scene, range(2000))}
    assert drawn == set(ALL_PAIRS)


def test_judged_scenes_come_in_turn():
    scenes = list(judged_scenes(len(HELD_OUT) * 3, 1, HELD_OUT))
    pairs = collections.Counter((s.objects[0].shape, s.objects[0].color) for s, _ in scenes)
    assert set(pairs.values()) == {3}
    assert all(caption in scene.captions() for scene, caption in scenes)
    again = list(judged_scenes(len(HELD_OUT) * 3, 1, HELD_OUT, seed=1))
    assert not {dataclasses.astuple(s) for s, _ in scenes} & {dataclasses.astuple(s) for s, _ in again}


def test_an_example_depends_on_its_number_alone():
    source = open_shapes(examples=1000, max_objects=3, side=24)
    copied = pickle.loads(pickle.dumps(source))
    backwards = {i: copied.read(i).image for i in reversed(range(20))}
    assert all((source.read(i).image == backwards[i]).all() for i in range(20))
    assert source.identity() == copied.identity()
    others = [{"seed": 1}, {"examples": 999}, {"side": 32}, {"max_objects": 2}, {"held_out": False}]
    fields = {"examples": 1000, "max_objects": 3, "side": 24}
    assert len({open_shapes(**(fields | other)).identity() for other in others} | {source.identity()}) == 6


def test_a_stream_of_scenes_resumes():
    def stream():
        return pipeline.build_pipeline(
            open_shapes(examples=50, side=16), resolution=16, batch_size=8, seed=3, tokenizer=ByteTokenizer(56),
            num_threads=0,
        )  # fmt: skip

    with stream() as whole, stream() as first, stream() as second:
        wanted = [next(whole) for _ in range(9)]
        for _ in range(4):
            next(first)
        second.restore(first.state())
        for batch in wanted[4:]:
            resumed = next(second)
            assert all((resumed[name] == batch[name]).all() for name in batch)
    # Six batches of eight and two more: an epoch of 50, each once.
    indices = np.concatenate([b["index"] for b in wanted])[:50]
    assert sorted(indices) == list(range(50))


def test_no_judged_scene_is_trained():
    """NumPy pads seeds with zeros: two words and three with a zero at the end are one stream."""
    source = open_shapes(examples=3000, max_objects=3)
    trained = {dataclasses.astuple(source.scene(i)) for i in range(3000)}
    judged = {dataclasses.astuple(s) for seed in (0, 1) for s, _ in judged_scenes(300, 3, SEEN, seed)}
    assert not trained & judged


# Tokens of the longest captions, bos and eot included: of one object, and of several.
LONGEST = {"bytes": (46, 112), "words": (10, 20)}


@pytest.mark.parametrize("encoder", LONGEST)
def test_captions_fit_the_configs(encoder):
    for most, needed in zip((1, 3), LONGEST[encoder], strict=True):
        config = from_dict(shapes.get_config("scenes" if most == 3 else ""))
        text = dataclasses.replace(config.text, encoder=encoder, length=200)
        tokenizer = make_tokenizer(encoder, 200, **tokenizer_options(text))
        rows = tokenizer([c for s, _ in judged_scenes(4000, most, ALL_PAIRS) for c in s.captions()])
        # Pads are zero.
        assert needed - 4 <= (rows != 0).sum(1).max() <= needed
        fields = to_dict(config)
        fields["text"] |= {"encoder": encoder, "length": needed}
        from_dict(fields)
        fields["text"] |= {"length": needed - 1}
        with pytest.raises(
            UserError, match=f"config.text.length={needed - 1} cuts captions of drawn shapes off: set it to {needed}"
        ):
            from_dict(fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"max_objects": 4}, "max_objects=4 must be 1 to 3"),
        ({"max_objects": 0}, "max_objects=0 must be 1 to 3"),
        ({"side": 8}, "side=8 must be 16 to 256 pixels"),
        ({"side": 512}, "side=512 must be 16 to 256 pixels"),
        ({"examples": 0}, "examples=0 must be positive"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(UserError, match=f"config.data.shapes.{words}"):
        open_shapes(**fields)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines(shape):
    # 401 points a side of [-1.2, 1.2]: the circle of radius 1 holds the shape, and touches it or nearly so.
    steps = np.linspace(-1.2, 1.2, 401)
    x, y = np.meshgrid(steps, steps)
    distance = outline_distance(shape, x, y)
    inside = distance < 0
    farthest = np.hypot(x, y)[inside].max()
    assert 0.9 < farthest <= 1.14
    # A bound of the distance to the outline: it changes by no more than one for one.
    step = steps[1] - steps[0]
    for axis in (0, 1):
        assert np.abs(np.diff(distance, axis=axis)).max() <= step * 1.001
    # The area of one pixel's softness is the area of the shape.
    covered = coverage(shape, (np.arange(64) + 0.5, np.arange(64) + 0.5), np.array([[32.0, 32.0, 20.0]]))[0]
    assert covered.sum() / 400 == pytest.approx(inside.mean() * 2.4**2, rel=0.03)


def test_sizes_and_places_of_a_drawing():
    for side in (16, 32, 256):
        for scene, _ in judged_scenes(30, 1, ALL_PAIRS):
            o = scene.objects[0]
            image = draw_scene(scene, side).astype(int)
            different = np.abs(image - scene.background).max(axis=2) > 25
            _rows, columns = np.nonzero(different)
            assert abs((columns.min() + columns.max() + 1) / 2 / side - o.x) < 0.02 + 1 / side
            assert (columns.max() - columns.min()) / side < 2.3 * o.radius + 2 / side
    assert set(SIZES) == {s.objects[0].size for s, _ in judged_scenes(30, 1, ALL_PAIRS)}
    assert set(MATERIALS) == {s.objects[0].material for s, _ in judged_scenes(30, 1, ALL_PAIRS)}


def test_paths_are_refused():
    for fields in ({"path": "photos"}, {"mixture": ("0.5:photos", "0.5:more")}):
        with pytest.raises(UserError, match=r"draws its pictures: config.data.path and mixture must be empty"):
            make_source(DataConfig(source="shapes", **fields))


def test_the_judge_of_shapes_needs_shapes():
    values = to_dict(from_dict(shapes.get_config())) | {
        "data": to_dict(from_dict(shapes.get_config()))["data"] | {"source": "digits"}
    }
    with pytest.raises(UserError, match=r"'shapes' judges drawn shapes: it needs config.data.source='shapes'"):
        from_dict(values)
