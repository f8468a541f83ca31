"""Emoji sets as tars: packages as npm unpacks them, cells that are held out, pictures, captions, licences, bad input."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.preparation.emoji import (
    CONCEPTS,
    EmojiSource,
    common_concepts,
    emoji_captions,
    held_out_cells,
    rasterize,
    read_set,
    read_tags,
)
from tools import prepare_data

CONCEPT_NAMES = ("red-disc", "scissors", "apple", "blue-bar")
BODIES = {
    "red-disc": '<circle cx="16" cy="16" r="12" fill="#f00"/>',
    "scissors": '<path d="M4 4L28 28M28 4L4 28" stroke="#000" stroke-width="4"/>',
    "apple": '<rect x="8" y="8" width="16" height="16" fill="#0a0"/>',
    "blue-bar": '<rect x="0" y="0" width="32" height="8" fill="#00f"/>',
}


def write_package(folder, prefix, bodies=BODIES, **fields):
    folder.mkdir(parents=True)
    icons = {name: {"body": body} for name, body in bodies.items()} | {"secret": {"body": "<g/>", "hidden": True}}
    icons["blue-bar"] |= {"height": 8}
    (folder / "icons.json").write_text(
        json.dumps({"prefix": prefix, "icons": icons, "width": 32, "height": 32} | fields)
    )
    info = {"name": f"The {prefix} set", "license": {"spdx": "MIT"}, "author": {"name": f"Who drew {prefix}"}}
    (folder / "info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def packages(tmp_path):
    return [write_package(tmp_path / "sets" / name, name) for name in ("noto", "fluent-emoji-flat", "unheard-of")]


@pytest.fixture
def sets(packages):
    return [read_set(folder) for folder in packages]


def pixels(source, i):
    return np.asarray(Image.open(io.BytesIO(source.read(i).image)).convert("RGB")).astype(int)


def test_cells_are_what_they_are_called(sets):
    source = EmojiSource(sets, 32, concepts=CONCEPT_NAMES, part="all")
    assert len(source) == 12
    names = [source.name(i) for i in range(12)]
    assert len(set(names)) == 12
    at = names.index("noto/red-disc")
    record = source.read(at)
    assert record.captions[0] == "a red disc, noto style"
    # A label a cell: another style of the concept is a wrong caption, another wording is none.
    assert [source.read(i).label for i in range(12)] == list(range(12))
    assert record.license == "MIT, Who drew noto"
    picture = pixels(source, at)
    assert picture.shape == (32, 32, 3)
    assert tuple(picture[16, 16]) == (255, 0, 0)
    # White where nothing is drawn.
    assert tuple(picture[0, 0]) == (255, 255, 255)
    # A disc of radius 12 of 32.
    assert (picture[..., 1] < 128).mean() == pytest.approx(np.pi * 12**2 / 32**2, rel=0.02)


def test_a_picture_that_is_not_square_is_not_squeezed(sets):
    source = EmojiSource(sets, 32, concepts=CONCEPT_NAMES, part="all")
    picture = pixels(source, [source.name(i) for i in range(12)].index("noto/blue-bar"))
    # 32 x 8 units in the middle of 32 x 32.
    assert (picture[14:18, :, 0] < 10).all()
    assert (picture[:11] == 255).all()
    assert (picture[21:] == 255).all()


def test_any_size_is_the_same_picture(sets):
    small, large = (EmojiSource(sets, size, concepts=CONCEPT_NAMES, part="all") for size in (16, 256))
    for i in range(12):
        mean = pixels(large, i).reshape(16, 16, 16, 16, 3).mean(axis=(1, 3))
        assert np.abs(mean - pixels(small, i)).mean() < 6
    assert small.identity() != large.identity()


def test_captions():
    assert emoji_captions("apple", "flat")[:2] == ("an apple, flat style", "an apple in flat style")
    assert emoji_captions("scissors", "flat")[0] == "scissors, flat style"
    assert emoji_captions("red-disc", "flat", ("round", "hot", "stop", "more"))[-1] == (
        "a red disc (round, hot, stop), flat style"
    )
    assert len(set(emoji_captions("cactus", "noto", ("plant",)))) == 5


@pytest.mark.parametrize("concepts, styles", [(64, 7), (1032, 7), (4, 3), (20, 2), (10, 11)])
def test_held_out_cells_leave_every_concept_and_style_in_training(concepts, styles):
    cells = held_out_cells([str(i) for i in range(concepts)], styles)
    assert len(cells) == round(concepts * styles / 10)
    for concept in range(concepts):
        assert sum(c == concept for c, _ in cells) < styles
    by_style = [sum(s == style for _, s in cells) for style in range(styles)]
    # A second cell of a concept skips a style.
    assert max(by_style) - min(by_style) <= 1 + (len(cells) > concepts)


def test_parts_are_the_whole(sets):
    parts = {part: EmojiSource(sets, 16, concepts=CONCEPT_NAMES, part=part) for part in ("train", "held_out", "all")}
    cells = {part: {s.name(i) for i in range(len(s))} for part, s in parts.items()}
    assert cells["train"] | cells["held_out"] == cells["all"]
    assert not cells["train"] & cells["held_out"]
    assert len(cells["held_out"]) == 1
    # The order of the folders changes nothing.
    turned = EmojiSource(sets[::-1], 16, concepts=CONCEPT_NAMES, part="held_out")
    assert turned.identity() == parts["held_out"].identity()


def test_whole_concepts_and_styles_are_held_out(sets):
    hidden = EmojiSource(sets, 16, concepts=CONCEPT_NAMES, part="held_out", hold_out=("concepts", "flat"))
    shown = EmojiSource(sets, 16, concepts=CONCEPT_NAMES, part="train", hold_out=("concepts", "flat"))
    flat = [s.style for s in hidden.sets].index("flat")
    # With fewer than six concepts none of them is a tenth.
    assert set(hidden.cells) == {(c, flat) for c in range(len(CONCEPT_NAMES))}
    assert len(shown) + len(hidden) == len(CONCEPT_NAMES) * len(sets)
    many = [f"{i:02}" for i in range(20)]
    drawn = [dataclasses.replace(s, icons=dict.fromkeys(many, "<g/>")) for s in sets]
    hidden = EmojiSource(drawn, 16, concepts=many, part="held_out", hold_out=("concepts",))
    assert set(hidden.cells) == {(c, s) for c in (5, 15) for s in range(len(sets))}
    with pytest.raises(UserError, match=r"--hold_out=baroque: must be one of cells, concepts, .*flat"):
        EmojiSource(sets, 16, concepts=CONCEPT_NAMES, hold_out=("baroque",))


def test_concepts(sets):
    # Hidden icons are no concepts.
    assert common_concepts(sets) == sorted(CONCEPT_NAMES)
    assert EmojiSource(sets, 16, concepts=()).concepts == tuple(sorted(CONCEPT_NAMES))
    assert len(CONCEPTS) == len(set(CONCEPTS)) == 64
    # A set without a word of its own is called by its title.
    assert [s.style for s in sets] == ["noto", "flat", "the unheard-of set"]


def test_tars_of_both_parts(packages, tmp_path, capsys):
    out = tmp_path / "out"
    for s in packages:
        # The default concepts are those of the real sets.
        icons = json.loads((s / "icons.json").read_text())
        icons["icons"] |= {"broken": {"body": "<path d="}}
        (s / "icons.json").write_text(json.dumps(icons))
    flags = [f"--packages={tmp_path / 'sets' / '*'}", "--size=16", f"--out={out}", "--concepts=all", "--workers=1"]
    assert prepare_data.verb(["emoji", *flags]) == 0
    printed = capsys.readouterr().out
    # 15 cells, of which two are held out; one that cannot be drawn is named.
    assert "could not be drawn; each is named in" in printed
    train, held_out = (TarSource(str(out / part / "00000.tar")) for part in ("train", "held_out"))
    assert len(train) + len(held_out) == 12
    assert "noto (noto style): MIT, Who drew noto" in (out / "LICENSES.txt").read_text()
    left_out = [json.loads(line) for line in (out / "train" / "left_out.jsonl").read_text().splitlines()]
    left_out += [json.loads(line) for line in (out / "held_out" / "left_out.jsonl").read_text().splitlines()]
    assert {line["cause"] for line in left_out} == {"svg_undrawable"}
    assert len(left_out) == 3
    assert train[0].image.shape == (16, 16, 3)
    assert len(train[0].captions) == 4
    import tarfile

    with tarfile.open(out / "train" / "00000.tar") as tar:
        first = next(m for m in tar.getmembers() if m.name.endswith(".json"))
        assert json.load(tar.extractfile(first))["license"].startswith("MIT, Who drew")


def test_tags(tmp_path):
    (tmp_path / "package" / "data").mkdir(parents=True)
    entries = [{"annotation": "Red Disc", "tags": "round, hot"}, {"annotation": "apple", "tags": ""}]
    (tmp_path / "package" / "data" / "openmoji.json").write_text(json.dumps(entries))
    assert read_tags(tmp_path) == {"red-disc": ("round", "hot"), "apple": ()}


def test_bad_input(packages, sets, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty is no package of an Iconify set \(it has no icons.json\): npm pack"):
        read_set(empty)
    with pytest.raises(UserError, match=r"--tags: .*empty is not the npm package openmoji"):
        read_tags(empty)
    with pytest.raises(UserError, match="no folder has such a name"):
        prepare_data.verb(["emoji", f"--packages={tmp_path}/none*", "--out=x"])
    (packages[0] / "info.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no package of an Iconify set \(KeyError: 'name' in its JSON\)"):
        read_set(packages[0])
    (packages[0] / "icons.json").write_text("{")
    with pytest.raises(UserError, match=r"icons.json cannot be read as JSON .*: unpack the package again"):
        read_set(packages[0])
    for size in (0, 8, 48, 8192):
        with pytest.raises(UserError, match=f"--size={size}: models have sides of 16, 32, 64"):
            EmojiSource(sets, size, concepts=CONCEPT_NAMES)
    with pytest.raises(UserError, match=r"the set fluent-emoji-flat does not draw|the set noto does not draw"):
        EmojiSource(sets, 32, concepts=("unknown",))
    with pytest.raises(UserError, match="two sets of one style"):
        EmojiSource([sets[0], sets[0]], 32, concepts=CONCEPT_NAMES)
    with pytest.raises(UserError, match="0 sets: name two or more"):
        EmojiSource([], 32)
    with pytest.raises(BadExample, match="svg_undrawable"):
        rasterize("<svg", 32)
