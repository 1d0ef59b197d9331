"""A program that mixes the units of a row, emitted for one row at a time.

Its arrays are flat and without the rows. Element-wise ones of one size are computed in one loop
over vectors, together with the sums of all their elements; what needs such a sum, or an array as a
whole, waits for the next *stage*. Only what later stages read is stored. What moves numbers,
slices, broadcasts and transposes, is a list of places that is known now.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias, cast

import jax
import llvmlite.ir as ir
import numpy as np
from jax import Array, ShapeDtypeStruct, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from lstmjax.recurrence.cpu.builder import I8, I32, I64, Builder, Known
from lstmjax.recurrence.cpu.emit import REAL_TYPES, WHOLE_TYPES, Value, Vectors, equation_refusal
from lstmjax.recurrence.cpu.functions import Functions, Wholes
from lstmjax.recurrence.layout import up
from lstmjax.traced import (
    INLINED,
    AnyArray,
    Atom,
    MixedRows,
    NoRule,
    Program,
    aval_of,
    bind_as_traced,
    callee,
    is_literal,
    needed,
    shape_of,
)
from lstmjax.traced.operations import ELEMENTWISE

Read: TypeAlias = Callable[[Known, int], ir.Value]
"""``(first, lanes)``: a vector of an argument's numbers, ``lanes`` of them from ``first`` on."""

Write: TypeAlias = Callable[[Known, int, ir.Value], None]
"""``(first, lanes, vector)``: stores the first ``lanes`` numbers of a vector in a result."""

FEW = 8
"""Most numbers that are combined, or results that are written, one by one."""

CHEAP = frozenset(["add", "add_any", "sub", "mul", "neg", "max", "min", "select_n"])

AGAIN = 2
"""So many `CHEAP` operations cost no more than to store their result and to load it again."""

COMBINED = {
    "sum": ("add", 0, lax.add, lax.reduce_sum, lax.cumsum),
    "prod": ("mul", 1, lax.mul, lax.reduce_prod, lax.cumprod),
    "max": ("max", -math.inf, lax.max, lax.reduce_max, lax.cummax),
    "min": ("min", math.inf, lax.min, lax.reduce_min, lax.cummin),
    "and": ("both", -1, lax.bitwise_and, lax.reduce_and, None),
    "or": ("either", 0, lax.bitwise_or, lax.reduce_or, None),
    "xor": ("differ", 0, lax.bitwise_xor, lax.reduce_xor, None),
}
"""Reductions: how `Functions` calls the operation, what changes nothing, and JAX' operations."""


@functools.lru_cache(maxsize=256)
def row_jaxpr(program: Program) -> ClosedJaxpr:
    """A program as one of a single row, all of whose sizes are known.

    Example:
        >>> import jax.numpy as jnp
        >>> from lstmjax.traced import trace
        >>> program = trace(lambda x: x - x.sum(1, keepdims=True), jnp.ones((5, 3)))
        >>> [a.shape for a in row_jaxpr(program).in_avals]
        [(1, 3)]
    """
    shapes = [
        ShapeDtypeStruct([1 if axis == row else n for axis, n in enumerate(a.shape)], a.dtype)
        for a, row in zip(program.closed.in_avals, program.rows, strict=True)
    ]
    with jax.enable_x64(True):
        return jax.make_jaxpr(lambda *a: jax.tree.leaves(program.run("first", *a)))(*shapes)


@functools.lru_cache(maxsize=256)
def refusal(program: Program) -> str | None:
    """What keeps a program from being emitted, by the name of the operation; None if nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> from lstmjax.traced import trace
        >>> refusal(trace(lambda x: jnp.sort(x, axis=1), jnp.ones((2, 3))))
        'it uses sort'
    """
    try:
        Graph(row_jaxpr(program), "float32", 16)
    except (NoRule, MixedRows) as error:
        return str(error)
    return None


# --- Arrays --------------------------------------------------------------------------------------


class Node:
    """Numbers of a row.

    Attributes:
        size: how many; one is enough for an array that is the same everywhere.
        dtype: their type.
        ins: what they are computed from.
        extent: numbers that the loop runs over in which they are computed; 0 without a loop.
        stage: when they are.
        kept: they are stored for later stages.
        at: where, in bytes.
    """

    kept, at = False, 0

    def __init__(
        self, size: int, dtype: str, ins: Sequence["Node"] = (), extent: int | None = None
    ) -> None:
        self.size, self.dtype, self.ins = size, dtype, tuple(ins)
        self.extent = size * (size > 1) if extent is None else extent
        ready = (x.stage + (isinstance(x, Total) or self.waits(x)) for x in ins)
        self.stage: int = max(ready, default=0)

    def waits(self, x: "Node") -> bool:
        """Whether it needs all of another array, and that is computed in a loop."""
        return isinstance(self, Whole) and x.size > 1 and x.extent > 0


class Constant(Node):
    """Numbers that are known now."""

    def __init__(self, value: np.ndarray) -> None:
        super().__init__(value.size, str(value.dtype), extent=0)
        self.value = value


class Argument(Node):
    """An argument, or some of its numbers; a dense one is in memory."""

    def __init__(self, size: int, dtype: str, number: int, first: int, dense: bool) -> None:
        super().__init__(size, dtype, extent=0 if dense else None)
        self.number, self.first, self.dense = number, first, dense


class Each(Node):
    """What an operation makes of each element."""

    def __init__(
        self,
        size: int,
        dtype: str,
        ins: Sequence[Node],
        do: Callable[[Vectors, list[Value]], Value],
        cheap: bool,
    ) -> None:
        super().__init__(size, dtype, ins)
        self.do, self.cheap = do, cheap


class Total(Node):
    """All elements combined into one."""

    def __init__(self, source: Node, name: str) -> None:
        super().__init__(1, source.dtype, [source], source.size)
        self.name = name


class Result(Node):
    """A result of the program, or some of its numbers."""

    def __init__(self, size: int, source: Node, number: int, first: int) -> None:
        super().__init__(size, source.dtype, [source])
        self.number, self.first = number, first


class Whole(Node):
    """What is computed, by code of its own, from all of other arrays."""

    def __init__(
        self, size: int, ins: Sequence[Node], emit: Callable[["Rows", "Whole"], None]
    ) -> None:
        super().__init__(size, ins[0].dtype, ins, 0)
        self.emit = emit


class Moved(Whole):
    """Numbers taken from others; ``index`` counts through all of ``ins``."""

    def __init__(self, ins: Sequence[Node], index: np.ndarray) -> None:
        super().__init__(index.size, ins, Rows.move)
        self.index = index

    @property
    def is_part(self) -> bool:
        """Whether they are neighbours in one array."""
        return len(self.ins) == 1 and self.size > 1 and bool(np.all(np.diff(self.index) == 1))


# --- From a jaxpr to arrays ----------------------------------------------------------------------

Flat: TypeAlias = tuple[Node, tuple[int, ...]]
"""An array of the program: its numbers, and its shape."""


class Graph:
    """The arrays that a program of one row computes.

    Attributes:
        nodes: those that results depend on, in order.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        dtype: str,
        lanes: int,
        dense: Collection[int] = (),
        loose: Collection[int] = (),
    ) -> None:
        self.lanes = lanes
        self.all: list[Node] = []
        self.moves: dict[tuple[object, ...], Node] = {}
        ins: list[Flat] = []
        for k, a in enumerate(closed.in_avals):
            argument = self.add(Argument(a.size, dtype, k, 0, k in dense))
            ins.append((self.converted(argument, str(a.dtype)), a.shape))
        results = []
        for k, (node, shape) in enumerate(self.evaluate(closed.jaxpr, closed.consts, ins)):
            first = 0
            for part in self.parts(node) if k in loose else [node]:
                size = part.size if part is not node else math.prod(shape)
                if size:
                    results.append(self.add(Result(size, self.converted(part, dtype), k, first)))
                first += size
        self._settle(results)

    def add(self, node: Node) -> Node:
        """A new array."""
        if node.dtype not in REAL_TYPES | WHOLE_TYPES:
            raise NoRule(f"it uses {node.dtype}")
        self.all.append(node)
        return node

    def each(
        self,
        size: int,
        dtype: str,
        ins: Sequence[Node],
        do: Callable[[Vectors, list[Value]], Value],
        cheap: bool = True,
    ) -> Node:
        """An element-wise operation."""
        return self.add(Each(size, dtype, ins, do, cheap))

    def converted(self, node: Node, dtype: str) -> Node:
        """As another type."""
        old = node.dtype
        if old == dtype:
            return node
        return self.each(
            node.size, dtype, [node], lambda v, ins: v.converted(v.full(ins[0], old), old, dtype)
        )

    def spread(self, node: Node, size: int) -> Node:
        """With as many numbers as an array has."""
        if node.size == size:
            return node
        return self.each(size, node.dtype, [node], lambda v, ins: v.full(ins[0], node.dtype))

    def widened(self, x: Flat, shape: Sequence[int]) -> Node:
        """As an operation takes it that repeats axes of size 1."""
        node, own = x
        if node.size in (1, math.prod(shape)):
            return node
        places = np.broadcast_to(np.arange(node.size).reshape(own), shape)
        return self.taken([node], places.reshape(-1))

    def evaluate(self, jaxpr: Jaxpr, consts: Iterable[AnyArray], ins: Sequence[Flat]) -> list[Flat]:
        """The outputs of a jaxpr."""
        given = [self.constant(np.asarray(const)) for const in consts]
        variables = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(map(id, variables), [*given, *ins], strict=True))

        def read(atom: Atom) -> Flat:
            if is_literal(atom):
                return self.constant(np.asarray(atom.val, aval_of(atom).dtype))
            return known[id(atom)]

        for eqn in needed(jaxpr):
            args = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in INLINED:
                outs = self.evaluate(*callee(eqn), args)
            else:
                outs = self.equation(eqn, args)
            known.update(zip(map(id, eqn.outvars), outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, ins: list[Flat]) -> list[Flat]:
        """The outputs of an operation that is not a call."""
        name, outs = eqn.primitive.name, [aval_of(var) for var in eqn.outvars]
        nodes = [node for node, _ in ins]
        if name in ("copy", "copy_p", "pvary", "stop_gradient"):
            return ins
        if outs and not any(out.size for out in outs):
            return [self.constant(np.zeros(out.shape, out.dtype)) for out in outs]
        by_places = name in ("gather", "dynamic_slice")
        if name in MOVES or (by_places and all(isinstance(x, Constant) for x in nodes[1:])):
            return self.moved(eqn, ins)
        if outs and all(isinstance(x, Constant) for x in nodes):
            return [self.constant(a) for a in _computed(eqn, map(_array, ins))]
        if name in ELEMENTWISE:
            if reason := equation_refusal(eqn):
                raise NoRule(reason)
            nodes = [self.widened(x, outs[0].shape) for x in ins]
            size, dtype = max(x.size for x in nodes), str(outs[0].dtype)
            cheap = name in CHEAP or (name == "integer_pow" and eqn.params["y"] == 2)
            node = self.each(size, dtype, nodes, lambda v, a: v.equation(eqn, a), cheap)
        elif name in RULES and all(x.size for x in nodes):
            node = RULES[name](self, eqn, *ins)
        else:
            raise NoRule(f"it uses {name}")
        return [(node, outs[0].shape)]

    def constant(self, value: np.ndarray) -> Flat:
        """An array that is known."""
        flat = value.reshape(-1)
        if flat.size and np.all(flat == flat[0]):
            flat = np.asarray(flat[0])
        return self.add(Constant(flat)), value.shape

    def traced(self, f: Callable[..., Array], *ins: Flat) -> Node:
        """What a function in JAX makes of arrays."""
        with jax.enable_x64(True):
            closed = jax.make_jaxpr(f)(*(ShapeDtypeStruct(s, x.dtype) for x, s in ins))
        return self.evaluate(closed.jaxpr, closed.consts, ins)[0][0]

    # What moves numbers

    def moved(self, eqn: JaxprEqn, ins: list[Flat]) -> list[Flat]:
        """The outputs of an operation that does: what it makes of the places of numbers."""
        name = eqn.primitive.name
        sources: list[Node] = []
        places: list[np.ndarray] = []
        for node, shape in ins if name in MOVES else ins[:1]:
            index = np.arange(node.size) + sum(x.size for x in sources)
            sources.append(node)
            places.append(np.broadcast_to(index.reshape(() if node.size == 1 else shape), shape))
        if name in MOVES:
            found = MOVES[name](eqn, *places)
            outs = found if isinstance(found, list) else [found]
        else:
            outs = _computed(eqn, [*places, *map(_array, ins[1:])])
            if outs[0].min() < 0:
                raise NoRule(f"it uses {name} out of bounds")
        return [(self.taken(sources, out.reshape(-1)), out.shape) for out in outs]

    def taken(self, sources: Sequence[Node], index: np.ndarray) -> Node:
        """Numbers of other arrays, counted through all of them."""
        if not index.size:
            return self.constant(np.zeros(0, sources[0].dtype))[0]
        which, index = _places(sources, index)
        if any(isinstance(sources[k], Moved) for k in np.unique(which)):
            return self.taken(*_opened(sources, which, index))
        used = list(dict.fromkeys(sources[k] for k in np.unique(which)))
        starts = dict(zip(used, np.cumsum([0, *(x.size for x in used)]), strict=False))
        index = index + np.array([starts.get(x, 0) for x in sources])[which]
        if np.all(index == index[0]):
            index = index[:1]
        if all(isinstance(x, Constant) for x in used):
            values = [cast(Constant, x).value.reshape(-1) for x in used]
            return self.constant(np.concatenate(values)[index])[0]
        (source, *others), first = used, int(index[0])
        if not others and np.all(np.diff(index) == 1):
            if index.size == source.size:
                return source
            if isinstance(source, Argument) and source.extent and first % self.lanes == 0:
                at = source.first + first
                return self.add(Argument(index.size, source.dtype, source.number, at, False))
        key = (*used, index.tobytes())
        if key not in self.moves:
            self.moves[key] = self.add(Moved(used, index))
        return self.moves[key]

    def parts(self, node: Node) -> list[Node]:
        """Pieces that one array after another was put together from, if they are few."""
        if not isinstance(node, Moved):
            return [node]
        which, index = _places(node.ins, node.index)
        single = np.array([x.size == 1 for x in node.ins])[which]
        ends = (np.diff(which) != 0) | (np.diff(index) != np.where(single[1:], 0, 1))
        ends = [0, *(np.flatnonzero(ends) + 1).tolist(), node.size]
        if not 2 < len(ends) <= FEW + 1:
            return [node]
        pieces = [
            (self.taken(node.ins, node.index[begin:end]), end - begin)
            for begin, end in itertools.pairwise(ends)
        ]
        return [self.spread(piece, size) for piece, size in pieces]

    # When what is computed

    def _settle(self, results: Sequence[Node]) -> None:
        """Find stages as late as that costs nothing, and what has to be kept for later ones."""
        wanted = set(results)
        for node in reversed(self.all):
            if node in wanted:
                wanted.update(node.ins)
        self.nodes = [node for node in self.all if node in wanted]
        self.users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for x in node.ins:
                self.users[x].append(node)
        for node in reversed(self.nodes):
            if isinstance(node, Each) and node.extent:
                stage = min(u.stage - isinstance(u, Whole) for u in self.users[node])
                more = [x for x in {*node.ins} if isinstance(x, Each) and x.extent]
                more = [x for x in more if not self._is_read(x, x.stage)]
                if stage > node.stage and len(more) <= 1 - self._is_read(node, stage):
                    node.stage = stage
        costs: dict[Node, int] = {}  # of computing them again, in cheap operations
        for node in self.nodes:
            costs[node] = 0
            if isinstance(node, Each) and node.extent:
                again = 1 + sum(costs[x] for x in node.ins)
                costs[node] = again if node.cheap and again <= AGAIN else AGAIN + 1
            whole = any(isinstance(u, Whole) for u in self.users[node])
            if isinstance(node, Whole) or (whole and node.size > 1 and node.extent):
                node.kept = True
            elif costs[node] > AGAIN:
                node.kept = self._is_read(node, node.stage)
            if node.kept:
                costs[node] = 0

    def _is_read(self, node: Node, stage: int) -> bool:
        """After a stage."""
        return any(u.stage > stage or isinstance(u, Whole) for u in self.users[node])


def _array(flat: Flat) -> np.ndarray:
    """Of a constant."""
    value = cast(Constant, flat[0]).value
    return np.broadcast_to(value.reshape(() if value.size == 1 else flat[1]), flat[1])


def _computed(eqn: JaxprEqn, ins: Iterable[np.ndarray]) -> list[np.ndarray]:
    """An operation, done now."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return [np.asarray(a) for a in bind_as_traced(eqn, list(ins))]


def _places(sources: Sequence[Node], index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which array each number is in, and where in that."""
    starts = np.cumsum([0, *(x.size for x in sources)])
    which = np.searchsorted(starts, index, "right") - 1
    return which, index - starts[which]


def _opened(
    sources: Sequence[Node], which: np.ndarray, index: np.ndarray
) -> tuple[list[Node], np.ndarray]:
    """Where numbers are that are moved numbers themselves."""
    inner = [
        (x.ins, x.index) if isinstance(x, Moved) else ((x,), np.arange(x.size)) for x in sources
    ]
    out, found = np.zeros_like(index), list[Node]()
    for k, (ins, places) in enumerate(inner):
        out[which == k] = places[index[which == k]] + sum(x.size for x in found)
        found += ins
    return found, out


# Operations on arrays of places


def _reshape(eqn: JaxprEqn, a: np.ndarray) -> np.ndarray:
    return a.reshape(shape_of(eqn.outvars[0]))


def _broadcast(eqn: JaxprEqn, a: np.ndarray) -> np.ndarray:
    shape = shape_of(eqn.outvars[0])
    sizes = dict(zip(eqn.params["broadcast_dimensions"], a.shape, strict=True))
    return np.broadcast_to(a.reshape([sizes.get(k, 1) for k in range(len(shape))]), shape)


def _slice(eqn: JaxprEqn, a: np.ndarray) -> np.ndarray:
    bounds = (eqn.params[name] for name in ("start_indices", "limit_indices", "strides"))
    return a[
        tuple(itertools.starmap(slice, zip(*(b or (1,) * a.ndim for b in bounds), strict=True)))
    ]


def _split(eqn: JaxprEqn, a: np.ndarray) -> list[np.ndarray]:
    return np.split(a, np.cumsum(eqn.params["sizes"])[:-1], eqn.params["axis"])


def _pad(eqn: JaxprEqn, a: np.ndarray, value: np.ndarray) -> np.ndarray:
    out = np.full(shape_of(eqn.outvars[0]), value)
    config = zip(eqn.params["padding_config"], a.shape, strict=True)
    places = [low + np.arange(n) * (inside + 1) for (low, _, inside), n in config]
    there = [(p >= 0) & (p < n) for p, n in zip(places, out.shape, strict=True)]
    out[np.ix_(*(p[t] for p, t in zip(places, there, strict=True)))] = a[np.ix_(*there)]
    return out


MOVES: dict[str, Callable[..., np.ndarray | list[np.ndarray]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda eqn, *a: np.concatenate(a, eqn.params["dimension"]),
    "expand_dims": _reshape,
    "pad": _pad,
    "reshape": _reshape,
    "rev": lambda eqn, a: np.flip(a, eqn.params["dimensions"]),
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "transpose": lambda eqn, a: np.transpose(a, eqn.params["permutation"]),
}


# Operations on several elements


def _reduce(graph: Graph, eqn: JaxprEqn, x: Flat) -> Node:
    """In a loop's vectors; or of columns, or of rows; others become rows first."""
    (node, shape), name = x, eqn.primitive.name.removeprefix("reduce_")
    axes = [a for a in sorted(eqn.params["axes"]) if shape[a] > 1]
    kept = [a for a in range(len(shape)) if a not in axes and shape[a] > 1]
    depth = math.prod(shape[a] for a in axes)
    if depth == 1:
        return node
    if node.size == 1 and name == "sum":
        return graph.traced(lambda x: x * np.asarray(depth, x.dtype), (node, ()))
    node = graph.spread(node, math.prod(shape))
    if not kept:
        return graph.add(Total(node, name))
    _, _, two, reduce, _ = COMBINED[name]
    size = node.size // depth
    if depth > FEW and max(kept) < min(axes):
        return graph.add(Whole(size, [node], functools.partial(Rows.fold, name=name, depth=depth)))
    if depth > FEW and max(axes) < min(kept) and size > FEW:
        return graph.add(Whole(size, [node], functools.partial(Rows.heap, name=name, depth=depth)))

    def apart(x: Array) -> Array:
        ones = [a for a in range(len(shape)) if shape[a] == 1]
        x = lax.transpose(x.reshape(shape), (*ones, *kept, *axes)).reshape(size, depth)
        if depth > FEW:
            return reduce(x, (1,))
        return functools.reduce(two, [x[:, k] for k in range(depth)])

    return graph.traced(apart, (node, (node.size,)))


def _place(graph: Graph, eqn: JaxprEqn, x: Flat) -> Node:
    """The first place of those that equal the extremum, or are NaN."""
    (axis,), dtype = eqn.params["axes"], eqn.params["index_dtype"]
    find = lax.reduce_max if eqn.primitive.name == "argmax" else lax.reduce_min

    def place(x: Array) -> Array:
        places = lax.broadcasted_iota(dtype, x.shape, axis)
        there = (x == lax.expand_dims(find(x, (axis,)), (axis,))) | (x != x)
        last = lax.full_like(places, x.shape[axis] - 1)
        return lax.reduce_min(lax.select(there, places, last), (axis,))

    return graph.traced(place, x)


def _cumulative(graph: Graph, eqn: JaxprEqn, x: Flat) -> Node:
    (node, shape), axis, reverse = x, eqn.params["axis"], eqn.params["reverse"]
    name = eqn.primitive.name.removeprefix("cum")
    if shape[axis] == 1:
        return node
    if math.prod(shape[axis + 1 :]) > 1:
        run, last = cast(Callable[..., Array], COMBINED[name][4]), len(shape) - 1

        def along(x: Array) -> Array:
            return run(x.swapaxes(axis, last), last, reverse).swapaxes(axis, last)

        return graph.traced(along, x)
    emit = functools.partial(Rows.run, name=name, depth=shape[axis], reverse=reverse)
    return graph.add(Whole(math.prod(shape), [graph.spread(node, math.prod(shape))], emit))


Side: TypeAlias = tuple[Node, tuple[int, ...], list[list[int]], list[int]]
"""Of a product: its numbers, its shape, and batch, free and contracted axes with their sizes."""


def _dot(graph: Graph, eqn: JaxprEqn, *ins: Flat) -> Node:
    """Of ``(b, m, k)`` and ``(b, n, k)``, but for the order of axes; small ones element-wise."""
    contract, batch = eqn.params["dimension_numbers"]
    dtype = aval_of(eqn.outvars[0]).dtype
    sides: list[Side] = []
    for (node, shape), c, b in zip(ins, contract, batch, strict=True):
        free = [a for a in range(len(shape)) if a not in c and a not in b]
        groups = [list(b), free, list(c)]
        sizes = [math.prod(shape[a] for a in axes) for axes in groups]
        node = graph.spread(graph.converted(node, str(dtype)), math.prod(shape))
        sides.append((node, shape, groups, sizes))
    (b, m, k), (_, n, _) = (sizes for *_, sizes in sides)
    small = max(m, n) == 1 or max(m, n, k) < FEW or (k == 1 and min(m, n) < FEW)
    if small or dtype.kind != "f":

        def multiplied(*arrays: Array) -> Array:
            x, y = (
                lax.transpose(a, [*itertools.chain(*groups)]).reshape(sizes)
                for a, (_, _, groups, sizes) in zip(arrays, sides, strict=True)
            )
            x = lax.broadcast_in_dim(x, (b, m, n, k), (0, 1, 3))
            y = lax.broadcast_in_dim(y, (b, m, n, k), (0, 2, 3))
            return lax.reduce_sum(x * y, (3,))

        return graph.traced(multiplied, *((node, shape) for node, shape, *_ in sides))
    if turned := n < m:
        sides.reverse()
    out, other = _product(graph, sides), np.arange(b * m * n)
    if k == 1:  # either way round is as good; what is not asked for is never computed
        index = other.reshape(b, max(m, n), min(m, n)).swapaxes(1, 2).reshape(-1)
        graph.moves[out, index.tobytes()] = _product(graph, sides[::-1])
    index = other.reshape(b, min(m, n), max(m, n)).swapaxes(1, 2).reshape(-1)
    return graph.taken([out], index) if turned else out


def _product(graph: Graph, sides: Sequence[Side]) -> Node:
    """``out[b, m, n] = sum_k left[b, m, k] right[b, n, k]``."""
    right, of_right = _strided(graph, sides[1], True)
    left, of_left = _strided(graph, sides[0], of_right[1] == 1)
    b, m, k = sides[0][-1]
    n = sides[1][-1][1]
    emit = functools.partial(Rows.product, sizes=(b, m, n, k), strides=(of_left, of_right))
    return graph.add(Whole(b * m * n, [left, right], emit))


def _strided(graph: Graph, side: Side, columns: bool) -> tuple[Node, tuple[int, int, int]]:
    """One side of a product, with the strides of its axes: that of k is 1 unless ``columns``."""
    node, shape, (batch, free, contracted), (_, f, k) = side
    here, places = np.arange(node.size).reshape(shape), np.arange(node.size)
    if columns and np.array_equal(here.transpose(batch + contracted + free).reshape(-1), places):
        return node, (f * k, 1, f)
    index = here.transpose(batch + free + contracted).reshape(-1)
    return graph.taken([node], index), (f * k, k, 1)


RULES: dict[str, Callable[..., Node]] = {
    **dict.fromkeys((f"reduce_{name}" for name in COMBINED), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _place),
    **{f"cum{name}": _cumulative for name, (*_, run) in COMBINED.items() if run},
    "dot_general": _dot,
}


# --- From arrays to code -------------------------------------------------------------------------


class Rows:
    """A program that is emitted for one row at a time.

    Attributes:
        room: numbers of memory, of the builder's type, that it needs.
    """

    def __init__(
        self,
        builder: Builder,
        vectors: Vectors,
        closed: ClosedJaxpr,
        dense: Collection[int] = (),
        loose: Collection[int] = (),
    ) -> None:
        """Plan.

        Args:
            builder, vectors: what emits.
            closed: what `row_jaxpr` returns.
            dense: numbers of arguments that `emit` gets as addresses, where they are dense.
            loose: numbers of results that are written from any number on, not only from multiples
                of the lanes.
        """
        self.e, self.b, self.vectors = builder, builder.b, vectors
        self.lanes = builder.lanes
        self.nodes = Graph(closed, builder.dtype, self.lanes, dense, loose).nodes
        size = 0
        for node in self.nodes:
            if node.kept and node.size > 1 and not (isinstance(node, Moved) and node.is_part):
                node.at = size
                # A vector more: the last vector of a part of it may begin anywhere.
                size += up((node.size + 2 * self.lanes) * self._width(node.dtype), 64)
        self.room = size // self._width(builder.dtype)

    def emit(
        self, reads: Sequence[Read | ir.Value], writes: Sequence[Write], memory: ir.Value
    ) -> None:
        """Compute one row; results may be written before all arguments have been read."""
        self.reads, self.writes, self.memory = reads, writes, memory
        self.numbers: dict[Node, Value] = {}
        self.tables: dict[Node, ir.Value] = {}
        for stage in range(1 + max((node.stage for node in self.nodes), default=0)):
            now = [node for node in self.nodes if node.stage == stage]
            for node in now:
                if not node.extent:
                    self._number(node)
            for extent in dict.fromkeys(node.extent for node in now if node.extent):
                self._loop(stage, extent, [node for node in now if node.extent == extent])

    def _number(self, node: Node) -> None:
        """What is outside of loops: numbers of the row, each as a vector, and whole arrays."""
        if isinstance(node, Whole):
            node.emit(self, node)
        elif isinstance(node, Constant) and node.size == 1:
            self.numbers[node] = node.value
        elif isinstance(node, Argument) and node.size == 1:
            read = self.reads[node.number]
            one = self._one(node, 0) if isinstance(read, ir.Value) else read(node.first, 1)
            self.numbers[node] = self._shuffled(one, None, [0] * self.lanes)
        elif isinstance(node, Each):
            self.numbers[node] = node.do(self.vectors, [self.numbers[x] for x in node.ins])
        elif isinstance(node, Result):
            value = self.vectors.full(self.numbers[node.ins[0]], node.dtype)
            self.writes[node.number](node.first, 1, value)

    # Loops

    def _loop(self, stage: int, extent: int, nodes: Sequence[Node]) -> None:
        """All that runs over so many numbers in a stage."""
        whole, tail = extent // self.lanes * self.lanes, extent % self.lanes
        totals = [node for node in nodes if isinstance(node, Total)]
        sums = [self._neutral(node.name, node.dtype) for node in totals]
        if whole == self.lanes:
            sums = self._body(stage, nodes, 0, whole, sums)
        else:
            with self.e.fold(whole, sums, step=self.lanes) as (k, sums, following):
                following += self._body(stage, nodes, k, self.lanes, sums)
        if tail:
            sums = self._body(stage, nodes, whole, tail, sums)
        for node, total in zip(totals, sums, strict=True):
            self.numbers[node] = self._across(node.name, node.dtype, total)

    def _body(
        self, stage: int, nodes: Sequence[Node], first: Known, lanes: int, sums: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """One vector of each array, and what totals are then."""
        found: dict[Node, Value] = {}

        def read(node: Node) -> Value:
            if node.size == 1:
                return self.numbers[node]
            if node not in found:
                if not node.extent or (node.kept and node.stage < stage):
                    found[node] = self._load(node, first, lanes)
                elif isinstance(node, Argument):
                    place = self.e.add(first, node.first)
                    found[node] = cast(Read, self.reads[node.number])(place, lanes)
                else:
                    found[node] = cast(Each, node).do(self.vectors, [read(x) for x in node.ins])
            return found[node]

        new, old = [], iter(sums)
        for node in nodes:
            source = node.ins[0] if isinstance(node, Total | Result) else node
            value = self.vectors.full(read(source), node.dtype)
            if isinstance(node, Total):
                value = self._masked(node.name, node.dtype, value, lanes)
                new.append(self._two(node.name, node.dtype, next(old), value))
            elif isinstance(node, Result):
                self.writes[node.number](self.e.add(first, node.first), lanes, value)
            elif node.kept:
                self._store(node, first, value)
        return new

    # Vectors

    def _functions(self, dtype: str) -> Functions | Wholes:
        return self.vectors.reals[dtype] if dtype in REAL_TYPES else self.vectors.wholes[dtype]

    def _neutral(self, name: str, dtype: str) -> ir.Value:
        """What changes nothing."""
        number = COMBINED[name][1]
        if dtype == "bool" and math.isinf(number):
            number = number > 0
        elif dtype in WHOLE_TYPES and math.isinf(number):
            number = np.iinfo(dtype).max if number > 0 else np.iinfo(dtype).min
        return self.vectors.full(np.asarray(number), dtype)

    def _two(self, name: str, dtype: str, x: ir.Value, y: ir.Value) -> ir.Value:
        """Combined."""
        return self.vectors.rounded(getattr(self._functions(dtype), COMBINED[name][0])(x, y), dtype)

    def _masked(self, name: str, dtype: str, x: ir.Value, lanes: int) -> ir.Value:
        """Neutral but in the first lanes."""
        if lanes == self.lanes:
            return x
        order = [k + self.lanes * (k >= lanes) for k in range(self.lanes)]
        return self._shuffled(x, self._neutral(name, dtype), order)

    def _across(self, name: str, dtype: str, x: ir.Value) -> ir.Value:
        """All lanes combined, everywhere."""
        step = self.lanes // 2
        while step:
            other = self._shuffled(x, None, [k ^ step for k in range(self.lanes)])
            x, step = self._two(name, dtype, x, other), step // 2
        return x

    def _shuffled(self, x: ir.Value, y: ir.Value | None, order: Sequence[int]) -> ir.Value:
        """Lanes of two vectors."""
        y = ir.Constant(x.type, ir.Undefined) if y is None else y
        mask = ir.Constant(ir.VectorType(I32, len(order)), [I32(k) for k in order])
        return self.b.shuffle_vector(x, y, mask)

    # Memory

    def _kind(self, dtype: str) -> ir.VectorType:
        """Vectors in memory, where a bit is a byte."""
        return ir.VectorType(I8, self.lanes) if dtype == "bool" else self._functions(dtype).kind

    def _width(self, dtype: str) -> int:
        """Bytes of a number in memory."""
        element = self._kind(dtype).element
        wide = isinstance(element, ir.DoubleType)
        return element.width // 8 if isinstance(element, ir.IntType) else 4 + 4 * wide

    def _origin(self, node: Node) -> tuple[Node, int]:
        """The array that one is a part of, and from which number on."""
        if not (isinstance(node, Moved) and node.is_part):
            return node, 0
        origin, first = self._origin(node.ins[0])
        return origin, first + int(node.index[0])

    def _address(self, node: Node, index: Known) -> ir.Value:
        node, first = self._origin(node)
        if isinstance(node, Constant):
            if node not in self.tables:
                self.tables[node] = self._table(node.value, self._kind(node.dtype).element)
            begin = self.tables[node]
        elif isinstance(node, Argument) and node.dense:
            begin = cast(ir.Value, self.reads[node.number])
        else:
            begin = self.e.byte(self.memory, node.at)
        return self.e.byte(begin, self.e.mul(self.e.add(index, first), self._width(node.dtype)))

    def _table(self, values: np.ndarray, element: ir.Type) -> ir.Value:
        """Numbers in the module, and zeros behind them."""
        own = int if isinstance(element, ir.IntType) else float
        numbers = [ir.Constant(element, own(x)) for x in [*values, *[0] * self.lanes]]
        kind = ir.ArrayType(element, len(numbers))
        found = ir.GlobalVariable(self.e.module, kind, self.e.module.get_unique_name("table"))
        found.initializer = ir.Constant(kind, numbers)
        found.global_constant, found.linkage = True, "internal"
        return found

    def _load(self, node: Node, first: Known, lanes: int) -> ir.Value:
        """A vector of an array; behind ``lanes`` is anything."""
        origin, _ = self._origin(node)
        kind, align = self._kind(node.dtype), self._width(node.dtype)
        some = lanes < self.lanes and isinstance(origin, Argument) and origin.dense
        typ = ir.VectorType(kind.element, lanes) if some else kind
        x = self.b.load(self._address(node, first), typ=typ, align=align)
        if some:
            x = self._shuffled(x, None, [min(k, lanes - 1) for k in range(self.lanes)])
        return self._bits(node, x)

    def _one(self, node: Node, index: Known) -> ir.Value:
        """A number of an array, everywhere."""
        kind, align = self._kind(node.dtype), self._width(node.dtype)
        one = self.b.load(self._address(node, index), typ=kind.element, align=align)
        return self._bits(node, self.e.splat(one, kind))

    def _bits(self, node: Node, x: ir.Value) -> ir.Value:
        return self.b.trunc(x, self._functions(node.dtype).kind) if node.dtype == "bool" else x

    def _store(self, node: Node, first: Known, x: ir.Value, lanes: int | None = None) -> None:
        """A whole vector, before what stands behind it; or its first lanes."""
        if node.dtype == "bool":
            x = self.b.zext(x, self._kind(node.dtype))
        if lanes == 1:
            x = self.b.extract_element(x, I32(0))
        elif lanes is not None and lanes < self.lanes:
            x = self._shuffled(x, None, range(lanes))
        self.b.store(x, self._address(node, first), align=self._width(node.dtype))

    # What moves numbers

    def move(self, node: Whole) -> None:
        """Emit a `Moved`."""
        assert isinstance(node, Moved)
        which, index = _places(node.ins, node.index)
        if node.size == 1:
            self.numbers[node] = self._one(node.ins[0], int(index[0]))
        elif len(node.ins) == 1 and node.size > 64 * self.lanes:
            if not node.is_part:
                self._move_many(node)
        elif not node.is_part:
            for first in range(0, node.size, self.lanes):
                some = slice(first, first + self.lanes)
                places = list(zip(which[some].tolist(), index[some].tolist(), strict=True))
                self._store(node, first, self._gathered(node, places))

    def _gathered(self, node: Moved, places: Sequence[tuple[int, int]]) -> ir.Value:
        """A vector put together from as few as there can be."""
        out, left = None, set(places)
        while left:
            k, begin = min(left)
            source = node.ins[k]
            if source.size == 1:
                value = self.vectors.full(self.numbers[source], source.dtype)
            else:
                begin = max(min(begin, source.size - self.lanes), 0)
                value = self._load(source, begin, min(source.size, self.lanes))
            here = {(j, n) for j, n in left if j == k and n < begin + self.lanes}
            left -= here
            order = [n - begin if (j, n) in here else -1 for j, n in places]
            order += [-1] * (self.lanes - len(order))
            if out is None:
                out = self._shuffled(value, None, [max(lane, 0) for lane in order])
            else:
                order = [self.lanes + n if n >= 0 else lane for lane, n in enumerate(order)]
                out = self._shuffled(out, value, order)
        return out

    def _move_many(self, node: Moved) -> None:
        """By a table of places."""
        table, kind, width = (
            self._table(node.index, I32),
            self._kind(node.dtype),
            self._width(node.dtype),
        )
        with self.e.loop(node.size, step=self.lanes) as first:
            value = ir.Constant(kind, ir.Undefined)
            for lane in range(self.lanes):
                place = self.e.byte(table, self.e.mul(self.e.add(first, lane), 4))
                index = self.b.sext(self.b.load(place, typ=I32), I64)
                place = self._address(node.ins[0], index)
                one = self.b.load(place, typ=kind.element, align=width)
                value = self.b.insert_element(value, one, I32(lane))
            self._store(node, first, self._bits(node, value))

    # What combines numbers

    def fold(self, node: Whole, name: str, depth: int) -> None:
        """Rows of so many numbers, each into one."""
        (source,), dtype, lanes = node.ins, node.dtype, self.lanes
        whole, tail = depth // lanes * lanes, depth % lanes
        with self.e.loop(node.size) as row:
            begin, neutral = self.e.mul(row, depth), self._neutral(name, dtype)
            with self.e.fold(whole, [neutral], step=lanes) as (k, (total,), following):
                value = self._load(source, self.e.add(begin, k), lanes)
                following.append(self._two(name, dtype, total, value))
            if tail:
                value = self._load(source, self.e.add(begin, whole), tail)
                total = self._two(name, dtype, total, self._masked(name, dtype, value, tail))
            self._store(node, row, self._across(name, dtype, total))

    def heap(self, node: Whole, name: str, depth: int) -> None:
        """Columns of so many numbers, each into one."""
        for first in range(0, node.size, self.lanes):
            lanes, neutral = min(self.lanes, node.size - first), self._neutral(name, node.dtype)
            with self.e.fold(depth, [neutral]) as (k, (total,), following):
                place = self.e.add(self.e.mul(k, node.size), first)
                value = self._load(node.ins[0], place, lanes)
                following.append(self._two(name, node.dtype, total, value))
            self._store(node, first, total)

    def run(self, node: Whole, name: str, depth: int, reverse: bool) -> None:
        """Rows, each number combined with those before it: in doubling steps in a vector."""
        lanes, dtype, neutral = self.lanes, node.dtype, self._neutral(name, node.dtype)
        whole, tail = depth // lanes * lanes, depth % lanes

        def some(first: Known, count: int, before: ir.Value) -> ir.Value:
            x = self._masked(name, dtype, self._load(node.ins[0], first, count), count)
            step = 1
            while step < lanes:
                places = [k + step if reverse else k - step for k in range(lanes)]
                order = [k if 0 <= k < lanes else lanes for k in places]
                x, step = self._two(name, dtype, x, self._shuffled(x, neutral, order)), 2 * step
            x = self._two(name, dtype, x, before)
            self._store(node, first, x)
            return self._shuffled(x, None, [0 if reverse else lanes - 1] * lanes)

        with self.e.loop(node.size // depth) as row:
            begin, before = self.e.mul(row, depth), neutral
            if tail and reverse:
                before = some(self.e.add(begin, whole), tail, before)
            with self.e.fold(whole, [before], step=lanes) as (k, (before,), following):
                at = self.e.sub(whole - lanes, k) if reverse else k
                following.append(some(self.e.add(begin, at), lanes, before))
            if tail and not reverse:
                some(self.e.add(begin, whole), tail, before)

    def product(
        self,
        node: Whole,
        sizes: tuple[int, int, int, int],
        strides: tuple[tuple[int, int, int], tuple[int, int, int]],
    ) -> None:
        """``out[b, m, n] = sum_k left(b, m, k) right(b, n, k)``, by strides of those axes."""
        e, (batch, m, n, depth) = self.e, sizes
        (left_b, left_m, left_k), (right_b, right_n, right_k) = strides
        with e.loop(batch) as b, e.loop(m) as row:
            left = e.add(e.mul(b, left_b), e.mul(row, left_m))
            right, out = e.mul(b, right_b), e.mul(e.add(e.mul(b, m), row), n)
            if right_n == 1:
                self._columns(node, left, right, out, (n, depth), (left_k, right_k))
            else:
                self._dots(node, left, right, out, (n, depth), right_n)

    def _columns(
        self,
        node: Whole,
        left: Known,
        right: Known,
        out: Known,
        sizes: tuple[int, int],
        steps: tuple[int, int],
    ) -> None:
        """Vectors of columns; where there are few, in several sums each."""
        e, lanes, functions = self.e, self.lanes, self.vectors.reals[node.dtype]
        n, depth = sizes
        firsts = [
            max(min(k, n - lanes), 0) for k in range(0, n, lanes)
        ]  # the last is the end again
        for some in (firsts[k : k + FEW] for k in range(0, len(firsts), FEW)):
            size = len(some)
            apart = min(max(4 // size, 1), depth)

            def terms(k: Known, sums: Sequence[ir.Value], some: list[int] = some) -> list[ir.Value]:
                x = self._one(node.ins[0], e.add(left, e.mul(k, steps[0])))
                line = e.add(right, e.mul(k, steps[1]))
                vectors = [self._load(node.ins[1], e.add(line, at), min(n, lanes)) for at in some]
                return [functions.fma(x, y, s) for y, s in zip(vectors, sums, strict=True)]

            whole = depth // apart * apart
            zeros = [functions.c(0)] * (size * apart)
            with e.fold(whole, zeros, step=apart) as (k, sums, following):
                for p in range(apart):
                    following += terms(e.add(k, p), sums[p * size : (p + 1) * size])
            totals = sums[:size]
            for p in range(1, apart):
                totals = list(map(functions.add, totals, sums[p * size : (p + 1) * size]))
            for p in range(whole, depth):
                totals = terms(p, totals)
            for at, total in zip(some, totals, strict=True):
                value = self.vectors.rounded(total, node.dtype)
                self._store(node, e.add(out, at), value, min(n, lanes))

    def _dots(
        self,
        node: Whole,
        left: Known,
        right: Known,
        out: Known,
        sizes: tuple[int, int],
        step: int,
    ) -> None:
        """Vectors of terms, for as many columns at a time as there are lanes."""
        e, lanes, functions = self.e, self.lanes, self.vectors.reals[node.dtype]
        n, depth = sizes
        count, whole, tail = min(n, lanes), depth // lanes * lanes, depth % lanes
        with e.loop(n, step=count) as k:
            column = e.minimum(k, n - count)  # the last ones are the end again
            lines = [e.add(right, e.mul(e.add(column, j), step)) for j in range(count)]

            def terms(k: Known, some: int, sums: Sequence[ir.Value]) -> list[ir.Value]:
                x, *columns = (
                    self._masked("sum", node.dtype, self._load(side, e.add(at, k), some), some)
                    for side, at in zip(
                        [node.ins[0]] + [node.ins[1]] * count, [left, *lines], strict=True
                    )
                )
                return [functions.fma(x, y, s) for y, s in zip(columns, sums, strict=True)]

            with e.fold(whole, [functions.c(0)] * count, step=lanes) as (k, sums, following):
                following += terms(k, lanes, sums)
            sums = terms(whole, tail, sums) if tail else sums
            sums = [*sums, *[functions.c(0)] * (lanes - count)]
            even, odd = range(0, 2 * lanes, 2), range(1, 2 * lanes, 2)
            while len(sums) > 1:
                pairs = list(zip(sums[::2], sums[1::2], strict=True))
                sums = [
                    functions.add(self._shuffled(x, y, even), self._shuffled(x, y, odd))
                    for x, y in pairs
                ]
            value = self.vectors.rounded(sums[0], node.dtype)
            self._store(node, e.add(out, column), value, count)
