"""Running the operations of a function of rows with the rows first or last."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn

from lstmjax.errors import user_line
from lstmjax.traced.operations import (
    ELEMENTWISE,
    INLINED,
    AnyArray,
    Atom,
    MixedRows,
    NoRule,
    Size,
    aval_of,
    bind,
    bind_as_traced,
    bind_to_derive,
    broadcast,
    callee,
    is_literal,
    name_of,
    needed,
    number,
    shape_of,
    shrunk,
)

Layout = Literal["first", "last"]
"""Where the rows are in every array that has them."""

try:  # JAX' own way to say which line an operation was written on; not for the public
    from jax._src import source_info_util

    user_context = source_info_util.user_context
except ImportError:

    def user_context(*_: object) -> contextlib.AbstractContextManager[None]:  # type: ignore[no-redef]
        """Without it, JAX' messages name a line of this package."""
        return contextlib.nullcontext()


class Value(NamedTuple):
    """An array of a running program.

    Attributes:
        array: axes along which the traced array is known to be constant may have size 1 here.
        row: which axis of the traced array the rows are, wherever they are in ``array``; None
            where it has none: the other axes are then where they were.
    """

    array: AnyArray
    row: int | None = None


_UNWANTED = Value(cast(AnyArray, np.zeros(())))
"""In place of an output that nobody asks for."""

_LAZY = ELEMENTWISE | {"broadcast_in_dim", "iota", "reshape", "squeeze", "expand_dims", "transpose"}


class Runner:
    """Runs jaxprs with the rows first or last in every array that has them."""

    def __init__(self, layout: Layout, sums: bool = False, valid: Array | None = None) -> None:
        self.first, self.sums, self.valid = layout == "first", sums, valid
        self.hook: Hook | None = None
        self.outer: JaxprEqn | None = None
        self.batch = 1

    def evaluate(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[AnyArray],
        args: Sequence[Value],
        wanted: Sequence[bool] | None = None,
    ) -> list[Value]:
        """The outputs of a jaxpr."""
        known: dict[int, Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            known[id(var)] = Value(shrunk(const))
        for var, value in zip(jaxpr.invars, args, strict=True):
            known[id(var)] = value
        self.execute(needed(jaxpr, wanted), known)
        return [
            self.read(var, known) if want else _UNWANTED
            for var, want in zip(jaxpr.outvars, wanted or [True] * len(jaxpr.outvars), strict=True)
        ]

    def execute(self, eqns: Sequence[JaxprEqn], known: dict[int, Value]) -> None:
        """Run operations on the variables known, by their identity, which become more."""
        for eqn in eqns:
            outer = self.outer
            self.outer = outer or eqn  # inside a call lines may be those of an earlier caller
            with user_context(self.outer.source_info.traceback):
                outs = self.equation(eqn, [self.read(atom, known) for atom in eqn.invars])
            known.update((id(var), out) for var, out in zip(eqn.outvars, outs, strict=True))
            self.outer = outer

    def line(self, eqn: JaxprEqn) -> str:
        """Where in a user's program an operation came from."""
        return user_line(self.outer or eqn)

    def read(self, atom: Atom, known: dict[int, Value]) -> Value:
        """The value of a variable, or of a number in the program."""
        return Value(number(atom)) if is_literal(atom) else known[id(atom)]

    def equation(self, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
        """The outputs of one operation."""
        name = name_of(eqn)
        if self.hook is not None and (taken := self.hook(eqn, ins)) is not None:
            return taken
        rowless = all(value.row is None for value in ins)
        if name in INLINED and not (rowless and name.startswith("custom_")):
            jaxpr, consts = callee(eqn)
            return self.evaluate(jaxpr, consts, ins)
        if rowless and name not in _LAZY:
            arrays = [
                self.whole(value, aval_of(atom)).array
                for value, atom in zip(ins, eqn.invars, strict=True)
            ]
            return [Value(a) for a in bind_as_traced(eqn, arrays)]
        if name in ELEMENTWISE:
            return [self.elementwise(eqn, ins)]
        if name in RULES:
            outs = RULES[name](self, eqn, ins)
            return outs if isinstance(outs, list) else [outs]
        if not eqn.outvars:
            return self.as_traced(eqn, ins)
        raise NoRule(f"it uses {name}{self.line(eqn)}")

    # In and out

    def enter(self, array: AnyArray, row: int | None) -> Value:
        """An argument, its rows where the layout has them."""
        if row is not None:
            self.batch = array.shape[0 if self.first else -1]
        return Value(array, row)

    def leave(self, value: Value, row: int | None, aval: ShapedArray) -> AnyArray:
        """A result whose rows are the axis ``row`` of the traced array."""
        value = self.whole(value, aval)
        if value.row == row:
            return value.array
        if (
            value.row is not None
            or row is None
            or value.array.shape[row] not in (1, aval.shape[row])
        ):
            raise MixedRows("a result has its rows along another axis than the arguments")
        array = lax.slice_in_dim(value.array, 0, 1, axis=row)  # as many as there are rows here
        kept = self.kept(array, row).array
        place = 0 if self.first else kept.ndim - 1
        shape = [self.batch if k == place else n for k, n in enumerate(kept.shape)]
        return broadcast(kept, shape)

    def sum_to(self, value: Value, aval: ShapedArray, shape: Sequence[Size]) -> AnyArray:
        """The gradient of an array of ``shape`` that is kept in place of a traced one: summed
        over rows and over every axis along which it is kept once."""
        value, row = self.whole(value, aval), value.row
        array = value.array
        if row is not None:
            array = self.counted(value).sum(0 if self.first else -1, keepdims=True)
            array = self.traced(Value(array, row))
        axes = tuple(k for k, n in enumerate(shape) if n == 1 and array.shape[k] != 1)
        return array.sum(axes, keepdims=True) if axes else array

    # Where the axes of the traced array are

    def axis(self, value: Value, axis: int) -> int:
        """The place, in ``value.array``, of an axis of the traced array."""
        if value.row is None:
            return axis
        if axis == value.row:
            return 0 if self.first else value.array.ndim - 1
        if self.first:
            return axis + (axis < value.row)
        return axis - (axis > value.row)

    def order(self, row: int | None, rank: int) -> list[int]:
        """The axes of a traced array in the order in which they are kept."""
        others = [axis for axis in range(rank) if axis != row]
        if row is None:
            return others
        return [row, *others] if self.first else [*others, row]

    def kept(self, array: AnyArray, row: int | None) -> Value:
        """From the traced order of axes to the one in which an array is kept."""
        if row is None:
            return Value(array)
        order = self.order(row, array.ndim)
        return Value(array if order == sorted(order) else array.transpose(order), row)

    def traced(self, value: Value) -> AnyArray:
        """Back again."""
        order = self.order(value.row, np.ndim(value.array))
        if order == sorted(order):
            return value.array
        return value.array.transpose(np.argsort(order))

    def whole(self, value: Value, aval: ShapedArray) -> Value:
        """With all axes but the rows of their traced size."""
        if not aval.shape:
            return value
        shape = [
            value.array.shape[k] if axis == value.row else aval.shape[axis]
            for k, axis in enumerate(self.order(value.row, len(aval.shape)))
        ]
        return Value(broadcast(value.array, shape), value.row)

    # Kinds of operations

    def aligned(self, ins: Sequence[Value], eqn: JaxprEqn) -> tuple[list[AnyArray], int | None]:
        """Arrays whose axes match, but for scalars, and which of those axes the rows are."""
        rows = {value.row for value in ins if value.row is not None}
        if len(rows) > 1:
            raise MixedRows(f"{name_of(eqn)} takes the rows along two axes at once{self.line(eqn)}")
        row = rows.pop() if rows else None
        arrays = []
        for value in ins:
            array = value.array
            if np.ndim(array) and value.row is None and row is not None:
                if array.shape[row] != 1:
                    raise MixedRows(
                        f"{name_of(eqn)} takes an array that differs from row to row by their "
                        f"place in the batch{self.line(eqn)}"
                    )
                array = self.kept(array, row).array
            arrays.append(array)
        return arrays, row

    def elementwise(self, eqn: JaxprEqn, ins: list[Value]) -> Value:
        """An operation on each element by itself."""
        arrays, row = self.aligned(ins, eqn)
        rank = len(shape_of(eqn.outvars[0]))
        shape = jnp.broadcast_shapes((1,) * rank, *(np.shape(a) for a in arrays))
        arrays = [broadcast(a, shape) for a in arrays]
        return Value(bind(eqn, arrays)[0], row)

    def as_traced(self, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
        """An operation without results, on arrays as they were traced."""
        arrays = [
            self.traced(self.whole(value, aval_of(atom)))
            for value, atom in zip(ins, eqn.invars, strict=True)
        ]
        bind(eqn, arrays)
        return []

    def counted(self, value: Value) -> AnyArray:
        """What a sum over rows adds up: nothing of rows that do not count."""
        if self.valid is None:
            return value.array
        valid = self.valid
        if valid.ndim != value.array.ndim:
            shape = [1] * value.array.ndim
            shape[0 if self.first else -1] = -1
            valid = valid.reshape(shape)
        return jnp.where(valid, value.array, 0)


class AsTraced(Runner):
    """Runs jaxprs as they were traced: no array moves, and every operation will do."""

    def __init__(self, hook: "Hook | None" = None) -> None:
        super().__init__("first")
        self.hook = hook

    def enter(self, array: AnyArray, row: int | None) -> Value:
        """From rows last."""
        return Value(array if row is None else jnp.moveaxis(array, -1, row))

    def leave(self, value: Value, row: int | None, aval: ShapedArray) -> AnyArray:
        """Rows last."""
        return value.array if row is None else jnp.moveaxis(value.array, row, -1)

    def sum_to(self, value: Value, aval: ShapedArray, shape: Sequence[Size]) -> AnyArray:
        """As it is: nothing is kept smaller than it was traced."""
        return value.array

    def equation(self, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
        """The outputs of one operation, with derivatives of their own where they have some."""
        if self.hook is not None and (taken := self.hook(eqn, ins)) is not None:
            return taken
        return [Value(a) for a in bind_to_derive(eqn, [value.array for value in ins])]


Hook = Callable[[JaxprEqn, list[Value]], "list[Value] | None"]
"""``(operation, arguments) -> results``, or None to let the runner do it."""


Rule = Callable[[Runner, JaxprEqn, list[Value]], "Value | list[Value]"]
RULES: dict[str, Rule] = {}
"""By the names of operations; `rules.py` fills it."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorates the rule of the operations of these names (`rules.py`)."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register
