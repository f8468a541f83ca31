"""Which members of a tar make an example, by their names; where its captions are; indexes of earlier versions."""

import json
import shlex
import subprocess
import tarfile

import numpy as np
import pytest

from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources import tar_index
from gigagan_jax.data.sources.tar import TarSource
from tests.img2dataset import add_member, encoded, write_tars

PICTURE = encoded(np.zeros((4, 4, 3), np.uint8), "PNG")


def pack(path, names, **contents):
    """A tar of members that hold a picture, or a text that repeats their name; {name: content}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names.split(" ") if isinstance(names, str) else names:
            text = f'{{"caption": "{name}"}}' if name.endswith("json") else name
            add_member(tar, name, contents.get(name, text).encode())
    return path


def examples_of(path, **options):
    """{key: (name of the image's member, captions or the cause)}"""
    source = TarSource(str(path), workers=1, **options)
    found = {}
    for i in range(len(source)):
        key = source.name(i).partition("/")[2]
        assert key not in found
        try:
            record = source.read(i)
            found[key] = record.image.decode(), *record.captions
        except BadExample as bad:
            found[key] = bad.cause
    return found


@pytest.mark.parametrize(
    "names, expected",
    [
        # Webdataset's rule: up to the first dot.
        ("x.jpg x.seg.png x.txt x.json y.txt y.png", {"x": ("x.jpg", "x.txt"), "y": ("y.png", "y.txt")}),
        # Dates and numbers with dots.
        (
            "a.05.00.jpg a.05.00.txt a.05.01.jpg a.05.01.txt",
            {"a.05.00": ("a.05.00.jpg", "a.05.00.txt"), "a.05.01": ("a.05.01.jpg", "a.05.01.txt")},
        ),
        ("a.1.jpg a.1.txt b.1.jpg b.1.txt", {"a.1": ("a.1.jpg", "a.1.txt"), "b.1": ("b.1.jpg", "b.1.txt")}),
        # Two-part suffixes, and both.
        (
            "x0.input.jpg x0.outputs.txt x1.input.jpg x1.outputs.txt",
            {"x0": ("x0.input.jpg", "x0.outputs.txt"), "x1": ("x1.input.jpg", "x1.outputs.txt")},
        ),
        (
            "a.1.input.jpg a.1.outputs.txt a.2.input.jpg a.2.outputs.txt",
            {"a.1": ("a.1.input.jpg", "a.1.outputs.txt"), "a.2": ("a.2.input.jpg", "a.2.outputs.txt")},
        ),
        # Two texts that fit as well as each other, and two images that share one: nobody guesses.
        ("x.in.jpg x.one.txt x.two.txt", {"x": "caption_missing"}),
        ("x.in.jpg x.out.jpg x.edit.txt", {"x.in": "caption_missing", "x.out": "caption_missing"}),
        # Other names of captions.
        ("x.jpg x.jpg.txt", {"x": ("x.jpg", "x.jpg.txt")}),
        ("x.jpg x.caption y.jpg y.prompt.txt", {"x": ("x.jpg", "x.caption"), "y": ("y.jpg", "y.prompt.txt")}),
        ("x.jpg x.caption x.txt", {"x": ("x.jpg", "x.txt")}),
        # Case, blanks and other scripts.
        (
            ["d/Mein Photo 1.JPEG", "d/Mein Photo 1.TXT", "d/写真 🐈.Jpg", "d/写真 🐈.txt"],
            {
                "d/Mein Photo 1": ("d/Mein Photo 1.JPEG", "d/Mein Photo 1.TXT"),
                "d/写真 🐈": ("d/写真 🐈.Jpg", "d/写真 🐈.txt"),
            },
        ),
        # All images first, as a shell's wildcards name them.
        ("a.jpg b.jpg a.txt b.txt", {"a": ("a.jpg", "a.txt"), "b": ("b.jpg", "b.txt")}),
        ("a.jpg a.txt b.txt", {"a": ("a.jpg", "a.txt"), "b": "image_missing"}),
        # Formats of phones, scanners and the web.
        ("a.avif a.txt b.TIFF b.txt", {"a": ("a.avif", "a.txt"), "b": ("b.TIFF", "b.txt")}),
    ],
)  # fmt: skip
def test_members_and_examples(tmp_path, names, expected):
    found = examples_of(pack(tmp_path / "0.tar", names))
    assert found == expected


def test_further_images_of_an_example_are_counted(tmp_path, caplog):
    pack(tmp_path / "0.tar", "w.jpg x.jpg x.1.jpg x.seg.png y.a.jpg y.b.jpg")
    pack(tmp_path / "1.tar", "x.jpg z.jpg z.2.jpg")
    source = TarSource(str(tmp_path), workers=1, caption_required=False)
    assert len(source) == 6
    expected = "passed over: 3 images whose example has another one (0.tar/x)"
    assert expected in source.report
    assert expected in caplog.text
    # An index without such images stays as it was.
    assert "unused_images" not in TarSource(str(pack(tmp_path / "b" / "0.tar", "x.jpg x.txt")), workers=1).index.about


def test_a_name_of_many_dots_takes_no_time(tmp_path):
    name = "x" + ".1" * 50_000
    assert list(examples_of(pack(tmp_path / "0.tar", [f"{name}.a.jpg", f"{name}.b.jpg"]), caption_required=False)) == [
        f"{name}.a",
        f"{name}.b",
    ]


def json_tar(path, objects, suffix="json"):
    names = [n for i in range(len(objects)) for n in (f"{i}.jpg", f"{i}.{suffix}")]
    return pack(path, names, **{f"{i}.{suffix}": json.dumps(o) for i, o in enumerate(objects)})


@pytest.mark.parametrize(
    "values, key, others",
    [
        ({"prompt": "c", "seed": 3}, "prompt", ""),
        ({"url": "u", "title": "t", "TEXT": ["c", "d"]}, "TEXT", "title hold text too: config.data.caption_keys=title"),
        ({"meta": {"caption": "c"}, "url": "u"}, "meta.caption", ""),
        ({"negative_prompt": "n", "caption_blip": "c"}, "caption_blip", ""),
    ],
)
def test_captions_are_found_in_json(tmp_path, values, key, others):
    path = json_tar(tmp_path / "0.tar", [{}, {**values}, {**values}])
    source = TarSource(str(path), workers=1)
    outer, _, inner = key.partition(".")
    expected = values[outer][inner] if inner else values[outer]
    assert list(source.read(1).captions) == (expected if isinstance(expected, list) else [expected])
    assert source.caption_note.startswith(f"captions: key {key!r} of the .json members of {path}")
    assert others in source.report
    # The keys may be named; and the data set is the same.
    named = TarSource(str(path), workers=1, caption_keys=(key,))
    assert named.read(2) == source.read(2)
    assert named.identity() == source.identity()


def test_keys_that_are_not_there(tmp_path, refused):
    path = json_tar(tmp_path / "0.tar", [{"a": "x", "n": 1, "b": {"c": "y"}}, {"a": None}])
    at = f"the .json members of {path} have no"
    refused(lambda: TarSource(str(path)), f"{at} key of a usual name", "a, b.c", "caption_keys=a", "captions=optional")
    refused(lambda: TarSource(str(path), caption_keys=("caption",)), f"caption_keys=caption: {at} such key", "a, b.c")
    # Nothing is refused where captions are not needed.
    for keys in ((), ("caption",)):
        assert TarSource(str(path), caption_keys=keys, caption_required=False).read(0).captions == ()
    # Numbers alone, as of a class.
    path = json_tar(tmp_path / "2.tar", [{"n": 1}, 5])
    refused(lambda: TarSource(str(path)), "no key of them holds text", ".txt member beside", "captions=optional")
    # A null is a missing caption, not a missing key.
    path = json_tar(tmp_path / "1.tar", [{"caption": None}])
    assert TarSource(str(path), caption_keys=("caption",)).name(0) == "1.tar/0"


def test_damaged_json_is_no_matter_of_keys(tmp_path):
    path = pack(tmp_path / "0.tar", "a.jpg a.json b.jpg b.json", **{"a.json": "{", "b.json": "\0\0"})
    with pytest.raises(BadExample, match="caption_missing"):
        TarSource(str(path), workers=1).read(0)


def test_tars_with_captions_in_json_are_indexed_once(tmp_path, monkeypatch, caplog):
    path = json_tar(tmp_path / "0.tar", [{"prompt": "c"}])
    compared = []
    scan = tar_index.scan_to_part
    monkeypatch.setattr(tar_index, "scan_to_part", lambda *args: compared.append(args[-1]) or scan(*args))
    caplog.set_level("INFO")
    for refresh in (False, False, True):
        assert TarSource(str(path), workers=1, refresh=refresh).read(0).captions == ("c",)
    # The first use, and the one that asks for it.
    assert compared == [str(path)] * 2
    assert caplog.text.count("indexing 1 tars") == 2


def test_a_text_comes_before_json(tmp_path):
    path = pack(tmp_path / "0.tar", "a.jpg a.json b.jpg b.json b.txt")
    source = TarSource(str(path), workers=1)
    assert source.read(1).captions == ("b.txt",)
    assert source.caption_note == ""


def scan_as_before(monkeypatch):
    """Indexes of the first rules: they name no rules."""
    merge, save = tar_index._merge_parts, tar_index.save_part

    def save_without(file, columns):
        save(file, {k: v for k, v in columns.items() if k != "grouping"})

    def merge_without(*args):
        target = merge(*args)
        about = json.loads((target / "index.json").read_text())
        about.pop("grouping", None), about.pop("other_captions", None)
        (target / "index.json").write_text(json.dumps(about, indent=1))
        return target

    monkeypatch.setattr(tar_index, "save_part", save_without)
    monkeypatch.setattr(tar_index, "_merge_parts", merge_without)


def test_indexes_of_earlier_versions(tmp_path, monkeypatch):
    """One of plain tars stays as it is; one in which images are missing is made anew."""
    plain, dotted = write_tars(tmp_path / "plain", 1, 3), tmp_path / "dotted"
    pack(dotted / "0.tar", "a.1.jpg a.1.txt a.2.jpg a.2.txt")
    with monkeypatch.context() as earlier:
        scan_as_before(earlier)
        earlier.setattr("gigagan_jax.data.sources.tar_examples._common_components", lambda middles: "")
        earlier.setattr("gigagan_jax.data.sources.tar_examples.IMAGE_SUFFIXES", (".png",))
        TarSource(str(dotted), workers=1)
        earlier.setattr("gigagan_jax.data.sources.tar_examples.IMAGE_SUFFIXES", (".jpg",))
        identity = TarSource(str(plain), workers=1).identity()
    files = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (plain / "gigagan_index").rglob("*") if p.is_file()}
    assert TarSource(str(plain), workers=1).identity() == identity
    assert files == {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (plain / "gigagan_index").rglob("*") if p.is_file()
    }
    assert list(examples_of(dotted)) == ["a.1", "a.2"]


def test_the_identity_of_plain_tars_is_that_of_earlier_versions(tmp_path):
    # Constants: runs of earlier versions hold them.
    assert TarSource(str(write_tars(tmp_path / "a", 2, 3)), workers=1).identity() == "4ee619ae5087019a"


@pytest.mark.parametrize(
    "name, plain", [("a b.tgz", "'{}/a b.tar'"), ("x.tar.gz", "{}/x.tar"), ("x.tar", "{}/x-unpacked.tar")]
)
def test_the_command_that_unpacks(tmp_path, name, plain, refused):
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        add_member(tar, "a.jpg", PICTURE)
    message = refused(lambda: TarSource(str(tmp_path / name)), "compressed (gzip)")
    command = message.rpartition(": ")[2]
    assert command.endswith(f"> {plain.format(tmp_path)}")
    subprocess.run(command, shell=True, check=True)
    assert len(TarSource(shlex.split(command)[-1], caption_required=False)) == 1
