"""Config files that import others: from any working directory, without PYTHONPATH, and without a trace afterwards."""

import sys
import textwrap

import pytest

from gigagan_jax.cli.config_file import read_config_file
from gigagan_jax.core.errors import UserError


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return file


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    # What a config imported must not be found by a later test.
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_from_its_own_repository_and_from_beside_it(elsewhere):
    repository = elsewhere / "repo"
    write(repository / "pyproject.toml", "")
    write(repository / "settings_here" / "base.py", "def values():\n    return {'seed': 3}\n")
    write(repository / "settings_here" / "deep" / "sibling_of_it.py", "BATCH = 5\n")
    file = write(
        repository / "settings_here" / "deep" / "own.py",
        """
        from settings_here import base
        import sibling_of_it

        def get_config(arg=""):
            # A late import works as well.
            from settings_here.base import values
            return values() | {"batch_size": sibling_of_it.BATCH}
        """,
    )
    before = list(sys.path)
    values = read_config_file(str(file))
    assert (values.seed, values.batch_size) == (3, 5)
    assert sys.path == before
    failing = write(repository / "settings_here" / "bad.py", "import no_such_module_here\n")
    with pytest.raises(UserError, match="No module named 'no_such_module_here'"):
        read_config_file(str(failing))
    assert sys.path == before


def test_what_lies_beside_a_config_takes_no_module_of_pythons(elsewhere):
    write(elsewhere / "configs_there" / "graphlib.py", "raise ValueError('not this one')\n")
    file = write(elsewhere / "configs_there" / "own.py", "import graphlib\ndef get_config():\n    return {'seed': 1}\n")
    sys.modules.pop("graphlib", None)
    assert read_config_file(str(file)).seed == 1
