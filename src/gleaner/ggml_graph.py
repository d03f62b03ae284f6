"""How ggml splits a graph over devices and lays its tensors out in each device's compute buffer.

A compute buffer is not a sum of tensors: one that is no longer needed gives its place to a later one, and how
well that goes depends on their order. So the planner walks the graph of one micro-batch by ggml's own rules
instead of by a formula. Only what decides over memory is kept of a tensor; there are no values.

Sources, llama.cpp at commit 0c1e570: ``ggml/src/ggml.c`` (order of nodes), ``ggml/src/ggml-backend.cpp``
(devices, splits, copies of inputs), ``ggml/src/ggml-alloc.c`` (places).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# With several devices, each graph input and each tensor that crosses devices exists this often, so that the
# devices can work on different micro-batches (GGML_SCHED_MAX_COPIES).
PIPELINE_COPIES = 4
# Operations that may write over their first fitting source (ggml_op_can_inplace).
IN_PLACE = frozenset({"add", "mul", "rms_norm", "rope", "scale", "soft_max", "unary"})
VIEWS = frozenset({"view", "reshape", "permute", "transpose"})
# A source does not choose the device of these: it is too small (ggml_backend_sched_backend_id_from_cur).
NOT_BY_WEIGHT = frozenset({"rope", "flash_attn"})

Shape = tuple[int, int, int, int]


class Tensor:
    """A tensor of the graph: its place in it, its size in bytes, and what keeps its memory from being reused.

    ``home`` is the device of one that lies in a buffer of its own (weights, KV cache); ``op`` is "" for leaves.
    ``extra`` are bytes that its operation needs behind its values.
    """

    __slots__ = (
        "allocated",
        "children",
        "device",
        "extra",
        "home",
        "is_input",
        "is_output",
        "offset",
        "op",
        "place",
        "shape",
        "size",
        "srcs",
        "view_of",
        "views",
        "weight",
    )

    def __init__(
        self,
        op: str,
        shape: Shape,
        srcs: Sequence[Tensor] = (),
        *,
        item: int = 4,
        view_of: Tensor | None = None,
        home: int | None = None,
        is_input: bool = False,
        weight: bool = False,
        extra: int = 0,
    ) -> None:
        self.op, self.shape, self.srcs = op, shape, list(srcs)
        self.size = shape[0] * shape[1] * shape[2] * shape[3] * item
        self.extra = extra
        self.view_of: Tensor | None = None if view_of is None else view_of.view_of or view_of
        self.home = home
        self.is_input, self.is_output, self.weight = is_input, False, weight
        self.device = -1
        self.children = self.views = 0
        self.allocated = False
        self.place, self.offset = -1, 0

    @property
    def external(self) -> bool:
        """Whether it lies in a buffer of its own, so that no compute buffer holds it."""
        return (self.view_of or self).home is not None

    @property
    def bytes(self) -> int:
        return self.size + self.extra


def leaf(shape: Shape, item: int = 4) -> Tensor:
    """An input of the graph."""
    return Tensor("", shape, item=item, is_input=True)


def stored(device: int, weight: bool = False) -> Tensor:
    """Weights or a KV cache on a device: never in a compute buffer, so without a size."""
    return Tensor("", (0, 0, 0, 0), home=device, weight=weight)


def view(source: Tensor, shape: Shape, op: str = "view") -> Tensor:
    return Tensor(op, shape, [source], view_of=source)


class Graph:
    """Nodes and leaves in the order in which llama.cpp builds them."""

    def __init__(self) -> None:
        self.nodes: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._seen: set[int] = set()

    def expand(self, tensor: Tensor) -> Tensor:
        """Append a tensor and, before it, all of its sources that are not there yet (ggml_build_forward_expand)."""
        stack = [(tensor, iter(tensor.srcs))]
        if id(tensor) in self._seen:
            return tensor
        self._seen.add(id(tensor))
        while stack:
            current, rest = stack[-1]
            for source in rest:
                if id(source) not in self._seen:
                    self._seen.add(id(source))
                    stack.append((source, iter(source.srcs)))
                    break
            else:
                stack.pop()
                (self.nodes if current.op else self.leaves).append(current)
        return tensor


def _assign(graph: Graph, devices: int) -> None:
    """Choose the device of each tensor (passes 1, 2 and 4 of ggml_backend_sched_split_graph).

    The last device is the CPU. All devices are taken to know all operations.
    """
    cpu = devices - 1
    for tensor in (*graph.leaves, *graph.nodes):
        if tensor.device != -1:
            continue
        if tensor.external:
            home = (tensor.view_of or tensor).home
            assert home is not None
            tensor.device = home
        elif tensor.is_input:
            tensor.device = cpu
        elif tensor.op and tensor.op not in NOT_BY_WEIGHT:
            tensor.device = next((src.device for src in tensor.srcs if src.weight), -1)
    work = [node for node in graph.nodes if node.op not in VIEWS]
    for order, skip_cpu in ((work, True), (work[::-1], True), (work, False), (work[::-1], False)):
        current = -1
        for node in order:
            if node.device != -1:
                current = -1 if skip_cpu and node.device == cpu else node.device
            elif current != -1:
                node.device = current
    for node in graph.nodes:
        if node.view_of is not None and node.device == -1:
            node.device = node.view_of.device
        for source in node.srcs:
            if source.device == -1:
                source.device = source.view_of.device if source.view_of is not None else node.device
        if node.device == -1:
            node.device = 0


def _copy_of(tensor: Tensor, device: int) -> Tensor:
    copy = Tensor("", tensor.shape, item=0)
    copy.size, copy.device = tensor.size, device
    return copy


def _split(graph: Graph, copies: int) -> tuple[list[Tensor], list[Tensor]]:
    """Cut the graph where the device changes and copy what crosses (passes 5 and 6): all nodes, all leaves."""
    copied: dict[tuple[int, int], list[Tensor]] = {}
    nodes: list[Tensor] = []
    crossing: list[Tensor] = []
    pending: list[Tensor] = []
    inputs: list[tuple[Tensor, list[Tensor]]] = []
    current = next((node.device for node in graph.nodes if node.op not in VIEWS), -1)

    def close() -> None:
        for source, twins in inputs:
            # Keeps the source until its copy is made; it is neither a view nor a use by an operation.
            kept = Tensor("", source.shape, [source], view_of=source)
            kept.device = source.device
            nodes.extend([kept, twins[0]])
            crossing.extend(twins)
        nodes.extend(pending)
        inputs.clear()
        pending.clear()

    for node in graph.nodes:
        if node.op in VIEWS:
            pending.append(node)
            continue
        foreign_weight = any(src.weight and src.device != current for src in node.srcs)
        if node.device != current or (inputs and foreign_weight):
            close()
            current = node.device
        for index, source in enumerate(node.srcs):
            if source.device == current:
                continue
            key = (id(source), current)
            if key not in copied:
                copied[key] = [_copy_of(source, current) for _ in range(copies)]
                inputs.append((source, copied[key]))
            node.srcs[index] = copied[key][0]
        pending.append(node)
    close()
    if copies == 1:
        return nodes, list(graph.leaves)
    for twin in crossing:
        twin.is_input = twin.is_output = True
    first: list[Tensor] = []
    for tensor in graph.leaves:
        if tensor.is_input:
            tensor.is_output = True
            first.append(tensor)
            for _ in range(copies - 1):
                twin = _copy_of(tensor, tensor.device)
                twin.is_input = twin.is_output = True
                first.append(twin)
    return nodes, [*first, *crossing, *graph.leaves]


class _Buffer:
    """A device's compute buffer: the smallest free block that fits, else the open end (ggml_dyn_tallocr)."""

    def __init__(self, alignment: int) -> None:
        self.alignment = alignment
        self.free: list[list[int]] = []  # [offset, size], by offset
        self.end = 0
        self.peak = 0

    def _round(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    def take(self, size: int) -> int:
        size = self._round(size)
        best = -1
        for index, (_, length) in enumerate(self.free):
            if length >= size and (best < 0 or length <= self.free[best][1]):
                best = index
        if best >= 0:
            offset = self.free[best][0]
            self.free[best][0] += size
            self.free[best][1] -= size
            if not self.free[best][1]:
                del self.free[best]
            return offset
        offset = self.end
        self.end += size
        self.peak = max(self.peak, self.end)
        return offset

    def give(self, offset: int, size: int) -> None:
        size = self._round(size)
        if not size:
            return
        at = 0
        while at < len(self.free) and self.free[at][0] < offset:
            at += 1
        self.free.insert(at, [offset, size])
        if at + 1 < len(self.free) and offset + size == self.free[at + 1][0]:
            self.free[at][1] += self.free.pop(at + 1)[1]
        if at and sum(self.free[at - 1]) == offset:
            self.free[at - 1][1] += self.free.pop(at)[1]
        if self.free and sum(self.free[-1]) == self.end:
            self.end = self.free.pop()[0]

    def shrink(self, offset: int, size: int, kept: int) -> None:
        """Give back the end of a block of which only ``kept`` bytes stay in use."""
        self.give(offset + self._round(kept), self._round(size) - self._round(kept))


class _Layout:
    def __init__(self, alignments: Sequence[int]) -> None:
        self.buffers = [_Buffer(alignment) for alignment in alignments]

    def place(self, tensor: Tensor, device: int) -> None:
        if tensor.external or tensor.allocated or tensor.view_of is not None or tensor.place >= 0:
            return
        tensor.allocated = True
        if tensor.op in IN_PLACE and self._over_a_source(tensor):
            return
        tensor.place, tensor.offset = device, self.buffers[device].take(tensor.bytes)

    def _over_a_source(self, tensor: Tensor) -> bool:
        for source in tensor.srcs:
            if not source.allocated or source.is_output or source.shape != tensor.shape:
                continue
            if source.children == 1 and not source.views:
                tensor.place, tensor.offset = source.place, source.offset
                source.allocated = False
                self.buffers[source.place].shrink(source.offset, source.bytes, tensor.bytes)
                return True
        return False

    def done_with(self, source: Tensor) -> None:
        source.children -= 1
        if source.children or source.views:
            return
        owner = source
        if source.view_of is not None:
            owner = source.view_of
            owner.views -= 1
            if owner.views or owner.children:
                return
        if owner.allocated and not owner.is_output:
            self.buffers[owner.place].give(owner.offset, owner.bytes)
            owner.allocated = False


def buffer_sizes(graph: Graph, alignments: Sequence[int]) -> list[int]:
    """Bytes of the compute buffer of each device, in the order of ``alignments``; the last device is the CPU.

    The graph is used up. With two or more devices besides the CPU llama.cpp works on several micro-batches at
    once (pipeline parallelism).
    """
    _assign(graph, len(alignments))
    nodes, leaves = _split(graph, PIPELINE_COPIES if len(alignments) > 2 else 1)
    layout = _Layout(alignments)
    for tensor in leaves:
        layout.place(tensor, tensor.device)
    for node in nodes:
        if node.view_of is not None and node.op:
            node.view_of.views += 1
        for source in node.srcs:
            source.children += 1
            if source.is_input:
                layout.place(source, node.device)
    for node in nodes:
        for source in node.srcs:
            layout.place(source, node.device)
        layout.place(node, node.device)
        for source in node.srcs:
            layout.done_with(source)
    return [buffer.peak for buffer in layout.buffers]


def outputs(tensors: Iterable[Tensor]) -> None:
    """Mark results that the program reads: their memory is never reused."""
    for tensor in tensors:
        tensor.is_output = True
