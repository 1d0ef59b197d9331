"""A reverse-mode derivative that is given; all others are another function's."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from lstmjax.traced import vary_alike


def with_derivative(
    forward: Callable[[PyTree], tuple[PyTree, PyTree]],
    backward: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree],
    plain: Callable[[PyTree], PyTree],
    values: Callable[[PyTree], PyTree] | None = None,
) -> Callable[[PyTree], PyTree]:
    """A function with a vector-Jacobian product of its own, differentiable any number of times.

    Nothing is computed, nor filled with zeros, for what JAX knows to have no influence.

    Args:
        forward: ``inputs -> outputs, saved``. Inputs may be flags, integers or keys, too; outputs
            are floating point.
        backward: ``inputs, saved, d outputs, wanted -> d inputs``. ``d outputs`` has None in place
            of the arrays that are known to be zero. ``wanted`` is True in place of the inputs whose
            gradient somebody asks for; in place of the others any result will do.
        plain: ``inputs -> outputs``, the same function as JAX differentiates it: what forward-mode
            and all higher derivatives are taken from.
        values: ``inputs -> outputs``, the same function where nobody asks for a derivative; by
            default ``forward`` without what it saves.

    Returns:
        ``inputs -> outputs``.

    Example:
        >>> cube = with_derivative(
        ...     lambda x: (x * x * x, x * x),
        ...     lambda x, saved, d, wanted: 3 * saved * d,
        ...     lambda x: x**3,
        ... )
        >>> float(cube(2.0)), float(jax.grad(cube)(2.0)), float(jax.grad(jax.grad(cube))(2.0))
        (8.0, 12.0, 12.0)
        >>> float(jax.jvp(cube, (2.0,), (1.0,))[1])
        12.0
    """
    # What is saved leads to nothing but the backward pass, which has its whole derivative.
    there = _differentiated_as(forward, lambda inputs: (plain(inputs), None))

    @jax.custom_jvp
    def function(inputs: PyTree) -> PyTree:
        return values(inputs) if values else forward(inputs)[0]

    def push_forward(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
        (inputs,), (d_inputs,) = primals, tangents
        outputs, saved = there(inputs)
        leaves, structure = _flatten(inputs)
        d_leaves = structure.flatten_up_to(d_inputs)
        wanted = tuple(not isinstance(d, SymbolicZero) for d in d_leaves)
        saved_leaves, saved_structure = jax.tree.flatten(saved)
        out_leaves, out_structure = jax.tree.flatten(outputs)
        shapes = tuple((a.shape, a.dtype) for a in out_leaves)
        map_ = _Linear(plain, backward, structure, saved_structure, out_structure, wanted, shapes)
        chosen = [d for d, want in zip(d_leaves, wanted, strict=True) if want]
        d_outputs = _linear.bind(*leaves, *saved_leaves, *chosen, map_=map_)
        return outputs, jax.tree.unflatten(out_structure, d_outputs)

    function.defjvp(push_forward, symbolic_zeros=True)
    return function


def _flatten(tree: PyTree) -> tuple[list[ArrayLike], PyTreeDef]:
    return jax.tree.flatten(tree)


def _differentiated_as(
    function: Callable[..., PyTree], plain: Callable[..., PyTree]
) -> Callable[..., PyTree]:
    """``function``, with the derivatives of ``plain``, which gives None in place of what has none.

    Both take trees of arrays.
    """

    @jax.custom_jvp
    def run(*args: PyTree) -> PyTree:
        return jax.tree.map(jnp.asarray, function(*args))

    @run.defjvp
    def _(args: tuple[PyTree, ...], d_args: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
        outs = run(*args)
        _, d_outs = jax.jvp(plain, args, d_args)
        return outs, or_zeros(d_outs, outs)

    return run


# --- The derivative as a linear map --------------------------------------------------------------
#
# Evaluated it is the plain function's tangent; transposed it is the backward pass.


_Leaf = TypeVar("_Leaf")
"""Of inputs, say, or of their tangents, or of the axes that either are mapped over."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Linear:
    """``inputs, saved, d inputs (those wanted) -> d outputs``, all flat."""

    plain: Callable[[PyTree], PyTree]
    backward: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]
    structure: PyTreeDef
    saved_structure: PyTreeDef
    out_structure: PyTreeDef
    wanted: tuple[bool, ...]
    shapes: tuple[tuple[tuple[int, ...], DTypeLike], ...]

    def cut(self, args: Sequence[_Leaf]) -> tuple[list[_Leaf], list[_Leaf], list[_Leaf]]:
        """Arguments of the primitive: inputs, saved, tangents."""
        one, two = self.structure.num_leaves, self.saved_structure.num_leaves
        return list(args[:one]), list(args[one : one + two]), list(args[one + two :])

    def merged(self, leaves: Sequence[ArrayLike], chosen: Sequence[ArrayLike]) -> PyTree:
        """The inputs, those wanted being given apart."""
        rest = iter(chosen)
        flat = [next(rest) if w else a for a, w in zip(leaves, self.wanted, strict=True)]
        return jax.tree.unflatten(self.structure, flat)

    def chosen(self, leaves: Sequence[_Leaf]) -> list[_Leaf]:
        """Those that are wanted."""
        return [a for a, want in zip(leaves, self.wanted, strict=True) if want]

    def tangents(self, leaves: Sequence[ArrayLike], d_chosen: Sequence[ArrayLike]) -> list[Array]:
        """The plain function's."""
        plain = lambda chosen: self.plain(self.merged(leaves, chosen))  # noqa: E731
        _, d_outputs = jax.jvp(plain, (self.chosen(leaves),), (list(d_chosen),))
        return jax.tree.leaves(d_outputs)

    def pull_back(
        self,
        leaves: Sequence[ArrayLike],
        saved: Sequence[ArrayLike],
        d_outputs: Sequence[ArrayLike | None],
    ) -> list[Array]:
        """Gradients of the wanted inputs by the backward pass; its own are the plain function's.

        Of ``d outputs`` what is known to be zero is None.
        """
        known = [d is not None for d in d_outputs]

        def full(d_known: Sequence[ArrayLike]) -> PyTree:
            rest = iter(d_known)
            flat = [next(rest) if k else None for k in known]
            return jax.tree.unflatten(self.out_structure, flat)

        def own(
            leaves: list[ArrayLike], saved: list[ArrayLike], d_known: list[ArrayLike]
        ) -> list[Array]:
            d_inputs = self.backward(
                jax.tree.unflatten(self.structure, leaves),
                jax.tree.unflatten(self.saved_structure, saved),
                full(d_known),
                jax.tree.unflatten(self.structure, self.wanted),
            )
            d_leaves = self.structure.flatten_up_to(d_inputs)
            return self.chosen(d_leaves)

        def plain(
            leaves: list[ArrayLike], saved: list[ArrayLike], d_known: list[ArrayLike]
        ) -> list[Array]:
            def outputs(chosen: list[ArrayLike]) -> PyTree:
                return self.plain(self.merged(leaves, chosen))

            values, back = jax.vjp(outputs, self.chosen(leaves))
            return back(or_zeros(full(d_known), values))[0]

        d_known = [d for d in d_outputs if d is not None]
        return _differentiated_as(own, plain)(list(leaves), list(saved), d_known)


_linear = Primitive("recurrence_derivative")
_linear.multiple_results = True


def _evaluate(*args: ArrayLike, map_: _Linear) -> list[Array]:
    leaves, _, d_chosen = map_.cut(args)
    return map_.tangents(leaves, d_chosen)


def _abstract(*avals: ShapedArray, map_: _Linear) -> list[ShapedArray]:
    def zeros(*args: Array) -> list[Array]:
        return [vary_alike(jnp.zeros(*shape), args) for shape in map_.shapes]

    return list(jax.make_jaxpr(zeros)(*avals).out_avals)


def _transpose(
    cts: Sequence[Array | ad.Zero], *args: ArrayLike | ad.UndefinedPrimal, map_: _Linear
) -> Sequence[Array | ad.Zero | None]:
    known = [a for a in args if not isinstance(a, ad.UndefinedPrimal)]
    leaves, saved, _ = map_.cut(known)
    nothing = [None] * len(leaves + saved)
    d_outputs = [None if isinstance(ct, ad.Zero) else ct for ct in cts]
    if all(d is None for d in d_outputs):
        d_chosen = args[len(nothing) :]
        return [
            *nothing,
            *(ad.Zero(d.aval) if isinstance(d, ad.UndefinedPrimal) else None for d in d_chosen),
        ]
    return [*nothing, *map_.pull_back(leaves, saved, d_outputs)]


def _push_forward(
    primals: Sequence[ArrayLike], tangents: Sequence[Array | ad.Zero], *, map_: _Linear
) -> tuple[list[Array], list[Array]]:
    outs = _linear.bind(*primals, map_=map_)
    leaves, _, d_chosen = map_.cut(primals)
    d_leaves, _, dd_chosen = map_.cut(tangents)
    moving = [not isinstance(d, ad.Zero) for d in (*d_leaves, *dd_chosen)]
    args = [*leaves, *d_chosen]

    def function(*moved: ArrayLike) -> list[Array]:
        rest = iter(moved)
        full = [next(rest) if m else a for a, m in zip(args, moving, strict=True)]
        return map_.tangents(full[: len(leaves)], full[len(leaves) :])

    some = [a for a, m in zip(args, moving, strict=True) if m]
    d_some = [d for d, m in zip((*d_leaves, *dd_chosen), moving, strict=True) if m]
    if not some:
        return outs, [jnp.zeros_like(a) for a in outs]
    return outs, jax.jvp(function, some, d_some)[1]


def _batch(
    args: Sequence[Array], axes: Sequence[int | None], *, map_: _Linear
) -> tuple[list[Array], list[int]]:
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    leaves_axes, saved_axes, d_axes = map_.cut(axes)
    # Gradients of an input are mapped even where the input is not.
    leaves, saved, d_chosen = map_.cut(args)
    rest = iter(range(len(d_chosen)))
    for k, want in enumerate(map_.wanted):
        if want:
            n = next(rest)
            leaves[k], leaves_axes[k] = _mapped(leaves[k], leaves_axes[k], size)
            d_chosen[n], d_axes[n] = _mapped(d_chosen[n], d_axes[n], size)

    def plain(inputs: PyTree) -> PyTree:
        return jax.vmap(map_.plain, (jax.tree.unflatten(map_.structure, leaves_axes),))(inputs)

    def backward(inputs: PyTree, saved: PyTree, d_outputs: PyTree, wanted: PyTree) -> PyTree:
        axes = (
            jax.tree.unflatten(map_.structure, leaves_axes),
            jax.tree.unflatten(map_.saved_structure, saved_axes),
            0,
        )

        def one(inputs: PyTree, saved: PyTree, d_outputs: PyTree) -> list[Array]:
            d_inputs = map_.backward(inputs, saved, d_outputs, wanted)
            return map_.chosen(map_.structure.flatten_up_to(d_inputs))

        found = iter(jax.vmap(one, axes)(inputs, saved, d_outputs))
        flat = [next(found) if want else None for want in map_.wanted]
        return jax.tree.unflatten(map_.structure, flat)

    shapes = tuple(((size, *shape), dtype) for shape, dtype in map_.shapes)
    mapped = dataclasses.replace(map_, plain=plain, backward=backward, shapes=shapes)
    outs = _linear.bind(*leaves, *saved, *d_chosen, map_=mapped)
    return outs, [0] * len(outs)


def _mapped(a: Array, axis: int | None, size: int) -> tuple[Array, int]:
    if axis is None:
        return jnp.broadcast_to(a, (size, *a.shape)), 0
    return a, axis


_linear.def_impl(_evaluate)
_linear.def_abstract_eval(_abstract)
mlir.register_lowering(_linear, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[_linear] = _push_forward
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch


def or_zeros(tree: PyTree, like: PyTree) -> PyTree:
    """A tree with zeros in place of None, like what is there in another tree."""

    def filled(a: PyTree, b: PyTree) -> PyTree:
        return jax.tree.map(_zeros_like, b) if a is None else a

    return jax.tree.map(filled, tree, like, is_leaf=lambda a: a is None)


def _zeros_like(a: Array) -> Array | np.ndarray:
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return np.zeros(a.shape, jax.dtypes.float0)
    return vary_alike(jnp.zeros(a.shape, a.dtype), a)
