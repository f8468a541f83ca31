"""Workdirs in a bucket: the objects, the lock, the checkpoints, the small files; against servers of gs:// and s3://."""

import json
import threading
import time

import jax
import numpy as np
import pytest

from gigagan_jax.checkpoint import bucket_lock, object_store
from gigagan_jax.checkpoint.bucket_lock import BucketLock, hold_bucket_lock
from gigagan_jax.checkpoint.checksums import CHECKSUMS_FILE
from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.object_store import ChangedError, ObjectStore, check_bucket
from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.data import storage
from tests.checkpoint.test_manager import abstract, save, state
from tests.runs import small

MARKER = "commit_success.txt"


def test_objects(address, tmp_path):
    store = ObjectStore(address)
    assert store.list_objects() == {}
    assert store.list_folders("") == []
    assert store.info("a") is None
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a")
    store.write_bytes("a", b"one")
    first = store.info("a")
    store.write_bytes("a", b"three")
    assert store.read_bytes("a") == b"three"
    assert (store.info("a").size, store.info("a").version != first.version) == (5, True)
    store.write_bytes("b/c/d", b"")
    store.write_bytes("bb/e", b"6")
    assert sorted(store.list_objects()) == ["a", "b/c/d", "bb/e"]
    # Not what begins alike.
    assert sorted(store.list_objects("b")) == ["c/d"]
    assert store.list_folders("") == ["b", "bb"]
    store.copy("bb", "copy")
    assert store.read_bytes("copy/e") == b"6"
    store.download(["a", "b/c/d"], tmp_path / "down")
    assert (tmp_path / "down/a").read_bytes() == b"three"
    store.upload(["b/c/d", "a"], tmp_path / "down")
    store.delete(["a", "b/c/d", "missing"])
    assert sorted(store.list_objects()) == ["bb/e", "copy/e"]


def test_conditional_writes(address):
    store = ObjectStore(address)
    first = store.write_if("lock", b"1", None)
    with pytest.raises(ChangedError):
        store.write_if("lock", b"2", None)
    second = store.write_if("lock", b"3", first)
    with pytest.raises(ChangedError):
        store.write_if("lock", b"4", first)
    assert store.read_versioned("lock") == (b"3", second)
    assert store.read_versioned("none") is None


def test_of_many_that_create_one_object_one_succeeds(address):
    stores, won = [ObjectStore(address) for _ in range(8)], []

    def create(i):
        try:
            stores[i].write_if("lock", str(i).encode(), None)
            won.append(i)
        except ChangedError:
            pass

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(i).encode() for i in won] == [ObjectStore(address).read_bytes("lock")]


def test_a_lost_answer_to_a_conditional_write_is_no_write_of_somebody_else(google, faults, tmp_path, monkeypatch):
    store = ObjectStore(f"gs://bucket/{tmp_path.name}")
    without_own_pauses(store, monkeypatch)
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.05)
    google.proxy.matches = "ifGenerationMatch"
    faults["lost"] = 0.6
    version = store.write_if("lock", b"0", None)
    for i in range(1, 4):
        version = store.write_if("lock", str(i).encode(), version)
    assert google.proxy.counts["lost"] > 0
    assert store.read_bytes("lock") == b"3"


@pytest.mark.parametrize("kind", ["503", "429", "cut"])
def test_a_server_that_is_away_is_waited_for_within_a_bound(google, faults, tmp_path, monkeypatch, kind):
    store = ObjectStore(f"gs://bucket/{tmp_path.name}", retry_seconds=0.5)
    without_own_pauses(store, monkeypatch)
    faults[kind] = 1.0
    with pytest.raises(Unreachable, match=r"has not answered for .*GIGAGAN_RETRY_SECONDS sets the time"):
        store.write_bytes("a", b"1")
    faults.clear()
    store.write_bytes("a", b"1")


def without_own_pauses(store, monkeypatch):
    """gcsfs repeats a request by itself, for half a minute."""
    system = store._file_system(store.address)
    monkeypatch.setattr(system, "_request", type(system)._request.__wrapped__.__get__(system))


def test_what_lacks_is_one_line(google, faults, tmp_path):
    with pytest.raises(UserError, match="there is no bucket gs://other-bucket: create it"):
        check_bucket(ObjectStore("gs://other-bucket/run"))
    faults["403"] = 1.0
    for matches, what in (("GET /storage/v1/b/bucket/o?", "list"), ("POST", "create"), ("DELETE", "delete")):
        google.proxy.matches = matches
        with pytest.raises(UserError, match=f"may not {what} objects there"):
            check_bucket(ObjectStore(f"gs://bucket/{tmp_path.name}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs://bucket", "name a folder in the bucket too"),
        ("gs:///a", "name a folder in the bucket too"),
        ("az://bucket/a", "a run lives in a folder, at gs://BUCKET/PATH or at s3://BUCKET/PATH"),
        ("gs://bucket/a/../b", "an address has no empty name"),
        ("gs://bucket//a", "an address has no empty name"),
        ("gs://bucket/.", "an address has no empty name"),
        ("gs://bucket/a?b#c", "and none of"),
        ("gs://bucket/[x]", "and none of"),
        ("gs://bucket/a\nb", "and none of"),
    ],
)
def test_addresses_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        RunFolder.open(text)


def test_a_path_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder.open("~/run").folder == tmp_path / "run"
    assert RunFolder.open(f"file://{tmp_path}").folder == tmp_path


def test_lock(address, monkeypatch):
    store = ObjectStore(address)
    with hold_bucket_lock(store, beat=0.1, takeover=1.0) as lock:
        assert bucket_lock.read_run(store) == lock.run
        # On this machine at once; on another one by the next refresh.
        for machine in (bucket_lock.machine_identity(), "another", ""):
            monkeypatch.setattr(bucket_lock, "machine_identity", lambda machine=machine: machine)
            with pytest.raises(UserError, match="another run is in it"):
                BucketLock(store, beat=0.1, takeover=1.0).acquire()
        lock.check()
    # Freed: the next one takes it at once.
    began = time.monotonic()
    with hold_bucket_lock(store, beat=0.1, takeover=60.0):
        assert time.monotonic() - began < 5


def test_a_lock_without_a_sign_is_taken_over_and_its_run_stops(google, tmp_path, monkeypatch):
    store = ObjectStore(f"gs://bucket/{tmp_path.name}")
    first = BucketLock(store, beat=0.1, takeover=0.6)
    first.acquire()
    # Of another machine: whether its process lives is not known here.
    monkeypatch.setattr(bucket_lock, "machine_identity", lambda: "another")
    second = BucketLock(store, beat=0.1, takeover=0.6)
    began = time.monotonic()
    second.acquire()
    assert time.monotonic() - began >= 0.6
    with pytest.raises(UserError, match=r"another run has taken its lock .*: this one stops here"):
        first.check()
    first.release()
    assert bucket_lock.read_run(store) == second.run
    second.check()


def test_a_lock_of_a_dead_process_of_this_machine_is_taken_at_once(google, tmp_path):
    store = ObjectStore(f"gs://bucket/{tmp_path.name}")
    dead = BucketLock(store)
    dead._me |= {"started": "1"}
    dead.acquire()
    began = time.monotonic()
    BucketLock(store, takeover=60.0).acquire()
    assert time.monotonic() - began < 5


def test_a_run_that_cannot_refresh_its_lock_stops_before_another_may_take_it(google, tmp_path, monkeypatch):
    store = ObjectStore(f"gs://bucket/{tmp_path.name}")
    lock = BucketLock(store, beat=0.1, takeover=0.5)
    lock.acquire()
    away = lambda *args, **kwargs: (_ for _ in ()).throw(Unreachable("away"))
    monkeypatch.setattr(ObjectStore, "write_if", away)
    time.sleep(0.36)
    with pytest.raises(Unreachable, match=r"could not be refreshed for .* another run may take it"):
        lock.check()


def write_checkpoints(place, *steps, **fields):
    config = small(**fields)
    open_workdir(place, config)
    checkpoints = Checkpoints(place, config)
    save(checkpoints, config, *steps)
    return config, checkpoints


def test_checkpoints(address):
    place = RunFolder.open(address)
    config, checkpoints = write_checkpoints(place, 2, 4, 6, 8)
    assert checkpoints.all_steps() == [4, 6, 8]
    checkpoints.close()
    reader = Checkpoints(RunFolder.open(address))
    assert reader.latest_valid_step() == 8
    restored, position = reader.restore(8, abstract())
    assert np.array_equal(restored["a"], state(8)["a"])
    assert position == {"examples_seen": 128}
    reader.close()
    reader = Checkpoints(RunFolder.open(address))
    part = reader.restore_partial(6, {"b": abstract()["b"]})
    assert np.array_equal(part["b"]["c"], state(6)["b"]["c"])
    reader.close()
    again = Checkpoints(RunFolder.open(address), config)
    step, restored, _ = again.restore_latest_valid(abstract())
    assert step == 8
    again.delete_step(8)
    assert again.all_steps() == [4, 6]
    save(again, config, 8)
    again.close()
    assert Checkpoints(place).latest_valid_step() == 8


def test_a_damaged_checkpoint_is_put_aside(address):
    place = RunFolder.open(address)
    config, checkpoints = write_checkpoints(place, 2, 4)
    checkpoints.close()
    store = place.store
    name = next(n for n, info in store.list_objects("checkpoints/4").items() if "/d/" in n and info.size > 100)
    data = store.read_bytes(f"checkpoints/4/{name}")
    store.write_bytes(f"checkpoints/4/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    reader = Checkpoints(RunFolder.open(address))
    assert reader.latest_valid_step() == 2
    # A reader changes nothing.
    assert store.list_folders("checkpoints") == ["2", "4"]
    again = Checkpoints(RunFolder.open(address), config)
    assert again.restore_latest_valid(abstract())[0] == 2
    assert store.list_folders("checkpoints") == ["2", "4.damaged"]
    save(again, config, 4)
    again.close()
    assert Checkpoints(place).latest_valid_step() == 4


def test_a_half_written_checkpoint_goes_and_no_other(address):
    place = RunFolder.open(address)
    config, checkpoints = write_checkpoints(place, 2, 4)
    checkpoints.close()
    store = place.store
    # What a kill inside a save leaves: no marker, and no time of a commit.
    for name in store.list_objects("checkpoints/4"):
        if name not in (MARKER, CHECKSUMS_FILE):
            store.write_bytes(f"checkpoints/6/{name}", store.read_bytes(f"checkpoints/4/{name}"))
    metadata = json.loads(store.read_bytes("checkpoints/6/_CHECKPOINT_METADATA"))
    store.write_bytes(
        "checkpoints/6/_CHECKPOINT_METADATA", json.dumps(metadata | {"commit_timestamp_nsecs": None}).encode()
    )
    # What a copy from a disk may lack: the markers.
    lost = [f"checkpoints/4/{n}" for n in store.list_objects("checkpoints/4") if n.endswith(MARKER)]
    store.delete(lost)
    assert Checkpoints(RunFolder.open(address)).all_steps() == [2, 4]
    again = Checkpoints(RunFolder.open(address), config)
    # The markers are among what is checksummed but for the checkpoint's own.
    assert store.list_folders("checkpoints") == ["2", "4"]
    again.close()


def test_a_copy_of_a_folder_goes_on_in_a_bucket_and_back(address, tmp_path):
    local = tmp_path / "local"
    config, checkpoints = write_checkpoints(local, 2, 4)
    checkpoints.close()
    place = RunFolder.open(address)
    names = [p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()]
    place.store.upload(names, local)
    # Orbax wrote none before it knew buckets.
    place.store.delete([f"checkpoints/4/{MARKER}", f"checkpoints/2/{MARKER}"])
    there = Checkpoints(place, config)
    step, restored, _ = there.restore_latest_valid(abstract())
    assert step == 4
    assert np.array_equal(jax.device_get(restored["a"]), state(4)["a"])
    save(there, config, 6)
    there.close()
    back = tmp_path / "back"
    place.store.download(place.store.list_objects(), back)
    here = Checkpoints(back, config)
    assert here.restore_latest_valid(abstract())[0] == 6
    save(here, config, 8)
    here.close()
    assert Checkpoints(back).latest_valid_step() == 8


def test_a_lock_that_was_taken_leaves_the_checkpoint_unfinished(google, tmp_path, monkeypatch):
    place = RunFolder.open(f"gs://bucket/{tmp_path.name}")
    config, checkpoints = write_checkpoints(place, 2)
    monkeypatch.setattr(place, "check_lock", lambda: (_ for _ in ()).throw(UserError("taken")))
    with pytest.raises(UserError, match="taken"):
        save(checkpoints, config, 4)
    assert Checkpoints(RunFolder.open(place.address)).all_steps() == [2]
    checkpoints.close()


def test_the_environments_time_for_retries(monkeypatch):
    for text in ("soon", "nan", "-5", "inf"):
        monkeypatch.setenv(object_store.RETRY_VARIABLE, text)
        with pytest.raises(UserError, match=f"GIGAGAN_RETRY_SECONDS={text} is no number"):
            ObjectStore("gs://bucket/a")


def test_a_folder_with_leading_zeros_is_no_checkpoint(address):
    place = RunFolder.open(address)
    config, checkpoints = write_checkpoints(place, 2, 4)
    checkpoints.close()
    place.store.write_bytes("checkpoints/0004/junk", b"1")
    again = Checkpoints(RunFolder.open(address), config)
    assert again.all_steps() == [2, 4]
    assert again.restore_latest_valid(abstract())[0] == 4
    again.close()
    assert place.store.list_folders("checkpoints") == ["0004", "2", "4"]


def test_a_lock_that_somebody_deleted_is_written_again(google, tmp_path):
    store = ObjectStore(f"gs://bucket/{tmp_path.name}")
    lock = BucketLock(store, beat=0.1, takeover=5.0)
    lock.acquire()
    store.delete(["run.lock"])
    lock._refresh(1.0)
    lock.check()
    assert bucket_lock.read_run(store) == lock.run
