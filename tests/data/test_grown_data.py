"""The data set changes within a run: from the acceptance on each example comes once an epoch, across kills and hosts."""

import collections

import numpy as np
import pytest

from gigagan_jax.data import sampling
from gigagan_jax.data.sources.mixture import MixtureSource
from tests.data.small_source import SmallSource
from tests.data.test_exactly_once import all_hosts, open_stream


def stream(source, hosts, batches, state=None, accept=False, batch_size=4):
    """(indices of the global batches in their order, state after them)"""
    shares, state = all_hosts(source, hosts, batches, state, accept=accept, batch_size=batch_size)
    rows = [np.reshape(share, (batches, batch_size // hosts)) for share in shares]
    return np.concatenate(rows, axis=1).reshape(-1).tolist(), state


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("then", [1, 2, 4])
def test_an_epoch_of_the_grown_data_begins_at_the_acceptance(first, then):
    """24 examples, then 28: accepted in the middle of an epoch, killed before and after the first checkpoint behind it."""
    small, grown = SmallSource(24), SmallSource(28)
    _, state = stream(small, first, 4)
    seen, after = stream(grown, first, 21, state, accept=True)
    for epoch in range(3):
        assert collections.Counter(seen[28 * epoch : 28 * epoch + 28]) == dict.fromkeys(range(28), 1)
    # A kill before the first checkpoint with the new data: accepted again, from the same one.
    assert stream(grown, then, 21, state, accept=True)[0] == seen
    # A kill later: the same command accepts nothing any more, and neither flag nor hosts change what comes.
    _, middle = stream(grown, then, 5, state, accept=True)
    assert stream(grown, then, 16, middle, accept=True)[0] == seen[20:]
    again, end = stream(grown, first, 16, middle)
    assert again == seen[20:]
    # The counters of quarantine are those of one host.
    assert end | {"quarantine": {}} == after | {"quarantine": {}}
    assert end["earlier"] == [[small.identity(), 24, 16]]
    assert end["examples"] == 28


def test_any_number_of_later_acceptances():
    """24, 28, 24 again, 5: a data set that comes back has another order, and each epoch is whole."""
    _, state = stream(SmallSource(24), 1, 6)
    orders = {}
    for n in (28, 24, 5, 24):
        seen, state = stream(SmallSource(n), 1, n, state, accept=True)
        for epoch in range(4):
            assert sorted(seen[n * epoch : n * epoch + n]) == list(range(n))
        orders.setdefault(n, []).append(seen)
    assert orders[24][0] != orders[24][1]
    assert [n for _, n, _ in state["earlier"]] == [24, 28, 24, 5]
    assert [end for _, _, end in state["earlier"]] == [24, 24 + 4 * 28, 24 + 4 * 52, 24 + 4 * 57]
    # What is drawn for an example belongs to its position: nothing of it repeats, and a resume draws the same.
    with open_stream(SmallSource(24), batch_size=4) as data:
        assert not data.restore(state)
        expected = next(data)
        data.restore(state)
        np.testing.assert_array_equal(next(data)["image"], expected["image"])
        name = data.example_name(state["examples_seen"])
        assert name == f"small/{expected['index'][0]}"


def test_rollbacks_before_and_behind_an_acceptance():
    small, grown = SmallSource(24), SmallSource(28)
    _, early = stream(small, 1, 2)
    _, later = stream(grown, 1, 3, early, accept=True)
    # Behind it: the reshuffle permutes what is left of the epoch over the new data.
    seen, _ = stream(grown, 1, 4, later | {"reorders": [[20, 1]]})
    plain, _ = stream(grown, 1, 4, later)
    assert seen != plain
    assert sorted(seen) == sorted(plain)
    with open_stream(grown, batch_size=4) as data:
        # The run was resumed without the flag; the checkpoint before is of data that it once accepted.
        assert not data.restore(later)
        assert data.restore(sampling.with_new_order(early, 1))
        rolled = [int(i) for _ in range(7) for i in next(data)["index"]]
        assert sorted(rolled) == list(range(28))
        # Another order than the first time.
        assert rolled != stream(grown, 1, 7, early, accept=True)[0]


def test_without_the_flag_the_refusal_names_the_numbers(refused):
    _, state = stream(SmallSource(24), 1, 2)
    with open_stream(SmallSource(28), batch_size=4) as data:
        before = data.state()
        refused(lambda: data.restore(state), "24 -> 28 examples", "--accept=data", "start a new run")
        # A state of before has no number of examples.
        old = {k: v for k, v in state.items() if k != "examples"}
        refused(lambda: data.restore(old), "? -> 28 examples")
        # The flag is no way to another seed.
        refused(lambda: data.restore(state | {"seed": 3}, accept_data=True), "seed=3")
        assert data.state() == before


def test_a_part_of_a_mixture_grows():
    mixture = MixtureSource([(3, SmallSource(28)), (1, SmallSource(5))])
    order = sampling.order_of_stream(mixture.shuffled_order, len(mixture), 0, [16], [])
    seen = [order[k] for k in range(16, 1016)]
    # The first block of the mixture begins at the acceptance: its shares are exact, and each part's epochs whole.
    assert collections.Counter(i >= 28 for i in seen) == {False: 750, True: 250}
    assert sorted([i for i in seen if i < 28][:28]) == list(range(28))
    with pytest.raises(IndexError, match="before position 16"):
        order[15]
