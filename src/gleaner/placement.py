"""Which device gets which layer: llama.cpp's own rule, and the split that fills the fullest device least.

A model of n layers has n + 1 slots: the output layer takes the last one. Devices stand in llama.cpp's order:
those of RPC servers first, then the head's own. The token embedding takes no slot; it is always on the head's CPU.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

MAX_DEVICES = 16
"""llama_max_devices(), src/llama.cpp."""
LEAST_SHARE, LARGEST_SHARE = 1e-6, 1e18


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _check_layers(n_layers: int) -> None:
    if not isinstance(n_layers, int) or isinstance(n_layers, bool) or n_layers < 1:
        raise ValueError(
            f"n_layers = {n_layers!r}; wanted a whole number of at least 1; cure: give the model's block_count"
        )


def _check_shares(shares: Sequence[float], what: str) -> None:
    if not 1 <= len(shares) <= MAX_DEVICES:
        raise ValueError(
            f"{what} = {len(shares)} devices; wanted 1 to {MAX_DEVICES}, as many as llama.cpp takes; "
            "cure: leave devices out"
        )
    for index, share in enumerate(shares):
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        # Smaller and larger numbers are 0 or infinite once they or their sum are 32-bit floats.
        if not number or not (share == 0 or LEAST_SHARE <= share <= LARGEST_SHARE):
            raise ValueError(
                f"{what}[{index}] = {share!r}; wanted a number from {LEAST_SHARE} to {LARGEST_SHARE}, or 0; "
                "cure: give each device its free memory, or 0 to leave it out"
            )
    if not any(shares):
        raise ValueError(f"{what} = {list(shares)}; wanted one above 0; cure: give one device its free memory")


def device_of_each_layer(n_layers: int, shares: Sequence[float]) -> list[int]:
    """The device of each of ``n_layers`` layers and, last, of the output layer, for ``--tensor-split shares``.

    Layer *il* goes to the first device whose cumulative share, in 32-bit floats, is greater than
    *il* / (n_layers + 1) (src/llama-model.cpp, load_tensors). All layers are offloaded. Raises ValueError for a
    share that is no number or negative, for none above 0 (which means `by free memory` to llama.cpp), and for
    fewer layers than one.
    """
    _check_layers(n_layers)
    _check_shares(shares, "tensor_split")
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
    it must not fall when slots are added. Of the splits that are equally good for the fullest device the one that
    fills the second fullest least is taken, and so on; of equal ones the one with more at the front, since the last
    device has the output layer besides. Every device gets at least one slot. Raises ValueError for more devices
    than slots.
    """
    devices = len(fills)
    if devices > slots:
        raise ValueError(
            f"devices = {devices} for {slots - 1} layers and the output; wanted at most {slots}: one for each layer "
            "and one for the output; cure: leave devices out"
        )
    even = [slots * device // devices for device in range(devices + 1)]
    bound = max(fill(first, last) for fill, first, last in zip(fills, even, even[1:]))
    # By the first slot that the devices looked at so far hold: how full they are, the fullest first, and their counts.
    best: dict[int, tuple[list[float], list[int]]] = {slots: ([], [])}
    for device in reversed(range(devices)):
        firsts = range(device, slots - devices + device + 1) if device else [0]
        found = ((first, _best_split(first, fills[device], bound, best)) for first in firsts)
        best = {first: split for first, split in found if split is not None}
    return best[0][1]


def _best_split(
    first: int,
    fill: Callable[[int, int], float],
    bound: float,
    after: Mapping[int, tuple[list[float], list[int]]],
) -> tuple[list[float], list[int]] | None:
    """The best split of the slots from ``first`` on, between a device and those after it; None above ``bound``."""
    best: tuple[list[float], list[int]] | None = None
    for last in range(max(first + 1, min(after)), max(after) + 1):
        if last not in after:
            continue
        own = fill(first, last)
        if own > bound:
            break
        full = sorted([own, *after[last][0]], reverse=True)
        if best is None or full <= best[0]:
            best = full, [last - first, *after[last][1]]
            bound = min(bound, full[0])
    return best


def split_by_memory(n_layers: int, memories: Sequence[float]) -> list[int]:
    """``--tensor-split`` for layers that are all alike and devices with so much free memory each, in slots.

    Whole numbers of slots, so that no share is a near-tie: both sides of llama.cpp's comparison are then the same
    division. 80 layers on three equal devices give 27, 27, 27: the last one holds 26 layers and the output layer.
    A device without memory gets no slot. Raises ValueError as ``device_of_each_layer`` does, and for more devices
    than slots.
    """
    _check_layers(n_layers)
    _check_shares(memories, "memory")
    used = [index for index, memory in enumerate(memories) if memory > 0]
    counts = [0] * len(memories)
    fills = [lambda first, last, memory=memories[index]: (last - first) / memory for index in used]
    for index, count in zip(used, least_maximal_fill(n_layers + 1, fills)):
        counts[index] = count
    return counts
