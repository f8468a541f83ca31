"""Runs that earlier code began go on: workdirs of tests/fixtures, the table of migrations, parameters that were renamed."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.checkpoint.manager import Checkpoints, with_shardings
from gigagan_jax.checkpoint.workdir import open_workdir, with_original_settings
from gigagan_jax.config import Config, MeshConfig, flatten_fields, from_dict, parameter_renames, to_dict
from gigagan_jax.config.migrations import ADDED, FORMAT, REPLACED, upgrade_config, with_format
from gigagan_jax.inference.sampler import Sampler
from gigagan_jax.models.layers.equalized import Linear
from gigagan_jax.models.network import Network
from gigagan_jax.parallel import sharding
from gigagan_jax.training.state import Networks
from tests.quick import FLAGS

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
NAMES = ("digits", "attention")
PROMPTS = {"digits": ("a handwritten seven", "the digit 3"), "attention": ("part of a cat", "part of a temple")}
SEEDS, TRUNCATION = 4, 0.7


def opened(name):
    """(checkpoints, the newest step, its config, the mesh of one device, the abstract state) of a fixture."""
    checkpoints = Checkpoints(FIXTURES / name)
    step = checkpoints.latest_valid_step()
    config = checkpoints.read_config(step)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    networks = Networks(config)
    return checkpoints, step, config, mesh, with_shardings(networks.abstract(), networks.shardings(mesh))


def stored_state(name):
    """(config, mesh of one device, {"g_ema", "w_avg"}) of a fixture's checkpoint."""
    checkpoints, step, config, mesh, abstract = opened(name)
    part = checkpoints.restore_partial(step, {"g_ema": abstract.g_ema, "w_avg": abstract.w_avg})
    checkpoints.close()
    return config, mesh, part


@pytest.mark.parametrize("name", NAMES)
def test_an_earlier_run_samples_as_its_own_code_did(name):
    config, mesh, part = stored_state(name)
    sampler = Sampler(config, mesh)
    prompts = [p for p in PROMPTS[name] for _ in range(SEEDS)]
    seeds = [*range(SEEDS)] * len(PROMPTS[name])
    # The code of these runs had one value for both.
    images = sampler(part["g_ema"], part["w_avg"], prompts, seeds, truncation=TRUNCATION, global_truncation=TRUNCATION)
    files = sorted((FIXTURES / name / "samples").glob("*.png"))
    assert len(files) == len(images)
    kept = np.stack([np.asarray(Image.open(file).convert("RGB"), np.int32) for file in files])
    difference = np.abs(np.asarray(images, np.int32) - kept)
    assert difference.max() <= 1
    assert kept.std() > 5


@pytest.mark.parametrize("name", ["digits", pytest.param("attention", marks=pytest.mark.slow)])
def test_an_earlier_run_goes_on(name, tmp_path):
    """With the settings it was begun with; what it logs is what its own code logged."""
    workdir = tmp_path / "run"
    shutil.copytree(FIXTURES / name, workdir)
    command = [sys.executable, "-m", "gigagan_jax.train", f"--config={workdir / 'config.json'}", f"--workdir={workdir}"]
    environment = os.environ | {"XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [json.loads(line) for line in (FIXTURES / name / "next_metrics.jsonl").read_text().splitlines()]
    lines = {m["step"]: m for m in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())}
    assert expected
    for line in expected:
        for key, value in line.items():
            if key.startswith(("loss/", "logits/", "grad_norm/")) and (key != "loss/r1" or key in lines[line["step"]]):
                assert lines[line["step"]][key] == pytest.approx(value, rel=2e-3, abs=2e-4), (line["step"], key)
    assert json.loads((workdir / "config.json").read_text())["format"] == FORMAT


# ---------------------------------------------------------------- the table of migrations


def test_a_field_that_a_stored_config_lacks_is_what_its_code_did(tmp_path, caplog):
    """Not today's default: of that, the run says that it does not take it."""
    workdir = tmp_path / "run"
    shutil.copytree(FIXTURES / "digits", workdir)
    stored = json.loads((workdir / "config.json").read_text())
    del stored["loss"]["mismatch_group"], stored["health"], stored["mesh"]["slices"]
    stored["checkpoint"]["keep_period_kimg"] = 3.0
    (workdir / "config.json").write_text(json.dumps(stored))
    values, lacked = upgrade_config(stored, "x")
    assert from_dict(values).loss.mismatch_group == 0
    assert {"loss.mismatch_group", "health.nonfinite", "mesh.slices"} <= lacked.keys()
    asked = from_dict(upgrade_config(json.loads((FIXTURES / "digits" / "config.json").read_text()), "y")[0])
    assert asked.loss.mismatch_group != 0
    with caplog.at_level(logging.INFO):
        config = with_original_settings(workdir, asked)
    assert config == dataclasses.replace(asked, loss=dataclasses.replace(asked.loss, mismatch_group=0))
    assert "config.loss.mismatch_group stays 0" in caplog.text
    for _ in range(3):  # and at every later start
        open_workdir(workdir, config)
        assert with_original_settings(workdir, asked) == config
    assert cli.load_config(str(workdir / "config.json"), ()) == config
    assert with_original_settings(tmp_path / "other", asked) == asked


def test_a_field_that_took_the_place_of_another():
    """Its value says what the other's did; one that the other never had is reported."""
    placement = lambda **g: upgrade_config({"generator": g}, "x")[0]["generator"].get("attention_placement")
    assert placement(attention_every_block=False) == "last"
    assert placement(attention_every_block=True) == "every"
    values, lacked = upgrade_config({"generator": {"attention_every_block": 3}}, "x")
    assert values["generator"]["attention_every_block"] == 3
    assert "generator.attention_placement" not in lacked


def test_formats_that_are_none(refused, tmp_path):
    stored = with_format(to_dict(Config()))
    assert upgrade_config(stored, "x") == (to_dict(Config()), {})
    refused(
        lambda: upgrade_config(stored | {"format": FORMAT + 1}, "run/config.json"), "run/config.json", "newer version"
    )
    refused(lambda: upgrade_config(stored | {"format": "one"}, "run/config.json"), "format one")
    refused(lambda: upgrade_config([1], "run/config.json"), "holds no config")
    refused(
        lambda: upgrade_config(stored | {"begun_without": 5}, "run/config.json"), "run/config.json", "no list of names"
    )
    file = tmp_path / "config.json"
    file.write_text("{")
    refused(lambda: cli.load_config(str(file), ()), "not readable JSON")
    file.write_text(json.dumps(stored))
    assert cli.load_config(str(file), ("--config.seed=3",)).seed == 3


def test_every_field_is_in_the_first_format_or_in_the_table():
    """A new field: raise migrations.FORMAT, add a line to ADDED, and a line here only where a field is removed."""
    first = set((FIXTURES / "fields_of_format_1.txt").read_text().split())
    later = {name for came, name, _ in ADDED if came > 1} | {successor for _, _, successor, _ in REPLACED}
    assert not first & later
    now = flatten_fields(to_dict(Config())).keys()
    assert now <= first | later, f"no line in migrations.ADDED for {sorted(now - first - later)}"
    assert {name for came, name, _ in ADDED if came == 1} <= first
    assert max(came for came, *_ in ADDED) <= FORMAT


# ---------------------------------------------------------------- parameters that were renamed


class Before(nnx.Module):
    def __init__(self, rngs):
        self.old = nnx.List([Linear(3, 3, axes=("embed", "mlp"), rngs=rngs) for _ in range(2)])


class Now(nnx.Module):
    def __init__(self, rngs):
        self.levels = nnx.List([Linear(3, 3, axes=("embed", "mlp"), rngs=rngs) for _ in range(2)])


def test_a_renamed_parameter_starts_as_it_did(monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    rules = Config().rules

    def first(make):
        module = Network("generator", lambda rngs: make(rngs=rngs))
        return jax.tree.leaves(module.init(0, module.shardings(mesh, rules)))

    before = first(Before)
    assert any((a != b).any() for a, b in zip(before, first(Now), strict=True))
    monkeypatch.setattr(parameter_renames, "RENAMED", ((2, "generator", "levels", "old"),))
    for a, b in zip(before, first(Now), strict=True):
        np.testing.assert_array_equal(a, b)


def test_renames_go_there_and_back(monkeypatch):
    table = ((2, "generator", "levels/0", "entry/0"), (3, "generator", "levels/0/conv", "levels/0/conv0"))
    monkeypatch.setattr(parameter_renames, "RENAMED", table)
    now = {"levels": {0: {"conv": 1, "skip": 2}, 1: {"conv": 3}}}
    first = parameter_renames.to_paths_at_format("generator", now, 0)
    assert first == {"entry": {0: {"conv0": 1, "skip": 2}}, "levels": {1: {"conv": 3}}}
    assert parameter_renames.from_paths_at_format("generator", first, now, 0) == now
    assert parameter_renames.to_paths_at_format("generator", now, 2) == {
        "levels": {0: {"conv0": 1, "skip": 2}, 1: {"conv": 3}}
    }
    assert parameter_renames.to_paths_at_format("discriminator", now, 0) == now


def test_a_checkpoint_is_restored_under_new_names(monkeypatch):
    """As if `mapper` were the name of today for what the checkpoint has as `mapping`."""
    checkpoints, step, _, _, abstract = opened("digits")
    before, _ = checkpoints.restore(step, abstract)
    table = (*parameter_renames.RENAMED, (FORMAT + 1, "generator", "mapper", "mapping"))
    monkeypatch.setattr(parameter_renames, "RENAMED", table)

    def renamed(tree):
        return {("mapper" if k == "mapping" else k): v for k, v in tree.items()} if "mapping" in tree else tree

    is_dict = lambda x: isinstance(x, dict)
    rename = lambda part: jax.tree.map(lambda x: renamed(x) if is_dict(x) else x, part, is_leaf=is_dict)
    asked = abstract.replace(g=rename(abstract.g), g_ema=rename(abstract.g_ema))
    after, _ = checkpoints.restore(step, asked)
    assert "mapper" in after.g.params
    assert "mapping" not in after.g_ema
    jax.tree.map(np.testing.assert_array_equal, after, before.replace(g=rename(before.g), g_ema=rename(before.g_ema)))
    checkpoints.close()
    checkpoints = Checkpoints(FIXTURES / "digits")  # Orbax reads an item in one way only
    part = checkpoints.restore_partial(step, {"g_ema": asked.g_ema})
    jax.tree.map(np.testing.assert_array_equal, part["g_ema"], after.g_ema)
    checkpoints.close()


def in_first_places(parts):
    """Parts of a state with every parameter where the first format has it."""
    is_dict = lambda x: isinstance(x, dict)
    networks = {"g": "generator", "g_ema": "generator", "d": "discriminator"}

    def move(name, part):
        one = lambda x: parameter_renames.to_paths_at_format(networks[name], x, 0) if is_dict(x) else x
        return jax.tree.map(one, part, is_leaf=is_dict)

    return {k: move(k, x) if k in networks else x for k, x in parts.items()}


def test_a_state_from_before_there_was_a_vision_aided_network(tmp_path):
    """Checkpoints of then have no entry for it at all."""
    checkpoints, step, config, _, abstract = opened("digits")
    state, position = checkpoints.restore(step, abstract)
    checkpoints.close()
    assert state.v is None
    earlier = Checkpoints(tmp_path, config)
    then = in_first_places({k: x for k, x in vars(state).items() if k != "v"})
    earlier.save(step, then, position, config)
    earlier.close()
    file = tmp_path / "checkpoints" / str(step) / "config" / "metadata"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({k: x for k, x in values.items() if k not in ("format", "vision_aided", "v_optimizer")}))
    checkpoints = Checkpoints(tmp_path, config)
    restored, again = checkpoints.restore(step, abstract)
    assert again == position
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    checkpoints.save(step + 1, restored, again, config)  # and the run goes on in the same folder
    checkpoints.close()
