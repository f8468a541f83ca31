"""The same tasks on Apache Beam give the same files as on one machine, byte for byte."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.preparation.check import check_source
from gigagan_jax.preparation.convert import convert_source
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.stats import write_stats
from gigagan_jax.preparation.tasks import run_tasks

ROOT = Path(__file__).parents[2]
# Examples of a shard: the 1,797 digits become five.
SIZE = 400

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="apache_beam is not installed"),
    # Beam's dependencies warn.
    pytest.mark.filterwarnings("ignore"),
]


def files_of(folder):
    """{relative path: bytes} of all files, the conversion's own records included."""
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def convert_digits(kind, out, **options):
    options = options or {"workers": 1}
    return convert_source(DigitsSource(), Output(str(out)), kind, shard_size=SIZE, quiet=True, **options)


@pytest.mark.parametrize("kind", ["tar", "folder", "arrayrecord"])
def test_beam_makes_the_files_of_one_machine(kind, tmp_path):
    done = convert_digits(kind, tmp_path / "beam", runner="DirectRunner")
    assert done == convert_digits(kind, tmp_path / "here")
    assert (done["examples"], done["shards"]) == (1797, 5)
    assert files_of(tmp_path / "beam") == files_of(tmp_path / "here")


def test_the_command_with_beams_flags_goes_on_where_one_machine_stopped(tmp_path):
    convert_digits("tar", tmp_path)
    whole = files_of(tmp_path)
    # Two shards are lost, with their results.
    for number in (1, 3):
        (tmp_path / f"{number:05d}.tar").unlink()
        (tmp_path / ".convert" / "shards" / f"{number:06d}.json").unlink()
    # Not lost, so Beam must leave it alone.
    kept = (tmp_path / "00002.tar").stat()
    command = [sys.executable, "tools/prepare_data.py", "convert", "--config.data.source=digits", "--to=tar"]
    command += [f"--out={tmp_path}", f"--shard_size={SIZE}", "--runner=DirectRunner"]
    command += ["--", "--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1797 examples in 5 shards" in done.stdout
    assert "converting to tar: 3 of 5 were done before" in done.stderr
    assert "converting to tar: 2 tasks by Apache Beam's DirectRunner" in done.stderr
    assert files_of(tmp_path) == whole
    # A kept shard is the same file, not an equal copy.
    now = (tmp_path / "00002.tar").stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_check_and_stats_find_the_same(tmp_path):
    digits = DigitsSource()
    # Two tasks of 500 at most: their counts are merged.
    check = lambda **options: check_source(digits, sample=700, seed=3, quiet=True, **options)
    assert check(runner="DirectRunner") == check(workers=1)
    for name, options in (("beam", {"runner": "DirectRunner"}), ("here", {"workers": 1})):
        write_stats(digits, tmp_path / f"{name}.html", title="digits", quiet=True, **options)
    assert (tmp_path / "beam.html").read_bytes() == (tmp_path / "here.html").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runner": "NoRunner"}, "--runner=NoRunner: Apache Beam refuses: Unexpected pipeline runner: NoRunner"),
        ({"runner": "DirectRunner", "beam_args": ["--direct_num_workers=x"]}, "invalid int value: 'x'"),
    ],
)
def test_what_beam_refuses_is_one_line(options, words, tmp_path, capsys):
    with pytest.raises(UserError) as error:
        convert_digits("tar", tmp_path, **options)
    assert words in str(error.value)
    # Beam's argparse prints its usage, which must not reach the terminal.
    assert capsys.readouterr().err == ""


def refuse_odd(i):
    if i % 2:
        raise UserError(f"{i} is odd")
    return i


def test_a_users_error_arrives_as_its_line_and_is_not_kept(tmp_path):
    options = {"runner": "DirectRunner", "results": Output(str(tmp_path)), "title": "t", "quiet": True}
    with pytest.raises(UserError, match=r"^3 is odd$"):
        run_tasks(refuse_odd, [2, 3], **options)
    # The failed task has no result, so it runs again.
    assert run_tasks(refuse_odd, [2, 4], **options) == [2, 4]


def test_other_machines_need_a_folder_that_all_see():
    with pytest.raises(UserError, match=r"--runner=FlinkRunner needs a folder that all its machines see.*--work"):
        check_source(DigitsSource(), runner="FlinkRunner", quiet=True)


def test_without_beam_its_extra_is_named(tmp_path, monkeypatch):
    # None makes the import raise ImportError.
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[beam\]'"):
        convert_digits("tar", tmp_path, runner="DirectRunner")
