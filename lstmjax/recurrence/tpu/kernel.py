"""The bodies of the TPU kernels, generic in a cell's ``step``; `tpu.calls` calls them.

One kernel runs a whole sequence forward, one backward. Their grid is (blocks of rows, chunks of
time); weights and carry stay in VMEM from chunk to chunk. Kept for the gradient are h of every
step and the carry on the way into each chunk, nothing else. The backward kernel takes a chunk in
three loops: it sweeps forward for the state, where all h are known by now; it walks back with
`jax.vjp` of the step; it takes the weight gradients as products over many steps at once.

Shapes: ``R`` rows of a block, ``C`` steps of a chunk, ``D`` features, ``H`` units, ``G`` gates.
``L`` is ``H`` rounded up to whole groups of 128 lanes: each gate starts at such a group.
``P`` is the number of bfloat16 parts that an operand of a product is split into. ``W`` is ``H``,
or fewer units where a cell has heads: those of a group, which is multiplied by itself.
"""

import functools
from collections.abc import Sequence
from types import EllipsisType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import PyTree

from lstmjax.cells.base import Carry
from lstmjax.recurrence.refs import Index, Ref
from lstmjax.recurrence.split import split
from lstmjax.recurrence.step import StepArguments
from lstmjax.recurrence.tpu.plan import LANES, TPUPlan

Block: TypeAlias = Array | Ref
"""An array outside of a kernel, a reference to a block of it inside."""

Carries: TypeAlias = PyTree
"""A `Carry` of them, or None."""


class Operands(NamedTuple):
    """What a recurrence depends on.

    Attributes:
        xs: ``(T, B, D)``.
        kernel: ``(D, G*L)``, with a leading ``P`` once it is split.
        recurrent_kernel: ``(W, G*L)``, likewise.
        bias: ``(1, G*L)``.
        recurrent_bias: ``(1, G*L)`` where the cell has its parts apart.
        units: per-unit parameters by name, ``(1, H)``.
        others: the cell's ``step_params`` by name.
        steps: its ``step_inputs`` and noise of each step, ``(T, B, n)``, in two dicts.
        initial: `Carry` of ``(B, H)``.
        start: what a reset puts in place of the carry, like ``initial``.
        valid: 1 on valid steps, ``(B/R, T/C, R, C)``.
        reset: 1 where a sequence begins, likewise.
    """

    xs: Block
    kernel: Block
    recurrent_kernel: Block
    bias: Block
    recurrent_bias: Block | None
    units: dict[str, Block]
    others: dict[str, Block]
    steps: tuple[dict[str, Block], dict[str, Block]]
    initial: Carries
    start: Carries
    valid: Block | None
    reset: Block | None

    @property
    def parameters(self) -> tuple[PyTree, ...]:
        """From the kernel to ``others``."""
        return self[1:7]


class Gradients(NamedTuple):
    """Of `Operands`; those of parameters are sums over a block of rows, ``(B/R, ...)``.

    Attributes:
        xs: None where nobody asks.
        steps: of the step inputs; None where there are none.
    """

    xs: Ref | None
    kernel: Ref
    recurrent_kernel: Ref
    bias: Ref
    recurrent_bias: Ref | None
    units: dict[str, Ref]
    others: dict[str, Ref]
    steps: dict[str, Ref] | None
    initial: Carries

    @property
    def parameters(self) -> tuple[PyTree, ...]:
        """From the kernel to ``others``."""
        return self[1:7]


class Kept(NamedTuple):
    """Scratch of the backward kernel: what one of its loops leaves to the next.

    Attributes:
        x: parts of the inputs, ``(P, C, R, D)``.
        h: parts of h_{t-1}, ``(P, C, R, H)``.
        pre: pre-activations, ``(C, R, G*L)`` each: the sum, or input part and recurrent part.
        carry: the state before each step, ``(C, R, H)``; h only where the step uses it.
        d_pre: parts of the gradient of ``pre``, ``(P, C, R, G*L)`` each.
        d_carry: gradient of the carry between two chunks, ``(R, H)``.
    """

    x: Ref
    h: Ref
    pre: tuple[Ref, ...]
    carry: Carries
    d_pre: tuple[Ref, ...]
    d_carry: Carries


# --- Products ------------------------------------------------------------------------------------


def product(a: Sequence[Array], b: Sequence[Array], axes: tuple[int, int] = (1, 0)) -> Array:
    """The product of two matrices in parts, ``axes`` contracted, small terms first.

    Terms that lie below the precision of the whole are left out: of three parts each, those that
    `jax.lax.Precision.HIGHEST` leaves out as well.
    """
    terms = [(i, n - i) for n in reversed(range(len(a))) for i in range(n + 1)]
    if a[0].shape[axes[0]] <= LANES // 2:  # the matrix unit is deeper than that: one behind another
        a = [jnp.concatenate([a[i] for i, _ in terms], axes[0])]
        b = [jnp.concatenate([b[j] for _, j in terms], axes[1])]
        terms = [(0, 0)]
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return functools.reduce(
        jnp.add,
        (lax.dot_general(a[i], b[j], dims, preferred_element_type=jnp.float32) for i, j in terms),
    )


# --- One step ------------------------------------------------------------------------------------


def read(refs: PyTree) -> PyTree:
    """The whole contents of every reference in a tree."""
    return jax.tree.map(lambda ref: ref[...], refs)


def write(refs: PyTree, values: PyTree, index: Index | EllipsisType = ...) -> None:
    """Store a tree of values, each at ``index`` of its reference."""

    def store(ref: Ref, value: Array) -> None:
        ref[index] = value

    jax.tree.map(store, refs, values)


def _flag(ref: Block, t: Index) -> Array:
    """Column ``t`` of a chunk's flags, ``(R, 1)``."""
    flags = ref[0, 0]
    column = lax.broadcasted_iota(jnp.int32, flags.shape, 1) == t
    return jnp.sum(jnp.where(column, flags, 0.0), axis=1, keepdims=True)


def _choose(flag: Array, yes: PyTree, no: PyTree) -> PyTree:
    def choose(a: Array, b: Array) -> Array:
        return jnp.where(jnp.broadcast_to(flag, a.shape) > 0, a, b)

    return jax.tree.map(choose, yes, no)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def _entered(ins: Operands, t: Index, carry: Carry) -> Carry:
    """The carry that step ``t`` starts from."""
    return carry if ins.reset is None else _choose(_flag(ins.reset, t), read(ins.start), carry)


def _left(ins: Operands, t: Index, new: Carry, old: Carry) -> Carry:
    """The carry that step ``t`` leaves."""
    return new if ins.valid is None else _choose(_flag(ins.valid, t), new, old)


def _pre_activations(
    plan: TPUPlan, ins: Operands, x: Sequence[Array], h: Sequence[Array]
) -> tuple[Array, ...]:
    """``(R, G*L)`` each: the sum, or the input part and the recurrent part."""
    parts = range(plan.parts)
    pre_x = product(x, [ins.kernel[p] for p in parts]) + ins.bias[...]
    pre_h = _recurrent(plan, h, ins.recurrent_kernel)
    if ins.recurrent_bias is not None:
        return pre_x, pre_h + ins.recurrent_bias[...]
    return (pre_x + pre_h,)


def _recurrent(plan: TPUPlan, h: Sequence[Array], kernel: Block) -> Array:
    """The recurrent product, ``(R, G*L)``."""
    found = []
    for units, columns in plan.groups:
        weights = _weights(plan, kernel, units, columns)
        found.append(_gates(plan, product([part[:, units] for part in h], weights)))
    return jnp.concatenate([a for gate in zip(*found, strict=True) for a in gate], axis=1)


def _recurrent_back(plan: TPUPlan, d_pre: Ref, t: Index, kernel: Block) -> Array:
    """Through the recurrent product, to what it sees of h."""
    found = []
    for units, columns in plan.groups:
        weights = _weights(plan, kernel, units, columns)
        d_gates = [_side_by_side(d_pre, (p, t, slice(None)), columns) for p in range(plan.parts)]
        found.append(product(d_gates, weights, (1, 1)))
    return jnp.concatenate(found, axis=1)


def _weights(plan: TPUPlan, kernel: Block, units: slice, columns: Sequence[slice]) -> list[Array]:
    """The parts of a group's own recurrent kernel, gates side by side."""
    rows = slice(units.stop - units.start)
    return [_side_by_side(kernel, (p, rows), columns) for p in range(plan.parts)]


def _side_by_side(a: Block, index: tuple[Index | slice, ...], columns: Sequence[slice]) -> Array:
    return jnp.concatenate([a[*index, each] for each in columns], axis=1)


def _gates(plan: TPUPlan, a: Array) -> list[Array]:
    """What is side by side."""
    return jnp.split(a, len(plan.cell.gates), axis=1)


def _blocks(plan: TPUPlan, pre: tuple[Array, ...]) -> list[Array]:
    """The gates' blocks, ``(R, H)`` each, as ``step`` takes them."""
    cell, size = plan.cell, plan.cell.hidden_size
    gates = cell.gates, cell.recurrent
    return [
        a[:, g * plan.lanes : g * plan.lanes + size]
        for a, names in zip(pre, gates, strict=False)
        for g, gate in enumerate(cell.gates)
        if gate in names
    ]


def _at(refs: PyTree, t: Index) -> PyTree:
    """What references hold of step ``t``."""
    return jax.tree.map(lambda ref: ref[t], refs)


def _seen(plan: TPUPlan, ins: Operands, t: Index, h: Array) -> Array:
    """What the recurrent product sees of h."""
    recur = plan.step.recur
    return h if recur is None else recur.run("first", h, _at(ins.steps, t)[1])


def _arguments(
    plan: TPUPlan, ins: Operands, t: Index, pre: tuple[Array, ...], carry: Carry
) -> StepArguments:
    """Of the programs of a step."""
    units, others = read((ins.units, ins.others))
    return StepArguments(_blocks(plan, pre), carry, units, others, *_at(ins.steps, t))


# --- Forward -------------------------------------------------------------------------------------


def forward_kernel(
    plan: TPUPlan,
    ins: Operands,
    hs: Ref,
    entering: Carries,
    final: Carries,
    carried: Carries,
) -> None:
    """Run one chunk.

    Args:
        plan: what the kernel is for.
        ins: the operands' blocks.
        hs: out, h after each step, ``(C, R, H)``.
        entering: out, the carry before the chunk, arrays ``(1, R, H)``, or None for values alone.
        final: out, the carry after the chunk, arrays ``(R, H)``.
        carried: scratch that hands the carry to the next chunk, likewise.
    """

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        write(carried, read(ins.initial))

    if entering is not None:
        write(entering, read(carried), 0)

    def body(k: Index, carry: Carry) -> Carry:
        t = plan.place(k)
        carry = _entered(ins, t, carry)
        seen = _seen(plan, ins, t, carry.h)
        x, h = split(ins.xs[t], plan.parts), split(seen, plan.parts)
        args = _arguments(plan, ins, t, _pre_activations(plan, ins, x, h), carry)
        carry = _left(ins, t, plan.step.forward.run("first", *args), carry)
        hs[t] = carry.h
        return carry

    last = lax.fori_loop(0, plan.chunk, body, read(carried), unroll=plan.unroll)
    write(carried, last)
    write(final, last)


# --- Backward ------------------------------------------------------------------------------------


def backward_kernel(
    plan: TPUPlan,
    ins: Operands,
    hs: Ref,
    entering: Carries,
    d_hs: Ref | None,
    d_final: Carries,
    d: Gradients,
    kept: Kept,
) -> None:
    """Take one chunk back; chunks come in the reverse of their order in the forward kernel.

    Args:
        plan: what the kernel is for.
        ins: the operands' blocks.
        hs: from the forward kernel.
        entering: from the forward kernel.
        d_hs: gradient of ``hs``, ``(C, R, H)``, or None where nothing depends on them.
        d_final: gradient of the final carry, arrays ``(R, H)``.
        d: out, gradients; those of parameters are sums over the rows, with a leading axis of 1.
        kept: scratch.
    """

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        write(kept.d_carry, read(d_final))
        jax.tree.map(_clear, d.parameters)
        _clear_lanes(plan, kept)

    _sweep(plan, ins, hs, entering, kept)
    _walk_back(plan, ins, d_hs, d, kept)
    _weight_gradients(plan, ins, d, kept)


def _clear(ref: Ref) -> None:
    ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _clear_lanes(plan: TPUPlan, kept: Kept) -> None:
    """Zeros in the lanes of ``d_pre`` behind each gate, that nothing else ever writes."""

    def body(t: Index, _: None) -> None:
        for ref in kept.d_pre:
            for p in range(plan.parts):
                ref[p, t] = jnp.zeros_like(ref[p, t])

    gaps = plan.lanes > plan.cell.hidden_size or plan.cell.recurrent != plan.cell.gates
    if gaps:
        lax.fori_loop(0, plan.chunk, body, None)


def _sweep(plan: TPUPlan, ins: Operands, hs: Ref, entering: Carries, kept: Kept) -> None:
    """Forward over the chunk, h being known: state and pre-activations of every step."""

    def body(k: Index, carry: Carry) -> Carry:
        t = plan.place(k)
        carry = _entered(ins, t, carry)
        seen = _seen(plan, ins, t, carry.h)
        x, h = split(ins.xs[t], plan.parts), split(seen, plan.parts)
        pre = _pre_activations(plan, ins, x, h)
        for p in range(plan.parts):
            kept.x[p, t], kept.h[p, t] = x[p], h[p]
        write(kept.pre, pre, t)
        write(kept.carry.state, carry.state, t)
        if plan.keeps_h:
            write(kept.carry.h, carry.h, t)
        new = plan.step.forward.run("first", *_arguments(plan, ins, t, pre, carry))
        return _left(ins, t, new, carry)._replace(h=hs[t])

    first = jax.tree.map(lambda ref: ref[0], entering)
    lax.fori_loop(0, plan.chunk, body, first, unroll=plan.unroll)


def _walk_back(plan: TPUPlan, ins: Operands, d_hs: Ref | None, d: Gradients, kept: Kept) -> None:
    """Backward over the chunk: only what has to be done step by step."""

    def body(k: Index, d_carry: Carry) -> Carry:
        t = plan.place(plan.chunk - 1 - k)
        d_new = d_carry
        if d_hs is not None:
            d_new = d_new._replace(h=d_new.h + d_hs[t])
        carry = jax.tree.map(lambda ref: ref[t], kept.carry)
        if carry.h is None:
            carry = carry._replace(h=jnp.zeros_like(d_new.h))
        valid = None if ins.valid is None else _flag(ins.valid, t) > 0
        args = _arguments(plan, ins, t, tuple(ref[t] for ref in kept.pre), carry)
        d_args = plan.step.backward.run("first", *args, d_new, valid=valid)
        for refs, values in ((d.units, d_args.units), (d.others, d_args.others)):
            for name, value in values.items():
                refs[name][0] += value
        if d.steps is not None:
            write(d.steps, _kept_rows(ins, t, d_args.inputs), t)
        _store_gates(plan, _kept_rows(ins, t, d_args.pre), t, d, kept)
        through_pre = _recurrent_back(plan, kept.d_pre[-1], t, ins.recurrent_kernel)
        if plan.step.recur_back is not None:
            noise = _at(ins.steps, t)[1]
            through_pre = plan.step.recur_back.run("first", carry.h, noise, through_pre)
        d_old = d_args.carry._replace(h=d_args.carry.h + through_pre)
        if ins.valid is not None:
            d_old = _choose(_flag(ins.valid, t), d_old, d_carry)
        return d_old if ins.reset is None else _choose(_flag(ins.reset, t), _zeros(d_old), d_old)

    first = lax.fori_loop(0, plan.chunk, body, read(kept.d_carry), unroll=plan.unroll)
    write(kept.d_carry, first)
    write(d.initial, first)


def _kept_rows(ins: Operands, t: Index, tree: PyTree) -> PyTree:
    """Zeros in the rows whose step does not count, whatever stands there."""
    return tree if ins.valid is None else _choose(_flag(ins.valid, t), tree, _zeros(tree))


def _store_gates(plan: TPUPlan, d_pre: list[Array], t: Index, d: Gradients, kept: Kept) -> None:
    """Lay the gradients of a step's gates side by side, and add them to those of the bias."""
    cell, rest = plan.cell, iter(d_pre)
    for ref, bias, names in zip(
        kept.d_pre, (d.bias, d.recurrent_bias), (cell.gates, cell.recurrent), strict=False
    ):
        for g, gate in enumerate(cell.gates):
            if gate not in names:
                continue
            value = next(rest)
            lanes = slice(g * plan.lanes, g * plan.lanes + cell.hidden_size)
            assert bias is not None
            bias[0, :, lanes] += jnp.sum(value, axis=0, keepdims=True)
            for p, part in enumerate(split(value, plan.parts)):
                ref[p, t, :, lanes] = part


def _weight_gradients(plan: TPUPlan, ins: Operands, d: Gradients, kept: Kept) -> None:
    """The products that need not wait for one another, ``group`` steps at once."""
    parts = range(plan.parts)
    kernel = [ins.kernel[p] for p in parts]

    def body(k: Index, _: None) -> None:
        steps = pl.ds(k * plan.group, plan.group)

        def rows(ref: Ref) -> list[Array]:
            return [ref[p, steps].reshape(-1, ref.shape[-1]) for p in parts]

        d_pre_x, d_pre_h, h = rows(kept.d_pre[0]), rows(kept.d_pre[-1]), rows(kept.h)
        d.kernel[0] += product(rows(kept.x), d_pre_x, (0, 0))
        for units, columns in plan.groups:
            own = slice(units.stop - units.start)
            left = [part[:, units] for part in h]
            for each in columns:
                right = [part[:, each] for part in d_pre_h]
                d.recurrent_kernel[0, own, each] += product(left, right, (0, 0))
        if d.xs is not None:
            d_xs = product(d_pre_x, kernel, (1, 1))
            d.xs[steps] = d_xs.reshape(plan.group, *d.xs.shape[1:])

    lax.fori_loop(0, plan.chunk // plan.group, body, None)
