"""Every example once in an epoch, with any number of hosts and worker processes, and whatever is killed in between."""

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
from gigagan_jax.data import pipeline, sampling
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources.mixture import MixedSource
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def source(tars):
    return TarSource(str(tars))


def stream(source, batch_size=8, hosts=1, host=0, seed=0, **options):
    options = {"num_threads": 0, "crop": "random", "flip": True, "caption_dropout": 0.2} | options
    return pipeline.build(
        source, resolution=8, batch_size=batch_size, seed=seed, tokenizer=ByteTokenizer(40), process_index=host,
        process_count=hosts, **options,
    )  # fmt: skip


def all_hosts(source, hosts, batches, state=None, **options):
    """Indices of each host, and the state after so many global batches."""
    seen, states = [], []
    for host in range(hosts):
        with stream(source, hosts=hosts, host=host, **options) as data:
            if state is not None:
                data.restore(state)
            seen.append([int(i) for _ in range(batches) for i in next(data)["index"]])
            states.append(data.state())
    positions = {s["examples_seen"] for s in states}
    assert len(positions) == 1
    return seen, states[0]


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("then", [1, 2, 4])
def test_an_epoch_is_the_data_set_across_a_resume_on_other_hosts(source, first, then):
    """24 examples, batches of 2: stopped at a random point, gone on with another number of hosts and another batch size."""
    stop = int(np.random.default_rng((first, then)).integers(1, 5))
    before, state = all_hosts(source, first, stop, batch_size=4)
    rest, _ = all_hosts(source, then, (24 - 4 * stop) // 4, state, batch_size=4)
    hosts = [*before, *rest]
    assert collections.Counter(i for host in hosts for i in host) == dict.fromkeys(range(24), 1)
    for some in (before, rest):  # two hosts never see the same
        assert len({i for host in some for i in host}) == sum(map(len, some))


def test_seeds_give_orders(source):
    orders = {seed: all_hosts(source, 1, 3, seed=seed)[0][0] for seed in (0, 1, 2)}
    assert len({tuple(sampling) for order in orders.values()}) == 3
    assert all_hosts(source, 1, 3, seed=1)[0][0] == orders[1]
    # On any machine: written down here, not computed.
    assert orders[0] == [18, 8, 16, 7, 20, 13, 1, 0, 19, 17, 10, 9, 21, 15, 3, 2, 11, 6, 12, 14, 4, 23, 22, 5]


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_worker_processes_change_nothing(source):
    """Five batches by threads; then by one worker, killed with everything after two, and by two, from its state."""
    with stream(source) as data:
        expected = [next(data) for _ in range(5)]
    with stream(source, num_workers=1, num_threads=2) as data:
        for batch in expected[:2]:
            same(next(data), batch)
        state = data.state()
    with stream(source, num_workers=2, num_threads=0) as data:
        data.restore(state)
        for batch in expected[2:]:
            same(next(data), batch)


def test_a_worker_that_is_killed_ends_the_run_in_one_line(source):
    with stream(source, num_workers=1) as data:
        next(data)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="a process that reads the data was lost") as refused:
            collections.deque(data, maxlen=1)  # what it had read is delivered first
    assert "\n" not in str(refused.value)


TRAINING = """
import multiprocessing, sys, time
from gigagan_jax.data import order, pipeline
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.data.tokenizers import ByteTokenizer

if __name__ == "__main__":
    data = pipeline.build(
        DigitsSource(), resolution=8, batch_size=8, seed=0, tokenizer=ByteTokenizer(40), num_workers=2, num_threads=1
    )
    next(data)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(100)
"""


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    script, root = tmp_path / "training.py", Path(__file__).parents[2]
    script.write_text(TRAINING)
    how = {"cwd": root, "env": os.environ | {"PYTHONPATH": str(root)}, "stdout": subprocess.PIPE, "text": True}
    with open(tmp_path / "log", "w") as log, subprocess.Popen([sys.executable, script], stderr=log, **how) as child:
        pids = [int(pid) for pid in child.stdout.readline().split()]
        child.kill()
    assert len(pids) == 2
    end = time.monotonic() + 5
    while any(map(lives, pids)):
        assert time.monotonic() < end
        time.sleep(0.01)


def lives(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Broken(MixedSource):
    """A mixture of which some examples cannot be read."""

    def __init__(self, parts, bad):
        super().__init__(parts)
        self.bad = bad

    def read(self, i):
        if i in self.bad:
            raise BadExample("image_empty")
        return super().read(i)


def test_a_bad_example_of_a_mixture_is_replaced_within_its_part(source):
    from gigagan_jax.data.sources.digits import DigitsSource

    parts = [(1, source), (1, DigitsSource())]
    options = {"max_bad_fraction": 1.0, "batch_size": 100}
    with stream(Broken(parts, set(range(1, 24))), **options) as data:
        seen = [int(i) for _ in range(10) for i in next(data)["index"]]
    assert collections.Counter(i < 24 for i in seen) == {True: 500, False: 500}
    assert {i for i in seen if i < 24} == {0}
    with (
        stream(Broken(parts, set(range(24))), **options) as data,
        pytest.raises(UserError, match="no readable example: all 24 are bad"),
    ):
        next(data)


def test_mixtures_keep_their_weights_and_see_each_example_once_an_epoch(source, tmp_path):
    from gigagan_jax.data.sources.digits import DigitsSource

    mixed = MixedSource([(3, source), (1, DigitsSource())])
    drawn = mixed.shuffled(5)
    stream = [drawn[k] for k in range(2000)]
    for block in (stream[:1000], stream[1000:]):
        assert sum(i < 24 for i in block) == 750
    photos = [i for i in stream if i < 24]
    for epoch in range(len(photos) // 24):
        assert sorted(photos[24 * epoch : 24 * epoch + 24]) == list(range(24))
    digits = [i for i in stream if i >= 24]
    assert len(set(digits)) == len(digits) == 500
    assert [drawn[k] for k in (1999, 17, 1000)] == [stream[1999], stream[17], stream[1000]]
    assert mixed.name(3).startswith("0:")
    assert mixed.read(24 + 7).captions == DigitsSource().read(7).captions
    with pytest.raises(UserError, match="less than one example"):
        MixedSource([(1, source), (1e-6, source)]).shuffled(0)


@pytest.mark.parametrize("starts", [(0,), (8,), (20,), (24,), (40,), (8, 12), (20, 32)])
def test_another_order_from_a_position_on_is_still_every_example_once(source, starts):
    """24 examples, three epochs; the order changes at each of `starts`; resumed on two hosts."""
    (whole,), _ = all_hosts(source, 1, 18, batch_size=4)
    state, seen = None, []
    for salt, start in enumerate(starts, 1):
        (some,), state = all_hosts(source, 1, (start - len(seen)) // 4, state, batch_size=4)
        seen += some
        state = sampling.reordered(state, salt)
    (rest,), _ = all_hosts(source, 1, (72 - len(seen)) // 4, state, batch_size=4)
    seen += rest
    assert seen[: starts[0]] == whole[: starts[0]]
    assert seen[starts[0] :] != whole[starts[0] :]
    for epoch in range(3):
        assert sorted(seen[24 * epoch : 24 * epoch + 24]) == list(range(24))
    hosts, after = all_hosts(source, 2, (72 - starts[-1]) // 4, state, batch_size=4)
    rows = [np.reshape(host, (-1, 2)) for host in hosts]
    assert np.concatenate(rows, axis=1).reshape(-1).tolist() == seen[starts[-1] :]
    assert after["reorders"] == [[start, salt] for salt, start in enumerate(starts, 1)]
    (other,), _ = all_hosts(source, 1, 6, sampling.reordered(state, 9), batch_size=4)
    assert other != seen[starts[-1] : starts[-1] + 24]


def test_the_name_of_what_is_at_a_position(source):
    with stream(source) as data:
        names = [source.name(int(i)) for i in next(data)["index"]]
        assert [data.name(k) for k in range(8)] == names
        data.restore(sampling.reordered(data.state(), 1))
        names = [source.name(int(i)) for i in next(data)["index"]]
        assert [data.name(k) for k in range(8, 16)] == names
