"""What is judged of a step: the measures against closed forms, and the monitor with its policies."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import get_config
from gigagan_jax.config import from_dict
from gigagan_jax.models.layers.resample import upsample
from gigagan_jax.training.batch import abstract_batch
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.health.monitor import HealthMonitor
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

BATCH = 16
MODULE = "generator/levels/1/to_rgb"


def tiny(**fields):
    """configs/digits.py:tiny with these settings of its health."""
    c = get_config("tiny")
    for name, value in fields.items():
        setattr(c.health, name, value)
    return from_dict(c)


@pytest.fixture(scope="module")
def networks():
    return Networks(tiny())


# ---------------------------------------------------------------- measures


def measures_of_d(config, real, fake, real_logit, fake_logit):
    n = len(real)
    exits = [np.full((n, 1), x, np.float32) for x in (0.0, 1.0, 2.0)]
    real_logits = [real_logit + 0 * x for x in exits]
    fake_logits = [fake_logit + 0 * x for x in exits]
    return step_statistics.measure_discriminator(config, real, fake, real_logits, fake_logits)[0]


def test_measures_of_the_discriminators_half():
    config, rng = tiny(), np.random.default_rng(0)
    real = rng.normal(size=(64, 8, 8, 3)).astype(np.float32)
    sure = measures_of_d(config, real, 0.5 * real, 20.0, -20.0)
    assert sure["health/d_gap"] == pytest.approx(1, abs=1e-6)
    assert sure["health/d_right_real"] == sure["health/d_right_fake"] == 1
    assert sure["health/diversity"] == pytest.approx(0.5, rel=1e-5)
    assert sure["health/exit/8"] == pytest.approx(20)
    lost = measures_of_d(config, real, np.broadcast_to(real[:1], real.shape), -1.0, -1.0)
    assert lost["health/d_gap"] == 0
    assert (lost["health/d_right_real"], lost["health/d_right_fake"]) == (0, 1)
    assert lost["health/diversity"] == pytest.approx(0, abs=1e-6)
    assert lost["health/diversity_low"] == pytest.approx(0, abs=1e-6)
    assert lost["health/exit/4"] == lost["health/exit/8"] == 0


def test_share_of_each_level():
    config, rng = tiny(), np.random.default_rng(0)
    low = rng.normal(size=(4, 4, 4, 3)).astype(np.float32)
    idle, _ = step_statistics.measure_generator(config, [jnp.asarray(low), upsample(jnp.asarray(low))])
    assert idle["health/level/4"] == pytest.approx(1)
    assert idle["health/level/8"] == pytest.approx(0, abs=1e-6)
    only, _ = step_statistics.measure_generator(
        config, [jnp.zeros((4, 4, 4, 3)), jnp.asarray(rng.normal(size=(4, 8, 8, 3)))]
    )
    assert only["health/level/4"] == 0
    assert only["health/level/8"] == pytest.approx(1)


def test_deviation_within_captions():
    """Images by the caption alone have none; images by z alone have as much as there is over all captions."""
    rng = np.random.default_rng(0)
    by_caption = rng.normal(size=(500, 8, 8, 3)).astype(np.float32)
    spread = jnp.std(by_caption, axis=0).mean()
    assert step_statistics.diversity_within_captions(by_caption, by_caption, spread) == 0
    other = rng.normal(size=by_caption.shape).astype(np.float32)
    assert step_statistics.diversity_within_captions(by_caption, other, spread) == pytest.approx(1, rel=0.01)


def test_sizes_of_an_update():
    params, updates = {"a": np.full((3, 4), 2.0), "b": np.full(4, 2.0)}, {"a": np.full((3, 4), 0.5), "b": np.zeros(4)}
    relative, rms = step_statistics.update_sizes(updates, params, 0.1)
    assert relative == pytest.approx(0.1 * math.sqrt(12 * 0.25) / math.sqrt(16 * 4))
    assert rms == pytest.approx(math.sqrt(12 * 0.25 / 16))


def test_bad_rows():
    features = np.zeros((6, 3, 2), np.float32)
    batch = {"image": np.zeros((6, 8, 8, 3), np.uint8), "features": features}
    clean = step_statistics.count_bad_rows(batch)
    assert (clean["bad/features"], clean["first/features"], bool(step_statistics.any_bad(clean))) == (0, -1, False)
    features[2, 1, 0], features[4, 0, 1] = np.inf, np.nan
    rows = step_statistics.count_bad_rows(batch)
    assert (rows["bad/features"], rows["first/features"]) == (2, 2)
    assert (rows["bad/image"], rows["first/image"], rows["bad/clip_text"]) == (0, -1, 0)
    assert step_statistics.any_bad(rows)


def test_every_parameter_belongs_to_a_module_that_is_watched(networks):
    p = step_statistics.HealthVector(networks)
    assert len(set(p.names)) == len(p.names)
    assert MODULE in p.modules["g"]
    assert {
        "discriminator/levels/0/down",
        "discriminator/levels/1/head",
        "discriminator/conditioner/transformer",
    } <= set(p.modules["d"])


def test_a_step_in_parts_has_the_same_vector():
    """Two micro-batches: what is kept of each part comes together again."""
    config = dataclasses.replace(tiny(), micro_batches=2)
    nets = Networks(config)
    step = TrainStep(nets)
    key = jax.eval_shape(lambda: jax.random.key(0))
    run = lambda state, batch, key: step(state, batch, key, with_r1=False)
    _, metrics = jax.eval_shape(run, nets.abstract(), abstract_batch(config), key)
    assert metrics["health"].shape == (len(step.health_vector.names),)
    assert all(x.shape == () for k, x in metrics.items() if k != "health")


# ---------------------------------------------------------------- the monitor


class Judge:
    """A monitor that is told values of a healthy step, but for those that are given."""

    def __init__(self, networks, **fields):
        self.probe = step_statistics.HealthVector(networks)
        self.monitor = HealthMonitor(tiny(**fields), self.probe.measures)
        self.step = 0
        good = {"d_gap": 0.5, "d_right_real": 0.8, "d_right_fake": 0.8, "spread_real": 0.5}
        self.healthy = dict.fromkeys(self.probe.names, 1.0)
        self.healthy |= {f"bad/{k}": 0.0 for k in step_statistics.INPUTS} | {
            f"first/{k}": -1.0 for k in step_statistics.INPUTS
        }
        self.healthy |= {f"health/{k}": v for k, v in good.items()}
        self.healthy |= {f"health/update/{net}": 1e-3 for net in "gd"} | {"loss/r1": math.nan}

    def __call__(self, steps=1, losses=dict, **values):
        found = []
        for _ in range(steps):
            self.step += 1
            entries = self.healthy | {k.replace("__", "/"): v for k, v in values.items()}
            vector = np.array([entries[name] for name in self.probe.names], np.float32)
            example = lambda row: f"digit {row}"
            found += self.monitor.observe(self.step, self.step * BATCH, self.probe.read(vector), losses, example)
        return found


SHORT = {"grace": 10, "window": 5, "patience": 20}


@pytest.mark.parametrize(
    "name, measure, value",
    [
        ("saturation", "d_gap", 0.999),
        ("collapse", "diversity", 0.1),
        ("collapse", "diversity_low", 0.1),
        ("collapse", "diversity_z", 0.01),
        ("levels", "level/4", 0.001),
        ("levels", "exit/8", 1e-5),
        ("updates", "direction/g", 1e-4),
        ("updates", "update/d", 0.5),
    ],
)
def test_a_mean_beyond_its_limit_is_found_once_and_again_after_it_recovered(networks, name, measure, value):
    judge = Judge(networks, **SHORT)
    bad = {f"health__{measure.replace('/', '__')}": value}
    assert judge(40) == []
    found = judge(60, **bad)
    assert [(f.name, f.module, f.action) for f in found] == [(name, measure, "warn")]
    assert found[0].value == pytest.approx(value, abs=0.02)
    assert found[0].threshold in dataclasses.asdict(judge.monitor.config.health).values()
    assert 60 <= found[0].step <= 95
    assert "for 20 steps; " in found[0].text
    assert judge(60) == []
    assert len(judge(60, **bad)) == 1


def test_what_is_short_or_early_or_off_is_no_finding(networks):
    judge = Judge(networks, **SHORT)
    assert judge(10, health__d_gap=1.0) == []  # in the grace at the start
    for _ in range(5):
        assert judge(15, health__d_gap=1.0) == []
        assert judge(15) == []
    quiet = Judge(networks, saturation="off", **SHORT)
    assert quiet(200, health__d_gap=1.0) == []
    assert quiet(200, health__d_gap=math.nan) == []  # of a batch in which nothing varies


def test_a_spike_of_the_penalty(networks):
    judge = Judge(networks, **SHORT)
    judge(10)
    assert judge(20, loss__r1=2.0) == []
    assert judge(1, loss__r1=30.0) == []
    (found,) = judge(1, loss__r1=100.0)
    assert (found.name, found.module, found.value) == ("penalty", "loss/r1", 100)
    assert found.threshold == pytest.approx(40)
    assert "50 times its median of 2" in found.text
    assert judge.monitor.log_values()["health/penalty"] == 50
    assert judge(1) == []


@pytest.mark.parametrize(
    "values, losses, where, words",
    [
        (
            {"applied/g": 0, MODULE: math.nan},
            {},
            MODULE,
            f"gradients of {MODULE}. G's half of the step was not applied",
        ),
        (
            {"applied/d": 0, "applied/g": 0, "bad/features": 2, "first/features": 5, MODULE: math.inf},
            {"loss/d": math.nan, "loss/g": 1.0},
            "features",
            "the caption embedding (features) of digit 5, number 5 of the batch and of 1 more; loss/d; gradients of",
        ),
        ({"applied/g": 0}, {"loss/clip": math.nan}, "loss/clip", "not finite: loss/clip. G's half"),
        ({"applied/g": 0}, {"loss/g": 1e38}, "grad_norm", "too large for float32. G's half"),
    ],
)
def test_what_is_not_finite_is_named(networks, values, losses, where, words):
    judge = Judge(networks)
    (found,) = judge(losses=lambda: losses, **values)
    assert (found.name, found.module, found.action, found.step) == ("nonfinite", where, "skip", 1)
    assert words in found.text
    assert judge.monitor.log_values()["health/skipped"] == 1


def test_policies_for_what_is_not_finite(networks):
    bad = {"applied/g": 0, MODULE: math.nan}
    actions = lambda found: [f.action for f in found]
    skip = Judge(networks, nonfinite="skip", max_skips=2)
    assert actions(skip(2, **bad) + skip(3) + skip(3, **bad)) == ["skip"] * 4 + ["stop"]
    back = Judge(networks, nonfinite="rollback", max_skips=1, max_rollbacks=2, rollback_lr=0.5)
    for scale in (0.5, 0.25):
        assert actions(back(2, **bad)) == ["skip", "rollback"]
        back.monitor.restore_after_rollback(None)
        assert back.monitor.lr_scale == scale
    assert actions(back(2, **bad)) == ["skip", "stop"]
    assert back.monitor.log_values() == {"health/skipped": 6, "health/rollbacks": 2, "health/lr_scale": 0.25}
    warn = Judge(networks, nonfinite="warn")
    assert actions(warn(100, **bad)) == ["warn"] * 7  # said at 1, 2, 4 ... 64 in a row
    assert warn.monitor.skipped == 100


def test_a_finding_may_ask_for_a_rollback(networks):
    judge = Judge(networks, collapse="rollback", max_rollbacks=1, **SHORT)
    judge(30)
    healthy = json.loads(json.dumps(judge.monitor.state()))
    (found,) = judge(40, health__diversity=0.0)
    assert found.action == "rollback"
    assert HealthMonitor.precedes_finding(healthy, found)
    assert not HealthMonitor.precedes_finding(judge.monitor.state(), found)
    judge.monitor.restore_after_rollback(healthy)
    assert HealthMonitor.precedes_finding(judge.monitor.state(), found)
    (found,) = judge(40, health__diversity=0.0)
    assert found.action == "stop"


def test_the_monitor_goes_on_from_its_state(networks):
    """Stopped anywhere, through JSON: the same findings in the same steps, and the same state at the end."""
    values = [
        {"health__d_gap": 0.9 + 0.1 * math.sin(i / 40), "loss__r1": 1.0 + 50.0 * (i % 37 == 0)}
        | ({"applied__g": 0.0} if i % 60 in (47, 48, 49, 50) else {})
        for i in range(300)
    ]
    whole, cut = Judge(networks, max_gap=0.95, **SHORT), Judge(networks, max_gap=0.95, **SHORT)
    expected = [f for v in values for f in whole(**v)]
    assert len({f.name for f in expected}) == 3
    assert any("number 4 of at most" in f.text for f in expected)  # in a row, over a restart before the third of them
    found = []
    for i, v in enumerate(values):
        if i % 7 == 0:
            state = json.loads(json.dumps(cut.monitor.state(), allow_nan=False))
            cut.monitor = HealthMonitor(cut.monitor.config, cut.probe.measures)
            cut.monitor.restore(state)
        found += cut(**v)
    assert found == expected
    assert cut.monitor.state() == whole.monitor.state()


def test_settings_that_cannot_be(refused):
    refused(lambda: tiny(collapse="skip"), "config.health.collapse='skip'", "'rollback'")
    refused(lambda: tiny(nonfinite="off"), "config.health.nonfinite='off'", "'skip'")
    refused(lambda: tiny(rollback_lr=0.0), "config.health.rollback_lr=0.0")
