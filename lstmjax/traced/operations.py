"""Operations of a jaxpr: which there are, what they need, how one is run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array, lax
from jaxtyping import PyTree

from lstmjax.precision import PRODUCT

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


class MixedRows(ValueError):
    """An operation computes a row from other rows of the batch."""


class NoRule(ValueError):
    """An operation that cannot be moved to another layout; the message names it."""


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


def name_of(eqn: Any) -> str:
    """What JAX calls an operation."""
    return str(eqn.primitive.name)


def is_product(eqn: Any) -> bool:
    """Whether an operation is a call of a matrix product by its name, `PRODUCT`."""
    return str(eqn.params.get("name", "")).startswith(PRODUCT)


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


def bind_as_traced(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
    """An operation on arrays of the shapes traced, with a derivative of its own if it has one."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # JAX before 0.10
    outs = eqn.primitive.bind(*functions, *vary_alike(list(arrays), *arrays), **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def bind(eqn: Any, arrays: Sequence[Any], params: Any = None) -> Any:
    """An operation on arrays of any shapes, with other parameters where some are given."""
    arrays = vary_alike(list(arrays), *arrays)
    return eqn.primitive.bind(*arrays, **(eqn.params if params is None else params))


def number(atom: Any) -> Any:
    """The number that a literal is."""
    return np.asarray(atom.val, atom.aval.dtype)


def shrunk(const: Any) -> Any:
    """A constant, with size 1 along a first axis that says the same again and again."""
    if isinstance(const, np.ndarray | Array) and not isinstance(const, jax.core.Tracer):
        array = np.asarray(const)
        if array.ndim and array.shape[0] > 1 and array.dtype.kind in "fiub":
            same = array == array[:1]
            if bool(np.all(same)):
                return array[:1]
    return const


def broadcast(array: Any, shape: Sequence[Size]) -> Any:
    """An array, or a number, in another shape of as many axes."""
    if np.shape(array) == tuple(shape):
        return array
    axes = range(len(shape)) if np.ndim(array) else ()
    return lax.broadcast_in_dim(array, tuple(shape), tuple(axes))
