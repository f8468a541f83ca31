"""Every example comes once an epoch, with any number of hosts and worker processes, and across kills and resumes."""

import collections
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.data import sampling
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources.mixture import MixtureSource
from gigagan_jax.data.sources.tar import TarSource
from tests.data.streams import all_hosts, open_stream


@pytest.fixture(scope="module")
def photo_source(tars):
    """24 photographs in tars."""
    return TarSource(str(tars))


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("then", [1, 2, 4])
def test_an_epoch_is_the_data_set_across_a_resume_on_other_hosts(photo_source, first, then):
    """24 examples in batches of 4: stopped at a random point, resumed on another number of hosts."""
    # After one to four of the six batches of an epoch.
    stop = int(np.random.default_rng((first, then)).integers(1, 5))
    before, state = all_hosts(photo_source, first, stop, batch_size=4)
    rest, _ = all_hosts(photo_source, then, (24 - 4 * stop) // 4, state, batch_size=4)
    hosts = [*before, *rest]
    assert collections.Counter(i for host in hosts for i in host) == dict.fromkeys(range(24), 1)
    # Two hosts never read the same example.
    for shares in (before, rest):
        assert len({i for host in shares for i in host}) == sum(map(len, shares))


def test_seeds_give_orders(photo_source):
    orders = {seed: all_hosts(photo_source, 1, 3, seed=seed)[0][0] for seed in (0, 1, 2)}
    assert len({tuple(order) for order in orders.values()}) == 3
    assert all_hosts(photo_source, 1, 3, seed=1)[0][0] == orders[1]
    # A constant, not computed: the order must be the same on every machine.
    assert orders[0] == [18, 8, 16, 7, 20, 13, 1, 0, 19, 17, 10, 9, 21, 15, 3, 2, 11, 6, 12, 14, 4, 23, 22, 5]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_worker_processes_change_nothing(photo_source):
    """Five batches in this process; then two by one worker, and the other three by two workers from its state."""
    with open_stream(photo_source) as data:
        expected = [next(data) for _ in range(5)]
    with open_stream(photo_source, num_workers=1, num_threads=2) as data:
        for batch in expected[:2]:
            assert_same(next(data), batch)
        state = data.state()
    with open_stream(photo_source, num_workers=2, num_threads=0) as data:
        data.restore(state)
        for batch in expected[2:]:
            assert_same(next(data), batch)


def test_a_worker_that_is_killed_ends_the_run_in_one_line(photo_source):
    with open_stream(photo_source, num_workers=1) as data:
        next(data)
        for child in multiprocessing.active_children():
            # As the kernel does when memory runs out.
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="a process that reads the data was lost") as refused:
            # Batches that the worker had finished are delivered first.
            collections.deque(data, maxlen=1)
    assert "\n" not in str(refused.value)


TRAINING = """
import multiprocessing, sys, time
from gigagan_jax.data import pipeline
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.data.tokenizers import ByteTokenizer

if __name__ == "__main__":
    data = pipeline.build_pipeline(
        DigitsSource(), resolution=8, batch_size=8, seed=0, tokenizer=ByteTokenizer(40), num_workers=2, num_threads=1
    )
    next(data)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(100)
"""


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    script, root = tmp_path / "training.py", Path(__file__).parents[2]
    script.write_text(TRAINING)
    options = {"cwd": root, "env": os.environ | {"PYTHONPATH": str(root)}, "stdout": subprocess.PIPE, "text": True}
    with open(tmp_path / "log", "w") as log, subprocess.Popen([sys.executable, script], stderr=log, **options) as child:
        pids = [int(pid) for pid in child.stdout.readline().split()]
        # SIGKILL: the parent cannot tell its workers.
        child.kill()
    assert len(pids) == 2
    # Seconds.
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid):
    try:
        # Signal 0 tests for existence only. A zombie (Z) exists, but has ended.
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class BrokenMixture(MixtureSource):
    """A mixture in which some examples cannot be read."""

    def __init__(self, parts, bad):
        super().__init__(parts)
        self.bad = bad

    def read(self, i):
        if i in self.bad:
            raise BadExample("image_empty")
        return super().read(i)


def test_a_bad_example_of_a_mixture_is_replaced_within_its_part(photo_source):
    from gigagan_jax.data.sources.digits import DigitsSource

    # Equal weights: half of the stream comes from each part, however many of a part are bad.
    parts = [(1, photo_source), (1, DigitsSource())]
    options = {"max_bad_fraction": 1.0, "batch_size": 100}
    with open_stream(BrokenMixture(parts, set(range(1, 24))), **options) as data:
        seen = [int(i) for _ in range(10) for i in next(data)["index"]]
    assert collections.Counter(i < 24 for i in seen) == {True: 500, False: 500}
    assert {i for i in seen if i < 24} == {0}
    with (
        open_stream(BrokenMixture(parts, set(range(24))), **options) as data,
        pytest.raises(UserError, match="no readable example: all 24 are bad"),
    ):
        next(data)


def test_mixtures_keep_their_weights_and_see_each_example_once_an_epoch(photo_source, tmp_path):
    from gigagan_jax.data.sources.digits import DigitsSource

    mixed = MixtureSource([(3, photo_source), (1, DigitsSource())])
    drawn = mixed.shuffled_order(5)
    # Two blocks of 1,000 positions, each with three quarters photographs.
    stream = [drawn[k] for k in range(2000)]
    for block in (stream[:1000], stream[1000:]):
        assert sum(i < 24 for i in block) == 750
    photos = [i for i in stream if i < 24]
    for epoch in range(len(photos) // 24):
        assert sorted(photos[24 * epoch : 24 * epoch + 24]) == list(range(24))
    digits = [i for i in stream if i >= 24]
    assert len(set(digits)) == len(digits) == 500
    # Random access gives the same elements as iteration.
    assert [drawn[k] for k in (1999, 17, 1000)] == [stream[1999], stream[17], stream[1000]]
    assert mixed.name(3).startswith("0:")
    assert mixed.read(24 + 7).captions == DigitsSource().read(7).captions
    # 1e-6 of a block of 1,000 rounds to no example.
    with pytest.raises(UserError, match="less than one example"):
        MixtureSource([(1, photo_source), (1e-6, photo_source)]).shuffled_order(0)


@pytest.mark.parametrize("starts", [(0,), (8,), (20,), (24,), (40,), (8, 12), (20, 32)])
def test_another_order_from_a_position_on_is_still_every_example_once(photo_source, starts):
    """24 examples, three epochs; the order changes at each of `starts`; resumed on two hosts."""
    (whole,), _ = all_hosts(photo_source, 1, 18, batch_size=4)
    # Runs up to each start, then adds the reshuffle to the state, as a rollback does.
    state, seen = None, []
    for salt, start in enumerate(starts, 1):
        (some,), state = all_hosts(photo_source, 1, (start - len(seen)) // 4, state, batch_size=4)
        seen += some
        state = sampling.with_new_order(state, salt)
    (rest,), _ = all_hosts(photo_source, 1, (72 - len(seen)) // 4, state, batch_size=4)
    seen += rest
    # Nothing changes before the first reshuffle.
    assert seen[: starts[0]] == whole[: starts[0]]
    assert seen[starts[0] :] != whole[starts[0] :]
    for epoch in range(3):
        assert sorted(seen[24 * epoch : 24 * epoch + 24]) == list(range(24))
    # Resumed on two hosts from the last reshuffle: interleaved rows are the stream of one host.
    hosts, after = all_hosts(photo_source, 2, (72 - starts[-1]) // 4, state, batch_size=4)
    rows = [np.reshape(host, (-1, 2)) for host in hosts]
    assert np.concatenate(rows, axis=1).reshape(-1).tolist() == seen[starts[-1] :]
    assert after["reorders"] == [[start, salt] for salt, start in enumerate(starts, 1)]
    # Another salt gives another order.
    (other,), _ = all_hosts(photo_source, 1, 6, sampling.with_new_order(state, 9), batch_size=4)
    assert other != seen[starts[-1] : starts[-1] + 24]


def test_the_name_of_what_is_at_a_position(photo_source):
    with open_stream(photo_source) as data:
        names = [photo_source.name(int(i)) for i in next(data)["index"]]
        assert [data.example_name(k) for k in range(8)] == names
        data.restore(sampling.with_new_order(data.state(), 1))
        names = [photo_source.name(int(i)) for i in next(data)["index"]]
        assert [data.example_name(k) for k in range(8, 16)] == names
