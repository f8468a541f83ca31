"""One run, killed with `kill -9` at random times: bit for bit the uninterrupted one, and little is done twice.

One kill in the default tier, five in the slow one; GIGAGAN_KILLS says how often there. 30 take about ten minutes on two cores.
"""

import json
import os
import random
import re
import signal
import time

import pytest

from gigagan_jax.checkpoint.manager import states_equal
from tests.runs import child, finished, log, read, saving, small

KILLS = int(os.environ.get("GIGAGAN_KILLS", "5"))  # of the slow tier
INTERVAL = 4  # steps between checkpoints

BEGUN = "compiling the train step"


def last_step(workdir):
    """Of metrics.jsonl, whose last line may be cut; 0 where there is none yet."""
    file = workdir / "metrics.jsonl"
    if not file.exists():
        return 0
    with open(file, "rb") as lines:
        lines.seek(max(0, file.stat().st_size - 5000))
        steps = re.findall(rb'^\{"step": (\d+),.*\}$', lines.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


@pytest.mark.parametrize("kills", [1, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_times_is_bit_exact(tmp_path, capsys, kills):
    """Parameters, both optimizers, EMA, w_avg and data position. Every other life waits for its saves."""
    steps = 3 * INTERVAL * kills
    flags = (f"--config.total_kimg={steps * 0.016}", f"--config.checkpoint_kimg={INTERVAL * 0.016}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert child(whole, *flags).wait(900) == 0, log(whole)
    rng = random.Random(0)
    folder = cut / "checkpoints"
    during_a_save, repeated = 0, {True: [], False: []}
    for kill in range(kills):
        waits = kill % 2 == 1
        start, lives = finished(folder), log(cut).count(BEGUN) if kill else 0
        process = child(cut, *flags, f"--config.checkpoint.wait={waits}")
        goal = start + rng.randint(1, 2 * INTERVAL - 1)
        in_save = kill % 3 == 0  # otherwise it is left to chance
        limit = time.monotonic() + 300
        # Until it has begun metrics.jsonl holds the steps of the life before.
        # The first life leaves a checkpoint, or all would start anew and nothing be resumed.
        while (
            log(cut).count(BEGUN) <= lives
            or last_step(cut) < goal
            or not finished(folder)
            or (in_save and not saving(folder))
        ):
            assert process.poll() is None, log(cut)
            assert time.monotonic() < limit, log(cut)
            time.sleep(0.003)
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, log(cut)
        during_a_save += saving(folder)
        done, kept = last_step(cut), finished(folder)
        repeated[waits].append(done - kept)  # by the next life
        # While a checkpoint is written training goes on, unless it was told to wait; not beyond the next one.
        assert done - kept <= (2 * INTERVAL if saving(folder) and not waits else INTERVAL)
    assert during_a_save
    assert child(cut, *flags).wait(900) == 0, log(cut)
    assert log(cut).count("start: initialising") == 1
    assert log(cut).count("resume: restoring") == kills
    (a, data_a), (b, data_b) = read(whole, small()), read(cut, small())
    assert int(a.step) == int(b.step) == steps
    assert states_equal(a, b)
    assert all(data_a[k] == data_b[k] for k in ("examples_seen", "seed", "source"))
    # The metrics file shows each step once, with the numbers of the uninterrupted run.
    losses = [
        [(m["step"], m["loss/g"]) for m in map(json.loads, (w / "metrics.jsonl").read_text().splitlines())]
        for w in (whole, cut)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps
    with capsys.disabled():
        most = {("waiting" if k else "not waiting"): max(v, default=0) for k, v in repeated.items()}
        print(f"\n{kills} kills, {during_a_save} during a save; steps repeated at most: {most}, interval {INTERVAL}")
