"""What the kernels compute, in plain JAX: for programs that leave this process."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import PyTree

from lstmjax.cells.base import Carry
from lstmjax.recurrence.cpu.plan import Block, Layout, Operand
from lstmjax.recurrence.engine import select_rows
from lstmjax.recurrence.step import StepArguments

if TYPE_CHECKING:
    from lstmjax.recurrence.cpu.calls import Kernel


def plain_kernel(kernel: "Kernel", args: Sequence[Array]) -> list[Array]:
    """A kernel's results, one operation after the other."""
    dtype = kernel.job.dtype
    given = {
        what.name: lax.bitcast_convert_type(a, dtype) if what.kind == "bits" else a
        for what, a in zip(kernel.arguments, args, strict=True)
    }
    found = (_back if kernel.back else _forward)(kernel.layout, given)
    return [
        lax.bitcast_convert_type(found[a.name].astype(dtype), a.dtype(dtype))
        if a.kind == "bits"
        else jnp.asarray(found[a.name], dtype)
        for a in kernel.results
    ]


def _in_order(layout: Layout, tree: PyTree) -> PyTree:
    """From the order of time to that of the run, or back."""
    return jax.tree.map(lambda a: a[::-1], tree) if layout.job.reverse else tree


def _over_time(layout: Layout, given: dict[str, Array]) -> dict[str, Array]:
    """Step inputs, noise and flags, in the order of the run."""
    names = [a.name for a in layout.extra()] + [n for n in ("mask", "resets") if n in given]
    return {name: _in_order(layout, given[name]) for name in names}


def _carry(layout: Layout, given: dict[str, Array], name: str) -> Carry:
    arrays = [given[f"{name} {k}"] for k in range(1 + layout.states)]
    return jax.tree.unflatten(jax.tree.structure(layout.job.step.shapes.carry), arrays)


def _named(name: str, arrays: Sequence[Array]) -> dict[str, Array]:
    return {f"{name} {k}": a for k, a in enumerate(arrays)}


def _rest(layout: Layout, given: dict[str, Array], now: dict[str, Array]) -> list[PyTree]:
    """What a step takes after the carry."""
    shapes = layout.job.step.shapes
    return [
        {n: given[f"unit {n}"][None] for n in shapes.units},
        {n: given[f"param {n}"].reshape(a.shape) for n, a in shapes.others.items()},
        {n: now[f"input {n}"] for n in shapes.inputs},
        {n: now[f"noise {n}"] for n in shapes.noise},
    ]


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _columns(layout: Layout, weights: Array, block: int) -> Array:
    return lax.slice_in_dim(weights, block * layout.units, (block + 1) * layout.units, axis=-1)


def _dense(layout: Layout, weights: Array) -> Array:
    """A block of the recurrent kernel, ``(H, H)``, from the rows of each unit's group."""
    groups = layout.units // layout.width
    blocks = weights.reshape(layout.width, groups, layout.width)
    own = jnp.eye(groups, dtype=weights.dtype)
    return jnp.einsum("kgu,fg->fkgu", blocks, own).reshape(layout.units, layout.units)


def _pre(layout: Layout, block: Block, given: dict[str, Array], x: Array, h: Array) -> Array:
    """A block's pre-activations."""
    total = jnp.zeros((x.shape[0], layout.units), x.dtype)
    if (weights := block.kernel) is not None:
        total = total + _dot(x, _columns(layout, given["kernel"], weights))
    if (weights := block.recurrent) is not None:
        dense = _dense(layout, _columns(layout, given["recurrent"], weights))
        total = total + _dot(h, dense)
    if block.bias is not None:
        name, number = block.bias
        total = total + _columns(layout, given[name][None], number)
    return total


def _blocks(layout: Layout) -> list[Block]:
    every = [block for kind in layout.kinds for block in kind.blocks]
    return sorted(every, key=lambda block: block.place)


def _forward(layout: Layout, given: dict[str, Array]) -> dict[str, Array]:
    job, step = layout.job, layout.job.step
    initial = _carry(layout, given, "initial")
    begun = _carry(layout, given, "start") if job.resets else None

    def one(carry: Carry, now: dict[str, Array]) -> tuple[Carry, tuple[Carry, Carry, Array]]:
        if begun is not None:
            carry = select_rows(now["resets"], begun, carry)
        rest = _rest(layout, given, now)
        seen = carry.h if step.recur is None else step.recur.run("first", carry.h, rest[-1])
        pre = [_pre(layout, block, given, now["x"], seen) for block in _blocks(layout)]
        new = step.forward.run("first", *StepArguments(pre, carry, *rest))
        outs = new
        if job.masked:
            outs = jax.tree.map(lambda a: jnp.where(now["mask"][:, None], a, 0), new)
            new = select_rows(now["mask"], new, carry)
        return new, (outs, carry, jnp.concatenate(pre, -1))

    xs = {"x": _in_order(layout, given["x"])} | _over_time(layout, given)
    final, (outs, before, pre) = lax.scan(one, initial, xs)
    found = _named("out", jax.tree.leaves(_in_order(layout, outs)))
    found |= _named("final", jax.tree.leaves(final))
    if not job.saving:
        return found
    # Where the kernel keeps its products' left sides, here are x and h, and nothing is packed.
    x = jnp.concatenate([xs["x"], xs["x"][-1:]])
    every = [jnp.concatenate([a, b[None]]) for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(final), strict=True)]  # fmt: skip
    rows = jnp.concatenate([x, jnp.ones_like(x[..., :1]), every[0]], -1)
    found["rows"] = _wide(rows, layout.x_at, layout.pitch)
    if layout.kept:
        kept = jnp.concatenate(every[1:] + every[:1], -1)
        found["kept"] = _wide(
            kept[..., : layout.kept * layout.units], 0, layout.kept * layout.padded
        )
    return found | {"pre": _wide(pre, 0, layout.numbers)}


def _wide(a: Array, first: int, size: int) -> Array:
    return jnp.pad(a, ((0, 0), (0, 0), (first, size - first - a.shape[-1])))


def _back(layout: Layout, given: dict[str, Array]) -> dict[str, Array]:
    job, step, units = layout.job, layout.job.step, layout.units
    blocks = _blocks(layout)
    rows, pre = given["rows"], given["pre"][..., : len(blocks) * units]
    x = rows[:-1, :, layout.x_at : layout.one_at]
    h = rows[:-1, :, layout.h_at : layout.h_at + units]
    states = [given["kept"][:-1, :, k * units : (k + 1) * units] for k in range(layout.states)]
    carry: Carry = jax.tree.unflatten(jax.tree.structure(step.shapes.carry), [h, *states])
    d_outs = [
        _in_order(layout, given[f"d_out {k}"]) if there else None
        for k, there in enumerate((*job.d_outs, *[False] * (1 + layout.states - len(job.d_outs))))
    ]
    over, shapes = _over_time(layout, given), step.shapes
    d_final = _carry(layout, given, "d_final")
    sums = jax.tree.map(lambda a: jnp.zeros(a.shape, x.dtype), (shapes.units, shapes.others))
    begin = d_final, sums, jax.tree.map(jnp.zeros_like, d_final)
    (d_initial, sums, d_start), (d_pre, d_inputs) = lax.scan(
        _step_back(layout, given), begin, (carry, pre, d_outs, over), reverse=True
    )
    seen, recur = h, step.recur
    if recur is not None:
        drawn = {n: over[f"noise {n}"] for n in shapes.noise}
        seen = jax.vmap(functools.partial(recur.run, "first"))(h, drawn)
    found = _weight_gradients(layout, given, blocks, x, seen, d_pre)
    found |= {f"d unit {n}": a.reshape(-1) for n, a in sums[0].items()}
    found |= {f"d param {n}": a.reshape(-1) for n, a in sums[1].items()}
    found |= {f"d input {n}": _in_order(layout, a) for n, a in d_inputs.items()}
    found |= _named("d initial", jax.tree.leaves(d_initial))
    return found | _named("d start", jax.tree.leaves(d_start))


_Loop = tuple[Carry, PyTree, Carry]
"""The gradients so far: of the carry, of what the step's parameters are, of the start."""


def _step_back(
    layout: Layout, given: dict[str, Array]
) -> Callable[[_Loop, PyTree], tuple[_Loop, PyTree]]:
    """One step: ``(loop, (carry, pre, d outs, over time)) -> (loop, (d pre, d inputs))``."""
    step, blocks = layout.job.step, _blocks(layout)
    numbers = [block.recurrent for block in blocks]
    dense = [
        None if n is None else _dense(layout, _columns(layout, given["recurrent"], n))
        for n in numbers
    ]

    def one(loop: _Loop, now: PyTree) -> tuple[_Loop, PyTree]:
        (d_carry, sums, d_start), (carry, pre, d_outs, over) = loop, now
        rest, valid = _rest(layout, given, over), over.get("mask")
        leaves = zip(jax.tree.leaves(d_carry), d_outs, strict=True)
        given_d = [a if b is None else a + b for a, b in leaves]
        d_new = jax.tree.unflatten(jax.tree.structure(d_carry), given_d)
        args = StepArguments(jnp.split(pre, len(blocks), -1), carry, *rest)
        d = step.backward.run("first", *args, d_new, valid=valid)

        def clear(a: Array) -> Array:
            return a if valid is None else jnp.where(valid[:, None], a, 0)

        d_pre = [clear(a) for a in d.pre]
        products = [_dot(a, w.T) for a, w in zip(d_pre, dense, strict=True) if w is not None]
        d_seen = sum(products, jnp.zeros_like(carry.h))
        if step.recur_back is not None:
            d_seen = clear(step.recur_back.run("first", carry.h, rest[-1], d_seen))
        d_old = d.carry if valid is None else select_rows(valid, d.carry, d_carry)
        d_old = d_old._replace(h=d_old.h + d_seen)
        if layout.job.resets:
            zeros = jax.tree.map(jnp.zeros_like, d_old)
            d_start = jax.tree.map(jnp.add, d_start, select_rows(over["resets"], d_old, zeros))
            d_old = select_rows(over["resets"], zeros, d_old)
        sums = jax.tree.map(lambda a, b: a + b.reshape(a.shape), sums, (d.units, d.others))
        return (d_old, sums, d_start), (d_pre, jax.tree.map(clear, d.inputs))

    return one


def _weight_gradients(
    layout: Layout,
    given: dict[str, Array],
    blocks: list[Block],
    x: Array,
    h: Array,
    d_pre: list[Array],
) -> dict[str, Array]:
    """And that of x."""
    units = layout.units
    d_x = jnp.zeros_like(x)
    operands: list[Operand] = layout.parameters()
    found = {f"d {a.name}": jnp.zeros(a.shape, x.dtype) for a in operands}

    def put(name: str, number: int, value: Array) -> None:
        here = slice(number * units, (number + 1) * units)
        found[name] = found[name].at[..., here].set(value)

    for block, d in zip(blocks, d_pre, strict=True):
        if block.kernel is not None:
            put("d kernel", block.kernel, jnp.einsum("tbd,tbu->du", x, d, precision="highest"))
            d_x = d_x + _dot(d, _columns(layout, given["kernel"], block.kernel).T)
        if block.recurrent is not None:
            groups = units // layout.width
            by_group = [a.reshape(*a.shape[:2], groups, layout.width) for a in (h, d)]
            d_r = jnp.einsum("tbgk,tbgu->kgu", *by_group, precision="highest")
            put("d recurrent", block.recurrent, d_r.reshape(layout.width, units))
        if block.bias is not None:
            put(f"d {block.bias[0]}", block.bias[1], d.sum((0, 1)))
    return found | {"d x": _in_order(layout, d_x)}
