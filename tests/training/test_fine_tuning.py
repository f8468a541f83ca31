"""New runs that start from weights: what is taken, what is said of the rest, and that nothing fits."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits
from gigagan_jax.checkpoint.manager import Checkpoints, states_equal
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.interop.initial_weights import open_initial_weights, path_in
from gigagan_jax.interop.weights import save_weights
from gigagan_jax.parallel import sharding
from gigagan_jax.training.fine_tuning import InitFrom, start_from
from gigagan_jax.training.state import Networks
from tests.runs import small
from tools import convert_checkpoint

PUBLISHED = Path(__file__).parents[2] / "docs" / "weights" / "digits"


def changed(state, seed):
    """A state of other values, as a run leaves it."""
    draw = np.random.default_rng(seed)

    def one(x):
        if not np.issubdtype(x.dtype, np.floating):
            return jax.device_put(np.full(x.shape, 7, x.dtype), x.sharding)
        return jax.device_put(draw.standard_normal(x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(one, state)


_NETWORKS = {}


def networks_of(config):
    """Traced once for all tests. A config has a dict, and no hash."""
    key = repr(config)
    if key not in _NETWORKS:
        _NETWORKS[key] = Networks(config)
    return _NETWORKS[key]


def mesh(devices=1):
    return sharding.make_mesh(MeshConfig(), jax.devices()[:devices])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(workdir, its state): one checkpoint, of step 7; not trained, and not to be written to."""
    workdir = tmp_path_factory.mktemp("fine") / "source"
    config = small()
    open_workdir(workdir, config)
    state = changed(networks_of(config).init(mesh()), 1)
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(7, state, {}, config, {"text": "x"})
    checkpoints.close()
    return workdir, state


def start(path, config, tmp_path, parts="g,d,averages", devices=1):
    networks = networks_of(config)
    return start_from(InitFrom.parse(str(path), parts), config, networks, mesh(devices), tmp_path, {})


def assert_counters_are_new(state):
    assert int(state.step) == int(state.images) == 0


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_of_a_run_of_the_same_config(source, tmp_path, caplog, devices):
    workdir, old = source
    with caplog.at_level(logging.INFO):
        new = start(workdir, small(), tmp_path, "g,d,ema,optimizer", devices)
    for part in ("g", "d", "g_ema", "w_avg"):
        assert states_equal(getattr(new, part), getattr(old, part)), part
    assert_counters_are_new(new)
    assert "G: 69 of 69 arrays (100.0 % of the parameters) taken" in caplog.text
    assert "the moments of D: taken" in caplog.text
    (line,) = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert (line["event"], line["source"], line["taken"]["G"]["of"]) == ("init", f"{workdir}, step 7", 69)
    # The state is donated to the step: no two of its arrays may be one.
    if devices == 1:
        assert len({x.unsafe_buffer_pointer() for x in jax.tree.leaves(new)}) == len(jax.tree.leaves(new))


@pytest.mark.slow
def test_moments_start_anew_by_default_and_where_arrays_do(source, tmp_path, caplog):
    workdir, old = source
    fresh = networks_of(small()).init(mesh())
    new = start(f"{workdir}/checkpoints/7", small(), tmp_path)
    assert states_equal(new.g.params, old.g.params)
    assert states_equal(new.g.opt, fresh.g.opt)
    # D's first layer of another width: one count corrects the bias of all its moments.
    other = small(discriminator__head_width=24)
    with caplog.at_level(logging.INFO):
        new = start(workdir, other, tmp_path, "g,d,averages,optimizer")
    assert states_equal(new.g.opt, old.g.opt)
    assert int(new.d.opt[0].count) == 0
    assert "the moments of D: start anew, since" in caplog.text
    assert "[1, 1, 1, 16, 16] there, [1, 1, 1, 16, 24] here" in caplog.text


@pytest.mark.slow
def test_parts(source, tmp_path):
    workdir, old = source
    fresh = networks_of(small()).init(mesh())
    new = start(workdir, small(), tmp_path, "g")
    # The average follows what was taken of G.
    assert states_equal(new.g_ema, old.g.params)
    assert states_equal(new.d, fresh.d)
    assert not np.asarray(new.w_avg).any()
    new = start(workdir, small(), tmp_path, "d")
    assert states_equal(new.g, fresh.g)
    assert states_equal(new.d.params, old.d.params)
    assert states_equal(new.g_ema, fresh.g_ema)
    with pytest.raises(UserError, match="unknown part 'text'; there are g, d, averages, optimizer"):
        InitFrom.parse("x", "g,text")


def larger():
    """The same at 16 px: one level above."""
    c = small()
    return dataclasses.replace(
        c,
        resolution=16,
        generator=dataclasses.replace(c.generator, blocks=(1, 1, 1), bank=(1, 2, 2), attention_depth=(0, 1, 0)),
        discriminator=dataclasses.replace(c.discriminator, blocks=(1, 1, 1), attention_depth=(0, 0, 0)),
        loss=dataclasses.replace(c.loss, level_weights=(1.0, 0.5, 0.25)),
    )


def test_levels_are_found_by_their_resolution(source, tmp_path, caplog):
    workdir, old = source
    with caplog.at_level(logging.INFO):
        new = start(workdir, larger(), tmp_path)
    # G counts its levels from 4 px up, D from the output image down.
    assert states_equal(new.g.params["levels"][1], old.g.params["levels"][1])
    assert states_equal(new.d.params["levels"][2], old.d.params["levels"][1])
    fresh = networks_of(larger()).init(mesh())
    assert states_equal(new.g.params["levels"][2], fresh.g.params["levels"][2])
    assert states_equal(new.g_ema["levels"][2], fresh.g_ema["levels"][2])
    assert states_equal(new.d.params["levels"][0], fresh.d.params["levels"][0])
    assert "that are not there (levels/2/" in caplog.text
    assert path_in(small(), larger(), "d", "levels/0/entry/bias") is None
    # And down again.
    assert path_in(larger(), small(), "d", "levels/0/entry/bias") == "levels/1/entry/bias"


def test_published_weights_give_g_and_its_average(tmp_path, caplog):
    config = from_dict(digits.get_config())
    with caplog.at_level(logging.INFO):
        new = start(PUBLISHED, config, tmp_path)
    assert states_equal(new.g.params, new.g_ema)
    assert np.asarray(new.w_avg).any()
    assert "the average of G: 88 of 88 arrays (100.0 % of the parameters) taken" in caplog.text
    assert f"D: starts anew ({PUBLISHED} has none)" in caplog.text
    assert "--config.g_optimizer.warmup_kimg" in caplog.text


@pytest.mark.slow
def test_weights_of_a_frozen_text_encoder_need_it_not(source, tmp_path):
    """Published weights of a model with CLIP's text: its folder is not known here."""
    _, old = source
    save_weights(tmp_path / "weights", small(), old.g_ema, old.w_avg, step=7, dtype=np.float32)
    file = tmp_path / "weights" / "config.json"
    values = json.loads(file.read_text())
    values["text"]["encoder"] = "clip"
    file.write_text(json.dumps(values))
    new = start(tmp_path / "weights", small(), tmp_path)
    assert states_equal(new.g.params, old.g_ema)
    # A new run that has one says where, which the weights do not.
    there = open_initial_weights(str(tmp_path / "weights"), small(text__path="clip"))
    assert there.arrays.shapes("g", "average")


def test_a_damaged_config_of_weights_is_one_line(tmp_path, refused):
    save_weights(tmp_path, small(), {"x": {"y": np.zeros(1)}}, np.zeros(1), step=7)
    (tmp_path / "config.json").write_text('{"format": 7, "loss": 3}')
    refused(lambda: open_initial_weights(str(tmp_path), small()), f"--init_from={tmp_path}", "config.loss")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pytorch", "safetensors"])
def test_a_converted_folder(source, tmp_path, form):
    workdir, old = source
    folder = tmp_path / "converted"
    convert_checkpoint.verb(
        [f"--to={form}", f"--workdir={workdir}", f"--out={folder}", "--what=optimizer", "--memory=1e-6"]
    )
    new = start(folder, small(), tmp_path, "g,d,averages,optimizer")
    for part in ("g", "d", "g_ema", "w_avg"):
        assert states_equal(getattr(new, part), getattr(old, part)), part
    assert_counters_are_new(new)


@pytest.mark.parametrize(
    "path, words",
    [
        ("nowhere/at/all", ("there is no such folder",)),
        ("empty", ("holds neither checkpoints nor model.safetensors",)),
        ("source/checkpoints/3", ("no checkpoint of step 3; there are: 7",)),
        (PUBLISHED.parent / "emoji_upsampler", ("nothing of it fits this config (G: starts anew",)),
    ],
)
def test_what_cannot_be_started_from(source, tmp_path, refused, path, words):
    (tmp_path / "empty").mkdir()
    path = Path(str(path).replace("source", str(source[0])))
    path = tmp_path / path if str(path) == "empty" else path
    refused(lambda: start(path, small(), tmp_path), f"--init_from={path}", *words)
