"""The same tasks by Apache Beam: the files of one machine, byte for byte."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.preparation.check import check
from gigagan_jax.preparation.convert import convert
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.stats import stats
from gigagan_jax.preparation.tasks import run_tasks

ROOT = Path(__file__).parents[2]
SIZE = 400

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="apache_beam is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Beam's own
]


def files_of(folder):
    """All files, what the conversion keeps for itself too."""
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def make(kind, out, **how):
    return convert(DigitsSource(), Output(str(out)), kind, shard_size=SIZE, quiet=True, **(how or {"workers": 1}))


@pytest.mark.parametrize("kind", ["tar", "folder", "arrayrecord"])
def test_beam_makes_the_files_of_one_machine(kind, tmp_path):
    done = make(kind, tmp_path / "beam", runner="DirectRunner")
    assert done == make(kind, tmp_path / "here")
    assert (done["examples"], done["shards"]) == (1797, 5)
    assert files_of(tmp_path / "beam") == files_of(tmp_path / "here")


def test_the_command_with_beams_flags_goes_on_where_one_machine_stopped(tmp_path):
    make("tar", tmp_path)
    whole = files_of(tmp_path)
    for number in (1, 3):
        (tmp_path / f"{number:05d}.tar").unlink()
        (tmp_path / ".convert" / "shards" / f"{number:06d}.json").unlink()
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
    now = (tmp_path / "00002.tar").stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_check_and_stats_find_the_same(tmp_path):
    digits = DigitsSource()
    say = lambda **how: check(digits, sample=700, seed=3, quiet=True, **how)
    assert say(runner="DirectRunner") == say(workers=1)
    for name, how in (("beam", {"runner": "DirectRunner"}), ("here", {"workers": 1})):
        stats(digits, tmp_path / f"{name}.html", title="digits", quiet=True, **how)
    assert (tmp_path / "beam.html").read_bytes() == (tmp_path / "here.html").read_bytes()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"runner": "NoRunner"}, "--runner=NoRunner: Apache Beam refuses: Unexpected pipeline runner: NoRunner"),
        ({"runner": "DirectRunner", "beam_args": ["--direct_num_workers=x"]}, "invalid int value: 'x'"),
    ],
)
def test_what_beam_refuses_is_one_line(how, words, tmp_path, capsys):
    with pytest.raises(UserError) as error:
        make("tar", tmp_path, **how)
    assert words in str(error.value)
    assert capsys.readouterr().err == ""


def refuse_odd(i):
    if i % 2:
        raise UserError(f"{i} is odd")
    return i


def test_a_users_error_arrives_as_its_line_and_is_not_kept(tmp_path):
    how = {"runner": "DirectRunner", "results": Output(str(tmp_path)), "title": "t", "quiet": True}
    with pytest.raises(UserError, match=r"^3 is odd$"):
        run_tasks(refuse_odd, [2, 3], **how)
    assert run_tasks(refuse_odd, [2, 4], **how) == [2, 4]


def test_other_machines_need_a_folder_that_all_see():
    with pytest.raises(UserError, match=r"--runner=FlinkRunner needs a folder that all its machines see.*--work"):
        check(DigitsSource(), runner="FlinkRunner", quiet=True)


def test_without_beam_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)  # as Python says that there is no such package
    with pytest.raises(UserError, match=r"pip install -e '.\[beam\]'"):
        make("tar", tmp_path, runner="DirectRunner")
