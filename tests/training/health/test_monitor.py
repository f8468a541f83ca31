"""What is judged of the steps: the findings of the monitor, its policies and its state."""

import dataclasses
import json
import math

import numpy as np
import pytest

from configs.digits import get_config
from gigagan_jax.config import from_dict
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.health.monitor import HealthMonitor
from gigagan_jax.training.state import Networks

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


class Judge:
    """A monitor that is told values of a healthy step, but for those that are given."""

    def __init__(self, networks, **fields):
        self.probe = step_statistics.HealthVector(networks)
        self.monitor = HealthMonitor(tiny(**fields), self.probe.measures)
        self.step = 0
        good = {"d_gap": 0.5, "d_gap/4": 0.5, "d_right_real": 0.8, "d_right_fake": 0.8, "spread_real": 0.5}
        self.healthy = dict.fromkeys(self.probe.names, 1.0)
        self.healthy |= {f"bad/{k}": 0.0 for k in step_statistics.INPUTS} | {
            f"first/{k}": -1.0 for k in step_statistics.INPUTS
        }
        self.healthy |= {f"health/{k}": v for k, v in good.items()}
        self.healthy |= {f"health/update/{net}": 1e-3 for net in "gd"}
        self.healthy |= dict.fromkeys(step_statistics.r1_measures(self.monitor.config), math.nan)

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
R1 = {"loss__r1": 2.0, "r1__last_exit": 2.0, "r1__cosine__8": 0.3}


def go_lazily(judge, readings, **values):
    """So many steps with R1, each the first of an interval; returns the findings."""
    interval = judge.monitor.config.loss.r1_interval
    return [f for _ in range(readings) for f in judge(1, **(R1 | values)) + judge(interval - 1)]


def continued(judge):
    """The judge with another monitor, which has the state of the first, through JSON."""
    state = json.loads(json.dumps(judge.monitor.state(), allow_nan=False))
    judge.monitor = HealthMonitor(judge.monitor.config, judge.probe.measures)
    judge.monitor.restore(state)
    return judge


@pytest.mark.parametrize(
    "name, measure, value",
    [
        ("saturation", "d_gap", 0.999),
        ("saturation", "d_gap/4", 0.999),
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


# With window 100, patience 500 and R1 in each 16th step: 8 readings and 32.
LAZY = {"grace": 0, "window": 100, "patience": 500, "penalty": "off"}


@pytest.mark.parametrize(
    "bad, module, threshold, words",
    [
        ({"r1__cosine__8": -0.9}, "r1/cosine/8", -0.5, "by images of 8 px cancel each other (cosine -0.90)"),
        # Paid: 0.1 of the last exit's own.
        ({"r1__last_exit": 20.0}, "r1_ratio", 0.5, "R1 is 0.10 of what D's last exit alone would pay"),
    ],
)
def test_exits_that_pay_for_each_other(networks, bad, module, threshold, words):
    judge = Judge(networks, **LAZY)
    assert judge.monitor.config.loss.r1_interval == 16
    # The mean is full after 8 readings, and the eighth is the first that counts.
    assert go_lazily(judge, 7 + 31, **bad) == []
    (found,) = go_lazily(continued(judge), 1, **bad)
    assert (found.name, found.module, found.threshold, found.action) == ("evasion", module, threshold, "warn")
    assert f"{words}, less than {threshold:g} for 512 steps; " in found.text
    assert 'config.loss.r1_exits="signs"' in found.text
    assert go_lazily(judge, 60, **bad) == []
    assert go_lazily(judge, 60) == []
    # Means of R1 are of readings, and not of steps: eight of them are more than gone after sixty.
    assert len(go_lazily(judge, 60, **bad)) == 1
    off = Judge(networks, evasion="off", **LAZY)
    assert go_lazily(off, 60, **bad) == []


def test_the_ratio_of_r1_is_logged(networks):
    judge = Judge(networks, **LAZY)
    assert "health/r1_ratio" not in judge.monitor.log_values()
    go_lazily(judge, 1, r1__last_exit=8.0)
    go_lazily(judge, 1)
    # Of the running mean, also in a step without R1, and in a process that has just begun.
    assert continued(judge).monitor.log_values()["health/r1_ratio"] == pytest.approx((0.25 + 1) / 2)
    go_lazily(judge, 1, r1__last_exit=0.0)
    assert judge.monitor.log_values()["health/r1_ratio"] == pytest.approx((0.25 + 1) / 2)


def gradient(judge, net, norm):
    """Entries of a step in which a network's gradient has this norm."""
    names = judge.probe.modules[net]
    return dict.fromkeys(names, norm**2 / len(names))


def test_gradients_that_grow(networks):
    judge = Judge(networks, **SHORT)
    # The grace, then a full window and `patience` steps: the level that later ones are compared with.
    judge(10 + 4 + 19, **gradient(judge, "g", 2.0))
    assert "health/drift/g" not in judge.monitor.log_values()
    judge(1, **gradient(judge, "g", 2.0))
    assert judge.monitor.log_values()["health/drift/g"] == pytest.approx(1, rel=1e-5)
    assert judge(100, **gradient(judge, "g", 18.0)) == []
    assert judge.monitor.log_values()["health/drift/g"] == pytest.approx(9, rel=1e-5)
    assert judge(19, **gradient(judge, "g", 50.0)) == []
    (found,) = continued(judge)(1, **gradient(judge, "g", 50.0))
    assert (found.name, found.module, found.threshold, found.action) == ("drift", "drift/g", 10.0, "warn")
    assert found.value == pytest.approx(25 * math.exp(-(0.8**20) * math.log(25 / 9)), rel=1e-5)
    words = "the gradient norm of G is 24.7 times the lowest level that it kept, more than 10 for 20 steps; "
    assert words in found.text
    assert judge.monitor.log_values()["health/drift/d"] == pytest.approx(1, rel=1e-5)
    assert judge(60, **gradient(judge, "g", 50.0)) == []
    off = Judge(networks, drift="off", **SHORT)
    assert off(40, **gradient(off, "g", 2.0)) + off(100, **gradient(off, "g", 50.0)) == []
    assert not any("drift" in name for name in off.monitor.log_values())


def test_steps_with_lazy_r1_are_no_drift_of_d(networks):
    """D's gradient holds R1 then, by a weight that may grow."""
    judge = Judge(networks, **SHORT)
    r1 = R1 | gradient(judge, "d", 1e4)
    found = [f for _ in range(40) for f in judge(1, **r1) + judge(1, **gradient(judge, "d", 1.0))]
    assert found == []
    assert judge.monitor.log_values()["health/drift/d"] == pytest.approx(1, rel=1e-5)
    # Where every step has R1, D's norm has it always.
    always = Judge(networks, **SHORT)
    always.monitor.config = dataclasses.replace(
        always.monitor.config, loss=dataclasses.replace(always.monitor.config.loss, r1_interval=1)
    )
    always(60, **(R1 | gradient(always, "d", 1.0)))
    assert len(always(60, **(R1 | gradient(always, "d", 30.0)))) == 1


def test_a_saturated_d_sets_no_level_for_drift(networks):
    """Its gradients are small as long as it is sure of everything."""
    judge = Judge(networks, **SHORT)
    judge(60, **gradient(judge, "d", 5.0))
    judge(8, health__d_gap=1.0)
    judge(200, health__d_gap=1.0, **gradient(judge, "d", 0.01))
    assert judge(100, **gradient(judge, "d", 5.0)) == []
    # The mean, which follows, is below its level for a while after D is sure of everything.
    assert judge.monitor.log_values()["health/drift/d"] == pytest.approx(1, rel=0.1)
    # The same with a D that is not sure: it learned less for a while, and learns more again.
    judge = Judge(networks, **SHORT)
    judge(60, **gradient(judge, "d", 5.0))
    judge(200, **gradient(judge, "d", 0.01))
    assert [f.module for f in judge(100, **gradient(judge, "d", 5.0))] == ["drift/d"]


def test_a_checkpoint_from_before_a_measure(networks):
    """Its state lacks the reference: that begins with the first steps after it."""
    judge = Judge(networks, **SHORT)
    judge(60, **gradient(judge, "g", 2.0))
    state = judge.monitor.state()
    del state["drift"]
    judge.monitor.restore(state)
    assert "health/drift/g" not in judge.monitor.log_values()
    judge(24, **gradient(judge, "g", 50.0))
    assert judge.monitor.log_values()["health/drift/g"] == pytest.approx(1, rel=1e-5)


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
        {"health__d_gap": 0.9 + 0.1 * math.sin(i / 40), "loss__r1": 1.0 + 50.0 * (i % 37 == 0), "r1__last_exit": 5.0}
        | {MODULE: math.exp(i / 30)}
        | ({"applied__g": 0.0} if i % 60 in (47, 48, 49, 50) else {})
        for i in range(300)
    ]
    whole, cut = Judge(networks, max_gap=0.95, **SHORT), Judge(networks, max_gap=0.95, **SHORT)
    expected = [f for v in values for f in whole(**v)]
    assert {f.name for f in expected} == {"saturation", "penalty", "evasion", "drift", "nonfinite"}
    assert any("number 4 of at most" in f.text for f in expected)  # in a row, over a restart before the third of them
    found = []
    for i, v in enumerate(values):
        if i % 7 == 0:
            continued(cut)
        found += cut(**v)
    assert found == expected
    assert cut.monitor.state() == whole.monitor.state()


def test_settings_that_cannot_be(refused):
    refused(lambda: tiny(collapse="skip"), "config.health.collapse='skip'", "'rollback'")
    refused(lambda: tiny(evasion="skip"), "config.health.evasion='skip'", "'rollback'")
    refused(lambda: tiny(drift="skip"), "config.health.drift='skip'", "'rollback'")
    refused(lambda: tiny(nonfinite="off"), "config.health.nonfinite='off'", "'skip'")
    refused(lambda: tiny(rollback_lr=0.0), "config.health.rollback_lr=0.0")
