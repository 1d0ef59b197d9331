"""A cell's ``step`` and its derivative as programs: what fused kernels are made of.

Kernels compute pre-activations themselves; `Step` has all else. It exists for cells that leave
`lstmjax.cells.Cell.transition` as it is.
"""

import dataclasses
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import PyTree

from lstmjax.cells.base import Carry, Cell, Named, Params, Parts, _record, arguments, recurs, start
from lstmjax.recurrence.engine import Workload, overridden
from lstmjax.traced import NoRule, Program, needed, trace


class StepArguments(NamedTuple):
    """What ``step`` takes, by blocks: as arrays or shapes.

    Attributes:
        pre: the gates' blocks, ``(B, H)`` each; of a cell with its parts apart those of the input
            part, then those of the recurrent part.
        carry: h and the state before the step.
        units: per-unit parameters by name, ``(1, H)``.
        others: those of ``step_params`` that the step reads, by name, with two axes at least.
        inputs: ``step_inputs`` by name, ``(B, width)``.
        noise: by name, ``(B, width)``.
    """

    pre: list[Array]
    carry: Carry
    units: dict[str, Array]
    others: dict[str, Array]
    inputs: dict[str, Array]
    noise: dict[str, Array]


ROWS = (0, 0, -1, -1, 0, 0)
"""Which axis of each argument the rows are, -1 for none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A step as programs.

    Attributes:
        forward: ``(StepArguments) -> Carry``.
        backward: ``(StepArguments, d carry) -> d StepArguments``, without that of the noise; the
            gradients of parameters are sums over the rows.
        recur: ``(h, noise) -> h`` as the recurrent product sees it; None where that is h itself.
        recur_back: ``(h, noise, d seen) -> d h``.
        shapes: of the arguments.
    """

    forward: Program
    backward: Program
    recur: Program | None
    recur_back: Program | None
    shapes: StepArguments


def step_of(cell: Cell, work: Workload) -> Step:
    """The programs of a cell's step for a batch."""
    return _step_of(cell, work.batch, work.features, work.training, work.dtype)


@functools.lru_cache(maxsize=256)
def _step_of(cell: Cell, batch: int, features: int, training: bool, dtype: str) -> Step:
    shapes, own = _shapes(cell, batch, features, training, dtype)
    count, x = len(cell.gates), ShapeDtypeStruct((batch, features), dtype)

    def one_step(*given: PyTree) -> Carry:
        args: StepArguments = StepArguments(*given)
        pre: Named | Parts[Named] = cell.named(args.pre[:count])
        if cell.parts_apart:
            apart = _record("gate with recurrence", cell.recurrent)(*args.pre[count:])
            pre = Parts(cell.named(args.pre[:count]), apart)
        others = {
            name: (args.others[name] if name in args.others else jnp.zeros(shape, dtype)).reshape(
                shape
            )
            for name, shape in own.items()
        }
        params: Params = {"units": {name: a[0] for name, a in args.units.items()}, "step": others}
        more = arguments(cell, x, args.inputs, args.noise)
        return cell.apply_step(pre, args.carry, params, **more)

    with jax.default_matmul_precision("highest"):
        forward = trace(one_step, *shapes, rows=ROWS)
        if (read := _read(forward, shapes)) != sorted(shapes.others):  # others: for `Cell.prepare`
            shapes = shapes._replace(others={name: shapes.others[name] for name in read})
            forward = trace(one_step, *shapes, rows=ROWS)
    backward = _derivative(forward, shapes)
    if any(isinstance(const, jax.core.Tracer) for const in forward.consts):
        raise NoRule("it closes over a value that is being traced")
    if not recurs(cell):
        return Step(forward, backward, None, None, shapes)
    h, noise, no_noise = shapes.carry.h, shapes.noise, _record("noise", ())()

    def seen(h: Array, noise: dict[str, Array]) -> Array:
        inputs = dict.fromkeys(cell.step_inputs)
        return cell.recur(h, arguments(cell, x, inputs, noise).get("noise", no_noise))

    recur = trace(seen, h, noise)
    back = trace(lambda h, noise, d: jax.vjp(lambda a: recur(a, noise), h)[1](d)[0], h, noise, h)
    return Step(forward, backward, recur, back, shapes)


def _read(forward: Program, shapes: StepArguments) -> list[str]:
    """Names of those of ``step_params`` that a step reads."""
    jaxpr = forward.closed.jaxpr
    read = {id(a) for eqn in needed(jaxpr) for a in eqn.invars} | set(map(id, jaxpr.outvars))
    before = len(jax.tree.leaves(shapes[:3]))
    names = sorted(shapes.others)
    variables = dict(zip(names, jaxpr.invars[before : before + len(names)], strict=True))
    return [name for name in names if id(variables[name]) in read]


def _shapes(
    cell: Cell, batch: int, features: int, training: bool, dtype: str
) -> tuple[StepArguments, dict[str, tuple[int, ...]]]:
    """Of a step's arguments, and of its ``step_params`` as the cell declares them."""

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, dtype)

    def make() -> tuple[StepArguments, dict[str, Array]]:
        params = cell.prepare(cell.init(jax.random.key(0), features, dtype))
        own = {name: params["step"][name] for name in cell.step_params}
        blocks = len(cell.gates) + (len(cell.recurrent) if cell.parts_apart else 0)
        drawn = cell.noise.items() if training else ()
        args = StepArguments(
            pre=[zeros(batch, cell.hidden_size) for _ in range(blocks)],
            carry=start(cell, params, batch, features, dtype),
            units={name: zeros(1, cell.hidden_size) for name in cell.unit_params},
            others={n: zeros(*(1,) * (2 - a.ndim), *a.shape) for n, a in own.items()},
            inputs={
                name: zeros(batch, cell.width(width, features))
                for name, width in cell.step_inputs.items()
            },
            noise={n: zeros(batch, cell.width(noise.width, features)) for n, noise in drawn},
        )
        return args, own

    shapes, own = jax.eval_shape(make)
    return shapes, {name: a.shape for name, a in own.items()}


def _derivative(forward: Program, shapes: StepArguments) -> Program:
    """The vector-Jacobian product of a step."""

    def back(*given: PyTree) -> StepArguments:
        *args, d_carry = given
        noise = args[-1]

        def step(*moving: PyTree) -> Carry:
            return forward.evaluate(jax.tree.leaves((*moving, noise)))

        d = jax.vjp(step, *args[:-1])[1](d_carry)
        return StepArguments._make((*d, jax.tree.map(lambda a: None, noise)))

    traced = trace(back, *shapes, shapes.carry, rows=(*ROWS, 0))
    out: PyTree = [
        jax.tree.map(lambda _, row=row: row, part)
        for row, part in zip(ROWS[:-1], shapes[:-1], strict=True)
    ]
    rows = tuple(None if row < 0 else row for row in jax.tree.leaves(out))
    return traced.with_sums(rows)


def standard(cell: Cell, params: Params) -> Params:
    """Parameters with zeros for the recurrence and the biases that a cell does without.

    Every gate then has a column of each, as the kernels lay them out.
    """
    units = cell.hidden_size
    dtype = params["kernel"].dtype

    def spread(a: Array | None, gates: tuple[str, ...], height: tuple[int, ...]) -> Array:
        parts = () if a is None else jnp.split(a, len(gates), -1)
        blocks = dict(zip(gates, parts, strict=True))
        zero = jnp.zeros((*height, units), dtype)
        return jnp.concatenate([blocks.get(gate, zero) for gate in cell.gates], -1)

    block = units // cell.heads
    filled = params.copy()
    if cell.recurrent != cell.gates:
        filled["recurrent_kernel"] = spread(
            params.get("recurrent_kernel"), cell.recurrent, (block,)
        )
    if cell.biased != cell.gates:
        filled["bias"] = spread(params.get("bias"), cell.biased, ())
    if cell.parts_apart and cell.recurrent_bias_gates != cell.gates:
        filled["recurrent_bias"] = spread(
            params.get("recurrent_bias"), cell.recurrent_bias_gates, ()
        )
    return filled


def learned_start(cell: Cell) -> bool:
    """Whether the carry that a reset puts in place depends on parameters."""
    own = type(cell).initial_carry is not Cell.initial_carry
    return own and "params" in inspect.signature(cell.initial_carry).parameters


def no_kernel(cell: Cell, work: Workload) -> str | None:
    """Why no kernel that is made of a step can serve, whatever the device."""
    if refusal := overridden(cell):
        return refusal
    if not cell.recurrent:
        return "it has no recurrent product that a kernel could keep on chip"
    if work.resets and learned_start(cell):
        return "its resets put learned numbers in place"
    try:
        step_of(cell, work)
    except NoRule as error:
        return str(error)
    return None
