"""The cache of row groups of a ParquetSource, and its warning about large groups."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources import parquet as module
from gigagan_jax.data.sources.parquet import ParquetSource
from gigagan_jax.data.sources.table import LruCache
from tests.parquet_files import cause_of, make_columns, make_picture, write_table


def test_row_groups_are_kept_and_let_go(tmp_path):
    """A group that is read twice is loaded once, evicted groups are loaded again, and the newest one always stays."""
    path = tmp_path / "a.parquet"
    write_table(path, make_columns(range(9)))
    source = ParquetSource(str(path))
    # Room for two groups is measured in decoded bytes.
    bytes_of_group = source._load_row_group(str(path), 0, source._columns).nbytes
    saved = path.read_bytes()

    source._tables = LruCache(int(2.5 * bytes_of_group))
    # The second group is the least recently used when the third one is loaded.
    for i in (0, 3, 0, 6):
        source.read(i)
    # With an empty file, only cached groups can be read.
    path.write_bytes(b"")
    # A new storage keeps no open file.
    source._storage = type(source._storage)()
    assert [source.read(i).image for i in (0, 8)] == [make_picture(0), make_picture(8)]
    # A cached group serves captions too.
    assert source.captions(2) == ("caption 2 ü",)
    assert cause_of(source.read, 3) == "row_group_corrupt"

    path.write_bytes(saved)
    # One byte is too small for any group: the newest one stays nevertheless.
    source._tables = LruCache(1)
    for i in (0, 3, 1):
        source.read(i)
    path.write_bytes(b"")
    source._storage = type(source._storage)()
    assert source.read(2).image == make_picture(2)
    assert cause_of(source.read, 3) == "row_group_corrupt"


def test_threads_that_want_the_same_wait_for_one():
    cache = LruCache(100)
    start, calls = threading.Barrier(8), []
    loading = threading.Event()

    def load_value():
        calls.append(1)
        # Holds the load until all threads have asked.
        loading.wait(10)
        return "value"

    def ask_cache(_):
        start.wait(10)
        return cache.get_or_load("key", load_value, len)

    # Eight threads ask, one releases the load.
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(ask_cache, i) for i in range(8)]
        pool.submit(loading.set)
        assert [a.result() for a in answers] == ["value"] * 8
    assert len(calls) == 1

    def fail_to_load():
        raise BadExample("broken")

    # A failed load is not cached: the second call raises again, and the third one loads.
    for _ in range(2):
        with pytest.raises(BadExample):
            cache.get_or_load("other", fail_to_load, len)
    assert cache.get_or_load("other", lambda: "good", len) == "good"


def test_large_row_groups_are_told_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "_LARGE_GROUP", 2 << 20)
    # Random bytes do not compress, so sizes in the file are those in memory.
    big = np.random.default_rng(0).bytes(1100 << 10)
    table = {"image": [big, big[1:]], "caption": ["a", "b"]}
    options = {"compression": "none", "use_dictionary": False}
    small = write_table(tmp_path / "small.parquet", table, row_group_size=1, **options)
    write_table(tmp_path / "large.parquet", table, row_group_size=2, **options)
    with caplog.at_level(logging.WARNING):
        # Groups of 1.1 MB are below the limit of 2 MiB.
        ParquetSource(small)
        assert caplog.records == []
        source = ParquetSource(str(tmp_path))
        assert source.read(1).image == big[1:]
    (warning,) = caplog.records
    assert "large.parquet" in warning.getMessage()
    assert "row_group_size" in warning.getMessage()
    assert "of up to 2 MB" in warning.getMessage()
