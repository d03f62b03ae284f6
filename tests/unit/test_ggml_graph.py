"""The walk over a graph: which device computes what, what is copied, and where each tensor lies."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gleaner import ggml_graph
from gleaner.ggml_graph import PIPELINE_COPIES, Graph, Shape, Tensor, leaf, stored, view

KIB = 1024
# A tensor of 1 KiB, 2 KiB, 4 KiB of 32-bit floats.
ONE, TWO, FOUR = (256, 1, 1, 1), (512, 1, 1, 1), (1024, 1, 1, 1)


def node(shape: Shape, *srcs: Tensor, op: str = "mul_mat", device: int = -1, extra: int = 0) -> Tensor:
    tensor = Tensor(op, shape, srcs, extra=extra)
    tensor.device = device
    return tensor


def graph_of(*tensors: Tensor) -> Graph:
    graph = Graph()
    for tensor in tensors:
        graph.expand(tensor)
    return graph


def kib(graph: Graph, devices: int = 1) -> list[float]:
    return [size / KIB for size in ggml_graph.buffer_sizes(graph, [64] * devices)]


def test_sources_come_before_what_uses_them_and_each_tensor_once() -> None:
    first, second = leaf(ONE), leaf(ONE)
    product = node(ONE, first, second)
    total = node(ONE, product, first, op="add")
    graph = graph_of(product, total, total)
    assert graph.nodes == [product, total]
    assert graph.leaves == [first, second]


def test_a_chain_deeper_than_pythons_stack_is_walked() -> None:
    tensor = leaf(ONE)
    for _ in range(5000):
        tensor = node(ONE, tensor)
    assert len(graph_of(tensor).nodes) == 5000


def test_one_that_is_no_longer_needed_gives_its_place_to_a_later_one() -> None:
    tensor = leaf(ONE)
    for _ in range(9):
        tensor = node(ONE, tensor)
    # A result and its source; whatever came before is gone.
    assert kib(graph_of(tensor)) == [2]


def test_an_operation_that_can_writes_over_its_source() -> None:
    def peak(op: str, shape: Shape = ONE, *, also: bool = False) -> float:
        source = node(ONE, leaf(ONE))
        result = node(shape, source, op=op)
        last = node(ONE, result, source) if also else result
        return kib(graph_of(last))[0]

    # The leaf and the product, and the third only where it needs a place of its own.
    assert [peak(op) for op in sorted(ggml_graph.IN_PLACE)] == [2] * len(ggml_graph.IN_PLACE)
    assert peak("cont") == 2  # over the leaf, which is gone
    assert peak("unary", also=True) == 3  # the source is used again
    assert peak("unary", TWO) == 4  # of another shape, and the place of the leaf is too small


def test_only_the_first_source_that_fits_is_written_over() -> None:
    small, large = node(ONE, leaf(ONE)), node(TWO, leaf(ONE))
    total = node(TWO, small, large, op="add")
    assert kib(graph_of(total)) == [5]
    assert (total.place, total.offset) == (0, large.offset)


def test_a_result_over_a_source_gives_back_what_the_source_had_for_its_operation() -> None:
    source = node(ONE, leaf(ONE), extra=3 * KIB)
    result = node(ONE, source, op="unary")
    after = node((768, 1, 1, 1), result)
    assert kib(graph_of(after)) == [5]
    assert after.offset == source.offset + KIB


def test_what_an_operation_needs_besides_lies_behind_its_values() -> None:
    assert kib(graph_of(node(ONE, leaf(ONE), extra=3 * KIB))) == [1 + 4]


def test_a_view_keeps_its_source_and_takes_nothing() -> None:
    source = node(FOUR, leaf(ONE))
    part = view(source, ONE)
    # Between the view and its use another tensor needs a place: it may not be the source's.
    other = node(FOUR, leaf(ONE))
    last = node(ONE, part, other)
    graph = graph_of(part, other, last)
    assert kib(graph) == [1 + 4 + 1 + 4]
    assert part.place == -1
    without = graph_of(node(ONE, source), node(FOUR, leaf(ONE)))
    assert kib(without) < [1 + 4 + 1 + 4]


def test_a_view_of_a_view_keeps_the_source_of_both() -> None:
    source = node(FOUR, leaf(ONE))
    outer = view(view(source, TWO), ONE, "permute")
    assert outer.view_of is source
    result = node(FOUR, outer, op="cont")
    assert kib(graph_of(result)) == [1 + 4 + 4]


def test_nothing_is_written_over_a_source_that_a_view_shows() -> None:
    source = node(ONE, leaf(ONE))
    part = view(source, ONE)
    result = node(ONE, source, op="unary")
    graph = graph_of(part, result, node(ONE, part, result))
    kib(graph)
    assert result.offset != source.offset


def test_a_result_that_the_program_reads_keeps_its_place() -> None:
    def peak(keep: bool) -> float:
        read = node(FOUR, leaf(ONE))
        graph = graph_of(read)
        if keep:
            ggml_graph.outputs([read])
        graph.expand(node(FOUR, node(FOUR, read)))
        return kib(graph)[0]

    assert peak(keep=True) == peak(keep=False) + 4


def test_weights_and_caches_take_nothing() -> None:
    weights, cache = stored(0, weight=True), stored(0)
    result = node(ONE, weights, view(cache, (0, 0, 0, 0)), leaf(ONE))
    assert kib(graph_of(result)) == [2]


def test_places_are_aligned() -> None:
    graph = graph_of(node((1, 1, 1, 1), leaf((1, 1, 1, 1)), leaf((17, 1, 1, 1))))
    assert ggml_graph.buffer_sizes(graph, [64]) == [64 + 128 + 64]
    graph = graph_of(node((1, 1, 1, 1), leaf((1, 1, 1, 1)), leaf((17, 1, 1, 1))))
    assert ggml_graph.buffer_sizes(graph, [128]) == [128 + 128 + 128]


# Devices


def test_weights_choose_the_device_and_what_has_none_follows() -> None:
    first, second = stored(0, weight=True), stored(1, weight=True)
    ids = leaf(ONE)
    start = node(ONE, ids, op="get_rows")
    here = node(ONE, first, start)
    between = node(ONE, here, op="cont")
    there = node(ONE, second, between)
    last = node(ONE, there, op="cont")
    ggml_graph.buffer_sizes(graph_of(last), [64] * 3)
    assert [tensor.device for tensor in (here, between, there, last)] == [0, 0, 1, 1]
    # Going back from a device gives it to what comes before, too; the input itself is the CPU's.
    assert start.device == 0
    assert ids.device == 2


def test_what_has_no_weights_between_the_cpu_and_a_device_is_the_devices() -> None:
    rows = node(ONE, stored(1, weight=True), leaf(ONE), op="get_rows")
    scaled = node(ONE, rows, op="scale")
    layer = node(ONE, stored(0, weight=True), scaled)
    ggml_graph.buffer_sizes(graph_of(layer), [64] * 2)
    assert [tensor.device for tensor in (rows, scaled, layer)] == [1, 0, 0]


def test_rope_and_flash_attention_are_not_drawn_to_the_weights_that_they_read() -> None:
    for op in sorted(ggml_graph.NOT_BY_WEIGHT):
        here = node(ONE, stored(0, weight=True), leaf(ONE))
        turned = node(ONE, here, stored(1, weight=True), op=op)
        ggml_graph.buffer_sizes(graph_of(turned), [64] * 3)
        assert turned.device == 0


def test_what_crosses_devices_is_copied_and_the_source_lives_until_then() -> None:
    # One device besides the CPU: a copy each. The CPU has the embedding, the device the layer.
    ids = leaf(ONE)
    rows = node(FOUR, stored(1, weight=True), ids, op="get_rows")
    layer = node(FOUR, stored(0, weight=True), rows)
    again = node(FOUR, stored(0, weight=True), layer, rows)
    graph = graph_of(again)
    assert kib(graph, 2) == [4 + 4 + 4, 1 + 4]
    twin = layer.srcs[1]
    assert twin is not rows
    assert (twin.device, twin.size) == (0, rows.size)
    assert again.srcs[2] is twin


def test_a_source_gives_its_place_back_once_it_is_copied() -> None:
    host, device = stored(1, weight=True), stored(0, weight=True)
    rows = node(FOUR, host, leaf(ONE), op="get_rows")
    back = node(FOUR, host, node(ONE, device, rows))
    # What comes back lies where the ids were, and the last result where the rows were.
    assert kib(graph_of(back), 2)[1] == 1 + 4
    assert back.offset == rows.offset


def test_foreign_weights_begin_a_split_whose_inputs_are_copied_later() -> None:
    first = node(ONE, stored(0, weight=True), leaf(FOUR))
    second = node(ONE, stored(1, weight=True), first, leaf(FOUR), device=0)
    # The second copy takes the place of the first.
    assert kib(graph_of(second), 2)[0] == 4 + 1 + 1


def test_with_several_devices_what_crosses_exists_four_times_and_stays() -> None:
    def sizes(devices: int) -> list[float]:
        rows = node(FOUR, stored(devices - 1, weight=True), leaf(ONE), op="get_rows")
        layer = node(TWO, stored(0, weight=True), rows)
        for device in range(1, devices - 1):
            layer = node(TWO, stored(device, weight=True), layer)
        return kib(graph_of(layer), devices)

    assert sizes(2) == [4 + 2, 1 + 4]
    # The CPU holds its input, and the device before it what it computed of the embedding.
    assert sizes(3) == [PIPELINE_COPIES * 4 + 2, PIPELINE_COPIES * 2 + 2, PIPELINE_COPIES * 1 + 4]


def test_each_device_has_a_copy_of_its_own() -> None:
    mask = leaf(FOUR)
    first = node(ONE, stored(0, weight=True), mask)
    second = node(ONE, stored(1, weight=True), first, mask)
    sizes = kib(graph_of(second), 3)
    copies = PIPELINE_COPIES
    assert sizes == [copies * 4 + 1, copies * (4 + 1) + 1, copies * 4]
    assert first.srcs[1] is not second.srcs[2]


def test_a_device_that_computes_nothing_takes_nothing() -> None:
    assert kib(graph_of(node(ONE, stored(0, weight=True), leaf(ONE))), 3)[1] == 0


# The free list


def buffer(*taken: int) -> ggml_graph._Buffer:
    found = ggml_graph._Buffer(64)
    for size in taken:
        found.take(size)
    return found


def test_the_smallest_block_that_fits_is_taken() -> None:
    blocks = buffer(256, 64, 128, 64, 192, 64)
    blocks.give(0, 256)
    blocks.give(320, 128)
    blocks.give(512, 192)
    assert blocks.free == [[0, 256], [320, 128], [512, 192]]
    assert blocks.take(130) == 512
    assert blocks.take(1) == 320
    # What is left of a block stays free, where it was.
    assert blocks.free == [[0, 256], [384, 64]]
    assert blocks.take(64) == 384
    assert blocks.free == [[0, 256]]


def test_of_equal_blocks_the_last_is_taken() -> None:
    blocks = buffer(128, 64, 128, 64)
    blocks.give(0, 128)
    blocks.give(192, 128)
    assert blocks.take(128) == 192


def test_what_fits_nowhere_opens_the_end() -> None:
    blocks = buffer(128, 64)
    blocks.give(0, 128)
    assert blocks.take(129) == 192
    assert (blocks.end, blocks.peak) == (384, 384)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_merge_and_the_end_closes(order: tuple[int, ...]) -> None:
    blocks = buffer(64, 128, 192, 64)
    starts, sizes = (0, 64, 192), (64, 128, 192)
    for index in order:
        blocks.give(starts[index], sizes[index])
    assert blocks.free == [[0, 384]]
    blocks.give(384, 64)
    assert blocks.free == []
    assert (blocks.end, blocks.peak) == (0, 448)


def test_the_end_of_a_block_is_given_back() -> None:
    blocks = buffer(512, 64)
    blocks.shrink(0, 512, 100)
    assert blocks.free == [[128, 384]]
    blocks.shrink(0, 100, 65)
    assert blocks.free == [[128, 384]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2000), st.booleans()), max_size=60))
def test_blocks_never_overlap_and_all_is_given_back(steps: list[tuple[int, bool]]) -> None:
    blocks = ggml_graph._Buffer(64)
    held: list[tuple[int, int]] = []
    for size, give in steps:
        if give and held:
            blocks.give(*held.pop(size % len(held)))
        else:
            held.append((blocks.take(size), size))
        ends = sorted((offset, offset + -(-taken // 64) * 64) for offset, taken in held if taken)
        assert all(end <= after for (_, end), (after, _) in zip(ends, ends[1:]))
        free = sorted((offset, offset + length) for offset, length in blocks.free)
        assert all(end < after for (_, end), (after, _) in zip(free, free[1:]))
        assert sum(end - start for start, end in [*ends, *free]) == blocks.end <= blocks.peak
    for one in held:
        blocks.give(*one)
    assert (blocks.free, blocks.end) == ([], 0)


# Any graph


@st.composite
def graphs(draw: st.DrawFn, devices: int) -> Graph:
    shapes = st.sampled_from([ONE, TWO, FOUR, (16, 16, 1, 1)])
    tensors = [leaf(draw(shapes)) for _ in range(draw(st.integers(1, 3)))]
    weights = [stored(device, weight=True) for device in range(devices)]
    graph = Graph()
    for _ in range(draw(st.integers(1, 25))):
        kind = draw(st.sampled_from(["mul_mat", "mul_mat", "cont", "add", "unary", "soft_max", "view"]))
        srcs = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=2, unique_by=id))
        if kind == "view":
            new = view(srcs[0], srcs[0].shape)
        else:
            if kind == "mul_mat":
                srcs = [draw(st.sampled_from(weights)), *srcs]
            new = node(draw(shapes), *srcs, op=kind)
        tensors.append(new)
        if draw(st.booleans()):
            graph.expand(new)
    for tensor in tensors:
        graph.expand(tensor)
    ggml_graph.outputs(tensor for tensor in tensors if tensor.op and draw(st.integers(0, 9)) == 0)
    return graph


def lives(graph: Graph) -> list[tuple[Tensor, int, float]]:
    """Each placed tensor with the first and the last of the nodes that need its memory, the oldest first."""
    found: dict[int, tuple[Tensor, int, float]] = {}
    for index, user in enumerate(graph.nodes):
        for tensor in (*user.srcs, user):
            owner = tensor.view_of or tensor
            if owner.place >= 0:
                start = found[id(owner)][1] if id(owner) in found else index
                found[id(owner)] = (owner, start, float("inf") if owner.is_output else index)
    return list(found.values())


@settings(deadline=None)
@given(st.data())
def test_tensors_that_live_at_the_same_time_do_not_overlap(data: st.DataObject) -> None:
    devices = data.draw(st.integers(1, 4))
    graph = data.draw(graphs(devices))
    sizes = ggml_graph.buffer_sizes(graph, [64] * devices)
    for (older, _, last), (newer, start, _) in itertools.combinations(lives(graph), 2):
        assert newer.offset + newer.bytes <= sizes[newer.place]
        apart = (
            older.place != newer.place
            or older.offset + older.bytes <= newer.offset
            or newer.offset + newer.bytes <= older.offset
        )
        if not apart and last >= start:
            # Both live during one node: the newer one is written over its source.
            assert last == start
            assert newer.op in ggml_graph.IN_PLACE
            assert older in newer.srcs
            assert (older.offset, older.shape) == (newer.offset, newer.shape)


@settings(deadline=None)
@given(st.data())
def test_a_device_reads_nothing_of_another(data: st.DataObject) -> None:
    devices = data.draw(st.integers(1, 4))
    graph = data.draw(graphs(devices))
    ggml_graph.buffer_sizes(graph, [64] * devices)
    for tensor in graph.nodes:
        if tensor.op not in ggml_graph.VIEWS:
            assert {source.device for source in tensor.srcs} <= {tensor.device}
