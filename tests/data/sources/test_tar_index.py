"""Random access to tars compared with Python's tarfile: formats, damage, and an index of a hundred million examples."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources import tar_index
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.sources.tar_headers import iter_members
from gigagan_jax.data.storage import Storage
from tests.img2dataset import add_member, encoded, write_tars


def list_members(data):
    read = lambda offset, size: data[offset : offset + size]
    return [(m.name, data[m.offset : m.offset + m.size], m.fault) for m in iter_members(read, len(data))]


def write_tar(names, **options):
    """A tar as bytes, of members that hold their own names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as tar:
        for name in names:
            # Contents repeat the name, so a wrong offset shows.
            add_member(tar, name, name.encode() * 40)
    return out.getvalue()


# A name beyond 100 bytes needs an extended header; one of 99 just fits; one is beyond ASCII.
NAMES = ("000000000.jpg", "some/folder/" + "long" * 40 + ".jpg", "with space.txt", "x" * 99, "ünïcode.jpg")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(format):
    # Plain ustar cannot store the long name.
    names = [n for n in NAMES if format != tarfile.USTAR_FORMAT or "long" not in n]
    assert list_members(write_tar(names, format=format)) == [(n, n.encode() * 40, "") for n in names]


def test_gnu_tar_writes_what_is_read(tmp_path):
    for name in ("a.jpg", "b" * 140 + ".jpg"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    # Links and folders are no members with data.
    os.symlink("a.jpg", tmp_path / "c.jpg")
    (tmp_path / "folder").mkdir()
    subprocess.run(
        ["tar", "cf", tmp_path / "x.tar", "-C", tmp_path, "a.jpg", "c.jpg", "folder", "b" * 140 + ".jpg"], check=True
    )
    members = list_members((tmp_path / "x.tar").read_bytes())
    assert [n for n, _, _ in members] == ["a.jpg", "b" * 140 + ".jpg"]
    assert all(data == name.encode() * 100 and not fault for name, data, fault in members)


def test_sizes_in_base_256_and_in_pax_headers():
    info = tarfile.TarInfo("big.jpg")
    # 8 GiB and more do not fit into the 11 octal digits of a header.
    info.size = 9 << 30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = info.tobuf(format)
        # The 9 GiB of data are never stored: every read past the header returns filler.
        read = lambda offset, size, header=header: header[offset : offset + size].ljust(size, b"\1")
        (member,) = iter_members(read, len(header) + (9 << 30))
        assert (member.size, member.fault) == (9 << 30, "")


def test_damage_costs_what_is_damaged_only():
    data = bytearray(write_tar([f"{i}.jpg" for i in range(5)]))
    second = data.index(b"1.jpg")
    # A byte of the second member's header.
    data[second + 110] ^= 0xFF
    members = list_members(bytes(data))
    assert [(n, f) for n, _, f in members] == [
        ("0.jpg", ""),
        ("0.jpg", "tar_corrupt"),
        *((f"{i}.jpg", "") for i in (2, 3, 4)),
    ]
    data = write_tar(["0.jpg", "1.jpg"])
    # The tar ends inside the second member's data.
    cut = data[: data.index(b"1.jpg1.jpg") + 100]
    assert [(n, f) for n, _, f in list_members(cut)] == [("0.jpg", ""), ("1.jpg", "tar_truncated")]


def test_examples_are_those_of_the_tars(tars):
    source = TarSource(str(tars))
    assert len(source) == 24
    expected = {}
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                # Keys of img2dataset have 9 digits.
                expected.setdefault(f"{path.name}/{member.name[:9]}", {})[member.name[10:]] = tar.extractfile(
                    member
                ).read()
    assert [source.name(i) for i in range(24)] == list(expected)
    for i, files in enumerate(expected.values()):
        record = source.read(i)
        assert record.image == files["jpg"]
        assert record.captions == source.captions(i) == (files["txt"].decode(),)
    assert TarSource(str(tars / "{00000..00002}.tar")).identity() == source.identity()
    # img2dataset writes the caption into .json too.
    from_json = TarSource(str(tars), caption_keys=("caption",))
    assert from_json.read(7).captions == source.read(7).captions
    assert pickle.loads(pickle.dumps(source)).read(23) == source.read(23)


def test_labels_of_some_examples_only(tmp_path):
    """Unknown labels are -1, not class 0, in a tar with labels and in a tar without any."""
    for name, labels in (("a", (b"3", None)), ("b", (None, None))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i, label in enumerate(labels):
                for suffix, data in (("jpg", b"image"), ("txt", b"a cat"), ("cls", label)):
                    if data is not None:
                        add_member(tar, f"{name}{i}.{suffix}", data)
    source = TarSource(str(tmp_path))
    assert source.has_labels
    assert [source.read(i).label for i in range(4)] == [3, -1, -1, -1]


def test_the_index_is_kept_and_made_again_for_other_tars(tmp_path, monkeypatch):
    folder = write_tars(tmp_path / "data", shards=2, each=2)
    # One worker: a child process would not see the patched function.
    before = TarSource(str(folder), workers=1).identity()
    scanned = []
    # Counts the tars that are really read.
    scan = tar_index.scan_tar
    monkeypatch.setattr(tar_index, "scan_tar", lambda storage, path: scanned.append(path) or scan(storage, path))
    assert TarSource(str(folder), workers=1).identity() == before
    assert not scanned
    # Changes size and time of one tar.
    with tarfile.open(folder / "00001.tar", "a") as tar:
        add_member(tar, "new.jpg", b"x")
        add_member(tar, "new.txt", b"new")
    source = TarSource(str(folder), workers=1)
    assert len(source) == 5
    assert source.identity() != before
    assert scanned == [str(folder / "00001.tar")]


def test_a_moved_data_set_is_the_same_one(tmp_path):
    folder = write_tars(tmp_path / "a", shards=2, each=2)
    identity = TarSource(str(folder)).identity()
    shutil.move(folder, tmp_path / "b")
    # The moved index must not matter.
    shutil.rmtree(tmp_path / "b" / "gigagan_index")
    assert TarSource(str(tmp_path / "b")).identity() == identity


def test_where_nothing_can_be_written_the_index_goes_to_the_workdir(tars, tmp_path, monkeypatch):
    # Patched, because file permissions do not stop root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    shutil.copytree(tars, tmp_path / "data", ignore=shutil.ignore_patterns("gigagan_index"))
    source = TarSource(str(tmp_path / "data"), workdir=tmp_path / "work")
    # The folder of the tars must stay untouched.
    assert (tmp_path / "work" / "gigagan_index") in source.index.folder.parents
    with pytest.raises(UserError, match=r"nothing can be written.*config.data.index"):
        TarSource(str(tmp_path / "data"))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / f"0.tar.{kind}", f"w:{kind}") as tar:
        add_member(tar, "0.jpg", b"x")
    with pytest.raises(
        UserError, match=r"0\.tar\.\w+ is compressed \(\w+\).*decompress it .*: \w+ -dc \S+ > \S+/0\.tar$"
    ):
        TarSource(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/", "nowhere.* is not there"),
        ("{00000..00009}.tar", "00003.tar cannot be read"),
        ("*.tat", "matches no file"),
        ("{00000.tar", "not closed"),
        ("{3..1}.tar", "runs backwards"),
        ("ftp6://x/y.tar", "no file system is known for ftp6"),
        ("gs://bucket/0.tar", "needs the package gcsfs: pip install -e '.\\[gcs\\]'"),
    ],
)
def test_bad_paths(tars, tmp_path, monkeypatch, path, message):
    if path.startswith("gs://"):
        # As where it is not installed, nor what it needs.
        monkeypatch.setitem(sys.modules, "aiohttp", None)
        monkeypatch.setattr("fsspec.filesystem", lambda *args, **kwargs: (_ for _ in ()).throw(ImportError("gcsfs")))
    where = path if "://" in path else str(tars / path)
    with pytest.raises(UserError, match=message):
        TarSource(where, index=str(tmp_path))


def test_a_tar_that_changed_after_indexing_is_told(tmp_path):
    folder = write_tars(tmp_path, shards=1, each=4)
    source = TarSource(str(folder))
    data = (folder / "00000.tar").read_bytes()
    # The first block moves to the end: all headers lie 512 bytes earlier.
    (folder / "00000.tar").write_bytes(data[512:] + data[:512])
    with pytest.raises(BadExample, match="tar_changed"):
        source.read(1)
    (folder / "00000.tar").unlink()
    # The copy has no open file, which would still read the deleted tar.
    source = pickle.loads(pickle.dumps(source))
    with pytest.raises(BadExample, match="tar_missing"):
        source.read(1)


def test_a_damaged_index_is_refused_in_one_line(tmp_path):
    index_folder = TarSource(str(write_tars(tmp_path, shards=1, each=2))).index.folder
    (index_folder / "fault.bin").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        tar_index.TarIndex(index_folder)


SYNTHETIC = 100_000_000


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """An index of a hundred million examples in ten thousand tars, as sparse files: contents do not matter."""
    folder = tmp_path_factory.mktemp("synthetic")
    shards, key = 10_000, 9
    (folder / "index.json").write_text(
        '{"version": 2, "damaged": [], "labelled": false, "identity": "synthetic", "examples": 100000000}'
    )
    (folder / "shards.txt").write_text("\n".join(f"{i:05d}.tar" for i in range(shards)))
    each = SYNTHETIC // shards
    np.savez(
        folder / "shards.npz",
        counts=np.full(shards, each),
        key_bytes=np.full(shards, each * key),
        stamps=np.zeros((shards, 2)),
    )
    for column, kind in (*tar_index.COLUMNS.items(), ("keys", np.uint8)):
        with open(folder / f"{column}.bin", "wb") as file:
            file.truncate(SYNTHETIC * np.dtype(kind).itemsize * (key if column == "keys" else 1))
    yield folder
    shutil.rmtree(folder)


def test_an_index_of_100_million_opens_and_shuffles_without_growing(synthetic):
    """Measures the seconds to open and the memory after a thousand shuffled reads, in a separate process."""
    code = f"""
import resource, sys, time
import numpy as np
from gigagan_jax.data.sources.tar_index import TarIndex
from gigagan_jax.data.sampling import ShuffledOrder
from pathlib import Path
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, began = peak(), time.monotonic()
index = TarIndex(Path({str(synthetic)!r}))
order = ShuffledOrder(len(index), 0)
opened = time.monotonic() - began
seen = set()
for k in range(1000):
    i = order[len(index) + k]
    seen.add(i)
    index.key_of(i), [int(index.columns[c][i]) for c in ("image_block", "image_size", "caption_block", "fault")]
assert len(index) == {SYNTHETIC} and len(seen) == 1000 and max(seen) < {SYNTHETIC}
print(opened, peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    seconds, grown = map(float, out)
    # Mapping is lazy: the time must not depend on the length.
    assert seconds < 5
    assert grown < 1 << 30
    total_bytes = sum(f.stat().st_size for f in synthetic.iterdir())
    # An upper bound for the memory if every page is read.
    assert total_bytes < 4 << 30


def test_indexing_takes_memory_for_one_tar_at_a_time(tmp_path):
    """Parts of a hundred tars of 20,000 examples are merged without holding all of them."""
    columns = {c: np.zeros(20_000, t) for c, t in tar_index.COLUMNS.items()}
    part = {k.replace("caption", "text"): v for k, v in columns.items()}
    part |= {k.replace("caption", "json"): v for k, v in columns.items() if "caption" in k}
    # Keys of 9 bytes each.
    part["key_end"] = np.arange(9, 9 * 20_001, 9, dtype=np.uint32)
    part |= {"keys": np.zeros(180_000, np.uint8), "stamp": np.array([1, 0])}
    (tmp_path / "parts").mkdir()
    paths = [f"/data/{i}.tar" for i in range(100)]
    first = tar_index.part_file(tmp_path, paths[0])
    tar_index.save_part(first, part)
    # Hard links: a hundred parts for the disk space of one.
    for path in paths[1:]:
        os.link(first, tar_index.part_file(tmp_path, path))
    tracemalloc.start()
    merged = tar_index._merge_parts(tmp_path, paths, "text")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All columns together are 60 MB.
    assert most < 4 << 20
    index = tar_index.TarIndex(merged)
    assert len(index) == 2_000_000
    assert index.shard_of(1_999_999) == 99


def test_a_range_read_is_what_the_file_holds(tmp_path):
    data = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "x").write_bytes(data)
    storage = Storage()
    assert storage.read(str(tmp_path / "x"), 17, 4000) == data[17:4017]
    assert storage.read(f"file://{tmp_path}/x") == data
    # A range beyond the end is cut.
    assert storage.read(str(tmp_path / "x"), 99_000, 5000) == data[99_000:]
    with storage.open(str(tmp_path / "x")) as file:
        file.seek(-10, 2)
        assert file.read() == data[-10:]
    assert encoded(np.zeros((2, 2, 3), np.uint8)).startswith(b"\xff\xd8")
