"""Placement: llama.cpp's rule for layers, and the split that fills the fullest device least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gleaner import placement

MEMORIES = st.integers(1, 200_000)


def counts_of(places: Sequence[int], devices: int) -> list[int]:
    return [list(places).count(device) for device in range(devices)]


# What llama-fit-params logged (llama.cpp 0c1e570), over RPC servers.
@pytest.mark.parametrize(
    ("n_layers", "shares", "counts"),
    [
        (80, [26, 27, 27], [27, 27, 27]),
        (80, [27, 27, 27], [27, 27, 27]),
        (80, [0.1, 0.2, 0.7], [9, 16, 56]),
        (4, [2, 4, 1], [2, 3, 0]),
        (4, [5, 3, 5], [2, 2, 1]),
        (18, [4, 5], [9, 10]),
        (30, [2, 4], [11, 20]),
        (30, [0, 1], [0, 31]),
        (30, [1, 0, 2], [11, 0, 20]),
    ],
)
def test_layers_lie_where_llama_cpp_put_them(n_layers: int, shares: list[float], counts: list[int]) -> None:
    assert counts_of(placement.device_of_each_layer(n_layers, shares), len(shares)) == counts


@settings(deadline=None)
@given(st.integers(1, 300), st.lists(st.floats(0.001, 1000), min_size=1, max_size=16))
def test_each_slot_has_one_device_and_devices_hold_them_in_order(n_layers: int, shares: list[float]) -> None:
    places = placement.device_of_each_layer(n_layers, shares)
    assert len(places) == n_layers + 1
    assert places == sorted(places)
    assert set(places) <= set(range(len(shares)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 128), min_size=1, max_size=16).filter(lambda counts: 2 <= sum(counts) <= 129))
def test_whole_slots_are_taken_at_their_word(counts: list[int]) -> None:
    places = placement.device_of_each_layer(sum(counts) - 1, counts)
    assert counts_of(places, len(counts)) == counts
    assert placement.slots_of_counts(counts) == places


@pytest.mark.parametrize("devices", range(1, 17))
def test_whole_slots_are_taken_at_their_word_for_every_count_of_layers(devices: int) -> None:
    for n_layers in range(max(1, devices - 1), 129):
        even, more = divmod(n_layers + 1, devices)
        counts = [even + (device < more) for device in range(devices)]
        for order in (counts, counts[::-1], [n_layers + 1 - devices + 1, *[1] * (devices - 1)]):
            places = placement.device_of_each_layer(n_layers, order)
            assert counts_of(places, devices) == order


@settings(deadline=None)
@given(st.data())
def test_a_split_by_memory_holds_every_layer_and_the_output(data: st.DataObject) -> None:
    memories = data.draw(st.lists(MEMORIES, min_size=1, max_size=16))
    n_layers = data.draw(st.integers(max(1, len(memories) - 1), 128))
    counts = placement.split_by_memory(n_layers, memories)
    assert sum(counts) == n_layers + 1
    assert min(counts) >= 1


@settings(deadline=None)
@given(st.data())
def test_more_memory_never_gets_fewer_layers(data: st.DataObject) -> None:
    # Small numbers, so that many splits are equally good.
    memories = data.draw(st.lists(st.integers(1, 12) | MEMORIES, min_size=2, max_size=8))
    n_layers = data.draw(st.integers(len(memories), 128))
    index = data.draw(st.integers(0, len(memories) - 1))
    more = list(memories)
    more[index] += data.draw(st.integers(1, 12) | MEMORIES)
    before, after = placement.split_by_memory(n_layers, memories), placement.split_by_memory(n_layers, more)
    assert after[index] >= before[index]


@settings(deadline=None)
@given(st.data())
def test_the_order_of_devices_changes_only_who_gets_a_tie(data: st.DataObject) -> None:
    memories = data.draw(st.lists(st.integers(1, 12) | MEMORIES, min_size=1, max_size=6))
    n_layers = data.draw(st.integers(len(memories), 128))
    order = data.draw(st.permutations(range(len(memories))))

    def fills(values: list[int]) -> list[float]:
        return sorted(count / memory for count, memory in zip(placement.split_by_memory(n_layers, values), values))

    assert fills([memories[index] for index in order]) == fills(memories)


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 128), MEMORIES)
def test_equal_devices_differ_by_one_slot_at_most_and_the_front_has_it(
    devices: int, n_layers: int, memory: int
) -> None:
    if devices > n_layers + 1:
        return
    counts = placement.split_by_memory(n_layers, [memory] * devices)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


def test_a_device_without_memory_is_left_out() -> None:
    assert placement.split_by_memory(80, [32, 0, 32]) == [41, 0, 40]
    assert placement.split_by_memory(1, [0, 32, 0, 0]) == [0, 2, 0, 0]


def test_a_larger_device_gets_more() -> None:
    assert placement.split_by_memory(80, [32, 32, 16]) == [33, 32, 16]
    assert placement.split_by_memory(80, [16, 32, 32]) == [16, 33, 32]


def split_fills(counts: Sequence[int], table: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    bounds = [0, *itertools.accumulate(counts)]
    return sorted(
        (table[device][first][last] for device, (first, last) in enumerate(zip(bounds, bounds[1:]))), reverse=True
    )


@settings(deadline=None)
@given(st.data())
def test_no_split_has_a_lower_maximum_than_the_chosen_one(data: st.DataObject) -> None:
    devices = data.draw(st.integers(1, 4))
    slots = data.draw(st.integers(devices, 9))
    # What devices need without a slot, and each slot's weight: none of them alike.
    fixed = data.draw(st.lists(st.integers(0, 20), min_size=devices, max_size=devices))
    limits = data.draw(st.lists(st.integers(1, 20), min_size=devices, max_size=devices))
    weights = data.draw(st.lists(st.integers(0, 20), min_size=slots, max_size=slots))
    sums = [0, *itertools.accumulate(weights)]
    table = [
        [[(constant + sums[last] - sums[first]) / limit for last in range(slots + 1)] for first in range(slots + 1)]
        for constant, limit in zip(fixed, limits)
    ]

    def fill(device: int) -> Callable[[int, int], float]:
        return lambda first, last: table[device][first][last]

    counts = placement.least_maximal_fill(slots, [fill(device) for device in range(devices)])
    assert sum(counts) == slots
    every = [
        [last - first for first, last in zip((0, *cuts), (*cuts, slots))]
        for cuts in itertools.combinations(range(1, slots), devices - 1)
    ]
    best = min(split_fills(other, table) for other in every)
    assert split_fills(counts, table) == best
    assert counts == max(other for other in every if split_fills(other, table) == best)


def test_more_devices_than_slots_are_refused() -> None:
    assert placement.split_by_memory(2, [1, 1, 1]) == [1, 1, 1]
    with pytest.raises(
        ValueError, match=r"^devices = 3 for 1 layers and the output; wanted at most 2: .*; cure: leave"
    ):
        placement.split_by_memory(1, [1, 1, 1])
    assert placement.split_by_memory(1, [1, 0, 1]) == [1, 0, 1]


SHARES: list[tuple[list[Any], str]] = [
    ([], "= 0 devices; wanted 1 to 16, as many as llama.cpp takes; cure: leave devices out"),
    ([1] * 17, "= 17 devices; wanted 1 to 16"),
    ([1, -1], r"\[1\] = -1; wanted a number from 1e-06 to 1e\+18, or 0; cure: give each device its free memory"),
    ([float("nan")], r"\[0\] = nan"),
    ([float("inf")], r"\[0\] = inf"),
    ([1e39], r"\[0\] = 1e\+39"),
    ([10**400], r"\[0\] = 10000"),
    ([1, 1e-60], r"\[1\] = 1e-60"),
    (["32"], r"\[0\] = '32'"),
    ([None], r"\[0\] = None"),
    ([True], r"\[0\] = True"),
    ([[1]], r"\[0\] = \[1\]"),
    ([0, 0.0], r"= \[0, 0.0\]; wanted one above 0; cure: give one device its free memory"),
]


@pytest.mark.parametrize(("shares", "words"), SHARES)
def test_shares_that_cannot_be_are_named(shares: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match="^tensor_split ?" + words):
        placement.device_of_each_layer(80, shares)
    with pytest.raises(ValueError, match="^memory ?" + words):
        placement.split_by_memory(80, shares)


@pytest.mark.parametrize("n_layers", [0, -1, 80.0, "80", None, True])
def test_a_count_of_layers_that_cannot_be_is_named(n_layers: Any) -> None:
    words = f"^n_layers = {n_layers!r}; wanted a whole number of at least 1; cure: give the model's block_count"
    for function in (placement.device_of_each_layer, placement.split_by_memory):
        with pytest.raises(ValueError, match=words):
            function(n_layers, [1, 1])


@settings(deadline=None)
@given(st.integers(1, 128), st.lists(st.floats(), min_size=1, max_size=17))
def test_shares_are_placed_or_refused_but_nothing_else(n_layers: int, shares: list[float]) -> None:
    try:
        places = placement.device_of_each_layer(n_layers, shares)
    except ValueError:
        return
    assert all(shares[place] > 0 for place in places)
