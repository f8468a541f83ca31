"""Robustness of the index of tars: damage, replaced tars, several processes at once."""

import io
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gigagan_jax.config import DataConfig, FilterConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sampling import ShuffledOrder
from gigagan_jax.data.sources import make_source, tar_headers, tar_index
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.storage import Storage
from tests.img2dataset import add_member, encoded, write_tars


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 256, 257, 1000, 65536, 65537, 65538, 262145])
def test_an_epoch_is_a_permutation_for_every_length(size):
    """grain's cipher is none for 2^16 + 1 and 2^18 + 1."""
    order = ShuffledOrder(size, 0)
    for epoch in (0, 3):
        assert len({order[epoch * size + i] for i in range(size)} & set(range(size))) == size


def write_tar(path, keys, shift=0):
    """A tar of grey images, whose captions say their keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, key in enumerate(keys):
            add_member(tar, f"{key}.png", encoded(np.full((4, 4, 3), i + shift, np.uint8), "PNG"))
            # The caption repeats the key, so a test sees when an offset leads to another example.
            add_member(tar, f"{key}.txt", f"it is {key}".encode())
    return str(path)


def first_captions(source):
    return [source.read(i).captions[0] for i in range(len(source))]


def test_data_sets_with_files_of_the_same_names_do_not_share_an_index(tmp_path):
    a, b = (write_tar(tmp_path / name / "0.tar", [f"{name}{i}" for i in range(n)]) for name, n in (("a", 3), ("b", 5)))
    # Both parts put their index into one folder.
    config = DataConfig(mixture=(f"0.5:{a}", f"0.5:{b}"), index=str(tmp_path / "index"))
    both = make_source(config, workers=1)
    assert first_captions(both) == [*(f"it is a{i}" for i in range(3)), *(f"it is b{i}" for i in range(5))]
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = TarSource(str(tmp_path / "moved" / "0.tar"), index=str(tmp_path / "index"))
    # Moved tars are indexed again under their new path, and remain the same data set.
    assert moved.identity() == both.parts[0].identity()


def test_tars_replaced_in_a_bucket_are_noticed(tmp_path):
    memory = fsspec.filesystem("memory")

    def put_tar(keys):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for key in keys:
                add_member(tar, f"{key}.jpg", b"x" * 1000)
                add_member(tar, f"{key}.txt", b"caption")
        memory.pipe_file("/care/0.tar", data.getvalue())

    put_tar(["k0", "k1"])
    source = TarSource("memory://care/0.tar", index=str(tmp_path), workers=1)
    assert source.read(0).image == b"x" * 1000
    # The same size with the examples swapped: only the names in the headers differ.
    put_tar(["k1", "k0"])
    with pytest.raises(BadExample, match="tar_changed"):
        source.read(0)


def test_index_again_looks_at_buckets_too(tmp_path):
    memory = fsspec.filesystem("memory")
    for keys in (["k0", "k1"], ["k1", "k0", "k2"]):
        memory.pipe_file("/care/1.tar", Path(write_tar(tmp_path / "1.tar", keys)).read_bytes())
        # Without refresh, tars in buckets are not compared with their index.
        found = TarSource("memory://care/1.tar", index=str(tmp_path / "index"), workers=1, refresh=True)
        assert first_captions(found) == [f"it is {key}" for key in keys]


@pytest.mark.parametrize("file", ["shards.npz", "shards.txt", "index.json", "fault.bin"])
# Empty, cut in half, and valid JSON of another type.
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"[]"])
def test_a_damaged_index_is_made_again(file, damage, tmp_path):
    tars = write_tars(tmp_path, shards=2, each=3)
    before = first_captions(TarSource(str(tars), workers=1))
    place = next((tmp_path / "gigagan_index" / "sets").iterdir()) / file
    place.write_bytes(damage(place.read_bytes()))
    again = TarSource(str(tars), workers=1)
    assert first_captions(again) == before


def test_indexing_again_what_did_not_change_disturbs_no_run(tmp_path):
    tars = write_tars(tmp_path, shards=2, each=3)
    source = TarSource(str(tars), workers=1, filters=FilterConfig(min_width=1))
    TarSource(str(tars), workers=1, refresh=True)
    # Worker processes receive the source as a pickle.
    assert first_captions(pickle.loads(pickle.dumps(source))) == first_captions(source)
    # Damage that keeps the length of the file.
    for file in ("keys.bin", "image_block.bin"):
        place = source.index.folder / file
        before = place.read_bytes()
        place.write_bytes(bytes(len(before)))
        TarSource(str(tars), workers=1, refresh=True)
        assert place.read_bytes() == before


def test_a_source_in_use_does_not_open_an_index_made_anew(tmp_path):
    tars = write_tars(tmp_path, shards=1, each=3)
    # The state that a worker process would receive, before the index changes.
    state = TarSource(str(tars), workers=1).index.__getstate__()
    (tmp_path / "00000.tar").unlink()
    write_tar(tmp_path / "00000.tar", ["a", "b"])
    TarSource(str(tars), workers=1)
    with pytest.raises(UserError, match="made anew while it was in use"):
        tar_index.TarIndex.__new__(tar_index.TarIndex).__setstate__(state)


def open_in_process(folder, queue):
    try:
        queue.put(first_captions(TarSource(folder, workers=1)))
    except BaseException as e:
        queue.put(repr(e))


def test_processes_that_start_together_find_the_same_index(tmp_path):
    tars = write_tars(tmp_path, shards=3, each=5)
    # Spawned processes start without an open index, as the hosts of a run do.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=open_in_process, args=(str(tars), queue)) for _ in range(4)]
    for child in children:
        child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert found == [first_captions(TarSource(str(tars)))] * 4


def test_an_empty_file_is_counted_and_named(tmp_path, caplog):
    tars = write_tars(tmp_path, shards=3, each=2)
    (tmp_path / "00001.tar").write_bytes(b"")
    with caplog.at_level("WARNING"):
        source = TarSource(str(tars), workers=1)
    assert "00001.tar" in caplog.text
    # A placeholder name: the file has no member to take one from.
    assert source.name(2) == "00001.tar/?@0"
    with pytest.raises(BadExample, match="tar_truncated"):
        source.read(2)


def make_header(size=b"%011o" % 3, name=b"a.jpg"):
    """A regular file's header with a size field of one's own."""
    block = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.USTAR_FORMAT))
    block[124 : 124 + len(size)] = size
    # The checksum counts its own field as blanks.
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [b"-0000001000", b"1_0", b"+1", b"0x10"])
def test_sizes_that_are_no_numbers_do_not_lead_backwards(size):
    data = make_header() + b"abc".ljust(512, b"\0") + make_header(size) + bytes(1024)
    found = list(tar_headers.iter_members(lambda at, n: data[at : at + n], len(data)))
    # A negative size would lead the reader backwards, for ever.
    assert [m.fault for m in found] == ["", "tar_corrupt"]


@pytest.mark.parametrize("size", ["²", "9" * 5000, "-1", "1e3"])
def test_sizes_in_pax_headers_that_are_no_numbers_are_left_out(size):
    record = f" size={size}\n".encode()
    # A pax record states its own length, digits included.
    record = str(len(record) + len(str(len(record) + 4))).encode() + record
    pax = make_header(b"%011o" % len(record), b"pax")
    pax = bytearray(pax)
    # The type flag of a pax header.
    pax[156:157] = b"x"
    pax[148:156] = b" " * 8
    pax[148:156] = b"%06o\0 " % sum(pax)
    data = (
        bytes(pax)
        + record.ljust(-(-len(record) // 512) * 512, b"\0")
        + make_header()
        + b"abc".ljust(512, b"\0")
        + bytes(1024)
    )
    found = list(tar_headers.iter_members(lambda at, n: data[at : at + n], len(data)))
    assert [(m.name, m.size, m.fault) for m in found] == [("a.jpg", 3, "")]


def test_brackets_and_blanks_in_paths_are_no_patterns(tmp_path):
    tars = write_tars(tmp_path / "ta ü [1] {x}", shards=2, each=2)
    assert len(TarSource(str(tars), workers=1)) == 4
    assert len(TarSource(str(tars / "00001.tar"), workers=1)) == 2
    assert Storage().expand_pattern(str(tars), (".tar",)) == [str(tars / f"0000{i}.tar") for i in range(2)]


def test_tars_of_a_folder_that_is_not_there(tmp_path, refused):
    refused(lambda: TarSource(str(tmp_path / "none" / "{0..3}.tar")), tmp_path / "none", "no such folder")
