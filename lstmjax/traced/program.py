"""A function as a program: traced once, run in any layout."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jaxtyping import PyTree

from lstmjax.traced.elementwise import elementwise_axes
from lstmjax.traced.operations import (
    INLINED,
    AnyArray,
    NoRule,
    aval_of,
    bind_as_traced,
    callee,
    is_product,
    name_of,
)
from lstmjax.traced.runner import AsTraced, Hook, Layout, Runner, Value


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

    closed: ClosedJaxpr
    structure: jax.tree_util.PyTreeDef
    rows: tuple[int | None, ...]
    sums: bool = False
    out_rows: tuple[int | None, ...] | None = None

    @property
    def consts(self) -> Sequence[AnyArray]:
        """Arrays that the function closed over."""
        return self.closed.consts

    def __call__(self, *args: PyTree) -> PyTree:
        """Run as traced, on arrays of the shapes traced."""
        return self.evaluate(jax.tree.leaves(args))

    def evaluate(
        self,
        leaves: Sequence[AnyArray],
        consts: Sequence[AnyArray] | None = None,
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
        consts: Sequence[AnyArray] | None = None,
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
            runner.leave(value, row, aval_of(var))
            for value, row, var in zip(outs, rows, self.closed.jaxpr.outvars, strict=True)
        ]
        return jax.tree.unflatten(self.structure, arrays)

    def mapped(self, layout: Layout = "last") -> str | None:
        """Why `run` cannot run it, None where it can.

        Raises:
            MixedRows: it brings rows together.
        """

        def run(*leaves: Array) -> PyTree:
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
            outs = elementwise_axes(self.closed.jaxpr, self.consts, axes[:count])
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


def _opens(eqn: JaxprEqn) -> bool:
    """Whether an operation is a call without a derivative of its own, nor a product by name."""
    name = name_of(eqn)
    return name in INLINED and not name.startswith("custom_") and not is_product(eqn)


def _opened(closed: ClosedJaxpr, leaves: Sequence[Array]) -> list[AnyArray]:
    """A jaxpr's outputs, its calls opened."""

    def open_call(eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
        if _opens(eqn):
            return runner.evaluate(*callee(eqn), ins)
        return [Value(a) for a in bind_as_traced(eqn, [value.array for value in ins])]

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
