"""Tars in a bucket, read over HTTP from a server that is killed and restarted meanwhile."""

import threading

import fsspec
import numpy as np
import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.data import pipeline
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.storage import Storage
from gigagan_jax.data.tokenizers import ByteTokenizer
from tests.object_server import Server


@pytest.fixture(scope="module")
def object_server(tars):
    with Server(tars) as object_server:
        yield object_server


@pytest.fixture
def running_server(object_server):
    # An earlier test may have killed it.
    if object_server.process.poll() is not None:
        object_server.start()
    return object_server


def make_stream(source, **options):
    return pipeline.build_pipeline(
        source, resolution=16, batch_size=4, seed=3, tokenizer=ByteTokenizer(40), crop="random", **options
    )


def test_a_bucket_holds_what_the_folder_holds(running_server, tars, tmp_path):
    local = TarSource(str(tars))
    for path in ("s3://bucket/{00000..00002}.tar", "s3://bucket/*.tar", "s3://bucket"):
        remote = TarSource(path, index=str(tmp_path))
        assert remote.identity() == local.identity()
        assert [remote.read(i) for i in range(24)] == [local.read(i) for i in range(24)]


def test_the_same_batches_whatever_happens_to_the_server(running_server, tars, tmp_path):
    """Three epochs; the server is killed twice on the way and is away for longer than what is read ahead lasts."""
    with make_stream(TarSource(str(tars))) as expected:
        # 24 examples in batches of 4: three epochs.
        batches = [next(expected) for _ in range(18)]
    storage = Storage(retry_seconds=60)
    source = TarSource("s3://bucket/{00000..00002}.tar", index=str(tmp_path), storage=storage)
    with make_stream(source, num_threads=2, prefetch_examples=4) as data:
        for i, batch in enumerate(batches):
            # 1.5 seconds outlast the examples read ahead, so reads meet the dead server.
            if i in (3, 11):
                running_server.kill()
                threading.Timer(1.5, running_server.start).start()
            actual = next(data)
            for key in batch:
                np.testing.assert_array_equal(actual[key], batch[key])
        # An outage must not count as bad examples.
        assert not data.quarantine.names


def test_worker_processes_read_from_the_bucket_too(running_server, tars, tmp_path):
    with make_stream(TarSource(str(tars))) as expected:
        expected_batch = next(expected)
    source = TarSource("s3://bucket/{00000..00002}.tar", index=str(tmp_path))
    with make_stream(source, num_workers=1, num_threads=2) as data:
        np.testing.assert_array_equal(next(data)["image"], expected_batch["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreachable_server_ends_in_one_line(running_server, tmp_path, workers):
    source = TarSource("s3://bucket/{00000..00002}.tar", index=str(tmp_path), storage=Storage(retry_seconds=1))
    running_server.kill()
    threads = {"num_threads": workers, "num_workers": workers}
    with make_stream(source, **threads) as data, pytest.raises(UserError, match="has not answered for") as refused:
        next(data)
    # Launchers restart a run that exits with 1.
    assert refused.value.code == 1
    assert "\n" not in str(refused.value)
    assert "s3://bucket/0000" in str(refused.value)


def test_a_missing_object_is_not_waited_for(running_server, tmp_path):
    # The server answers that the object is missing, so a retry would be useless.
    with pytest.raises(UserError, match=r"00003\.tar cannot be read"):
        TarSource("s3://bucket/{00000..00003}.tar", index=str(tmp_path))
    with pytest.raises(UserError, match=r"nosuchbucket.*cannot be read"):
        TarSource("s3://nosuchbucket/00003.tar", index=str(tmp_path))


def test_missing_credentials_are_not_waited_for(running_server, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # fsspec keeps file systems, with the credentials they were made with.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"00000.tar: not allowed.*check the credentials"):
        TarSource("s3://bucket/{00000..00002}.tar", index=str(tmp_path), workers=1)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
