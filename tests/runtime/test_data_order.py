"""The shuffle: a permutation at every size, another for every key, the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from autopar.runtime.order import shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_index_goes_to_a_place_of_its_own(size):
    for key in (0, 1, 2**62 + 5):
        assert sorted(shuffled(np.arange(size), size, key).tolist()) == list(range(size))


def test_an_index_alone_goes_where_it_goes_among_others():
    whole = shuffled(np.arange(1000), 1000, 9)
    assert [int(shuffled(np.asarray([i]), 1000, 9)[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_keys_give_orders_that_look_independent():
    size = 2000
    orders = [shuffled(np.arange(size), size, key) for key in range(6)]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(np.arange(size), one)[0, 1]) < 0.08
        for other in orders[:i]:
            assert (one == other).sum() < 10 and abs(np.corrcoef(one, other)[0, 1]) < 0.08


def test_an_order_is_the_same_on_every_machine_and_needs_no_memory():
    assert shuffled(np.arange(10), 10, 42).tolist() == [0, 2, 8, 1, 7, 5, 6, 4, 9, 3]
    assert 0 <= int(shuffled(np.asarray([10**15]), 10**15 + 3, 1)[0]) < 10**15 + 3
