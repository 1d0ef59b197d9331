"""A recurrence by the CPU kernels: forward, and its derivative."""

import functools
from collections.abc import Callable

import jax
from jax import Array
from jax.tree_util import PyTreeDef
from jaxtyping import PyTree

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.recurrence.cpu.calls import Kernel
from lstmjax.recurrence.cpu.machine import Machine
from lstmjax.recurrence.cpu.plan import Job, Layout
from lstmjax.recurrence.derivatives import or_zeros, with_derivative
from lstmjax.recurrence.derived.engine import Derived
from lstmjax.recurrence.engine import How, Inputs, Outputs
from lstmjax.recurrence.layout import grouped
from lstmjax.recurrence.step import Step
from lstmjax.traced import vary_alike

Saved = dict[str, Array]
"""What the forward kernel keeps, by name."""


def run_kernels(cell: Cell, step: Step, inputs: Inputs, how: How) -> tuple[Outputs, Carry]:
    """Run ``cell`` over time."""
    job = Job(
        cell,
        step,
        features=inputs.xs.shape[-1],
        dtype=str(inputs.xs.dtype),
        reverse=how.reverse,
        masked=inputs.mask is not None,
        resets=inputs.resets is not None,
        states=how.states,
    )
    flags = vary_alike((inputs.mask, inputs.resets), inputs.xs)
    return _recurrence(job, how)(inputs._replace(mask=flags[0], resets=flags[1]))


@functools.lru_cache(maxsize=256)
def _recurrence(job: Job, how: How) -> Callable[[Inputs], tuple[Outputs, Carry]]:
    return with_derivative(
        functools.partial(_forward, job, True),
        functools.partial(_backward, job),
        Derived().function(job.cell, how),
        lambda inputs: _forward(job, False, inputs)[0],
    )


def _forward(job: Job, saving: bool, inputs: Inputs) -> tuple[tuple[Outputs, Carry], Saved]:
    kernel = Kernel(job._replace(saving=saving), False, Machine.host())
    layout, given = kernel.layout, {"x": inputs.xs} | _operands(kernel.layout, inputs)
    for name, carry in (("initial", inputs.initial), ("start", inputs.start)):
        given |= _numbered(name, jax.tree.leaves(carry))
    found = kernel(given)
    outs = [found[a.name] for a in layout.outputs()]
    shown = _as_carry(layout, outs) if job.states else Carry(outs[0], None)
    saved = {a.name: found[a.name] for a in layout.saved()} if saving else {}
    return (shown, _carry(layout, found, "final")), saved


def _backward(
    job: Job,
    inputs: Inputs,
    saved: Saved,
    d_outputs: tuple[Outputs, Carry],
    wanted: PyTree[bool],
) -> Inputs:
    d_outs, d_final = d_outputs
    structure: PyTreeDef = jax.tree.structure(job.step.shapes.carry)
    known = structure.flatten_up_to(d_outs) if job.states else [d_outs.h]
    names = {f"input {name}" for name, want in wanted.inputs.items() if want}
    names |= {"x"} if wanted.xs else set()
    names |= {"start"} if job.resets and any(jax.tree.leaves(wanted.start)) else set()
    job = job._replace(
        saving=True, wanted=tuple(sorted(names)), d_outs=tuple(d is not None for d in known)
    )
    kernel = Kernel(job, True, Machine.host())
    layout = kernel.layout
    weights, pull_back = jax.vjp(functools.partial(_weights, layout), inputs.params)
    given = saved | _operands(layout, inputs) | weights
    given |= {f"d_out {k}": d for k, d in enumerate(known) if d is not None}
    given |= _numbered("d_final", jax.tree.leaves(or_zeros(d_final, inputs.initial)))
    found = kernel(given)
    (d_params,) = pull_back({name: found[f"d {name}"] for name in weights})
    nothing = jax.tree.map(lambda a: None, inputs)
    return nothing._replace(
        params=d_params,
        xs=found.get("d x", inputs.xs),
        initial=_carry(layout, found, "d initial"),
        start=_carry(layout, found, "d start") if "start" in names else inputs.start,
        inputs={name: found.get(f"d input {name}", a) for name, a in inputs.inputs.items()},
    )


# --- Operands ------------------------------------------------------------------------------------


def _numbered(name: str, arrays: list[Array]) -> dict[str, Array]:
    return {f"{name} {k}": a for k, a in enumerate(arrays)}


def _carry(layout: Layout, found: dict[str, Array], name: str) -> Carry:
    return _as_carry(layout, [found[f"{name} {k}"] for k in range(1 + layout.states)])


def _as_carry(layout: Layout, arrays: list[Array]) -> Carry:
    return jax.tree.unflatten(jax.tree.structure(layout.job.step.shapes.carry), arrays)


def _operands(layout: Layout, inputs: Inputs) -> dict[str, Array]:
    """What both kernels take: weights, flags, step inputs and noise."""
    found = _weights(layout, inputs.params)
    flags = {"mask": inputs.mask, "resets": inputs.resets}
    found |= {name: a for name, a in flags.items() if a is not None}
    found |= {f"input {name}": a for name, a in inputs.inputs.items()}
    if inputs.noises is not None:
        steps, dtype = inputs.xs.shape[0], inputs.xs.dtype
        drawn = inputs.noises.draw(layout.job.cell, dtype, 0, steps)
        found |= {f"noise {name}": a for name, a in drawn.items()}
    return found


def _weights(layout: Layout, params: Params) -> dict[str, Array]:
    """Parameters as the kernels take them."""
    cell, shapes = layout.job.cell, layout.job.step.shapes
    found = {"kernel": params["kernel"]}
    if cell.recurrent:
        found["recurrent"] = grouped(cell, params["recurrent_kernel"], layout.width)
    if cell.biased:
        found["bias"] = params["bias"]
    if cell.recurrent_bias_gates:
        found["recurrent_bias"] = params["recurrent_bias"]
    found |= {f"unit {name}": params["units"][name] for name in shapes.units}
    return found | {f"param {n}": params["step"][n].reshape(-1) for n in shapes.others}
