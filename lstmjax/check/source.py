"""What a step is made of, read off its trace: operations, dependences, and their lines."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax.cells.base import Carry, Cell
from lstmjax.cells.contract import Arguments, shapes_of, trace_transition
from lstmjax.errors import installed, user_line
from lstmjax.traced import AsTraced, Program, Value, is_literal, trace

RANDOM = ("random_", "threefry", "rng_", "shuffle")
NO_DERIVATIVE = {
    "stop_gradient": "jax.lax.stop_gradient",
    "round": "round",
    "floor": "floor",
    "ceil": "ceil",
    "sign": "sign",
}
"""Operations that let no gradient through, and what a user calls them."""


def fresh_trace(cell: Cell, features: int, dtype: str, batch: int = 2) -> tuple[Program, Arguments]:
    """One step, traced anew, as in training where that differs; and the shapes of its arguments."""
    shapes = shapes_of(cell, batch, features, jnp.dtype(dtype), training=bool(cell.noise))
    return trace_transition(cell, shapes), shapes


def operations(jaxpr: Any, line: str = "") -> Iterator[tuple[Any, str]]:
    """All operations of a trace, with the user's line, those inside of calls too."""
    for eqn in jaxpr.eqns:
        at = line or user_line(eqn)
        yield eqn, at
        for part in eqn.params.values():
            for inner in part if isinstance(part, tuple | list) else (part,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from operations(inner, at)


def draws(program: Program) -> str | None:
    """Where a step draws random numbers itself, as `` (my_cell.py:12)``; None if nowhere."""
    for eqn, line in operations(program.closed.jaxpr):
        if eqn.primitive.name.startswith(RANDOM):
            return line
    return None


def narrowed(program: Program, dtype: str) -> str | None:
    """Where a step computes in less than ``dtype``: ``"float16 (my_cell.py:12)"``."""
    bits = jnp.finfo(dtype).bits
    for eqn, line in operations(program.closed.jaxpr):
        for var in eqn.outvars:
            found = var.aval.dtype
            if jnp.issubdtype(found, jnp.floating) and jnp.finfo(found).bits < bits:
                return f"{found}{line}"
    return None


def blocked(program: Program) -> list[str]:
    """What may keep a gradient from being that of the values, with lines."""
    found = []
    for eqn, line in operations(program.closed.jaxpr):
        name = eqn.primitive.name
        if name in NO_DERIVATIVE:
            found.append(f"{NO_DERIVATIVE[name]}{line}")
        elif name.startswith(("custom_vjp_call", "custom_jvp_call")):
            called = eqn.params.get("call_jaxpr") or eqn.params.get("fun_jaxpr")
            info = getattr(getattr(called, "jaxpr", called), "debug_info", None)
            told = getattr(info, "func_src_info", "") or ""
            function, _, file = told.partition(" at ")
            if not installed(file):
                found.append(f"{name.removesuffix('_call')} {function}{line}")
    return list(dict.fromkeys(found))


def difference(a: Program, b: Program) -> str | None:
    """Where two traces of one step differ, as a line of the user's; None where they are one."""
    ours, theirs = list(operations(a.closed.jaxpr)), list(operations(b.closed.jaxpr))
    for (one, line), (other, _) in zip(ours, theirs, strict=False):
        if _text(one) != _text(other) or _numbers(one) != _numbers(other):
            return line
    if len(ours) != len(theirs) or len(a.consts) != len(b.consts):
        return ""
    for var, one, other in zip(a.closed.jaxpr.constvars, a.consts, b.consts, strict=True):
        if not _same_constant(one, other):
            return next((line for eqn, line in ours if var in eqn.invars), "")
    return None


def _text(eqn: Any) -> str:
    names = [str(atom.aval) for atom in (*eqn.invars, *eqn.outvars)]
    inner = sorted(f"{k}={v}" for k, v in eqn.params.items() if isinstance(v, int | str | tuple))
    return re.sub("0x[0-9a-f]+", "", f"{eqn.primitive.name} {names} {inner}")


def _numbers(eqn: Any) -> list[Any]:
    return [np.asarray(a.val).tolist() for a in eqn.invars if is_literal(a)]


def _same_constant(a: Any, b: Any) -> bool:
    if any(isinstance(c, jax.core.Tracer) for c in (a, b)):
        return a is b
    if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")


def state_reads(program: Program, args: Arguments) -> dict[str, set[str]]:
    """For each array of the state, those of the step before that its new value depends on."""
    fields = list(args.carry.state._fields)
    leaves = jax.tree_util.tree_leaves_with_path(args)
    jaxpr = program.closed.jaxpr
    reads: dict[int, set[str]] = {}
    for (path, _), var in zip(leaves, jaxpr.invars, strict=True):
        name = getattr(path[-1], "name", "")
        in_state = len(path) > 2 and getattr(path[1], "name", "") == "state"
        reads[id(var)] = {name} if in_state and name in fields else set()
    for eqn in jaxpr.eqns:
        ins = (reads.get(id(a), set()) for a in eqn.invars if not is_literal(a))
        together = set().union(*ins)
        reads.update((id(var), together) for var in eqn.outvars)
    outs = jaxpr.outvars[len(jaxpr.outvars) - len(fields) :]
    return {f: reads.get(id(v), set()) for f, v in zip(fields, outs, strict=True)}


class _Watching(AsTraced):
    """Runs a program and keeps the first operation that makes what is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
        """As traced; looks at the results."""
        outs = super().equation(eqn, ins)
        if self.found is None and _finite(ins) and not _finite(outs):
            self.found = f"{eqn.primitive.name}{self.line(eqn)}"
        return outs


def _finite(values: Sequence[Value]) -> bool:
    return all(
        bool(jnp.all(jnp.isfinite(v.array)))
        for v in values
        if jnp.issubdtype(jnp.result_type(v.array), jnp.floating)
    )


def first_not_finite(cell: Cell, args: Arguments, xs: Any) -> str | None:
    """The operation that first gives infinity or NaN over the steps, or in their derivatives.

    Args:
        cell: the cell.
        args: of the first step, as arrays.
        xs: inputs of all steps, ``(T, B, D)``.

    Returns:
        ``"exp (my_cell.py:12), step 3"``, or None.
    """
    program = trace_transition(cell, args)
    jaxpr = program.closed.jaxpr

    def back(*given: Any) -> Any:
        *arrays, d_carry = given
        floats = [k for k, a in enumerate(jax.tree.leaves(arrays)) if a.dtype.kind == "f"]

        def step(*moving: Any) -> Carry:
            leaves = list(jax.tree.leaves(arrays))
            for k, a in zip(floats, moving, strict=True):
                leaves[k] = a
            return program.evaluate(leaves)

        leaves = jax.tree.leaves(arrays)
        return jax.vjp(step, *(leaves[k] for k in floats))[1](d_carry)

    derivative = None
    for step, x in enumerate(xs):
        args = args._replace(x=x)
        carries = args.carry
        watching = _Watching()
        outs = watching.evaluate(jaxpr, program.consts, [Value(a) for a in jax.tree.leaves(args)])
        if watching.found is not None:
            return f"{watching.found}, step {step + 1}"
        floats = all(a.dtype.kind == "f" for a in jax.tree.leaves(carries))
        if floats:
            ones = jax.tree.map(jnp.ones_like, carries)
            if derivative is None:
                derivative = trace(back, *args, ones, rows=-1)
            flat = [Value(a) for a in jax.tree.leaves((*args, ones))]
            watching.evaluate(derivative.closed.jaxpr, derivative.consts, flat)
            if watching.found is not None:
                return f"the derivative of {watching.found}, step {step + 1}"
        args = args._replace(carry=jax.tree.unflatten(program.structure, [v.array for v in outs]))
    return None
