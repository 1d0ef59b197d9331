"""Operations of a jaxpr: which there are, what they need, how one is run."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike
from jaxtyping import PyTree

from lstmjax.precision import PRODUCT

_Value = TypeVar("_Value")

Atom: TypeAlias = Var | Literal
"""What an operation takes: a variable, or a number in the program."""

if TYPE_CHECKING:
    Size = int
    AnyArray = Array
else:
    Size = object
    """Of an axis: an int, or a symbol of `jax.export`, which JAX has no public type for."""
    AnyArray = Array | np.ndarray | np.generic
    """A traced array, or one whose numbers are known, of which the same methods are used."""

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
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "bitcast_convert_type cbrt ceil clamp convert_element_type copy copy_p cos cosh digamma div "
    "eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac integer_pow "
    "is_finite le lgamma log log1p log2 logistic lt max min mul ne neg nextafter not "
    "one_minus_square or polygamma polynomial population_count pow pvary reduce_precision "
    "regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta"
)
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Operations on each element by itself."""


def is_literal(atom: Atom) -> TypeGuard[Literal]:
    """Whether an argument of an operation is a number in the program, not a variable."""
    return isinstance(atom, Literal)


def aval_of(atom: Atom) -> ShapedArray:
    """Shape and type of an array of a program."""
    assert isinstance(atom.aval, ShapedArray), atom.aval
    return atom.aval


def shape_of(atom: Atom) -> tuple[Size, ...]:
    """Shape of an array of a program."""
    return aval_of(atom).shape


def callee(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[AnyArray]]:
    """The jaxpr that a call in `INLINED` calls, and its constants."""
    called = eqn.params[INLINED[eqn.primitive.name]]
    return getattr(called, "jaxpr", called), getattr(called, "consts", ())


def needed(jaxpr: Jaxpr, outputs: Sequence[bool] | None = None) -> list[JaxprEqn]:
    """The equations that the outputs (or those marked) depend on, in order."""
    marks = outputs or [True] * len(jaxpr.outvars)
    return live(jaxpr.eqns, [a for a, want in zip(jaxpr.outvars, marks, strict=True) if want])


def live(eqns: Sequence[JaxprEqn], outputs: Sequence[Atom]) -> list[JaxprEqn]:
    """Those of the equations that the variables depend on, in order."""
    wanted = {id(atom) for atom in outputs if not is_literal(atom)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(id(var) in wanted for var in eqn.outvars):
            kept.append(eqn)
            wanted.update(id(atom) for atom in eqn.invars if not is_literal(atom))
    return kept[::-1]


def interpret(
    jaxpr: Jaxpr,
    consts: Iterable[object],
    args: Iterable[_Value],
    equation: Callable[[JaxprEqn, list[_Value]], _Value],
) -> list[_Value]:
    """The outputs of a jaxpr of one number, or one tile, a variable, its calls opened.

    Args:
        jaxpr: what to run; numbers in it are NumPy numbers.
        consts: its constants, likewise.
        args: its arguments, in whatever form ``equation`` takes.
        equation: ``(operation, arguments) -> result``.
    """
    known: dict[int, _Value] = {}

    def read(var: Atom) -> _Value:
        return cast(_Value, number(var)) if is_literal(var) else known[id(var)]

    numbers = (cast(_Value, np.asarray(const).reshape(())) for const in consts)
    known.update(zip(map(id, jaxpr.constvars), numbers, strict=True))
    known.update(zip(map(id, jaxpr.invars), args, strict=True))
    for eqn in needed(jaxpr):
        ins = [read(var) for var in eqn.invars]
        if eqn.primitive.name in INLINED:
            outs = interpret(*callee(eqn), ins, equation)
        else:
            outs = [equation(eqn, ins)]
        known.update(zip(map(id, eqn.outvars), outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def name_of(eqn: JaxprEqn) -> str:
    """What JAX calls an operation; a bitcast that adds or takes an axis has a name of its own."""
    name = str(eqn.primitive.name)
    if name == "bitcast_convert_type":
        before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
        return name if len(before) == len(after) else f"{name} to another width"
    return name


def is_product(eqn: JaxprEqn) -> bool:
    """Whether an operation is a call of a matrix product by its name, `PRODUCT`."""
    return str(eqn.params.get("name", "")).startswith(PRODUCT)


def vary_alike(tree: PyTree, *references: PyTree) -> PyTree:
    """``tree`` marked as varying over the mesh axes, inside `jax.shard_map`, of any reference.

    Loops ask for carries of one type; and the gradient of what is the same on all devices is then
    summed over them here, once, and not at every step.
    """

    def varying(a: ArrayLike) -> frozenset[str]:
        return jax.typeof(a).manual_axis_type.varying

    axes = frozenset().union(*map(varying, jax.tree.leaves(references)))
    if not axes:
        return tree

    def vary(a: Array) -> Array:
        missing = tuple(axes - varying(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(vary, tree)


def bind_as_traced(eqn: JaxprEqn, arrays: Sequence[ArrayLike]) -> list[Array]:
    """An operation on arrays of the shapes traced, with a derivative of its own if it has one."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # JAX before 0.10
    outs = eqn.primitive.bind(*functions, *vary_alike(list(arrays), *arrays), **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def bind_to_derive(eqn: JaxprEqn, arrays: Sequence[ArrayLike]) -> list[Array]:
    """The same for programs that are differentiated: extrema have derivatives of ours."""
    name, out = name_of(eqn), aval_of(eqn.outvars[0]) if eqn.outvars else None
    if out is not None and jnp.issubdtype(out.dtype, jnp.floating):
        if name in ("reduce_max", "reduce_min"):
            return [_extremum(jnp.asarray(arrays[0]), eqn.params["axes"], name)]
        if name in ("max", "min"):
            return [_of_two(*map(jnp.asarray, vary_alike(list(arrays), *arrays)), name)]
    return bind_as_traced(eqn, arrays)


# XLA may compute an array twice, and round it in two ways: with a fused multiply-add and without.
# JAX finds out which of its elements is the largest by comparing them with the result: none may
# equal it then, and the gradient is 0, or 0 / 0, or another's. Here it does not depend on that.


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _of_two(x: Array, y: Array, name: str) -> Array:
    return {"max": lax.max, "min": lax.min}[name](x, y)


@_of_two.defjvp
def _(
    name: str, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, y), (d_x, d_y) = primals, tangents
    chosen = x > y if name == "max" else x < y
    share = jnp.where(x == y, jnp.asarray(0.5, x.dtype), chosen.astype(x.dtype))
    return _of_two(x, y, name), d_x * share + d_y * (1 - share)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _extremum(x: Array, axes: tuple[int, ...], name: str) -> Array:
    return {"reduce_max": lax.reduce_max, "reduce_min": lax.reduce_min}[name](x, axes)


@_extremum.defjvp
def _(
    axes: tuple[int, ...], name: str, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """Shared by all that equal the extremum but for rounding, and by what is found by its place."""
    out = _extremum(*primals, axes, name)
    last, end = tuple(range(-len(axes), 0)), (out.ndim,)
    x, d_x = (jnp.moveaxis(a, axes, last).reshape(*out.shape, -1) for a in (*primals, *tangents))
    find = {"reduce_max": lax.argmax, "reduce_min": lax.argmin}[name]
    at, top = (lax.expand_dims(a, end) for a in (find(x, out.ndim, np.int32), out))
    near = jnp.abs(x - top) <= 16 * jnp.finfo(x.dtype).eps * jnp.abs(top)
    place = lax.broadcasted_iota(np.int32, x.shape, out.ndim)
    share = (near | (place == at)).astype(x.dtype)
    return out, (d_x * share).sum(-1) / share.sum(-1)


def bind(
    eqn: JaxprEqn, arrays: Sequence[AnyArray], params: Mapping[str, object] | None = None
) -> list[Array]:
    """An operation on arrays of any shapes, with other parameters where some are given."""
    arrays = vary_alike(list(arrays), *arrays)
    outs = eqn.primitive.bind(*arrays, **(eqn.params if params is None else params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def number(atom: Literal) -> AnyArray:
    """The number that a literal is."""
    return cast(AnyArray, np.asarray(atom.val, aval_of(atom).dtype))


def shrunk(const: AnyArray) -> AnyArray:
    """A constant, with size 1 along a first axis that says the same again and again."""
    if isinstance(const, np.ndarray | Array) and not isinstance(const, jax.core.Tracer):
        array = np.asarray(const)
        if array.ndim and array.shape[0] > 1 and array.dtype.kind in "fiub":
            same = array == array[:1]
            if bool(np.all(same)):
                return cast(AnyArray, array[:1])
    return const


def broadcast(array: AnyArray, shape: Sequence[Size]) -> AnyArray:
    """An array, or a number, in another shape of as many axes."""
    if np.shape(array) == tuple(shape):
        return array
    axes = range(len(shape)) if np.ndim(array) else ()
    return lax.broadcast_in_dim(array, tuple(shape), tuple(axes))
