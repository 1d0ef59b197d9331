"""The TPU kernels as functions of arrays: layout, calls, gradient.

`tpu.kernel` says what the letters in shapes mean.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import PyTree

from lstmjax.cells.base import Carry
from lstmjax.recurrence.derivatives import or_zeros
from lstmjax.recurrence.engine import Inputs, Outputs, cleared
from lstmjax.recurrence.layout import grouped, up
from lstmjax.recurrence.refs import Index
from lstmjax.recurrence.split import split_outside
from lstmjax.recurrence.step import standard
from lstmjax.recurrence.tpu.kernel import (
    Carries,
    Gradients,
    Kept,
    Operands,
    backward_kernel,
    forward_kernel,
)
from lstmjax.recurrence.tpu.plan import DEFAULT_VMEM, TPUPlan

# --- Layout --------------------------------------------------------------------------------------


def laid_out(plan: TPUPlan, inputs: Inputs) -> Operands:
    """Arrays as the kernels take them: whole chunks, whole blocks of rows, gates at lane groups."""
    cell, params, xs = plan.cell, standard(plan.cell, inputs.params), inputs.xs
    mask, resets, noises = inputs.mask, inputs.resets, inputs.noises
    steps, batch, _ = xs.shape
    drawn = {} if noises is None else noises.draw(cell, xs.dtype, 0, steps)
    extra = inputs.inputs, drawn
    missing = up(steps, plan.chunk) - steps
    if missing:  # steps that are masked: they pass the carry by
        mask = jnp.ones((steps, batch), bool) if mask is None else mask
        xs, mask = _longer(xs, missing), _longer(mask, missing)
        extra = jax.tree.map(lambda a: _longer(a, missing), extra)
        resets = None if resets is None else _longer(resets, missing)
    more_rows = functools.partial(_more_rows, plan)
    return Operands(
        xs=more_rows(xs, axis=1),
        kernel=_spread(plan, params["kernel"]),
        recurrent_kernel=_spread(plan, grouped(cell, params["recurrent_kernel"], plan.width)),
        bias=_spread(plan, params["bias"][None]),
        recurrent_bias=_spread(plan, params["recurrent_bias"][None]) if cell.parts_apart else None,
        units={name: params["units"][name][None] for name in cell.unit_params},
        others={
            name: params["step"][name].reshape(a.shape)
            for name, a in plan.step.shapes.others.items()
        },
        steps=jax.tree.map(functools.partial(more_rows, axis=1), extra),
        initial=jax.tree.map(more_rows, inputs.initial),
        start=jax.tree.map(more_rows, inputs.start),
        valid=_flags(plan, mask, xs.dtype),
        reset=_flags(plan, resets, xs.dtype),
    )


def _longer(a: Array, missing: int) -> Array:
    return jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1))


def _more_rows(plan: TPUPlan, a: Array, axis: int = 0) -> Array:
    """Copies of the last row: with them a step cannot meet values that it never meets otherwise."""
    missing = up(a.shape[axis], plan.rows) - a.shape[axis]
    if not missing:
        return a
    widths = [(0, missing if k == axis else 0) for k in range(a.ndim)]
    return jnp.pad(a, widths, mode="edge")


def _spread(plan: TPUPlan, a: Array) -> Array:
    """``(n, G*H)`` to ``(n, G*L)``, zeros behind each gate."""
    gates, size = len(plan.cell.gates), plan.cell.hidden_size
    a = jnp.pad(a.reshape(-1, gates, size), ((0, 0), (0, 0), (0, plan.lanes - size)))
    return a.reshape(-1, gates * plan.lanes)


def _flags(plan: TPUPlan, a: Array | None, dtype: DTypeLike) -> Array | None:
    """``(T, B)`` to ``(B/R, T/C, R, C)``: time along the lanes, so that little is padded."""
    if a is None:
        return None
    a = _more_rows(plan, a, axis=1).astype(dtype)
    steps, batch = a.shape
    a = a.reshape(steps // plan.chunk, plan.chunk, batch // plan.rows, plan.rows)
    return a.transpose(2, 0, 3, 1)


# --- Calls ---------------------------------------------------------------------------------------


_Shaped: TypeAlias = Array | ShapeDtypeStruct


class Blocks(NamedTuple):
    """Block shapes and index maps for the kinds of arrays there are; the grid is (rows, time)."""

    plan: TPUPlan
    chunk: Callable[[Index], Index]  # which chunk the i-th on the grid is

    def steps(self, a: _Shaped) -> pl.BlockSpec:
        """``(T, B, n)``."""
        block = (self.plan.chunk, self.plan.rows, a.shape[2])
        return pl.BlockSpec(block, lambda b, i: (self.chunk(i), b, 0))

    def chunks(self, a: _Shaped) -> pl.BlockSpec:
        """``(T/C, B, n)``."""
        block = (1, self.plan.rows, a.shape[2])
        return pl.BlockSpec(block, lambda b, i: (self.chunk(i), b, 0))

    def rows(self, a: _Shaped) -> pl.BlockSpec:
        """``(B, n)``."""
        return pl.BlockSpec((self.plan.rows, a.shape[1]), lambda b, i: (b, 0))

    def flags(self, a: _Shaped) -> pl.BlockSpec:
        """``(B/R, T/C, R, C)``."""
        return pl.BlockSpec((1, 1, *a.shape[2:]), lambda b, i: (b, self.chunk(i), 0, 0))

    def sums(self, a: _Shaped) -> pl.BlockSpec:
        """``(B/R, m, n)``: one for each block of rows."""
        return pl.BlockSpec((1, *a.shape[1:]), lambda b, i: (b, 0, 0))

    def whole(self, a: _Shaped) -> pl.BlockSpec:
        """The same for all."""
        return pl.BlockSpec(a.shape, lambda b, i: (0,) * len(a.shape))

    def operands(self, operands: Operands) -> PyTree[pl.BlockSpec]:
        """Those of all operands."""
        whole, rows, flags = self.whole, self.rows, self.flags
        kinds = (self.steps, *(whole,) * 6, self.steps, rows, rows, flags, flags)
        return Operands(*map(jax.tree.map, kinds, operands))


def _blocks(plan: TPUPlan, operands: Operands, *, reverse: bool) -> tuple[Blocks, tuple[int, int]]:
    steps, batch, _ = operands.xs.shape
    grid = batch // plan.rows, steps // plan.chunk
    return Blocks(plan, lambda i: grid[1] - 1 - i if reverse else i), grid


class _Cut(TypedDict):
    """How arrays are cut, as `pl.pallas_call` takes it."""

    grid: tuple[int, int]
    in_specs: PyTree
    out_specs: PyTree
    out_shape: PyTree
    scratch_shapes: PyTree


def _call(
    plan: TPUPlan,
    kernel: Callable[..., None],
    vmem: int,
    operands: tuple[PyTree, ...],
    aliases: dict[int, int],
    **how: Unpack[_Cut],
) -> PyTree:
    name = f"{kernel.__name__}_{type(plan.cell).__name__}"
    # A limit, even a small one, takes 16 MiB from what the compiler may keep in VMEM throughout.
    limit = vmem if vmem > DEFAULT_VMEM else None
    parameters = pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit
    )
    call = pl.pallas_call(
        functools.partial(kernel, plan),
        compiler_params=parameters,
        input_output_aliases=aliases,
        interpret=plan.interpret,
        name=name,
        **how,
    )
    return call(*operands)


def _shape(operands: Operands, *shape: int) -> ShapeDtypeStruct:
    """Of an output, which differs between devices where the inputs do (in `jax.shard_map`)."""
    kind = jax.typeof(operands.xs).manual_axis_type
    return ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=kind)


def _forward(
    plan: TPUPlan, operands: Operands, *, saving: bool
) -> tuple[Array, Carry, Carry | None]:
    """h of every step, the final carry, where it is to be saved the carry into each chunk."""
    steps, batch, _ = operands.xs.shape
    size = plan.cell.hidden_size
    blocks, grid = _blocks(plan, operands, reverse=plan.reverse)
    operands = _split(plan, operands)

    def carries(*shape: int) -> Carries:
        return jax.tree.map(lambda _: _shape(operands, *shape), operands.initial)

    hs = _shape(operands, steps, batch, size)
    entering = carries(grid[1], batch, size) if saving else None
    final = carries(batch, size)
    scratch = jax.tree.map(lambda _: pltpu.VMEM((plan.rows, size), jnp.float32), operands.initial)
    hs, entering, final = _call(
        plan,
        forward_kernel,
        plan.vmem if saving else plan.vmem_forward,  # the backward kernel beside it takes more
        (operands,),
        {},
        grid=grid,
        in_specs=[blocks.operands(operands)],
        out_specs=[
            blocks.steps(hs),
            jax.tree.map(blocks.chunks, entering),
            jax.tree.map(blocks.rows, final),
        ],
        out_shape=[hs, entering, final],
        scratch_shapes=[scratch],
    )
    return hs, final, entering


def _backward(
    plan: TPUPlan,
    operands: Operands,
    hs: Array,
    entering: Carry,
    d_hs: Array | None,
    d_final: Carry,
    differentiate_xs: bool,
) -> Gradients:
    """The gradients of all operands."""
    blocks, grid = _blocks(plan, operands, reverse=not plan.reverse)

    def like(tree: PyTree, *blocks: int) -> PyTree[ShapeDtypeStruct]:
        return jax.tree.map(lambda a: _shape(operands, *blocks, *a.shape), tree)

    d = Gradients._make(
        [
            like(operands.xs) if differentiate_xs else None,
            *like(operands.parameters, grid[0]),
            like(operands.steps[0] or None),
            like(operands.initial),
        ]
    )
    kinds = (blocks.steps, *(blocks.sums,) * 6, blocks.steps, blocks.rows)
    d_specs = Gradients._make(map(jax.tree.map, kinds, d))
    scratch = _scratch(plan, operands)
    # The gradient of xs takes their place: a chunk is read before it is written.
    aliases = {0: 0} if differentiate_xs else {}
    operands = _split(plan, operands)
    (d,) = _call(
        plan,
        backward_kernel,
        plan.vmem,
        (operands, hs, entering, d_hs, d_final),
        aliases,
        grid=grid,
        in_specs=[
            blocks.operands(operands),
            blocks.steps(hs),
            jax.tree.map(blocks.chunks, entering),
            None if d_hs is None else blocks.steps(d_hs),
            jax.tree.map(blocks.rows, d_final),
        ],
        out_specs=[d_specs],
        out_shape=[d],
        scratch_shapes=[scratch],
    )
    sums = jax.tree.map(lambda a: a.sum(0), d.parameters)
    return Gradients._make([d.xs, *sums, d.steps, d.initial])


def _scratch(plan: TPUPlan, operands: Operands) -> PyTree[pl.MemoryRef]:
    """`Kept`."""
    cell, (_, _, features) = plan.cell, operands.xs.shape
    size, width = cell.hidden_size, len(cell.gates) * plan.lanes

    def each_step(n: int) -> PyTree[pl.MemoryRef]:
        return pltpu.VMEM((plan.chunk, plan.rows, n), jnp.float32)

    def in_parts(n: int) -> PyTree[pl.MemoryRef]:
        return pltpu.VMEM((plan.parts, plan.chunk, plan.rows, n), jnp.bfloat16)

    pres = 2 if cell.parts_apart else 1
    carry = operands.initial if plan.keeps_h else operands.initial._replace(h=None)
    return Kept(
        x=in_parts(features),
        h=in_parts(size),
        pre=(each_step(width),) * pres,
        carry=jax.tree.map(lambda _: each_step(size), carry),
        d_pre=(in_parts(width),) * pres,
        d_carry=jax.tree.map(
            lambda _: pltpu.VMEM((plan.rows, size), jnp.float32), operands.initial
        ),
    )


def _split(plan: TPUPlan, operands: Operands) -> Operands:
    """The weights in parts."""

    def parts(a: Array) -> Array:
        return jnp.stack(split_outside(a, plan.parts))

    kernels = jax.tree.map(parts, (operands.kernel, operands.recurrent_kernel))
    return operands._replace(kernel=kernels[0], recurrent_kernel=kernels[1])


# --- What `with_derivative` takes -----------------------------------------------------------------


def forward(
    plan: TPUPlan, inputs: Inputs, saving: bool = True
) -> tuple[tuple[Outputs, Carry], tuple[Array, Carry | None]]:
    """``(h (T, B, H), final)``, and h of every step and the carry into each chunk as laid out."""
    steps, batch, _ = inputs.xs.shape
    all_hs, final, entering = _forward(plan, laid_out(plan, inputs), saving=saving)
    hs, final = all_hs[:steps, :batch], jax.tree.map(lambda a: a[:batch], final)
    return (cleared(inputs.mask, Carry(hs, None)), final), (all_hs, entering)


def values(plan: TPUPlan, inputs: Inputs) -> tuple[Outputs, Carry]:
    """What `forward` returns first, without writing what it saves."""
    return forward(plan, inputs, saving=False)[0]


def backward(
    plan: TPUPlan,
    inputs: Inputs,
    saved: tuple[Array, Carry],
    d_outputs: tuple[Outputs, Carry],
    wanted: PyTree[bool],
) -> Inputs:
    """The gradients of all inputs but flags, keys and what resets put in place."""
    hs, entering = saved
    d_outs, d_final = d_outputs
    d_hs = None if d_outs is None else d_outs.h
    names = ("params", "xs", "initial", "inputs")

    def lay_out(*moving: PyTree) -> Operands:
        return laid_out(plan, inputs._replace(**dict(zip(names, moving, strict=True))))

    operands, pull_back = jax.vjp(lay_out, *(getattr(inputs, name) for name in names))
    if d_hs is not None:
        d_hs = _filled(cleared(inputs.mask, d_hs), hs.shape)
    d_final = or_zeros(d_final, inputs.initial)
    d_final = jax.tree.map(lambda a, b: _filled(a, b.shape), d_final, operands.initial)
    d = _backward(plan, operands, hs, entering, d_hs, d_final, wanted.xs)
    steps = d.steps or {}, jax.tree.map(lambda a: None, operands.steps[1])
    d_operands = Operands._make([d.xs, *d.parameters, steps, d.initial, None, None, None])
    nothing = jax.tree.map(lambda a: None, inputs)
    return nothing._replace(
        **dict(zip(names, pull_back(or_zeros(d_operands, operands)), strict=True))
    )


def _filled(a: Array, shape: tuple[int, ...]) -> Array:
    """Zeros behind the rows and steps that there are."""
    return jnp.pad(a, [(0, n - m) for n, m in zip(shape, a.shape, strict=True)])
