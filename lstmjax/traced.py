"""A function of rows as a program: what a user wrote is traced once, and all engines run that.

`trace` calls a function with the shapes that it was promised, ``(B, ...)``, and keeps its
operations. `Program` runs them again with the rows as the last axis of every array, or as the
first, and with any number of them: feature-major for CPUs, blocks of rows for kernels. The
function itself is never called with another shape, so what it reads from one, ``h.shape[-1]`` or
``h.size``, is the same on every engine.

That every row is computed from itself alone is found on the way: an operation that brings rows
together is `MixedRows`, one without a rule here `NoRule`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import PyTree

from lstmjax.errors import user_line
from lstmjax.precision import PRODUCT

Layout = Literal["first", "last"]
"""Where the rows are in every array that has them."""

Size = Any
"""Of an axis: an int, or a symbol of `jax.export`."""

if TYPE_CHECKING:
    AnyArray = Array
else:
    AnyArray = Array | np.ndarray | np.generic
    """A traced array, or one whose numbers are known."""

INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
"""Calls that are opened, with the parameter that holds what is called."""


try:  # JAX' own way to say which line an operation was written on; not for the public
    from jax._src.source_info_util import user_context
except ImportError:

    def user_context(*_: Any, **__: Any) -> Any:  # type: ignore[no-redef]
        """Without it, JAX' messages name a line of this package."""
        return contextlib.nullcontext()


class MixedRows(ValueError):
    """An operation computes a row from other rows of the batch."""


class NoRule(ValueError):
    """An operation that cannot be moved to another layout; the message names it."""


class Value(NamedTuple):
    """An array of a running program.

    Attributes:
        array: axes along which the traced array is known to be constant may have size 1 here.
        row: which axis of the traced array the rows are, wherever they are in ``array``; None
            where it has none: the other axes are then where they were.
    """

    array: Any
    row: int | None = None


def is_literal(atom: Any) -> bool:
    """Whether an argument of an operation is a number in the program, not a variable."""
    return hasattr(atom, "val")


def callee(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr that a call in `INLINED` calls, and its constants."""
    called = eqn.params[INLINED[eqn.primitive.name]]
    return getattr(called, "jaxpr", called), getattr(called, "consts", ())


def needed(jaxpr: Any, outputs: Sequence[bool] | None = None) -> list[Any]:
    """The equations that the outputs (or those marked) depend on, in order."""
    marks = outputs or [True] * len(jaxpr.outvars)
    return live(jaxpr.eqns, [a for a, want in zip(jaxpr.outvars, marks, strict=True) if want])


def live(eqns: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """Those of the equations that the variables depend on, in order."""
    wanted = {id(atom) for atom in outputs if not is_literal(atom)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(id(var) in wanted for var in eqn.outvars):
            kept.append(eqn)
            wanted.update(id(atom) for atom in eqn.invars if not is_literal(atom))
    return kept[::-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What `trace` returns: a function of pytrees of arrays, as operations.

    Attributes:
        closed: the jaxpr with its constants.
        structure: of what the function returns.
        rows: for each argument, flat, which axis the rows are, or None.
        sums: what its outputs sum up over rows counts as a sum, not as mixed rows: for programs
            made by differentiation, whose gradients of what all rows share are such sums.
        out_rows: likewise of each output; the first axis of all where nothing is said.
    """

    closed: Any
    structure: Any
    rows: tuple[int | None, ...]
    sums: bool = False
    out_rows: tuple[int | None, ...] | None = None

    @property
    def consts(self) -> Sequence[Any]:
        """Arrays that the function closed over."""
        return self.closed.consts

    def __call__(self, *args: PyTree) -> PyTree:
        """Run as traced, on arrays of the shapes traced."""
        return self.evaluate(jax.tree.leaves(args))

    def evaluate(
        self,
        leaves: Sequence[AnyArray],
        consts: Sequence[Any] | None = None,
        hook: "Hook | None" = None,
    ) -> PyTree:
        """As traced, with the constants given, or its own; what ``hook`` takes, it computes."""
        runner = AsTraced(hook)
        consts = self.consts if consts is None else consts
        outs = runner.evaluate(self.closed.jaxpr, consts, [Value(a) for a in leaves])
        return jax.tree.unflatten(self.structure, [value.array for value in outs])

    def with_sums(self, out_rows: tuple[int | None, ...]) -> "Program":
        """The same as the program of a derivative: ``sums``, and where its results have rows."""
        return dataclasses.replace(self, sums=True, out_rows=out_rows)

    def shapes(self) -> PyTree:
        """What it returns, as shapes."""
        outs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.closed.out_avals]
        return jax.tree.unflatten(self.structure, outs)

    def run(
        self,
        layout: Layout,
        *args: PyTree,
        consts: Sequence[Any] | None = None,
        valid: Array | None = None,
    ) -> PyTree:
        """Run with the rows first or last, any number of them.

        Args:
            layout: where the rows are in the arguments that have them, and in the results.
            *args: as when traced, but for the place of the rows. An axis along which all rows
                of the traced array were one (a per-unit parameter's first) may be there or have
                size 1.
            consts: in place of those traced.
            valid: ``(B,)``, rows that count in sums over rows.

        Raises:
            MixedRows, NoRule: what the operations do not allow.
        """
        runner = Runner(layout, self.sums, valid)
        pairs = zip(jax.tree.leaves(args), self.rows, strict=True)
        values = [runner.enter(a, row) for a, row in pairs]
        consts = self.consts if consts is None else consts
        outs = runner.evaluate(self.closed.jaxpr, consts, values)
        rows = self.out_rows or (0,) * len(outs)
        arrays = [
            runner.leave(value, row, var.aval)
            for value, row, var in zip(outs, rows, self.closed.jaxpr.outvars, strict=True)
        ]
        return jax.tree.unflatten(self.structure, arrays)

    def mapped(self, layout: Layout = "last") -> str | None:
        """Why `run` cannot run it, None where it can.

        Raises:
            MixedRows: it brings rows together.
        """

        def run(*leaves: Array) -> Any:
            placed = [
                a if row is None else jnp.moveaxis(a, row, 0 if layout == "first" else -1)
                for a, row in zip(leaves, self.rows, strict=True)
            ]
            return self.run(layout, *placed)

        try:
            jax.eval_shape(run, *self.closed.in_avals)
        except NoRule as error:
            return str(error)
        return None

    def elementwise(self) -> str | None:
        """Why it is not element-wise, None if each unit depends on the same unit alone.

        Arguments and results count as ``(B, H)``; an axis of size 1 is neither rows nor units.
        """
        shapes = [aval.shape for aval in (*self.closed.in_avals, *self.closed.out_avals)]
        if odd := [shape for shape in shapes if len(shape) > 2]:
            return f"it has an array of shape {odd[0]}, not (B, H)"
        axes = [
            "".join("1" if n == 1 else a for n, a in zip(s, "ru"[2 - len(s) :], strict=True))
            for s in shapes
        ]
        count = len(self.closed.in_avals)
        try:
            outs = _elementwise(self.closed.jaxpr, self.consts, axes[:count])
        except NoRule as error:
            return str(error)
        fits = all(
            a in ("1", b)
            for out, want in zip(outs, axes[count:], strict=True)
            for a, b in zip(out, want, strict=True)
        )
        return None if fits else "it returns rows along the axis of the units"


def trace(function: Callable[..., PyTree], *args: PyTree, rows: PyTree = 0) -> Program:
    """Call ``function`` once, with arrays like ``args``, and keep its operations.

    Args:
        function: of pytrees of arrays.
        *args: arrays or shapes.
        rows: for every argument, as a tree prefix of ``args``, the axis of the rows, -1 for none.

    Example:
        >>> program = trace(lambda h, w: jnp.tanh(h) * w, jnp.ones((2, 3)), jnp.ones((1, 3)),
        ...                 rows=(0, -1))
        >>> program.run("last", jnp.ones((3, 5)), jnp.ones((1, 3))).shape
        (3, 5)
    """
    axes = broadcast_prefix(rows, args)
    with jax.disable_jit(False):  # products are found as calls
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    structure = jax.tree.structure(out)
    if any(map(_opens, closed.jaxpr.eqns)):  # so that products are found wherever they are
        with jax.disable_jit(False):
            closed = jax.make_jaxpr(lambda *leaves: _opened(closed, leaves))(*jax.tree.leaves(args))
    return Program(closed, structure, axes)


def _opens(eqn: Any) -> bool:
    """Whether an operation is a call without a derivative of its own, nor a product by name."""
    name = _name(eqn)
    return (
        name in INLINED
        and not name.startswith("custom_")
        and not str(eqn.params.get("name", "")).startswith(PRODUCT)
    )


def _opened(closed: Any, leaves: Sequence[Array]) -> list[Any]:
    """A jaxpr's outputs, its calls opened."""

    def open_call(eqn: Any, ins: list[Value]) -> list[Value] | None:
        return runner.evaluate(*callee(eqn), ins) if _opens(eqn) else None

    runner = AsTraced(open_call)
    outs = runner.evaluate(closed.jaxpr, closed.consts, [Value(a) for a in leaves])
    return [value.array for value in outs]


def broadcast_prefix(prefix: PyTree, tree: PyTree) -> tuple[int | None, ...]:
    """The numbers of a tree prefix, one for each leaf of the tree; None for -1."""
    if isinstance(prefix, int):
        prefix = jax.tree.map(lambda _: prefix, tree)
    else:
        prefix = tuple(
            jax.tree.map(lambda _, p=p: p, part) if isinstance(p, int) else p
            for p, part in zip(prefix, tree, strict=True)
        )
    return tuple(None if axis < 0 else axis for axis in jax.tree.leaves(prefix))


def vary_alike(tree: PyTree, *references: PyTree) -> PyTree:
    """``tree`` marked as varying over the mesh axes, inside `jax.shard_map`, of any reference.

    Loops ask for carries of one type; and the gradient of what is the same on all devices is then
    summed over them here, once, and not at every step.
    """

    def varying(a: Any) -> frozenset[Any]:
        return jax.typeof(a).manual_axis_type.varying

    axes = frozenset().union(*map(varying, jax.tree.leaves(references)))
    if not axes:
        return tree

    def vary(a: Any) -> Any:
        missing = tuple(axes - varying(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(vary, tree)


def unknown(jaxpr: Any) -> str | None:
    """The name of an operation without a rule for other layouts, calls opened; None if all have."""
    for eqn in needed(jaxpr):
        name = _name(eqn)
        if str(eqn.params.get("name", "")).startswith(PRODUCT):
            continue
        if name in INLINED:
            if (found := unknown(callee(eqn)[0])) is not None:
                return found
        elif eqn.outvars and name not in ELEMENTWISE and name not in _RULES:
            return name
    return None


# --- Running in another layout -------------------------------------------------------------------


class Runner:
    """Runs jaxprs with the rows first or last in every array that has them."""

    def __init__(self, layout: Layout, sums: bool = False, valid: Array | None = None) -> None:
        self.first, self.sums, self.valid = layout == "first", sums, valid
        self.hook: Hook | None = None
        self.outer: Any = None
        self.batch = 1

    def evaluate(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value], wanted: Any = None
    ) -> list[Value]:
        """The outputs of a jaxpr."""
        known: dict[int, Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            known[id(var)] = Value(_shrunk(const))
        for var, value in zip(jaxpr.invars, args, strict=True):
            known[id(var)] = value
        self.execute(needed(jaxpr, wanted), known)
        return [
            self.read(var, known) if want else Value(None)
            for var, want in zip(jaxpr.outvars, wanted or [True] * len(jaxpr.outvars), strict=True)
        ]

    def execute(self, eqns: Sequence[Any], known: dict[int, Value]) -> None:
        """Run operations on the variables known, by their identity, which become more."""
        for eqn in eqns:
            outermost = self.outer is None  # inside a call lines may be those of an earlier caller
            self.outer = eqn if outermost else self.outer
            with user_context(self.outer.source_info.traceback):
                outs = self.equation(eqn, [self.read(atom, known) for atom in eqn.invars])
            known.update((id(var), out) for var, out in zip(eqn.outvars, outs, strict=True))
            self.outer = None if outermost else self.outer

    def line(self, eqn: Any) -> str:
        """Where in a user's program an operation came from."""
        return user_line(eqn if self.outer is None else self.outer)

    def read(self, atom: Any, known: dict[int, Value]) -> Value:
        """The value of a variable, or of a number in the program."""
        return Value(_number(atom)) if is_literal(atom) else known[id(atom)]

    def equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
        """The outputs of one operation."""
        name = eqn.primitive.name
        if self.hook is not None and (taken := self.hook(eqn, ins)) is not None:
            return taken
        rowless = all(value.row is None for value in ins)
        if name in INLINED and not (rowless and name.startswith("custom_")):
            jaxpr, consts = callee(eqn)
            return self.evaluate(jaxpr, consts, ins)
        if rowless and name not in _LAZY:
            arrays = [
                self.whole(value, atom.aval).array
                for value, atom in zip(ins, eqn.invars, strict=True)
            ]
            return [Value(a) for a in bind_as_traced(eqn, arrays)]
        if name in ELEMENTWISE:
            return [self.elementwise(eqn, ins)]
        if name in _RULES:
            outs = _RULES[name](self, eqn, ins)
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

    def leave(self, value: Value, row: int | None, aval: Any) -> AnyArray:
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
        return _broadcast(kept, shape)

    def sum_to(self, value: Value, aval: Any, shape: Sequence[Size]) -> AnyArray:
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

    def whole(self, value: Value, aval: Any) -> Value:
        """With all axes but the rows of their traced size."""
        if not aval.shape:
            return value
        shape = [
            value.array.shape[k] if axis == value.row else aval.shape[axis]
            for k, axis in enumerate(self.order(value.row, len(aval.shape)))
        ]
        return Value(_broadcast(value.array, shape), value.row)

    # Kinds of operations

    def aligned(self, ins: Sequence[Value], eqn: Any) -> tuple[list[AnyArray], int | None]:
        """Arrays whose axes match, but for scalars, and which of those axes the rows are."""
        rows = {value.row for value in ins if value.row is not None}
        if len(rows) > 1:
            raise MixedRows(f"{_name(eqn)} takes the rows along two axes at once{self.line(eqn)}")
        row = rows.pop() if rows else None
        arrays = []
        for value in ins:
            array = value.array
            if np.ndim(array) and value.row is None and row is not None:
                if array.shape[row] != 1:
                    raise MixedRows(
                        f"{_name(eqn)} takes an array that differs from row to row by their place "
                        f"in the batch{self.line(eqn)}"
                    )
                array = self.kept(array, row).array
            arrays.append(array)
        return arrays, row

    def elementwise(self, eqn: Any, ins: list[Value]) -> Value:
        """An operation on each element by itself."""
        arrays, row = self.aligned(ins, eqn)
        rank = len(eqn.outvars[0].aval.shape)
        shape = jnp.broadcast_shapes((1,) * rank, *(np.shape(a) for a in arrays))
        arrays = [_broadcast(a, shape) for a in arrays]
        return Value(_bind(eqn, arrays), row)

    def as_traced(self, eqn: Any, ins: list[Value]) -> list[Value]:
        """An operation without results, on arrays as they were traced."""
        arrays = [
            self.traced(self.whole(value, atom.aval))
            for value, atom in zip(ins, eqn.invars, strict=True)
        ]
        _bind(eqn, arrays)
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

    def leave(self, value: Value, row: int | None, aval: Any) -> AnyArray:
        """Rows last."""
        return value.array if row is None else jnp.moveaxis(value.array, row, -1)

    def sum_to(self, value: Value, aval: Any, shape: Sequence[Size]) -> AnyArray:
        """As it is: nothing is kept smaller than it was traced."""
        return value.array

    def equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
        """The outputs of one operation, with derivatives of their own where they have some."""
        if self.hook is not None and (taken := self.hook(eqn, ins)) is not None:
            return taken
        return [Value(a) for a in bind_as_traced(eqn, [value.array for value in ins])]


Hook = Callable[[Any, list[Value]], "list[Value] | None"]
"""``(operation, arguments) -> results``, or None to let the runner do it."""


def bind_as_traced(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
    """An operation on arrays of the shapes traced, with a derivative of its own if it has one."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # JAX before 0.10
    outs = eqn.primitive.bind(*functions, *vary_alike(list(arrays), *arrays), **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _bind(eqn: Any, arrays: Sequence[Any], params: Any = None) -> Any:
    arrays = vary_alike(list(arrays), *arrays)
    return eqn.primitive.bind(*arrays, **(eqn.params if params is None else params))


def _number(atom: Any) -> Any:
    return np.asarray(atom.val, atom.aval.dtype)


def _shrunk(const: Any) -> Any:
    """A constant, with size 1 along a first axis that says the same again and again."""
    if isinstance(const, np.ndarray | Array) and not isinstance(const, jax.core.Tracer):
        array = np.asarray(const)
        if array.ndim and array.shape[0] > 1 and array.dtype.kind in "fiub":
            same = array == array[:1]
            if bool(np.all(same)):
                return array[:1]
    return const


def _broadcast(array: Any, shape: Sequence[Size]) -> Any:
    if np.shape(array) == tuple(shape):
        return array
    axes = range(len(shape)) if np.ndim(array) else ()
    return lax.broadcast_in_dim(array, tuple(shape), tuple(axes))


def _name(eqn: Any) -> str:
    return str(eqn.primitive.name)


# --- Rules ---------------------------------------------------------------------------------------

_ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 "
    "expm1 floor ge gt igamma igamma_grad_a igammac integer_pow is_finite le lgamma log log1p log2 "
    "logistic lt max min mul ne neg nextafter not one_minus_square or polygamma population_count "
    "pow pvary reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan "
    "tanh xor zeta"
)
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Operations on each element by itself."""

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
_LAZY = ELEMENTWISE | {"broadcast_in_dim", "iota", "reshape", "squeeze", "expand_dims", "transpose"}

_Rule = Callable[[Runner, Any, list[Value]], "Value | list[Value]"]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@_rule("broadcast_in_dim")
def _broadcast_in_dim(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    """New axes get size 1: whoever combines them with others broadcasts them."""
    value, places = ins[0], [int(a) for a in eqn.params["broadcast_dimensions"]]
    sizes = [1] * len(eqn.params["shape"])
    if np.ndim(value.array) == 0:
        return Value(_broadcast(value.array, sizes))
    for axis, place in enumerate(places):
        sizes[place] = value.array.shape[runner.axis(value, axis)]
    row = None if value.row is None else places[value.row]
    if row is None:
        return Value(value.array.reshape(sizes))
    order = runner.order(row, len(sizes))
    return Value(value.array.reshape([sizes[axis] for axis in order]), row)


@_rule("iota")
def _iota(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    shape, dimension = eqn.params["shape"], eqn.params["dimension"]
    sizes = [n if axis == dimension else 1 for axis, n in enumerate(shape)]
    return Value(lax.broadcasted_iota(eqn.params["dtype"], sizes, dimension))


@_rule("reshape")
def _reshape(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    value, new = ins[0], eqn.params["new_sizes"]
    old = eqn.invars[0].aval.shape
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
    array = runner.whole(value, eqn.invars[0].aval).array
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
    return Value(_broadcast(array, old).reshape(new))


@_rule("squeeze")
def _squeeze(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    value, gone = ins[0], set(eqn.params["dimensions"])
    if value.row in gone:
        raise NoRule(f"it takes the only row out of its batch{runner.line(eqn)}")
    row = None if value.row is None else value.row - sum(axis < value.row for axis in gone)
    axes = tuple(runner.axis(value, axis) for axis in gone)
    return Value(jnp.squeeze(value.array, axes), row)


@_rule("expand_dims")
def _expand_dims(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    value = ins[0]
    traced = lax.expand_dims(runner.traced(value), eqn.params["dimensions"])
    new = {axis % traced.ndim for axis in eqn.params["dimensions"]}
    old = [axis for axis in range(traced.ndim) if axis not in new]
    return runner.kept(traced, None if value.row is None else old[value.row])


@_rule("transpose")
def _transpose(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    value, order = ins[0], [int(a) for a in eqn.params["permutation"]]
    if value.row is None:
        return Value(jnp.transpose(value.array, order))
    row = order.index(value.row)
    places = [runner.axis(value, order[axis]) for axis in runner.order(row, len(order))]
    return Value(value.array.transpose(places), row)


@_rule(*_REDUCTIONS)
def _reduce(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    value = runner.whole(ins[0], eqn.invars[0].aval)
    axes = tuple(int(a) for a in eqn.params["axes"])
    params = dict(eqn.params)
    if "out_sharding" in params:
        params["out_sharding"] = None
    if value.row in axes:
        if not (runner.sums and _name(eqn) == "reduce_sum"):
            raise MixedRows(f"{_name(eqn)} over the rows{runner.line(eqn)}")
        value = Value(runner.counted(value), value.row)
        row = None
    else:
        row = None if value.row is None else value.row - sum(axis < value.row for axis in axes)
    params["axes"] = tuple(sorted(runner.axis(value, axis) for axis in axes))
    return Value(_bind(eqn, [value.array], params), row)


@_rule(*_CUMULATIVE)
def _cumulative(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    return _along(runner, eqn, ins, "axis")[0]


@_rule("sort")
def _sort(runner: Runner, eqn: Any, ins: list[Value]) -> list[Value]:
    return _along(runner, eqn, ins, "dimension")


@_rule("split")
def _split(runner: Runner, eqn: Any, ins: list[Value]) -> list[Value]:
    return _along(runner, eqn, ins, "axis")


@_rule("concatenate")
def _concatenate(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    return _along(runner, eqn, ins, "dimension")[0]


@_rule("top_k", "approx_top_k")
def _top_k(runner: Runner, eqn: Any, ins: list[Value]) -> list[Value]:
    value, rank = ins[0], len(eqn.invars[0].aval.shape)
    axis = eqn.params.get("axis", rank - 1) % rank
    if "axis" in eqn.params or runner.axis(value, axis) == rank - 1:
        return _along(runner, eqn, ins, "axis")
    whole = runner.whole(value, eqn.invars[0].aval)
    outs = _bind(eqn, [runner.traced(whole)])
    return [runner.kept(a, value.row) for a in outs]


def _along(runner: Runner, eqn: Any, ins: list[Value], name: str) -> list[Value]:
    """An operation along one axis that is not the rows'."""
    rows = {value.row for value in ins if value.row is not None}
    if len(rows) > 1:
        raise MixedRows(f"{_name(eqn)} takes the rows along two axes at once{runner.line(eqn)}")
    row = rows.pop() if rows else None
    rank = len(eqn.invars[0].aval.shape)
    axis = int(eqn.params.get(name, rank - 1)) % rank
    if axis == row:
        raise MixedRows(f"{_name(eqn)} along the rows{runner.line(eqn)}")
    arrays = []
    for value, atom in zip(ins, eqn.invars, strict=True):
        array = runner.whole(value, atom.aval).array
        if value.row is None and row is not None:
            array = runner.kept(_shrunk(array), row).array
        arrays.append(array)
    if row is not None:
        place = 0 if runner.first else rank - 1
        count = max(array.shape[place] for array in arrays)
        if any(array.shape[place] not in (1, count) for array in arrays):
            raise MixedRows(
                f"{_name(eqn)} takes an array that differs from row to row{runner.line(eqn)}"
            )
        arrays = [
            _broadcast(a, [count if k == place else n for k, n in enumerate(a.shape)])
            for a in arrays
        ]
    params = dict(eqn.params)
    if name in params:
        params[name] = runner.axis(Value(arrays[0], row), axis)
    outs = _bind(eqn, arrays, params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    return [Value(a, row) for a in outs]


@_rule("rev")
def _rev(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    value = runner.whole(ins[0], eqn.invars[0].aval)
    if value.row in eqn.params["dimensions"]:
        raise MixedRows(f"rev turns the rows round{runner.line(eqn)}")
    return Value(
        lax.rev(value.array, [runner.axis(value, a) for a in eqn.params["dimensions"]]), value.row
    )


@_rule("slice")
def _slice(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    value, shape = runner.whole(ins[0], eqn.invars[0].aval), eqn.invars[0].aval.shape
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


@_rule("pad")
def _pad(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    value = runner.whole(ins[0], eqn.invars[0].aval)
    config = eqn.params["padding_config"]
    if value.row is not None and tuple(config[value.row]) != (0, 0, 0):
        raise MixedRows(f"pad adds rows{runner.line(eqn)}")
    if ins[1].row is not None:
        raise NoRule(f"it pads with a number that differs from row to row{runner.line(eqn)}")
    order = runner.order(value.row, len(config))
    return Value(lax.pad(value.array, ins[1].array, [config[axis] for axis in order]), value.row)


@_rule("dot_general")
def _dot_general(runner: Runner, eqn: Any, ins: list[Value]) -> Value:
    """The rows come where the rows of the layout are; anything else is as traced."""
    (contract, batch), rank = (
        eqn.params["dimension_numbers"],
        [len(atom.aval.shape) for atom in eqn.invars],
    )
    ins = [runner.whole(v, atom.aval) for v, atom in zip(ins, eqn.invars, strict=True)]
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
    out = _bind(eqn, [arrays[sides[0]], arrays[sides[1]]], params)
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
    runner: Runner, eqn: Any, ins: list[Value], contract: Any, batch: Any, free: Any
) -> tuple[int | None, bool]:
    """Which axis of the product the rows are, and whether it sums over rows."""
    left, right = ins[0].row, ins[1].row
    count = len(batch[0])
    if left is None and right is None:
        return None, False
    if left is not None and right is not None:
        if (left, right) in zip(*batch, strict=True):
            return list(batch[0]).index(left), False
        if runner.sums and (left, right) in zip(*contract, strict=True):
            return None, True
        raise MixedRows(f"dot_general multiplies rows with rows{runner.line(eqn)}")
    side = 0 if right is None else 1
    row = left if right is None else right
    if row in free[side]:
        return count + len(free[0]) * side + free[side].index(row), False
    if runner.sums and row in contract[side]:
        other = contract[1 - side][list(contract[side]).index(row)]
        if ins[1 - side].array.shape[other] != 1:
            raise NoRule(f"it multiplies rows with a constant a row{runner.line(eqn)}")
    raise MixedRows(f"dot_general adds up the rows{runner.line(eqn)}")


# --- Element-wise or not -------------------------------------------------------------------------

_Axes = str
"""Of an array, axis by axis: ``"r"`` rows, ``"u"`` units, ``"1"`` constant along it."""


def _elementwise(jaxpr: Any, consts: Sequence[Any], args: Sequence[_Axes]) -> list[_Axes]:
    """The axes of the outputs; `NoRule` where something is not element-wise over ``(B, H)``."""
    labels: dict[int, _Axes] = dict(zip(map(id, jaxpr.invars), args, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        if np.size(const) != 1:
            raise NoRule(f"it holds a constant of shape {np.shape(const)}")
        labels[id(var)] = "1" * np.ndim(const)

    def label(atom: Any) -> _Axes:
        return "1" * len(atom.aval.shape) if is_literal(atom) else labels[id(atom)]

    for eqn in needed(jaxpr):
        name, ins = _name(eqn), [label(atom) for atom in eqn.invars]
        if name in INLINED:
            outs = _elementwise(*callee(eqn), ins)
        elif name in ELEMENTWISE:
            outs = [_joined(ins, eqn)]
        elif name == "broadcast_in_dim":
            made = ["1"] * len(eqn.outvars[0].aval.shape)
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


def _joined(ins: Sequence[_Axes], eqn: Any) -> _Axes:
    """The axes of an element-wise result."""
    joined = ""
    for axis in range(len(eqn.outvars[0].aval.shape)):
        names = {label[axis] for label in ins if label} - {"1"}
        if len(names) > 1:
            raise NoRule(f"{_name(eqn)} takes rows along the axis of the units{user_line(eqn)}")
        joined += names.pop() if names else "1"
    return joined


def _only_ones(eqn: Any) -> bool:
    """Whether axes of size 1 come or go, and nothing else."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [n for n in old if n != 1] == [n for n in new if n != 1]


def _relabelled(label: _Axes, eqn: Any) -> _Axes:
    shape = eqn.invars[0].aval.shape
    kept = iter([name for name, n in zip(label, shape, strict=True) if n != 1])
    return "".join("1" if n == 1 else next(kept) for n in eqn.outvars[0].aval.shape)
