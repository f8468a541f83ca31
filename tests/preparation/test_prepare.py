"""prepare_data.py: conversions, also interrupted and resumed, tasks, and the command line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import UNKNOWN_LABEL, Record
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.data.sources.folder import FolderSource
from gigagan_jax.preparation import shards
from gigagan_jax.preparation.convert import convert_source
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.tasks import _RecordingTask, run_tasks
from tests.broken_photos import BAD, COUNT, write_photos
from tools import prepare_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    """30 photographs with captions, of which three are damaged (BAD)."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def photo_source(photo_folder):
    return FolderSource(photo_folder)


@pytest.fixture(scope="module")
def photo_tars(photo_source, tmp_path_factory):
    """The photographs as tars of 8, written in this process."""
    out = tmp_path_factory.mktemp("tars") / "out"
    convert_source(photo_source, Output(str(out)), "tar", shard_size=8, workers=1, quiet=True)
    return out


def files_of(folder):
    """{relative path: bytes} of all files except hidden ones and indices."""
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    # An index of tars (gigagan_index) holds times of files, which differ.
    parts = {p.relative_to(folder): p for p in files}
    return {
        str(r): p.read_bytes() for r, p in parts.items() if not any(s.startswith((".", "gigagan_")) for s in r.parts)
    }


def open_source(path, captions="optional", **keys):
    return make_source(DataConfig(path=str(path), captions=captions, **keys), workers=1)


# ---------------------------------------------------------------- convert


def test_tars_are_in_the_layout_of_img2dataset(photo_source, photo_tars):
    with tarfile.open(photo_tars / "00001.tar") as tar:
        assert tar.getnames()[:3] == ["000010000.png", "000010000.txt", "000010000.json"]
        # No times and owners: two runs write the same bytes.
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}
        about = json.load(tar.extractfile("000010000.json"))
        assert tar.extractfile("000010000.txt").read().decode().split("\n") == list(photo_source.captions(8))
        image = tar.extractfile("000010000.png").read()
    assert image == photo_source.read(8).image
    width, height = Image.open(io.BytesIO(image)).size
    assert (about["width"], about["height"]) == (width, height)
    assert about["caption"] == photo_source.captions(8)[0]
    assert about["name"] == photo_source.name(8)
    assert "label" not in about


def test_tars_hold_what_the_folder_held(photo_source, photo_tars):
    found = open_source(photo_tars)
    good = [i for i in range(COUNT) if photo_source.name(i) not in ("007.jpg", "011.jpg")]
    # Only check_images finds truncated images.
    assert len(found) == len(good) == COUNT - 2
    for i, j in enumerate(good):
        a, b = found.read(i), photo_source.read(j)
        assert (a.image, a.captions, a.label) == (b.image, b.captions, UNKNOWN_LABEL)
    left_out = [json.loads(line) for line in (photo_tars / "left_out.jsonl").read_text().splitlines()]
    assert {bad["name"]: bad["cause"] for bad in left_out} == {n: c for n, c in BAD.items() if n != "023.jpg"}
    assert [bad["index"] for bad in left_out] == [7, 11]


def test_the_number_of_workers_changes_no_byte(photo_source, photo_tars, tmp_path):
    convert_source(photo_source, Output(str(tmp_path)), "tar", shard_size=8, workers=2, quiet=True)
    assert files_of(tmp_path) == files_of(photo_tars)


@pytest.mark.parametrize("kind", ["folder", "tar", "arrayrecord"])
def test_kinds_hold_the_same_examples(photo_source, kind, tmp_path):
    done = convert_source(
        photo_source, Output(str(tmp_path)), kind, shard_size=8, workers=1, check_images=True, name="photos", quiet=True
    )
    # check_images decodes, so all three damaged images are left out.
    assert done["examples"] == COUNT - 3
    assert done["shards"] == 4
    assert done["left_out"] == {"image_undecodable": 2, "image_empty": 1}
    found = open_source(tmp_path, source=kind)
    good = [i for i in range(COUNT) if photo_source.name(i) not in BAD]
    # By image: an ArrayRecord source has names of its own.
    images = {photo_source.read(i).image: photo_source.captions(i) for i in good}
    assert {r.image: r.captions for r in map(found.read, range(len(found)))} == images
    # Inside the first output, and so excluded below.
    again = tmp_path / "again"
    convert_source(
        photo_source, Output(str(again)), kind, shard_size=8, workers=2, check_images=True, name="photos", quiet=True
    )
    assert files_of(again) == {n: data for n, data in files_of(tmp_path).items() if not n.startswith("again")}


def test_pixels_and_labels_go_through_tars(tmp_path):
    digits = DigitsSource()
    # Pixels become PNG in the tars, without loss.
    convert_source(digits, Output(str(tmp_path)), "tar", shard_size=1000, workers=1, quiet=True)
    found = open_source(tmp_path)
    assert len(found) == len(digits)
    # The ends of both shards.
    for i in (0, 999, 1000, 1796):
        a, b = found[i], digits[i]
        np.testing.assert_array_equal(a.image, b.image)
        assert (a.captions, a.label) == (b.captions, b.label)


def test_back_and_forth_gives_the_same_tars(photo_tars, tmp_path):
    middle, end = tmp_path / "folder", tmp_path / "tars"
    convert_source(open_source(photo_tars), Output(str(middle)), "folder", shard_size=100, workers=1, quiet=True)
    convert_source(open_source(middle), Output(str(end)), "tar", shard_size=100, workers=1, quiet=True)
    read = lambda s: [(s.read(i).image, s.read(i).captions) for i in range(len(s))]
    assert read(open_source(end)) == read(open_source(photo_tars))


def test_formats_that_no_source_looks_for_become_png():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    # No source lists .tif files.
    Image.fromarray(pixels).save(file, "TIFF")
    image, suffix = shards.to_portable(Record(file.getvalue(), (), 0, "x"))
    assert suffix == ".png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), pixels)


def test_captions_with_line_breaks_stay_one_caption_each():
    item = shards.Item(
        "k", shards.encode_png(np.zeros((2, 3, 3), np.uint8)), ".png", Record(b"", ("a\r\n b", " ", "c\ud800"), 4, "n")
    )
    members = dict(item.member_files())
    # One line a caption; the lone surrogate becomes "?". The JSON keeps everything.
    assert members[".txt"] == b"a b\nc?"
    assert json.loads(members[".json"])["captions"] == ["a\r\n b", " ", "c\ud800"]
    assert members[".cls"] == b"4"


# Example 20 is in the third shard of 8.
KILLED = """
import os, signal, sys
from gigagan_jax.preparation.convert import convert_source
from gigagan_jax.preparation.output import Output
from gigagan_jax.data.sources.folder import FolderSource

class Dying(FolderSource):
    def read(self, i):
        if i == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(i)

convert_source(Dying(sys.argv[1]), Output(sys.argv[2]), sys.argv[3], shard_size=8, workers=1, quiet=True)
"""


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_killed_in_the_middle_it_goes_on(photo_folder, photo_source, kind, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    convert_source(photo_source, Output(str(whole)), kind, shard_size=8, workers=1, quiet=True)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, photo_folder, cut, kind], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    suffix = ".tar" if kind == "tar" else ""
    before = {name: (cut / name).stat() for name in (f"00000{suffix}", f"00001{suffix}")}
    assert not (cut / f"00002{suffix}").exists()
    convert_source(photo_source, Output(str(cut)), kind, shard_size=8, workers=1, quiet=True)
    assert files_of(cut) == files_of(whole)
    assert not (cut / ".scratch").exists()
    # Finished shards are the same files, not equal copies.
    same = lambda a, b: (a.st_ino, a.st_mtime_ns) == (b.st_ino, b.st_mtime_ns)
    assert all(same((cut / name).stat(), status) for name, status in before.items())


# Slow enough to be killed while both workers write; each worker leaves its process id.
SLOW = """
import os, sys, time
from pathlib import Path
from gigagan_jax.preparation.convert import convert_source
from gigagan_jax.preparation.output import Output
from gigagan_jax.data.sources.folder import FolderSource

class Slow(FolderSource):
    def read(self, i):
        Path(sys.argv[3], str(os.getpid())).touch()
        time.sleep(0.05)
        return super().read(i)

if __name__ == "__main__":
    convert_source(Slow(sys.argv[1]), Output(sys.argv[2]), "folder", shard_size=5, workers=2, quiet=True)
"""


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_of_a_killed_convert_end_and_take_nothing_from_the_next(photo_folder, photo_source, tmp_path):
    whole, cut, pids, script = (tmp_path / name for name in ("whole", "cut", "pids", "slow.py"))
    convert_source(photo_source, Output(str(whole)), "folder", shard_size=5, workers=1, quiet=True)
    pids.mkdir()
    script.write_text(SLOW)
    command, env = [sys.executable, script, photo_folder, cut, pids], os.environ | {"PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, cwd=ROOT, env=env, stderr=log) as child:
        wait_for(lambda: list(cut.glob("0000?")) and len(os.listdir(pids)) == 2, 60)
        # The running convert holds the lock.
        with pytest.raises(UserError, match="lock is held: another convert writes to this folder") as held:
            convert_source(photo_source, Output(str(cut)), "folder", shard_size=5, workers=1, quiet=True)
        assert "\n" not in str(held.value)
        # SIGKILL: the parent cannot tell its workers.
        child.kill()
    assert not (cut / "00005").exists()
    convert_source(photo_source, Output(str(cut)), "folder", shard_size=5, workers=1, quiet=True)
    wait_for(lambda: all(has_ended(int(pid)) for pid in os.listdir(pids)), 5)
    assert files_of(cut) == files_of(whole)
    assert not list(cut.glob(".scratch*"))


def has_ended(pid):
    """Whether a process has ended. A zombie (Z) has, although it still has a process id."""
    try:
        # Signal 0 tests for existence only.
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_files_lost_while_a_shard_is_written_are_noticed(photo_source, tmp_path, monkeypatch):
    write = shards.write_folder

    def lose_one(path, items):
        written = write(path, items)
        # As another process that clears the folder.
        next(path.iterdir()).unlink()
        return written

    monkeypatch.setattr(shards, "write_folder", lose_one)
    make = lambda: convert_source(photo_source, Output(str(tmp_path)), "folder", shard_size=100, workers=1, quiet=True)
    # 28 images with a caption file each.
    with pytest.raises(UserError, match=r"holds 55 files, .* bytes of the 56 files"):
        make()
    assert not (tmp_path / "00000").exists()
    # The same command completes the conversion.
    monkeypatch.undo()
    make()
    assert len(files_of(tmp_path / "00000")) == 56


def test_what_outlives_a_cleared_scratch_cannot_publish(tmp_path):
    out = Output(str(tmp_path))
    with pytest.raises(UserError, match="cannot be written"), out.scratch_folder() as folder:  # noqa: PT012
        (folder / "made").mkdir()
        out.clear_scratch()
        out.publish(folder / "made", "made")
    assert os.listdir(tmp_path) == []


def test_a_shard_that_is_gone_or_cut_is_made_again(photo_source, photo_tars, tmp_path):
    out = Output(str(tmp_path))
    make = lambda: convert_source(photo_source, out, "tar", shard_size=8, workers=1, quiet=True)
    first = make()
    (tmp_path / "00000.tar").unlink()
    os.truncate(tmp_path / "00002.tar", 1000)
    kept = (tmp_path / "00001.tar").stat().st_mtime_ns
    assert make() == first
    assert files_of(tmp_path) == files_of(photo_tars)
    assert (tmp_path / "00001.tar").stat().st_mtime_ns == kept


def test_an_address_takes_the_same_files(photo_source, photo_tars, tmp_path):
    """`local://` is fsspec's scheme for this disk: the code path of buckets, without a server."""
    # The second run finds all shards complete.
    for _ in range(2):
        convert_source(photo_source, Output(f"local://{tmp_path}/out"), "tar", shard_size=8, workers=2, quiet=True)
    assert files_of(tmp_path / "out") == files_of(photo_tars)
    convert_source(photo_source, Output(f"local://{tmp_path}/folder"), "folder", shard_size=8, workers=1, quiet=True)
    assert len(open_source(tmp_path / "folder")) == COUNT - 2


# ---------------------------------------------------------------- tasks


def refuse_odd(i):
    if i % 2:
        raise UserError(f"{i} is odd")
    return i


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_error_ends_the_tasks_and_is_not_kept(workers, tmp_path):
    kept = Output(str(tmp_path))
    with pytest.raises(UserError, match="1 is odd"):
        run_tasks(refuse_odd, [0, 1, 2, 4], workers=workers, results=kept, title="t", quiet=True)
    assert run_tasks(refuse_odd, [0, 6, 2, 4], workers=workers, results=kept, title="t", quiet=True) == [0, 6, 2, 4]
    # Without a results folder the error passes through memory.
    with pytest.raises(UserError, match="3 is odd"):
        run_tasks(refuse_odd, [0, 3], workers=workers, title="t", quiet=True)


def kill_worker(i):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_worker_is_one_line():
    with pytest.raises(UserError, match=r"counting: a worker process was lost.* fewer --workers") as lost:
        run_tasks(kill_worker, [0, 1], workers=2, title="counting", quiet=True)
    assert "\n" not in str(lost.value)


def test_a_late_error_takes_no_result_away(tmp_path):
    kept = Output(str(tmp_path))
    # A task of a killed run that fails after the next run has finished.
    late = _RecordingTask(refuse_odd, kept)
    assert run_tasks(refuse_odd, [8], workers=1, results=kept, title="t", quiet=True) == [8]
    assert late((0, 1)) == "1 is odd"
    assert run_tasks(refuse_odd, [1], workers=1, results=kept, title="t", quiet=True) == [8]


def test_kept_results_are_not_made_again(tmp_path):
    kept = Output(str(tmp_path))
    assert run_tasks(refuse_odd, [8, 4], workers=1, results=kept, title="t", quiet=True) == [8, 4]
    # Tasks with results do not run, so these items cannot fail.
    assert run_tasks(refuse_odd, [1, 3], workers=1, results=kept, title="t", quiet=True) == [8, 4]
    # A damaged result and an incomplete output run again.
    (tmp_path / "000000.json").write_text('{"resu')
    again = run_tasks(
        refuse_odd, [2, 6], workers=1, results=kept, is_complete=lambda item, result: result != 4, title="t", quiet=True
    )
    assert again == [2, 6]


# ---------------------------------------------------------------- the command line


def run_command(*args):
    """Runs the command in a process of its own."""
    command = [sys.executable, "tools/prepare_data.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_line_from_photos_to_records(photo_folder, tmp_path):
    # 3 of 30 are bad: exit code 1.
    done = run_command("check", f"--path={photo_folder}", f"--report={tmp_path}/bad.jsonl", "--workers=1")
    assert done.returncode == 1, done.stderr
    assert "NOT healthy: 10.0 % bad, 5.00 % allowed" in done.stdout
    converted = tmp_path / "tars"
    done = run_command(
        "convert", f"--path={photo_folder}", "--to=tar", f"--out={converted}", "--check_images", "--shard_size=10"
    )
    assert done.returncode == 0, done.stderr
    assert "27 examples in 3 shards" in done.stdout
    assert f"left out: 2 image_undecodable, 1 image_empty; each is named in {converted}/left_out.jsonl" in done.stdout
    done = run_command("index", f"--path={converted}", "--config.data.filters.min_width=40", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"width >= 40 +\d+", done.stdout)
    assert "27 examples in 3 tars" in done.stdout
    done = run_command(
        "stats", "--config=configs/laion.py:tiny", f"--path={converted}", f"--out={tmp_path}/page.html", "--sample=20"
    )
    assert done.returncode == 0, done.stderr
    assert "20 of 27 examples, 0 bad (0.0 %)" in done.stdout
    assert "a random sample of 20 examples" in (tmp_path / "page.html").read_text()


def test_index_says_what_needs_none(photo_folder, capsys):
    assert prepare_data.verb(["index", f"--path={photo_folder}"]) == 0
    assert "30 examples; data of this kind (folder) needs no index" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["check"], "what data? name it by --path=PATTERN or by --config=FILE.py"),
        (["check", "--path=/nowhere/at/all"], "/nowhere/at/all: there is nothing at this path"),
        (["check", "--path={photos}", "--sample=-3"], "'-3' is not a whole number"),
        (["check", "--path={photos}", "--report={photos}"], "cannot be written"),
        (["check", "--path={photos}", "--config.data.pth=x"], "pth"),
        (["check", "--path={photos}", "--nonsense"], "unknown argument --nonsense"),
        (["check", "--path={photos}", "--", "--parallelism=3"], "name its runner by --runner=DirectRunner"),
        (["check", "--path={photos}", "--config.data.filters.min_width=9"], "no metadata to filter by"),
        (["convert", "--path={photos}", "--to=zip", "--out=x"], "invalid choice: 'zip'"),
        (["convert", "--path={photos}", "--to=tar", "--out={photos}"], "holds other files (000.jpg)"),
        (["convert", "--path={photos}", "--to=tar", "--out={photos}/000.jpg/x"], "cannot be written: Not a directory"),
        (["convert", "--path={photos}", "--to=tar", "--out={tmp}", "--shard_size=0"], "at least 1 example"),
        (["convert", "--path={photos}", "--to=arrayrecord", "--out={tmp}", "--name=a b"], "no name for a data set"),
        (["convert", "--path={photos}", "--to=tar", "--out=nosuch://x"], "no file system is known for nosuch://"),
        (["embed", "--path={photos}", "--out=x"], "whose text encoder?"),
        (["polish", "--path={photos}"], "invalid choice: 'polish'"),
        ([], "required: TASK"),
    ],
)
def test_bad_input_is_one_line(args, words, photo_folder, tmp_path):
    with pytest.raises(UserError) as error:
        prepare_data.verb([a.format(photos=photo_folder, tmp=tmp_path) for a in args])
    assert words in str(error.value)


def test_another_conversion_is_not_mixed_in(photo_tars, photo_source):
    for change in ({"shard_size": 9}, {"check_images": True}):
        with pytest.raises(UserError, match=f"another conversion .other: {next(iter(change))}"):
            convert_source(photo_source, Output(str(photo_tars)), "tar", **{"shard_size": 8, "workers": 1, **change})
    with pytest.raises(UserError, match="other: source"):
        convert_source(DigitsSource(), Output(str(photo_tars)), "tar", shard_size=8)
