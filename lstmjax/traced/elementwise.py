"""Whether a program is element-wise over ``(B, H)``."""

from collections.abc import Sequence

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from lstmjax.errors import user_line
from lstmjax.traced.operations import (
    ELEMENTWISE,
    INLINED,
    AnyArray,
    Atom,
    NoRule,
    callee,
    is_literal,
    name_of,
    needed,
    shape_of,
)

Axes = str
"""Of an array, axis by axis: ``"r"`` rows, ``"u"`` units, ``"1"`` constant along it."""


def elementwise_axes(jaxpr: Jaxpr, consts: Sequence[AnyArray], args: Sequence[Axes]) -> list[Axes]:
    """The axes of the outputs; `NoRule` where something is not element-wise over ``(B, H)``."""
    labels: dict[int, Axes] = dict(zip(map(id, jaxpr.invars), args, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        if np.size(const) != 1:
            raise NoRule(f"it holds a constant of shape {np.shape(const)}")
        labels[id(var)] = "1" * np.ndim(const)

    def label(atom: Atom) -> Axes:
        return "1" * len(shape_of(atom)) if is_literal(atom) else labels[id(atom)]

    for eqn in needed(jaxpr):
        name, ins = name_of(eqn), [label(atom) for atom in eqn.invars]
        if name in INLINED:
            outs = elementwise_axes(*callee(eqn), ins)
        elif name in ELEMENTWISE:
            outs = [_joined(ins, eqn)]
        elif name == "broadcast_in_dim":
            made = ["1"] * len(shape_of(eqn.outvars[0]))
            for axis, place in zip(ins[0], eqn.params["broadcast_dimensions"], strict=True):
                made[int(place)] = axis
            outs = ["".join(made)]
        elif name in ("reshape", "squeeze", "expand_dims") and _only_ones(eqn):
            outs = [_relabelled(ins[0], eqn)]
        elif eqn.outvars:
            raise NoRule(f"it uses {name}{user_line(eqn)}")
        else:
            continue
        labels.update(zip(map(id, eqn.outvars), outs, strict=True))
    return [label(atom) for atom in jaxpr.outvars]


def _joined(ins: Sequence[Axes], eqn: JaxprEqn) -> Axes:
    """The axes of an element-wise result."""
    joined = ""
    for axis in range(len(shape_of(eqn.outvars[0]))):
        names = {label[axis] for label in ins if label} - {"1"}
        if len(names) > 1:
            raise NoRule(f"{name_of(eqn)} takes rows along the axis of the units{user_line(eqn)}")
        joined += names.pop() if names else "1"
    return joined


def _only_ones(eqn: JaxprEqn) -> bool:
    """Whether axes of size 1 come or go, and nothing else."""
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return [n for n in old if n != 1] == [n for n in new if n != 1]


def _relabelled(label: Axes, eqn: JaxprEqn) -> Axes:
    shape = shape_of(eqn.invars[0])
    kept = iter([name for name, n in zip(label, shape, strict=True) if n != 1])
    return "".join("1" if n == 1 else next(kept) for n in shape_of(eqn.outvars[0]))
