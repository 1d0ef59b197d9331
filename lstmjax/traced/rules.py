"""Where the rows go, operation by operation."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn

from lstmjax.traced.operations import (
    ELEMENTWISE,
    INLINED,
    MixedRows,
    NoRule,
    Size,
    aval_of,
    bind,
    broadcast,
    callee,
    is_product,
    name_of,
    needed,
    shape_of,
    shrunk,
)
from lstmjax.traced.runner import RULES, Runner, Value, rule

_REDUCTIONS = frozenset(
    [
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "argmax",
        "argmin",
    ]
)
_CUMULATIVE = frozenset(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])


def unknown(jaxpr: Jaxpr) -> str | None:
    """The name of an operation without a rule for other layouts, calls opened; None if all have."""
    for eqn in needed(jaxpr):
        name = name_of(eqn)
        if is_product(eqn):
            continue
        if name in INLINED:
            if (found := unknown(callee(eqn)[0])) is not None:
                return found
        elif eqn.outvars and name not in ELEMENTWISE and name not in RULES:
            return name
    return None


@rule("broadcast_in_dim")
def _broadcast_in_dim(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    """New axes get size 1: whoever combines them with others broadcasts them."""
    value, places = ins[0], [int(a) for a in eqn.params["broadcast_dimensions"]]
    sizes = [1] * len(eqn.params["shape"])
    if np.ndim(value.array) == 0:
        return Value(broadcast(value.array, sizes))
    for axis, place in enumerate(places):
        sizes[place] = value.array.shape[runner.axis(value, axis)]
    row = None if value.row is None else places[value.row]
    if row is None:
        return Value(value.array.reshape(sizes))
    order = runner.order(row, len(sizes))
    return Value(value.array.reshape([sizes[axis] for axis in order]), row)


@rule("iota")
def _iota(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    shape, dimension = eqn.params["shape"], eqn.params["dimension"]
    sizes = [n if axis == dimension else 1 for axis, n in enumerate(shape)]
    return Value(lax.broadcasted_iota(eqn.params["dtype"], sizes, dimension))


@rule("reshape")
def _reshape(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    value, new = ins[0], eqn.params["new_sizes"]
    old = shape_of(eqn.invars[0])
    if eqn.params.get("dimensions") is not None:
        raise NoRule(f"it uses reshape with dimensions{runner.line(eqn)}")
    if value.row is None:
        return _reshape_rowless(value, old, new)
    before = math.prod(old[: value.row])
    places = [
        axis
        for axis, n in enumerate(new)
        if n == old[value.row] and math.prod(new[:axis]) == before
    ]
    if not places:
        raise MixedRows(f"reshape merges the rows with another axis{runner.line(eqn)}")
    row = places[0]
    array = runner.whole(value, aval_of(eqn.invars[0])).array
    rows = array.shape[0 if runner.first else -1]
    others = [n for axis, n in enumerate(new) if axis != row]
    return Value(array.reshape([rows, *others] if runner.first else [*others, rows]), row)


def _reshape_rowless(value: Value, old: Sequence[Size], new: Sequence[Size]) -> Value:
    """Without making what is constant along an axis larger, where axes of size 1 come or go."""
    array = value.array
    if np.ndim(array) == 0:
        return Value(jnp.reshape(array, (1,) * len(new)))
    if [n for n in old if n != 1] == [n for n in new if n != 1]:
        kept = iter([k for k, n in zip(array.shape, old, strict=True) if n != 1])
        return Value(array.reshape([1 if n == 1 else next(kept) for n in new]))
    return Value(broadcast(array, old).reshape(new))


@rule("squeeze")
def _squeeze(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    value, gone = ins[0], set(eqn.params["dimensions"])
    if value.row in gone:
        raise NoRule(f"it takes the only row out of its batch{runner.line(eqn)}")
    row = None if value.row is None else value.row - sum(axis < value.row for axis in gone)
    axes = tuple(runner.axis(value, axis) for axis in gone)
    return Value(jnp.squeeze(value.array, axes), row)


@rule("expand_dims")
def _expand_dims(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    value = ins[0]
    traced = lax.expand_dims(runner.traced(value), eqn.params["dimensions"])
    new = {axis % traced.ndim for axis in eqn.params["dimensions"]}
    old = [axis for axis in range(traced.ndim) if axis not in new]
    return runner.kept(traced, None if value.row is None else old[value.row])


@rule("transpose")
def _transpose(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    value, order = ins[0], [int(a) for a in eqn.params["permutation"]]
    if value.row is None:
        return Value(jnp.transpose(value.array, order))
    row = order.index(value.row)
    places = [runner.axis(value, order[axis]) for axis in runner.order(row, len(order))]
    return Value(value.array.transpose(places), row)


@rule(*_REDUCTIONS)
def _reduce(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    value = runner.whole(ins[0], aval_of(eqn.invars[0]))
    axes = tuple(int(a) for a in eqn.params["axes"])
    params = dict(eqn.params)
    if "out_sharding" in params:
        params["out_sharding"] = None
    if value.row in axes:
        if not (runner.sums and name_of(eqn) == "reduce_sum"):
            raise MixedRows(f"{name_of(eqn)} over the rows{runner.line(eqn)}")
        value = Value(runner.counted(value), value.row)
        row = None
    else:
        row = None if value.row is None else value.row - sum(axis < value.row for axis in axes)
    params["axes"] = tuple(sorted(runner.axis(value, axis) for axis in axes))
    return Value(bind(eqn, [value.array], params)[0], row)


@rule(*_CUMULATIVE)
def _cumulative(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    return _along(runner, eqn, ins, "axis")[0]


@rule("sort")
def _sort(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
    return _along(runner, eqn, ins, "dimension")


@rule("split")
def _split(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
    return _along(runner, eqn, ins, "axis")


@rule("concatenate")
def _concatenate(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    return _along(runner, eqn, ins, "dimension")[0]


@rule("top_k", "approx_top_k")
def _top_k(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
    value, rank = ins[0], len(shape_of(eqn.invars[0]))
    axis = eqn.params.get("axis", rank - 1) % rank
    if "axis" in eqn.params or runner.axis(value, axis) == rank - 1:
        return _along(runner, eqn, ins, "axis")
    whole = runner.whole(value, aval_of(eqn.invars[0]))
    outs = bind(eqn, [runner.traced(whole)])
    return [runner.kept(a, value.row) for a in outs]


def _along(runner: Runner, eqn: JaxprEqn, ins: list[Value], name: str) -> list[Value]:
    """An operation along one axis that is not the rows'."""
    rows = {value.row for value in ins if value.row is not None}
    if len(rows) > 1:
        raise MixedRows(f"{name_of(eqn)} takes the rows along two axes at once{runner.line(eqn)}")
    row = rows.pop() if rows else None
    rank = len(shape_of(eqn.invars[0]))
    axis = int(eqn.params.get(name, rank - 1)) % rank
    if axis == row:
        raise MixedRows(f"{name_of(eqn)} along the rows{runner.line(eqn)}")
    arrays = []
    for value, atom in zip(ins, eqn.invars, strict=True):
        array = runner.whole(value, aval_of(atom)).array
        if value.row is None and row is not None:
            array = runner.kept(shrunk(array), row).array
        arrays.append(array)
    if row is not None:
        place = 0 if runner.first else rank - 1
        count = max(array.shape[place] for array in arrays)
        if any(array.shape[place] not in (1, count) for array in arrays):
            raise MixedRows(
                f"{name_of(eqn)} takes an array that differs from row to row{runner.line(eqn)}"
            )
        arrays = [
            broadcast(a, [count if k == place else n for k, n in enumerate(a.shape)])
            for a in arrays
        ]
    params = dict(eqn.params)
    if name in params:
        params[name] = runner.axis(Value(arrays[0], row), axis)
    return [Value(a, row) for a in bind(eqn, arrays, params)]


@rule("rev")
def _rev(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    value = runner.whole(ins[0], aval_of(eqn.invars[0]))
    if value.row in eqn.params["dimensions"]:
        raise MixedRows(f"rev turns the rows round{runner.line(eqn)}")
    return Value(
        lax.rev(value.array, [runner.axis(value, a) for a in eqn.params["dimensions"]]), value.row
    )


@rule("slice")
def _slice(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    value, shape = runner.whole(ins[0], aval_of(eqn.invars[0])), shape_of(eqn.invars[0])
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(shape)
    row = value.row
    if row is not None and (start[row], limit[row], strides[row]) != (0, shape[row], 1):
        raise MixedRows(f"slice takes some of the rows{runner.line(eqn)}")
    array = value.array
    for axis in range(len(shape)):
        if axis != row:
            array = lax.slice_in_dim(
                array, start[axis], limit[axis], strides[axis], runner.axis(value, axis)
            )
    return Value(array, row)


@rule("pad")
def _pad(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    value = runner.whole(ins[0], aval_of(eqn.invars[0]))
    config = eqn.params["padding_config"]
    if value.row is not None and tuple(config[value.row]) != (0, 0, 0):
        raise MixedRows(f"pad adds rows{runner.line(eqn)}")
    if ins[1].row is not None:
        raise NoRule(f"it pads with a number that differs from row to row{runner.line(eqn)}")
    order = runner.order(value.row, len(config))
    return Value(lax.pad(value.array, ins[1].array, [config[axis] for axis in order]), value.row)


_Sides = Sequence[Sequence[int]]
"""Axes of the left operand, and of the right one."""


@rule("dot_general")
def _dot_general(runner: Runner, eqn: JaxprEqn, ins: list[Value]) -> Value:
    """The rows come where the rows of the layout are; anything else is as traced."""
    (contract, batch), rank = (
        eqn.params["dimension_numbers"],
        [len(shape_of(atom)) for atom in eqn.invars],
    )
    ins = [runner.whole(v, aval_of(atom)) for v, atom in zip(ins, eqn.invars, strict=True)]
    free = [
        [a for a in range(n) if a not in c and a not in b]
        for n, c, b in zip(rank, contract, batch, strict=True)
    ]
    row, summed = _product_row(runner, eqn, ins, contract, batch, free)
    params = dict(eqn.params)
    if "out_sharding" in params:
        params["out_sharding"] = None
    arrays = [runner.counted(v) if summed and v.row is not None else v.array for v in ins]
    sides = [0, 1]
    if row is not None and ins[0].row in free[0] and ins[1].row is None and not runner.first:
        sides = [1, 0]  # then the rows come out last, where they belong
    places = [
        [[runner.axis(ins[k], a) for a in part[k]] for k in sides] for part in (contract, batch)
    ]
    params["dimension_numbers"] = tuple(
        tuple(tuple(int(a) for a in side) for side in part) for part in places
    )
    (out,) = bind(eqn, [arrays[sides[0]], arrays[sides[1]]], params)
    if row is None:
        return Value(out)
    # What came out, axis by axis, as axes of the traced result; then into the order of the layout.
    count = len(batch[0])
    first_free, second_free = (
        [count + axis for axis in range(len(free[0]))],
        [count + len(free[0]) + axis for axis in range(len(free[1]))],
    )
    names = {(0, a): n for a, n in zip(free[0], first_free, strict=True)} | {
        (1, a): n for a, n in zip(free[1], second_free, strict=True)
    }
    came = list(range(count))
    for k in sides:
        order = [a for a in runner.order(ins[k].row, rank[k]) if a in free[k]]
        came += [names[k, a] for a in order]
    wanted = runner.order(row, len(came))
    places_out = [came.index(axis) for axis in wanted]
    if places_out != sorted(places_out):
        out = out.transpose(places_out)
    return Value(out, row)


def _product_row(
    runner: Runner, eqn: JaxprEqn, ins: list[Value], contract: _Sides, batch: _Sides, free: _Sides
) -> tuple[int | None, bool]:
    """Which axis of the product the rows are, and whether it sums over rows."""
    rows = [(side, value.row) for side, value in enumerate(ins) if value.row is not None]
    count = len(batch[0])
    if not rows:
        return None, False
    if len(rows) == 2:
        pair = rows[0][1], rows[1][1]
        if pair in zip(*batch, strict=True):
            return list(batch[0]).index(pair[0]), False
        if runner.sums and pair in zip(*contract, strict=True):
            return None, True
        raise MixedRows(f"dot_general multiplies rows with rows{runner.line(eqn)}")
    ((side, row),) = rows
    if row in free[side]:
        return count + len(free[0]) * side + free[side].index(row), False
    if runner.sums and row in contract[side]:
        other = contract[1 - side][list(contract[side]).index(row)]
        if ins[1 - side].array.shape[other] != 1:
            raise NoRule(f"it multiplies rows with a constant a row{runner.line(eqn)}")
    raise MixedRows(f"dot_general adds up the rows{runner.line(eqn)}")
