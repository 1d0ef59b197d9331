"""The fused GPU engine: one kernel for all of time, with the recurrent kernel kept on chip.

Derived from ``step`` for every element-wise cell. Forward, a kernel runs the cell's ``step`` and
keeps the carry of each time step. Backward, all pre-activations are computed anew in one product,
a kernel runs `jax.vjp` of ``step`` from the last time step to the first, and the gradients of the
weights are one product each over all of time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.precision import Precision, make_dot
from lstmjax.recurrence.derivatives import or_zeros, with_derivative
from lstmjax.recurrence.derived.engine import Derived
from lstmjax.recurrence.engine import (
    Engine,
    How,
    Inputs,
    Outputs,
    Workload,
    cleared,
    odd_carry,
    select_rows,
)
from lstmjax.recurrence.gpu.backend import backend_refusal
from lstmjax.recurrence.gpu.cells import (
    Job,
    backward_recurrence,
    cut,
    forward_recurrence,
    refusal,
    sizes_of,
)
from lstmjax.recurrence.gpu.plan import TILE, GPUPlan, Recurrence, at_once, choose_plan
from lstmjax.recurrence.layout import grouped, up
from lstmjax.recurrence.split import split_outside
from lstmjax.recurrence.step import no_kernel, standard, step_of
from lstmjax.traced import vary_alike

_CORES = 132
"""Multiprocessors of an H100 that is not there."""


@dataclasses.dataclass(frozen=True)
class PallasGPU(Engine):
    """Runs element-wise cells on Hopper GPUs (H100, H200) in one kernel, forward and backward.

    Up to 128 units (64 with ``precision="float32"``), where it fits, a block of the GPU owns a few
    rows of the batch for all of time, so no block waits for another; else a cluster of blocks does.
    Heads that fill 64 units are recurrences side by side, each with blocks of its own.
    The gradient keeps the carry of each step.
    All other derivatives are those of the derived engine.

    With ``precision="float32"`` each operand of a recurrent product is split into two bfloat16
    numbers, up to 64 units into three: exact to 2^-17 and 2^-24 (on an H100, 33 steps were within
    5e-6 and 5e-7 of float64); what is infinite becomes NaN. The other products, those for the
    gradients of the weights among them, are in full float32.

    Attributes:
        rows: of the batch in a block, a multiple of 8; by default 8, or 16 where the blocks would
            not all run at once.
        depth: time steps whose inputs are on chip, or on their way; by default 3, or 2 to save
            memory.
        fast_math: the hardware's tanh and exponential, exact to 2^-11. By default with
            ``precision="bfloat16"`` only.
        attached: False to compile for a GPU that this machine does not have.
        interpret: parameters of Pallas' interpreter for Mosaic GPU, to run on a CPU, slowly; or
            what takes the kernel's place, `gpu.plain.plain_kernel`.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> work = Workload("cpu", "float32", "bfloat16", steps=500, batch=64, features=32)
        >>> PallasGPU().refusal(LSTM(100), work)
        'it runs on GPUs, not on cpu'
        >>> PallasGPU(attached=False).refusal(LSTM(100), work) is None
        True
    """

    name: ClassVar[str] = "pallas_gpu"
    only_on: ClassVar[str | None] = "gpu"

    rows: int | None = None
    depth: int | None = None
    fast_math: bool | None = None
    attached: bool = True
    interpret: object = None

    def __post_init__(self) -> None:
        if self.rows is not None and (self.rows < 8 or self.rows % 8):
            raise ValueError(f"rows must be a multiple of 8, got {self.rows}")
        if self.depth is not None and self.depth < 2:
            raise ValueError(f"depth must be at least 2, got {self.depth}")

    def refusal(self, cell: Cell, work: Workload) -> str | None:
        """Why not, in one clause: the device, the cell, the precision, or the size."""
        if self.attached and self.interpret is None:
            if work.platform != "gpu":
                return f"it runs on GPUs, not on {work.platform}"
            if (found := _compute_capability()) != "9.0":
                instead = f"not {found}" if found else "and there is none here"
                return f"it needs a Hopper GPU (compute capability 9.0), {instead}"
        if work.dtype != "float32":
            return f"it computes in float32, the inputs are {work.dtype}"
        if reason := odd_carry(cell) or no_kernel(cell, work) or refusal(step_of(cell, work)):
            return reason
        if self.plans(cell, work) is None:
            gates = len(cell.gates)
            return f"{cell.hidden_size} units with {gates} gates do not fit into shared memory"
        return backend_refusal() if self.interpret is None else None

    def plans(self, cell: Cell, work: Workload) -> tuple[GPUPlan, GPUPlan] | None:
        """Layouts of the forward and the backward kernel, or None where they do not fit.

        The more rows a block has, the fewer blocks there are, and the slower is each.
        """
        batch, precision = work.batch, work.precision
        step = step_of(cell, work)
        every = (True,) * (sizes_of(step).carry if work.states else 1)
        # Masks and resets take some memory as well: one layout with them and without.
        job = Job(cell, step, masked=True, resets=True, reverse=False, d_outs=every)
        tiles = job.units // TILE
        parts = {"bfloat16": 1, "float32": 3 if tiles == 1 else 2}[precision]
        fast = precision == "bfloat16" if self.fast_math is None else self.fast_math
        depths = (3, 2) if self.depth is None else (self.depth,)
        found = []
        for rows in (8, 16) if self.rows is None else (self.rows,):
            wanted = GPUPlan(rows=rows, parts=parts, fast_math=fast, interpret=self.interpret)
            forward = choose_plan(forward_recurrence(job, 1, rows), wanted, depths)
            backward = choose_plan(backward_recurrence(job, 1, rows), wanted, depths)
            if forward is not None and backward is not None:
                found.append((forward, backward))
                blocks = tiles if backward.cluster else 1
                if job.groups * -(-batch // rows) <= at_once(self._cores(), blocks):
                    break
        return found[-1] if found else None

    def _cores(self) -> int:
        return _attached().core_count if self.attached and self.interpret is None else _CORES

    def __call__(self, cell: Cell, inputs: Inputs, how: How) -> tuple[Outputs, Carry]:
        """Run ``cell`` over time."""
        steps, batch, features = inputs.xs.shape
        work = Workload(
            "gpu",
            "float32",
            how.precision,
            steps,
            batch,
            features,
            inputs.noises is not None,
            how.states,
        )
        plans = self.plans(cell, work)
        assert plans is not None, "refused"
        masked, resets = inputs.mask is not None, inputs.resets is not None
        job = Job(cell, step_of(cell, work), masked, resets, how.reverse)
        flags = vary_alike((inputs.mask, inputs.resets), inputs.xs)
        inputs = inputs._replace(mask=flags[0], resets=flags[1])
        return _recurrence(_How(job, how, *plans))(inputs)


def _attached() -> jax.Device:
    return jax.local_devices(backend="gpu")[0]


def _compute_capability() -> str | None:
    """Of the GPU that is here; None without one."""
    try:
        device = _attached()
    except RuntimeError:
        return None
    return str(getattr(device, "compute_capability", device.device_kind))


class _How(NamedTuple):
    """All that is static."""

    job: Job
    how: How
    forward: GPUPlan
    backward: GPUPlan

    @property
    def cell(self) -> Cell:
        return self.job.cell

    @property
    def precision(self) -> Precision:
        return self.how.precision


@functools.lru_cache(maxsize=256)
def _recurrence(how: _How) -> Callable[[Inputs], tuple[Outputs, Carry]]:
    """Compiled as a whole even where the caller is not: a kernel takes seconds."""
    return jax.jit(
        with_derivative(
            functools.partial(_forward, how),
            functools.partial(_backward, how),
            Derived().function(how.cell, how.how),
        )
    )


_Saved = tuple[list[Array], list[Array]]
"""The carry that entered the first step, and that which left each, padded."""


# --- Forward and backward ------------------------------------------------------------------------


def _forward(how: _How, inputs: Inputs) -> tuple[tuple[Outputs, Carry], _Saved]:
    params = standard(how.cell, inputs.params)
    mask, resets, initial = inputs.mask, inputs.resets, inputs.initial
    steps, batch, _ = inputs.xs.shape
    if resets is not None:
        initial = select_rows(_first(how, resets), inputs.start, initial)
    carry = [_pad(how, a) for a in (initial.h, *initial.state)]
    rows, sizes = len(carry[0]), sizes_of(how.job.step)
    outs = _run(
        forward_recurrence(how.job, steps, rows),
        how.forward,
        weights=_weights(how, params, backward=False),
        inputs=[_input_part(how, params, inputs.xs), *_extra(how, inputs)],
        flags=_flags(how, mask, resets),
        constants=_constants(how, params, rows)
        + _recurrent_bias(how, params, rows)
        + _start(how, inputs),
        carry=carry,
        exchanged=carry[:1],
    )
    after, final = cut(outs, sizes.carry)
    unpadded = [_unpad(how, a, batch) for a in (after if how.how.states else after[:1])]
    shown = Carry(unpadded[0], how.cell.State._make(unpadded[1:]) if how.how.states else None)
    final = [_unpad(how, a, batch) for a in final]
    return (cleared(mask, shown), _as_carry(how, final)), (carry, after)


def _backward(
    how: _How,
    inputs: Inputs,
    saved: _Saved,
    d_outputs: tuple[Outputs, Carry],
    wanted: PyTree[bool],
) -> Inputs:
    """The gradients of parameters, inputs and initial carry."""
    mask, resets, initial = inputs.mask, inputs.resets, inputs.initial
    (carry, after), (d_outs, d_final) = saved, d_outputs
    params, pull_params = jax.vjp(functools.partial(standard, how.cell), inputs.params)
    # Often only the final carry is used: no array of zeros as large as hs is then made, or read.
    known = _known(how, d_outs)
    outside = [_pad(how, cleared(mask, d), "constant") for d in known if d is not None]
    d_final = or_zeros(d_final, initial)
    (steps, batch, _), sizes = inputs.xs.shape, sizes_of(how.job.step)
    rows, units = carry[0].shape
    flags = _flags(how, mask, resets)
    entering = _entering(how, inputs, carry, after, flags)
    x_part, pull_x = jax.vjp(functools.partial(_input_part, how), params, inputs.xs)
    h_part, pull_h = jax.vjp(lambda params: _recurrent_part(how, params, entering[0]), params)
    pre = [x_part, h_part] if how.cell.parts_apart else [x_part + h_part]
    extra, pull_extra = jax.vjp(
        lambda given: _extra(how, inputs._replace(inputs=given)), inputs.inputs
    )
    constants, pull_constants = jax.vjp(lambda params: _constants(how, params, rows), params)
    zero = jnp.zeros((rows, units), inputs.xs.dtype)
    job = how.job._replace(d_outs=tuple(d is not None for d in known))
    outs, finals = cut(
        _run(
            backward_recurrence(job, steps, rows),
            how.backward,
            weights=_weights(how, params, backward=True),
            inputs=[*pre, *entering[not how.cell.uses_h :], *extra, *outside],
            flags=flags,
            constants=constants,
            carry=[_pad(how, a, "constant") for a in (d_final.h, *d_final.state)]
            + [zero] * sizes.constants,
            exchanged=[zero] * len(how.cell.gates),
        ),
        len(pre) + sizes.inputs,
    )
    d_pre, d_extra = _real(how, outs[: len(pre)], batch), outs[len(pre) :]
    (d_params, d_xs), (d_more,) = pull_x(d_pre[0]), pull_h(d_pre[-1])
    d_constants = _real(how, finals[sizes.carry :], batch)
    d_params = jax.tree.map(
        lambda *a: functools.reduce(jnp.add, a), d_params, d_more, pull_constants(d_constants)[0]
    )
    d_noise = [jnp.zeros_like(a) for a in extra[sizes.inputs :]]
    d_inputs = pull_extra([*_real(how, d_extra, batch), *d_noise])[0]
    d_initial = _as_carry(how, [_unpad(how, a, batch) for a in finals[: sizes.carry]])
    if resets is not None:
        zeros = jax.tree.map(jnp.zeros_like, d_initial)
        d_initial = select_rows(_first(how, resets), zeros, d_initial)
    nothing = jax.tree.map(lambda a: None, inputs)
    return nothing._replace(
        params=pull_params(d_params)[0], xs=d_xs, initial=d_initial, inputs=d_inputs
    )


def _known(how: _How, d_outs: Outputs | None) -> list[Array | None]:
    """The gradients of the outputs, h first; None for what is known to be zero."""
    if d_outs is None:
        return [None]
    return [d_outs.h, *(d_outs.state or [None] * 0)] if how.how.states else [d_outs.h]


def _real(how: _How, arrays: list[Array], batch: int) -> list[Array]:
    """Zeros in rows and units of padding, whose derivatives may be infinite: 0 x inf is no zero."""
    found = []
    for a in arrays:
        row = jnp.arange(a.shape[-2])[:, None] < batch
        unit = jnp.arange(a.shape[-1])[None] % how.job.units < how.job.width
        keep = jnp.broadcast_to(row & unit, a.shape[-2:])
        found.append(jnp.where(keep.reshape((1,) * (a.ndim - 2) + keep.shape), a, 0))
    return found


def _run(
    what: Recurrence,
    plan: GPUPlan,
    *,
    weights: Array,
    inputs: list[Array],
    flags: list[Array],
    constants: list[Array],
    carry: list[Array],
    exchanged: list[Array],
) -> list[Array]:
    """Call a kernel on padded arrays; returns the outputs and the final carry."""
    make = plan.interpret
    if not callable(make):
        from lstmjax.recurrence.gpu.kernel import recurrence_kernel  # of no use elsewhere

        make = recurrence_kernel
    arrays = [weights, *inputs, *flags, *constants, *carry, *exchanged]
    # A kernel does not say along which axes of a mesh its results vary: as its operands do.
    return vary_alike(list(make(what, plan)(*arrays)), arrays)


def _first(how: _How, resets: Array) -> Array:
    """Rows whose carry is replaced on the way into the first step."""
    return resets[-1 if how.job.reverse else 0]


def _flags(how: _How, mask: Array | None, resets: Array | None) -> list[Array]:
    """Those of a kernel, for padded rows: valid, and reset before the step that comes next."""
    flags = [] if mask is None else [mask]
    if resets is not None:
        later = 1 if how.job.reverse else -1
        last = 0 if how.job.reverse else -1
        flags.append(jnp.roll(resets, later, axis=0).at[last].set(False))
    return [_pad_rows(how, flag.astype(jnp.float32), 1) for flag in flags]


def _as_carry(how: _How, arrays: list[Array]) -> Carry:
    return Carry(arrays[0], how.cell.State._make(arrays[1:]))


def _entering(
    how: _How, inputs: Inputs, carry: list[Array], after: list[Array], flags: list[Array]
) -> list[Array]:
    """The carry that each step saw, from the carry that each left."""

    def shift(first: Array, later: Array) -> Array:
        if how.job.reverse:
            return jnp.concatenate([later[1:], first[None]])
        return jnp.concatenate([first[None], later[:-1]])

    entering = [shift(a, b) for a, b in zip(carry, after, strict=True)]
    if not how.job.resets:
        return entering
    reset = shift(jnp.zeros_like(flags[-1][0]), flags[-1])[..., None] != 0
    start = _start(how, inputs)
    return [jnp.where(reset, s[None], a) for s, a in zip(start, entering, strict=True)]


# --- Operands ------------------------------------------------------------------------------------


def _input_part(how: _How, params: Params, xs: Array) -> Array:
    """``x W + b`` of all steps, padded: ``(T, B, G H)``."""
    kernel, bias = _pad_units(how, params["kernel"]), _pad_units(how, params["bias"])
    return make_dot(how.precision)(_pad_rows(how, xs, 1), kernel) + bias[None, None]


def _recurrent_part(how: _How, params: Params, hs: Array) -> Array:
    """``h R`` of all steps, ``hs (T, B, H)`` and the result padded."""
    kernel = _recurrent_kernel(how, params, "edge")
    groups, units, gates, _ = kernel.shape
    dot = jax.vmap(make_dot(how.precision), (-2, 0), -2)
    part = dot(hs.reshape(*hs.shape[:-1], groups, units), kernel.reshape(groups, units, -1))
    part = part.reshape(*hs.shape[:-1], groups, gates, units).swapaxes(-3, -2)
    part = part.reshape(*hs.shape[:-1], -1)
    if how.cell.parts_apart:
        part = part + _pad_units(how, params["recurrent_bias"])[None, None]
    return part


def _weights(how: _How, params: Params, *, backward: bool) -> Array:
    """The W_g of a kernel, ``(groups, parts, G, units, units)``: [unit computed, unit multiplied].

    Whatever a padded unit holds is multiplied by zero.
    """
    plan = how.backward if backward else how.forward
    kernel = _recurrent_kernel(how, params, "constant" if backward else "edge")
    kernel = kernel.transpose((0, 2, 1, 3) if backward else (0, 2, 3, 1))
    return jnp.stack(split_outside(kernel, plan.parts), axis=1)


def _recurrent_kernel(how: _How, params: Params, mode: str) -> Array:
    """``(groups, units, G, units)``, the last axis padded as is said, the other with zeros."""
    job, width = how.job, how.job.width
    kernel = grouped(how.cell, params["recurrent_kernel"], width)
    kernel = kernel.reshape(width, -1, job.groups, width).transpose(2, 0, 1, 3)
    kernel = _pad_units(how, kernel, mode)
    return jnp.pad(kernel, ((0, 0), (0, job.units - width), (0, 0), (0, 0)))


def _constants(how: _How, params: Params, rows: int) -> list[Array]:
    """The step's parameters, each ``(rows, H)``."""
    others = {name: params["step"][name] for name in how.job.step.shapes.others}
    arrays = jax.tree.leaves((params.get("units", {}), others))
    size = how.cell.hidden_size
    return [_wide(how, jnp.broadcast_to(a.reshape(-1), (size,)), rows) for a in arrays]


def _extra(how: _How, inputs: Inputs) -> list[Array]:
    """The step's inputs and noise, each ``(T, B, H)``, padded."""
    steps, batch, _ = inputs.xs.shape
    noises = inputs.noises
    drawn = {} if noises is None else noises.draw(how.cell, inputs.xs.dtype, 0, steps)
    shape = steps, batch, how.cell.hidden_size
    arrays = [*jax.tree.leaves(inputs.inputs), *jax.tree.leaves(drawn)]
    return [_pad(how, jnp.broadcast_to(a, shape)) for a in arrays]


def _recurrent_bias(how: _How, params: Params, rows: int) -> list[Array]:
    """Gate by gate, each ``(rows, H)``, where the cell has one."""
    if not how.cell.parts_apart:
        return []
    gates = jnp.split(params["recurrent_bias"], len(how.cell.gates))
    return [_wide(how, gate, rows) for gate in gates]


def _start(how: _How, inputs: Inputs) -> list[Array]:
    """The carry after a reset, each array ``(rows, H)``, where there are resets."""
    if not how.job.resets:
        return []
    return [_pad(how, a) for a in jax.tree.leaves(inputs.start)]


def _wide(how: _How, unit: Array, rows: int) -> Array:
    padded = _pad_units(how, unit)
    return jnp.broadcast_to(padded[None], (rows, *padded.shape))


# --- Padding -------------------------------------------------------------------------------------


def _pad_rows(how: _How, x: Array, axis: int, mode: str = "edge") -> Array:
    """Up to whole blocks, by copies of the last row: no step then meets what it never meets else.

    A cell need not stand zeros: it may divide by a state that starts at one.
    """
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, up(x.shape[axis], how.forward.rows) - x.shape[axis])
    return jnp.pad(x, widths, mode=mode)


def _pad_units(how: _How, x: Array, mode: str = "edge") -> Array:
    """``(..., n H)`` up to whole tiles, group by group, by copies of the last unit.

    So what a padded unit computes is as finite as what the cell computes itself: zeros might make
    a step divide by zero, and a NaN spreads to all units through the product.
    """
    missing = how.job.units - how.job.width
    if not missing:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, how.job.width)
    widths = [(0, 0)] * (x.ndim) + [(0, missing)]
    return jnp.pad(blocks, widths, mode=mode).reshape(*x.shape[:-1], -1)


def _pad(how: _How, x: Array, mode: str = "edge") -> Array:
    """``(..., B, H)``, rows and units."""
    return _pad_units(how, _pad_rows(how, x, x.ndim - 2, mode), mode)


def _unpad(how: _How, x: Array, batch: int) -> Array:
    groups = x[..., :batch, :].reshape(*x.shape[:-2], batch, how.job.groups, how.job.units)
    return groups[..., : how.job.width].reshape(*x.shape[:-2], batch, how.cell.hidden_size)
