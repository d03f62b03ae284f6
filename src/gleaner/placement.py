"""Which device gets which layer: llama.cpp's own rule, and the split that fills the fullest device least.

A model of n layers has n + 1 slots: the output layer takes the last one. Devices stand in llama.cpp's order:
those of RPC servers first, then the head's own. The token embedding takes no slot; it is always on the head's CPU.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence

MAX_DEVICES = 16
"""llama_max_devices(), src/llama.cpp."""


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _check_shares(shares: Sequence[float], what: str) -> None:
    if not 1 <= len(shares) <= MAX_DEVICES:
        raise ValueError(f"{what}: {len(shares)} devices; wanted 1 to {MAX_DEVICES}")
    for index, share in enumerate(shares):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not math.isfinite(share) or share < 0:
            raise ValueError(
                f"{what}[{index}] = {share!r}; wanted a number of at least 0; "
                "cure: give each device its memory, or 0 to leave it out"
            )


def device_of_each_layer(n_layers: int, shares: Sequence[float]) -> list[int]:
    """The device of each of ``n_layers`` layers and, last, of the output layer, for ``--tensor-split shares``.

    Layer *il* goes to the first device whose cumulative share, in 32-bit floats, is greater than
    *il* / (n_layers + 1) (src/llama-model.cpp, load_tensors). All layers are offloaded. Raises ValueError for a
    share that is no number or negative, for none above 0, and for fewer layers than one.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers = {n_layers}; wanted at least 1")
    _check_shares(shares, "tensor_split")
    if not any(shares):
        raise ValueError("tensor_split: all shares are 0, which means `by free memory` to llama.cpp; give one of them")
    sums: list[float] = []
    total = 0.0
    for share in shares:
        total = _float32(total + _float32(share))
        sums.append(total)
    cumulative = [_float32(value / total) for value in sums]
    slots = n_layers + 1
    return [bisect_right(cumulative, _float32(_float32(slot) / _float32(slots))) for slot in range(slots)]


def slots_of_counts(counts: Sequence[int]) -> list[int]:
    """The device of each slot when the devices hold ``counts`` slots, one after the other."""
    return [device for device, count in enumerate(counts) for _ in range(count)]


def least_maximal_fill(slots: int, fills: Sequence[Callable[[int, int], float]]) -> list[int]:
    """How many of ``slots`` slots each device gets, in their order, so that the fullest is filled least.

    ``fills[device](first, last)`` is how full the device is (1.0: to its limit) with the slots first … last - 1;
    it must not fall when slots are added. Of the splits that are equally good for the fullest device the most even
    one is taken, and of those the one with more at the front: the last device has the output layer besides. Every
    device gets at least one slot. Raises ValueError for more devices than slots.
    """
    devices = len(fills)
    if devices > slots:
        raise ValueError(
            f"{devices} devices for {slots - 1} layers and the output; wanted at most one device a layer; "
            "cure: leave devices out"
        )
    even = [slots * device // devices for device in range(devices + 1)]
    bound = max(fill(first, last) for fill, first, last in zip(fills, even, even[1:]))
    fullest = _cheapest(slots, fills, bound, max)[0]
    return _cheapest(slots, fills, fullest, lambda fill, rest: fill * fill + rest)[1]


def _cheapest(
    slots: int,
    fills: Sequence[Callable[[int, int], float]],
    bound: float,
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The cost and the counts of the cheapest split in which no device is filled more than ``bound``.

    Dynamic programming from the last device backwards.
    """
    devices = len(fills)
    after: dict[int, tuple[float, list[int]]] = {slots: (0.0, [])}
    for device in reversed(range(devices)):
        here: dict[int, tuple[float, list[int]]] = {}
        nearest = min(after)
        for first in range(device, slots - devices + device + 1) if device else (0,):
            for last in range(max(first + 1, nearest), slots - devices + device + 2):
                if last not in after:
                    continue
                fill = fills[device](first, last)
                if fill > bound:
                    break
                cost = join(fill, after[last][0])
                if first not in here or cost <= here[first][0]:
                    here[first] = (cost, [last - first, *after[last][1]])
        after = here
    return after[0]


def split_by_memory(n_layers: int, memories: Sequence[float]) -> list[int]:
    """``--tensor-split`` for layers that are all alike and devices with so much free memory each, in slots.

    Whole numbers of slots, so that no share is a near-tie: both sides of llama.cpp's comparison are then the same
    division. 80 layers on three equal devices give 27, 27, 27: the last one holds 26 layers and the output layer.
    A device without memory gets no slot. Raises ValueError as ``device_of_each_layer`` does, and for more devices
    than slots.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers = {n_layers}; wanted at least 1")
    _check_shares(memories, "memory")
    used = [index for index, memory in enumerate(memories) if memory > 0]
    if not used:
        raise ValueError("memory: no device has any; wanted at least one above 0")
    counts = [0] * len(memories)
    fills = [lambda first, last, memory=memories[index]: (last - first) / memory for index in used]
    for index, count in zip(used, least_maximal_fill(n_layers + 1, fills)):
        counts[index] = count
    return counts
