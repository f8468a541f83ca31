"""Tars in a bucket, over HTTP from a server that is killed and started again while they are read."""

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
def server(tars):
    with Server(tars) as server:
        yield server


@pytest.fixture
def running(server):
    if server.process.poll() is not None:
        server.start()
    return server


def stream(source, **options):
    return pipeline.build(
        source, resolution=16, batch_size=4, seed=3, tokenizer=ByteTokenizer(40), crop="random", **options
    )


def test_a_bucket_holds_what_the_folder_holds(running, tars, tmp_path):
    local = TarSource(str(tars))
    for path in ("s3://bucket/{00000..00002}.tar", "s3://bucket/*.tar", "s3://bucket"):
        remote = TarSource(path, index=str(tmp_path))
        assert remote.identity() == local.identity()
        assert [remote.read(i) for i in range(24)] == [local.read(i) for i in range(24)]


def test_the_same_batches_whatever_happens_to_the_server(running, tars, tmp_path):
    """Three epochs; the server is killed twice on the way and is away for longer than what is read ahead lasts."""
    with stream(TarSource(str(tars))) as expected:
        batches = [next(expected) for _ in range(18)]
    storage = Storage(retry_seconds=60)
    source = TarSource("s3://bucket/{00000..00002}.tar", index=str(tmp_path), storage=storage)
    with stream(source, num_threads=2, prefetch_examples=4) as data:
        for i, batch in enumerate(batches):
            if i in (3, 11):
                running.kill()
                threading.Timer(1.5, running.start).start()
            got = next(data)
            for key in batch:
                np.testing.assert_array_equal(got[key], batch[key])
        assert not data.quarantine.names


def test_worker_processes_read_from_the_bucket_too(running, tars, tmp_path):
    with stream(TarSource(str(tars))) as expected:
        want = next(expected)
    source = TarSource("s3://bucket/{00000..00002}.tar", index=str(tmp_path))
    with stream(source, num_workers=1, num_threads=2) as data:
        np.testing.assert_array_equal(next(data)["image"], want["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreachable_server_ends_in_one_line(running, tmp_path, workers):
    source = TarSource("s3://bucket/{00000..00002}.tar", index=str(tmp_path), storage=Storage(retry_seconds=1))
    running.kill()
    threads = {"num_threads": workers, "num_workers": workers}
    with stream(source, **threads) as data, pytest.raises(UserError, match="has not answered for") as refused:
        next(data)
    assert refused.value.code == 1  # launchers try again
    assert "\n" not in str(refused.value)
    assert "s3://bucket/0000" in str(refused.value)


def test_a_missing_object_is_not_waited_for(running, tmp_path):
    with pytest.raises(UserError, match=r"00003\.tar cannot be read"):
        TarSource("s3://bucket/{00000..00003}.tar", index=str(tmp_path))
    with pytest.raises(UserError, match=r"nosuchbucket.*cannot be read"):
        TarSource("s3://nosuchbucket/00003.tar", index=str(tmp_path))


def test_missing_credentials_are_not_waited_for(running, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"00000.tar: not allowed.*check the credentials"):
        TarSource("s3://bucket/{00000..00002}.tar", index=str(tmp_path), workers=1)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
