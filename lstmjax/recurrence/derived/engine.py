"""The derived engine: a gradient made for recurrences, from nothing but the cell's transition.

Time is cut into chunks. The forward pass keeps the carry after every step (or at the start of every
chunk only) and nothing else. The backward pass goes through the chunks from the end: it walks back
through the steps of a chunk, recomputing what it needs, with only what is truly sequential (the
vector-Jacobian product of the step, products with recurrent kernels), and adds up the gradient of
each kernel in one large product.

As nothing differentiates the loops, their bounds may depend on the data: chunks at either end in
which every row is masked are not run, at no cost in compiled shapes.

Inside, arrays are feature-major, ``(features, B)``: the blocks of the gates are then contiguous and
every product has the rows of the batch along the vector registers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, PyTree

from lstmjax.cells.base import Carry, Cell
from lstmjax.cells.contract import Arguments, not_mapped, shapes_of, transition_program
from lstmjax.precision import PRODUCT, make_dot, make_matmul
from lstmjax.recurrence.derivatives import or_zeros, with_derivative
from lstmjax.recurrence.derived.body import Body, Site, plain_product
from lstmjax.recurrence.derived.products import Product, in_one, zeros
from lstmjax.recurrence.engine import (
    Engine,
    How,
    Inputs,
    Outputs,
    Workload,
    cleared,
    platform,
    step_arguments,
)
from lstmjax.recurrence.scan import harmless, scan_over_time
from lstmjax.traced import (
    INLINED,
    AsTraced,
    Program,
    Runner,
    Value,
    callee,
    unknown,
    vary_alike,
)


@dataclasses.dataclass(frozen=True)
class Derived(Engine):
    """Exact first derivatives, faster and in less memory than differentiating a scan.

    Forward mode and all higher derivatives are those of the plain scan.

    Attributes:
        chunk: steps a chunk; by default what keeps a chunk's pre-activations in the cache.
        save: what the forward pass keeps: the carry after all ``"steps"``, or only at the starts
            of ``"chunks"``. The latter runs every chunk forward once more on the way back and
            needs memory for ``T / chunk + chunk`` carries; its chunk is √T by default.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> from lstmjax.recurrence import unroll
        >>> cell = LSTM(4)
        >>> params = cell.init(jax.random.key(0), input_size=3)
        >>> hs, final = unroll(cell, params, jnp.ones((2, 90, 3)), engine=Derived(chunk=30))
        >>> hs.shape
        (2, 90, 4)
    """

    chunk: int | None = None
    save: Literal["steps", "chunks"] = "steps"

    name: ClassVar[str] = "derived"

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.save not in ("steps", "chunks"):
            raise ValueError(f'save must be "steps" or "chunks", got {self.save!r}')

    def refusal(self, cell: Cell, work: Workload) -> str | None:
        """It differentiates the carry by hand, and cuts time into chunks of a known size."""
        carry = shapes_of(cell, 2, work.features).carry if work.args is None else work.args.carry
        for path, a in jax.tree_util.tree_leaves_with_path(carry):
            if not jnp.issubdtype(a.dtype, jnp.floating):
                name = jax.tree_util.keystr(path).lstrip(".")
                return f"{type(cell).__name__} carries {name}, which is {a.dtype}"
        if not (isinstance(work.steps, int) and isinstance(work.batch, int)):
            return "the length or the batch is not known when it is traced"
        return None

    def __call__(self, cell: Cell, inputs: Inputs, how: How) -> tuple[Outputs, Carry]:
        """Run ``cell`` over time."""
        args = step_arguments(cell, inputs)
        program = transition_program(cell, args)
        steps = inputs.xs.shape[0]
        body = Body(program, args)
        mapped = not_mapped(cell, args) is None and unknown(body.backward.closed.jaxpr) is None
        width = sum(site.out.aval.size for site in body.sites) or inputs.initial.h.size
        size = self._chunk_size(steps, width * inputs.xs.itemsize)
        plan = _Plan(cell, body, mapped, size, self.save, how)
        prepared = _in_chunks(inputs, size, how.reverse)
        # Values that the step closes over are inputs as well: they may have gradients.
        closed = list(program.consts)
        run = with_derivative(
            functools.partial(_run_chunks, plan),
            functools.partial(_run_chunks_back, plan),
            functools.partial(_plain, cell, program, how._replace(reverse=False)),
            lambda given: _run_chunks(plan, given, saving=False)[0],
        )
        outs, final = run((prepared, closed))
        outs = jax.tree.map(lambda a: a[:steps], outs)
        return (jax.tree.map(lambda a: a[::-1], outs) if how.reverse else outs), final

    def _chunk_size(self, steps: int, bytes_a_step: int) -> int:
        """The chunk asked for; else a divisor of ``steps`` near the one wanted, if there is one."""
        if self.chunk is not None:
            return min(self.chunk, steps)
        if self.save == "chunks":
            wanted = round(steps**0.5)
        else:
            budget = 2**20 if platform() == "cpu" else 2**25
            wanted = max(8, min(128, budget // bytes_a_step))
        if wanted >= steps:
            return steps
        near = [k for k in range(wanted // 2 + 1, 2 * wanted) if steps % k == 0]
        return min(near, key=lambda k: abs(k - wanted), default=wanted)


def _in_chunks(inputs: Inputs, size: int, reverse: bool) -> Inputs:
    """In the order of the run, and with masked steps behind, up to whole chunks."""
    steps, batch = inputs.xs.shape[:2]
    padding, mask = -steps % size, inputs.mask
    if padding and mask is None:
        mask = jnp.ones((steps, batch), bool)

    def prepare(a: Array) -> Array:
        a = a[::-1] if reverse else a
        return jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))) if padding else a

    noises = inputs.noises
    if noises is not None:
        places = jax.tree.map(prepare, (noises.steps, noises.sequences))
        noises = noises._replace(steps=places[0], sequences=places[1])
    over_time = jax.tree.map(prepare, (inputs.xs, inputs.inputs, mask, inputs.resets))
    xs, more, mask, resets = over_time
    return inputs._replace(xs=xs, inputs=more, noises=noises, mask=mask, resets=resets)


def _plain(
    cell: Cell, program: Program, how: How, given: tuple[Inputs, list[Array]]
) -> tuple[Outputs, Carry]:
    """The plain scan over the traced step: what JAX differentiates in our place."""
    inputs, closed = given
    product = functools.partial(plain_product, make_dot(how.precision))

    def transition(args: Arguments) -> Carry:
        return program.evaluate(jax.tree.leaves(args), closed, product)

    return scan_over_time(cell, transition, inputs, how)


class _Plan(NamedTuple):
    """What is fixed when a recurrence is traced; T is a multiple of the chunk."""

    cell: Cell
    body: Body
    mapped: bool
    chunk: int
    save: Literal["steps", "chunks"]
    how: How


Index = Any
"""A place in time: traced, or where `jax.disable_jit` runs loops in Python an int."""

_Given = tuple[Inputs, list[Array]]
"""The inputs, and the values that the step closes over."""


# --- The two passes ------------------------------------------------------------------------------


def _run_chunks(
    plan: _Plan, given: _Given, saving: bool = True
) -> tuple[tuple[Outputs, Carry], Carry | None]:
    """All steps forward: ``(outputs (T, B, ...), final)`` and what `_run_chunks_back` needs.

    That is the carry before every step and after the last, ``(T + 1, ..., B)``, or that before
    every chunk and after the last, ``(T / chunk + 1, ..., B)``.
    """
    inputs, _ = given
    steps, size = inputs.xs.shape[0], plan.chunk
    every_step = plan.save == "steps" and saving
    first, last = _active_chunks(plan, inputs)
    scale = size if every_step else 1  # places in `saved` a chunk
    rnn = _Recurrence(plan, given)
    carry = _rows_last(inputs.initial)

    def shown(carry: Carry) -> Outputs:
        return carry if plan.how.states else carry._replace(state=None)

    def run_chunk(k: Index, loop: Any) -> Any:
        def keep(kept: Any, new: Carry, i: Index) -> Any:
            (saved, outs), t = kept, k * size + i
            if every_step:
                return _write(saved, new, t + 1), outs
            return saved, _write(outs, shown(new), t)

        carry, (saved, outs) = rnn.walk(k, size, loop[0], loop[1], keep)
        if saving and not every_step:
            saved = _write(saved, carry, k + 1)
        return carry, (saved, outs)

    saved = _room(steps // size * scale + 1, carry) if saving else None
    if saving:
        saved = _write(saved, carry, first * scale)
    outs = None if every_step else _room(steps, shown(carry))
    carry, (saved, outs) = lax.fori_loop(first, last, run_chunk, (carry, (saved, outs)))
    if every_step:
        outs = jax.tree.map(lambda a: a[1:], shown(saved))
    outs = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 1), outs)
    return (cleared(inputs.mask, outs), _rows_first(carry)), saved


def _run_chunks_back(
    plan: _Plan, given: _Given, saved: Carry, d_results: tuple[Outputs, Carry], wanted: Any
) -> tuple[Inputs, list[Array]]:
    """All steps backward: the gradients of all inputs that are asked for."""
    inputs, _ = given
    d_outs, d_final = d_results
    first, last = _active_chunks(plan, inputs)
    rnn = _Recurrence(plan, given, wanted)
    size, count = plan.chunk, inputs.xs.shape[0] // plan.chunk

    def run_chunk(j: Index, loop: _Gradients) -> _Gradients:
        k = first + last - 1 - j
        before, at = saved, k * size
        if plan.save == "chunks":
            before, at = rnn.carries_before(k, _at(saved, k)), 0
        return rnn.walk_back(k, loop, before, at, d_leaves)

    carry: Any = jax.tree.structure(inputs.initial)
    others = [None] * (carry.num_leaves - 1)
    d_leaves = carry.flatten_up_to(d_outs) if plan.how.states else [d_outs.h, *others]
    d_carry = _rows_last(or_zeros(d_final, inputs.initial))
    loop = lax.fori_loop(first, last, run_chunk, rnn.no_gradients(d_carry, count))
    return rnn.gradients(loop)


def _active_chunks(plan: _Plan, inputs: Inputs) -> tuple[Any, Any]:
    """The first chunk with anything to do, and the one after the last."""
    mask, resets = inputs.mask, inputs.resets
    count = inputs.xs.shape[0] // plan.chunk
    if mask is None:
        return 0, count
    active = mask if resets is None else mask | resets
    return _bounds(active.reshape(count, -1).any(1))


@jax.custom_batching.custom_vmap
def _bounds(active: Bool[Array, " chunks"]) -> tuple[Array, Array]:
    """The first of the chunks that are active, and the one after the last."""
    count = active.shape[0]
    first = jnp.argmax(active)
    last = count - jnp.argmax(active[::-1])
    return first, jnp.where(active.any(), last, first)


@_bounds.def_vmap
def _bounds_of_all(
    axis_size: int, in_batched: list[bool], active: Bool[Array, "mapped chunks"]
) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    """Mapped recurrences run the same chunks: with bounds of its own each would copy its arrays."""
    return _bounds(active.any(0)), (False, False)


# No place is negative where it counts (a mapped loop that has ended may go on below zero, and what
# it computes is thrown away): told so, JAX leaves out the arithmetic that would wrap them.


def _at(tree: PyTree, place: Any) -> PyTree:
    def at(a: Array) -> Array:
        return lax.dynamic_index_in_dim(a, place, keepdims=False, allow_negative_indices=False)

    return jax.tree.map(at, tree)


def _chunk(a: Array, first: Any, size: int) -> Array:
    return lax.dynamic_slice_in_dim(a, first, size, allow_negative_indices=False)


def _write(target: PyTree, part: PyTree, place: Any, axis: int = 0) -> PyTree:
    def write(a: Array, b: Array) -> Array:
        b = b.astype(a.dtype)
        return lax.dynamic_update_index_in_dim(a, b, place, axis, allow_negative_indices=False)

    return jax.tree.map(write, target, part)


def _room(places: int, one: PyTree) -> PyTree:
    """Zeros for so many of what is in the tree."""
    return jax.tree.map(lambda a: zeros((places, *a.shape), a), one)


def _rows_last(tree: PyTree) -> PyTree:
    """``(B, H)`` to ``(H, B)``."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), tree)


def _rows_first(tree: PyTree) -> PyTree:
    """And back."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), tree)


def _where(rows: Bool[Array, " B"], yes: PyTree, no: PyTree) -> PyTree:
    """`select_rows` for feature-major arrays."""
    return jax.tree.map(lambda a, b: jnp.where(rows, a, b), yes, no)


def _floating(a: Array) -> bool:
    return bool(jnp.issubdtype(a.dtype, jnp.floating))


def _like(a: Array) -> tuple[tuple[int, ...], Any]:
    """Shape and type of the gradient of an array; of whole numbers it is a zero."""
    return (a.shape, a.dtype) if _floating(a) else ((), jnp.float32)


class _Gradients(NamedTuple):
    """What the backward pass has so far.

    Attributes:
        carry: of the carry, rows last.
        start: of what a reset puts in place of it; None where nobody asks.
        constants: of what else the loop takes from the parameters.
        sums: of the products' parameters, as `Product` keeps them.
        xs: of the input through products, ``(T / chunk, D, chunk B)``; None where nobody asks.
        direct: of the input and of ``step_inputs``, without products, ``(T, n, B)``.
        rooms: whose contents do not matter: of products' results for a chunk and for a step, of
            left sides for a chunk.
    """

    carry: Carry
    start: Carry | None
    constants: list[Array]
    sums: list[Any]
    xs: Array | None
    direct: list[Array | None]
    rooms: Any


class _Recurrence:
    """A cell's recurrence, chunk by chunk, there and back; carries have their rows last."""

    def __init__(self, plan: _Plan, given: _Given, wanted: Any = None) -> None:
        self.plan, self.body, self.size = plan, plan.body, plan.chunk
        self.inputs, closed = given
        self.xs, self.mask, self.resets = (self.inputs.xs, self.inputs.mask, self.inputs.resets)
        self.start = _rows_last(self.inputs.start)
        self.wanted = wanted

        def before(params: PyTree, closed: list[Array]) -> Any:
            return self.body.before(params, closed, whole=not plan.mapped)

        given_before = self.inputs.params, list(closed)
        if wanted is None:
            (weights, biases, self.constants), self.pull_back = before(*given_before), None
        else:
            (weights, biases, self.constants), self.pull_back = jax.vjp(before, *given_before)
        self.weights, self.biases = weights, biases
        by_weight = dict(zip(map(id, self.body.weights), weights, strict=True))
        by_bias = dict(zip(map(id, self.body.biases), biases, strict=True))
        make = functools.partial(Product, make_matmul(plan.how.precision, self.xs.dtype))
        narrow = jnp.bfloat16 if plan.how.precision == "bfloat16" else self.xs.dtype
        self.products = [
            make(narrow, s, [by_weight[id(f.weight)] for f in s.factors], by_bias.get(id(s.bias)))
            for s in self.body.sites
        ]
        self.structure = jax.tree.structure(self.inputs.initial)

    # There

    def runner(self, valid: Array | None = None, sums: bool = False) -> Runner:
        """Runs a step."""
        return Runner("last", sums, valid) if self.plan.mapped else AsTraced()

    def drawn(self, k: Index) -> list[Array]:
        """The noise of a chunk, ``(chunk, n, B)`` each."""
        noises = self.inputs.noises
        if noises is None:
            return []
        first = k * self.size
        drawn = noises.draw(self.plan.cell, self.xs.dtype, first, self.size)
        return [jnp.moveaxis(a, 1, -1) for a in jax.tree.leaves(drawn)]

    def arguments(self, t: Index, carry: Carry, noise: list[Array]) -> list[Array]:
        """Of step ``t``, rows last."""
        x, more = _at((self.xs, self.inputs.inputs), t)
        return [x.T, *jax.tree.leaves(carry), *(a.T for a in jax.tree.leaves(more)), *noise]

    def begun(self, t: Index, carry: Carry) -> Carry:
        """The carry that step ``t`` starts from, given that of the step before."""
        return carry if self.resets is None else _where(_at(self.resets, t), self.start, carry)

    def step(self, t: Index, carry: Carry, noise: list[Array]) -> Carry:
        """The carry after step ``t``."""
        runner = self.runner()

        def product(site: Site, left: list[Value]) -> Value:
            found = self.products[self.body.sites.index(site)]
            return runner.enter(found.forward(found.leave(runner, left)), site.row)

        args = self.arguments(t, carry, noise)
        outs = self.body.forward(runner, self.constants, args, product)
        return jax.tree.unflatten(self.structure, outs)

    def walk(
        self,
        k: Index,
        steps: int,
        carry: Carry,
        kept: Any,
        keep: Callable[[Any, Carry, Array], Any],
    ) -> tuple[Carry, Any]:
        """Run so many steps of chunk ``k``, and ``keep(kept, new carry, i)`` after the i-th."""
        noise = self.drawn(k)

        def step(i: Index, loop: tuple[Carry, Any]) -> tuple[Carry, Any]:
            t = k * self.size + i
            carry = self.begun(t, loop[0])
            new = self.step(t, carry, _at(noise, i))
            if self.mask is not None:
                new = _where(_at(self.mask, t), new, carry)
            return new, keep(loop[1], new, i)

        return lax.fori_loop(0, steps, step, (carry, kept))

    def carries_before(self, k: Index, carry: Carry) -> Carry:
        """The carries before all steps of a chunk, from the first of them."""
        kept = _write(_room(self.size, carry), carry, 0)
        steps = self.size - 1
        return self.walk(k, steps, carry, kept, lambda a, new, i: _write(a, new, i + 1))[1]

    # And back

    def no_gradients(self, d_carry: Carry, count: int) -> _Gradients:
        """Zeros to add the gradients of `walk_back` to."""
        steps, batch, features = self.xs.shape
        inputs = self.inputs
        wanted_x = self.wanted[0].xs
        through = any(f.kind == "x" for site in self.body.sites for f in site.factors)
        xs = zeros((count, features, self.size * batch), self.xs) if wanted_x and through else None
        direct = [
            zeros((steps, a.shape[2], batch), a) if want and reads else None
            for a, want, reads in zip(
                (inputs.xs, *jax.tree.leaves(inputs.inputs)),
                (wanted_x, *jax.tree.leaves(self.wanted[0].inputs)),
                self.body.backward.moves_inputs(len(inputs.inputs)),
                strict=True,
            )
        ]
        start = None
        if inputs.start is not None and any(jax.tree.leaves(self.wanted[0].start)):
            start = jax.tree.map(jnp.zeros_like, self.start)
        constants = [vary_alike(jnp.zeros(*_like(a)), self.xs) for a in self.constants]
        rooms = (
            [p.room(self.size, batch, self.xs) for p in self.products],
            [p.room(1, batch, self.xs)[:, 0] for p in self.products],
            [
                zeros((self.products[n].lefts[j], self.size, batch), self.xs)
                for n, j in self.body.backward.recorded
            ],
        )
        sums = [p.no_gradient(self.xs) for p in self.products]
        return _Gradients(d_carry, start, constants, sums, xs, direct, rooms)

    def walk_back(
        self, k: Index, loop: _Gradients, before: Carry, at: Any, d_outs: list[Any]
    ) -> _Gradients:
        """Run chunk ``k`` backward, the carries before its steps being those from ``at`` on."""
        noise = self.drawn(k)

        def step(j: Index, loop: _Gradients) -> _Gradients:
            i = self.size - 1 - j
            t = k * self.size + i
            return self.step_back(t, i, loop, _at(before, at + i), _at(noise, i), d_outs)

        loop = lax.fori_loop(0, self.size, step, loop)
        results, _, recorded = loop.rooms
        x, h = _chunk(self.xs, k * self.size, self.size), _chunk(before.h, at, self.size)
        if self.resets is not None:
            reset = _chunk(self.resets, k * self.size, self.size)
            h = jnp.where(reset[:, None], self.start.h, h)
        kept = dict(zip(self.body.backward.recorded, recorded, strict=True))
        own = {"x": x, "h": h.swapaxes(1, 2)}  # each (chunk, B, n)
        sums, d_x = [], None
        for number, (product, d) in enumerate(zip(self.products, results, strict=True)):
            lefts = [
                jnp.moveaxis(kept[number, place], 0, -1) if f.kind == "other" else own[f.kind]
                for place, f in enumerate(product.site.factors)
            ]
            sums.append(jax.tree.map(jnp.add, loop.sums[number], product.shares(d, lefts)))
            if loop.xs is not None and (share := product.input_share(d)) is not None:
                d_x = share if d_x is None else d_x + share
        xs = loop.xs if d_x is None else _write(loop.xs, d_x, k)
        return loop._replace(sums=sums, xs=xs)

    def step_back(
        self,
        t: Index,
        i: Index,
        loop: _Gradients,
        carry: Carry,
        noise: list[Array],
        d_outs: list[Any],
    ) -> _Gradients:
        """Take one step back."""
        results, rows, recorded = loop.rooms
        carry, d_new = self.begun(t, carry), loop.carry
        outside = [None if d is None else jnp.moveaxis(_at(d, t), 0, -1) for d in d_outs]
        leaves = zip(jax.tree.leaves(d_new), outside, strict=True)
        d_leaves = [a if b is None else a + b for a, b in leaves]
        valid = None if self.mask is None else _at(self.mask, t)
        given = carry
        if valid is not None and not self.plan.mapped:  # where sums over rows cannot leave any out
            d_leaves = [jnp.where(valid, d, 0) for d in d_leaves]
            given = _rows_last(harmless(valid, _rows_first(carry)))
        back = _StepBack(self, valid, rows)
        d = back(self.arguments(t, given, noise), d_leaves)
        d_old = jax.tree.unflatten(self.structure, d.carry)
        direct = [
            None if room is None else _write(room, a, t)
            for room, a in zip(loop.direct, (d.x, *d.inputs), strict=True)
        ]
        start = loop.start
        if valid is not None:
            d_old = _where(valid, d_old, loop.carry)
        if self.resets is not None:
            reset, zeros = _at(self.resets, t), jax.tree.map(jnp.zeros_like, d_old)
            if start is not None:
                start = jax.tree.map(jnp.add, start, _where(reset, d_old, zeros))
            d_old = _where(reset, zeros, d_old)
        results = [_write(room, a, i, axis=1) for room, a in zip(results, d.results, strict=True)]
        recorded = [_write(room, a, i, axis=1) for room, a in zip(recorded, d.left, strict=True)]
        constants = [a + b for a, b in zip(loop.constants, d.constants, strict=True)]
        return _Gradients(
            d_old, start, constants, loop.sums, loop.xs, direct, (results, back.rows, recorded)
        )

    def gradients(self, loop: _Gradients) -> tuple[Inputs, list[Array]]:
        """Those of all inputs, from what the chunks gave."""
        inputs = self.inputs
        d_weights, d_biases = (
            {id(var): jnp.zeros_like(a) for var, a in zip(variables, arrays, strict=True)}
            for variables, arrays in (
                (self.body.weights, self.weights),
                (self.body.biases, self.biases),
            )
        )
        for product, sums in zip(self.products, loop.sums, strict=True):
            weights, bias = product.turned(sums)
            for factor, d in zip(product.site.factors, weights, strict=True):
                d_weights[id(factor.weight)] += d
            if bias is not None:
                d_biases[id(product.site.bias)] += bias
        assert self.pull_back is not None
        d_constants = [
            d if _floating(a) else np.zeros(a.shape, jax.dtypes.float0)
            for a, d in zip(self.constants, loop.constants, strict=True)
        ]
        d_params, d_closed = self.pull_back(
            (list(d_weights.values()), list(d_biases.values()), d_constants)
        )
        d_xs = None
        if loop.xs is not None:
            count, features, _ = loop.xs.shape
            d_xs = loop.xs.reshape(count, features, self.size, -1)
            d_xs = d_xs.transpose(0, 2, 3, 1).reshape(self.xs.shape)
        direct = [None if a is None else a.swapaxes(1, 2) for a in loop.direct]
        if direct[0] is not None:
            d_xs = direct[0] if d_xs is None else d_xs + direct[0]
        d_inputs = jax.tree.unflatten(jax.tree.structure(inputs.inputs), direct[1:])
        d_given = Inputs(
            d_params,
            jnp.zeros_like(self.xs) if d_xs is None else d_xs,
            _rows_first(loop.carry),
            None if inputs.start is None else _rows_first(loop.start or self.start),
            or_zeros(d_inputs, inputs.inputs),
            jax.tree.map(lambda a: None, inputs.noises),
            None,
            None,
        )
        return d_given, d_closed


class _StepGradients(NamedTuple):
    """What one step back gives, rows last.

    Attributes:
        constants: summed over the rows that count.
        x, carry, inputs: of the arguments.
        results: of the sites' results, ``(n, B)``, zero in rows that do not count.
        left: left sides that are recorded, ``(n, B)``.
    """

    constants: list[Array]
    x: Array
    carry: list[Array]
    inputs: list[Array]
    results: list[Array]
    left: list[Array]


class _StepBack:
    """The derivative of one step, its products being those of a recurrence."""

    def __init__(self, rnn: _Recurrence, valid: Array | None, rows: list[Array]) -> None:
        self.rnn, self.valid, self.rows = rnn, valid, list(rows)
        self.runner = rnn.runner(valid, sums=True)
        self.runner.hook = self.take

    def __call__(self, arguments: list[Array], d_new: list[Array]) -> _StepGradients:
        """Of the arguments and the gradient of the new carry."""
        rnn, runner, program = self.rnn, self.runner, self.rnn.body.backward
        values = [runner.enter(a, None) for a in rnn.constants]
        places = zip(arguments, rnn.body.rows, strict=True)
        values += [runner.enter(a, row) for a, row in places]
        values += [runner.enter(a, 0) for a in d_new]
        outs = runner.evaluate(program.closed.jaxpr, program.closed.consts, values)
        pairs = [*zip(outs, program.closed.jaxpr.outvars, strict=True)]
        sizes = len(rnn.constants), len(arguments), len(rnn.body.sites)
        first, second, third = (sum(sizes[: k + 1]) for k in range(3))
        constants = [
            runner.sum_to(value, var.aval, _like(a)[0])
            for (value, var), a in zip(pairs[:first], rnn.constants, strict=True)
        ]
        d_arguments = [runner.leave(v, 0, var.aval) for v, var in pairs[first:second]]
        results = [
            self.result(number, value, var)
            for number, (value, var) in enumerate(pairs[second:third])
        ]
        recorded = zip(program.recorded, pairs[third:], strict=True)
        left = [rnn.products[n].leave(runner, [v], k)[0] for (n, k), (v, _) in recorded]
        carries, inputs = len(d_new), len(rnn.inputs.inputs)
        return _StepGradients(
            constants,
            d_arguments[0],
            d_arguments[1 : 1 + carries],
            d_arguments[1 + carries : 1 + carries + inputs],
            results,
            [a.reshape(-1, a.shape[-1]) for a in left],
        )

    def result(self, number: int, value: Value, var: Any) -> Array:
        """The gradient of a site's result."""
        if id(var) in self.rnn.body.backward.pieces and self.rnn.plan.mapped:
            return self.rows[number]
        d = self.runner.leave(value, self.rnn.body.sites[number].row, var.aval)
        d = d.reshape(-1, d.shape[-1])
        return d if self.valid is None else jnp.where(self.valid, d, 0)

    def take(self, eqn: Any, ins: list[Value]) -> list[Value] | None:
        """Products, and the gradients of their results that come in pieces."""
        name = str(eqn.params.get("name", ""))
        if name.startswith(f"{PRODUCT}:"):
            _, site, which = name.split(":")
            return self.product(self.rnn.products[int(site)], which, eqn, ins)
        if eqn.primitive.name in INLINED:  # nothing is differentiated any more
            return self.runner.evaluate(*callee(eqn), ins)
        number = self.rnn.body.backward.pieces.get(id(eqn.outvars[0])) if eqn.outvars else None
        if number is None or not self.rnn.plan.mapped:
            return None
        pieces = [self.runner.leave(v, 0, a.aval) for v, a in zip(ins, eqn.invars, strict=True)]
        if self.valid is not None:
            pieces = [jnp.where(self.valid, a, 0) for a in pieces]
        self.rows[number] = in_one(self.rows[number], pieces)
        return [Value(self.rows[number], 0)]

    def product(self, product: "Product", which: str, eqn: Any, ins: list[Value]) -> list[Value]:
        """A product, or the gradient of its left sides from that of its result."""
        runner, row = self.runner, product.site.row
        if which == "forward":
            return [runner.enter(product.forward(product.leave(runner, ins)), row)]
        d = runner.leave(ins[0], row, eqn.invars[0].aval)
        found = product.back(d.reshape(-1, d.shape[-1]))
        return [runner.enter(a, place) for a, place in found]
