"""The small files of a run in a bucket: their parts, their scratch folder, and names that are none."""

import itertools
import json
import os
from pathlib import Path

import pytest

from gigagan_jax.checkpoint import mirror
from gigagan_jax.checkpoint.mirror import Mirror
from gigagan_jax.checkpoint.object_store import ObjectStore
from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.files import join_parts, part_names, read_json_lines, split_lines
from gigagan_jax.telemetry.metrics import MetricLogger
from tests.telemetry.test_metrics import read_events


def test_small_files(address, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "PART_BYTES", 120)
    store = ObjectStore(address)
    here = Mirror(store, tmp_path / "here")
    (tmp_path / "here/snapshots").mkdir(parents=True)
    log = tmp_path / "here/metrics.jsonl"
    lines = [json.dumps({"step": i, "x": "y" * 30}) + "\n" for i in range(10)]
    log.write_text("".join(lines))
    (tmp_path / "here/snapshots/a.png").write_bytes(b"image")
    (tmp_path / "here/half.tmp").write_bytes(b"")
    (tmp_path / "here/.hidden").write_bytes(b"")
    here.upload()
    parts = list(itertools.islice(part_names("metrics.jsonl"), 5))
    assert sorted(store.list_objects()) == [*parts, "snapshots/a.png"]
    # What is appended costs the last part, and what did not change nothing.
    before = {n: info.version for n, info in store.list_objects().items()}
    with log.open("a") as file:
        file.write('{"step": 10}\n')
    here.upload()
    after = {n: info.version for n, info in store.list_objects().items()}
    assert [n for n in after if after[n] != before.get(n)] == ["metrics.jsonl.4"]
    # Another machine has the whole file, and a rollback takes parts away.
    there = Mirror(store, tmp_path / "there")
    there.download(everything=True)
    assert (tmp_path / "there/metrics.jsonl").read_text() == log.read_text()
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["metrics.jsonl"]
    (tmp_path / "there/metrics.jsonl").write_text("".join(lines[:3]))
    there.upload()
    assert [n for n in sorted(store.list_objects()) if "jsonl" in n] == ["metrics.jsonl", "metrics.jsonl.1"]
    # A copy on a disk reads as one file.
    copy = tmp_path / "copy"
    store.download(store.list_objects(), copy)
    join_parts(copy)
    assert [line["step"] for line in read_json_lines(copy / "metrics.jsonl")] == [0, 1, 2]
    assert not (copy / "metrics.jsonl.1").exists()


def test_a_start_without_a_checkpoint_knows_of_events_before_it(google, tmp_path):
    store = ObjectStore(f"gs://bucket/{tmp_path.name}")
    store.write_bytes("tensorboard/events.1", b"1")
    here = Mirror(store, tmp_path / "here")
    here.download(everything=True)
    MetricLogger(tmp_path / "here").close()
    here.upload()
    # The purge of TensorBoard, which drops the steps of the start before.
    assert [e.step for e in read_events(tmp_path / "here") if e.HasField("session_log")] == [0]
    assert sorted(p.count("/") for p in store.list_objects("tensorboard")) == [0, 0]


def test_parts():
    lines = [b"%d\n" % i for i in range(100)]
    parts = split_lines(b"".join(lines), 50)
    assert b"".join(parts) == b"".join(lines)
    assert all(len(p) <= 50 and p.endswith(b"\n") for p in parts)
    # Only the last part changes while lines are appended.
    longer = split_lines(b"".join(lines) + b"more\n", 50)
    assert longer[: len(parts) - 1] == parts[:-1]
    assert split_lines(b"x" * 200 + b"\ny", 50) == [b"x" * 200 + b"\n", b"y"]
    assert split_lines(b"", 50) == [b""]


def test_joining_parts_may_stop_in_the_middle(tmp_path):
    for name, text in (("a.jsonl", "1\n"), ("a.jsonl.1", "2\n"), ("a.jsonl.2", "3\n"), ("b.jsonl", "4\n")):
        (tmp_path / name).write_text(text)
    join_parts(tmp_path)
    assert (tmp_path / "a.jsonl").read_text() == "1\n2\n3\n"
    # The parts were not yet removed.
    (tmp_path / "a.jsonl.1").write_text("2\n")
    (tmp_path / "a.jsonl.2").write_text("3\n")
    join_parts(tmp_path)
    assert (tmp_path / "a.jsonl").read_text() == "1\n2\n3\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_scratch_folders_of_killed_processes_go(google, tmp_path, monkeypatch):
    monkeypatch.setenv("GIGAGAN_SCRATCH", str(tmp_path))
    place = RunFolder.open("gs://bucket/scratch")
    stale = Path(str(place.folder).replace(f"-{os.getpid()}-", "-999999999-"))
    stale.mkdir()
    # Of another machine or container, where this number may be that of a live process.
    foreign = tmp_path / stale.name.replace(stale.name.split("-")[1], "0123456789abcdef")
    foreign.mkdir()
    other = RunFolder.open("gs://bucket/scratch")
    assert sorted(tmp_path.iterdir()) == sorted([place.folder, other.folder, foreign])


def test_names_that_leave_the_folder_are_passed_over(amazon, tmp_path):
    store = ObjectStore(f"s3://bucket/{tmp_path.name}")
    for name in ("config.json", f"/{tmp_path}/out", "../x", "a/../../x"):
        store._file_system(store.address).call_s3(
            "put_object", Bucket="bucket", Key=f"{tmp_path.name}/{name}", Body=b"1"
        )
    assert list(store.list_objects()) == ["config.json"]
    Mirror(store, tmp_path / "here").download(everything=True)
    assert [p.name for p in (tmp_path / "here").rglob("*")] == ["config.json"]


@pytest.mark.parametrize("lines", [15, 25])
def test_a_long_file_of_a_copy_is_cut_anew(google, tmp_path, monkeypatch, lines):
    monkeypatch.setattr(mirror, "PART_BYTES", 1000)
    store = ObjectStore(f"gs://bucket/{tmp_path.name}")
    row = lambda i: json.dumps({"step": i, "x": "y" * 80}) + "\n"
    store.write_bytes("metrics.jsonl", "".join(row(i) for i in range(lines)).encode())
    for start in range(3):
        here = tmp_path / str(start)
        copy = Mirror(store, here)
        copy.download(everything=True)
        with (here / "metrics.jsonl").open("a") as file:
            file.write(row(lines + start))
        copy.close()
    last = Mirror(store, tmp_path / "last")
    last.download(everything=True)
    steps = [line["step"] for line in read_json_lines(tmp_path / "last/metrics.jsonl")]
    assert steps == list(range(lines + 3))


def test_a_bucket_that_is_missing_is_one_line(amazon):
    place = RunFolder.open("s3://nobucket/run")
    (place.folder / "dry_run.json").write_text("{}")
    for act in (place.download_programs, place.download_logs, place.upload):
        with pytest.raises(UserError, match="there is no bucket s3://nobucket"):
            act()
