"""An element-wise function, re-emitted operation by operation with what a kernel's backend has.

Pallas Mosaic GPU lowers fewer operations than XLA: no ``custom_jvp`` (relu, softplus), no log1p,
expm1, floor, and none of those that transposition brings in. `trace` turns a function of equally
shaped arrays into a `Program` that says what stands in the way and runs on tiles of any shape.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Value = Any
"""A tile, or the number that all elements of a tile would have."""

_NATIVE = (
    "abs add and atan2 clamp cos div eq erf exp exp2 ge gt le log logistic lt max min mul ne neg or"
    " rem round rsqrt sign sin square sub tanh xor"
)
NATIVE = frozenset(_NATIVE.split())
"""Operations that are bound as they are."""

INLINED = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",  # JAX 0.10 has it
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
}
"""Calls that are opened, with the parameter that holds what is called."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What `trace` returns: operations on tiles, from a list of tiles to a list of tiles."""

    closed: Any  # a ClosedJaxpr
    shape: tuple[int, ...]

    def refusal(self) -> str | None:
        """What keeps the program from being emitted, by the name of the operation; None if nothing.

        Example:
            >>> import jax.numpy as jnp
            >>> trace(lambda x: [jnp.cumsum(x, axis=1)], (2, 3), 1).refusal()
            'its step uses cumsum'
        """
        return next(_refusals(self.closed.jaxpr, self.closed.consts, self.shape), None)

    def __call__(self, *tiles: Array) -> list[Array]:
        """Run on tiles of one shape, whatever the shape that the program was traced with."""
        shape = tiles[0].shape
        outs = _evaluate(self.closed.jaxpr, self.closed.consts, list(tiles), shape)
        return [_full(out, shape) for out in outs]


def trace(f: Callable[..., list[Array]], shape: tuple[int, int], arguments: int) -> Program:
    """Trace ``f`` on float32 arrays.

    Args:
        f: takes arrays of ``shape``, returns a list of such.
        shape: of every argument; what is no number has to have it throughout.
        arguments: how many.

    Example:
        >>> program = trace(lambda x, y: [jax.nn.softplus(x) * y], (2, 3), 2)
        >>> program(jnp.zeros((5, 4)), jnp.ones((5, 4)))[0].shape
        (5, 4)
    """
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Program(jax.make_jaxpr(f)(*[array] * arguments), shape)


# --- What cannot be emitted ----------------------------------------------------------------------


def _refusals(jaxpr: Any, consts: Iterable[Any], shape: tuple[int, ...]) -> Iterator[str]:
    for const in consts:
        if np.size(const) != 1:
            yield f"its step holds a constant of shape {np.shape(const)}"
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in INLINED:
            yield from _refusals(*_callee(eqn), shape)
        elif name not in NATIVE and name not in RULES:
            yield f"its step uses {name}"
        elif name == "select_n" and len(eqn.invars) != 3:
            yield "its step uses select_n with more than two cases"
        else:
            for var in (*eqn.invars, *eqn.outvars):
                if math.prod(var.aval.shape) != 1 and var.aval.shape != shape:
                    yield f"its step makes an array of shape {var.aval.shape} ({name})"


def _callee(eqn: Any) -> tuple[Any, Any]:
    called = eqn.params[INLINED[eqn.primitive.name]]
    return getattr(called, "jaxpr", called), getattr(called, "consts", ())


# --- Emission ------------------------------------------------------------------------------------


def _evaluate(
    jaxpr: Any, consts: Iterable[Any], args: list[Value], shape: tuple[int, ...]
) -> list[Value]:
    from jax.extend import core  # slow to import, and most never get here

    known: dict[Any, Value] = {}

    def read(var: Any) -> Value:
        return var.val if isinstance(var, core.Literal) else known[var]

    known.update(zip(jaxpr.constvars, map(_number, consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        ins = [read(var) for var in eqn.invars]
        if eqn.primitive.name in INLINED:
            outs = _evaluate(*_callee(eqn), ins, shape)
        elif all(np.shape(value) == () for value in ins):
            outs = [_fold(eqn, ins)]
        else:
            outs = [_emit(eqn, ins, shape)]
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _fold(eqn: Any, ins: list[Value]) -> Value:
    """An operation on numbers only, done now."""
    if eqn.primitive.name in ("broadcast_in_dim", "reshape", "squeeze"):
        return ins[0]
    with jax.ensure_compile_time_eval():
        arrays = [jnp.asarray(x, v.aval.dtype) for x, v in zip(ins, eqn.invars, strict=True)]
        return _number(eqn.primitive.bind(*arrays, **eqn.params))


def _emit(eqn: Any, ins: list[Value], shape: tuple[int, ...]) -> Value:
    name = eqn.primitive.name
    ins = [
        x if np.shape(x) else np.asarray(x, var.aval.dtype)
        for x, var in zip(ins, eqn.invars, strict=True)
    ]
    if name in RULES:
        return RULES[name](*(_full(x, shape) for x in ins), **eqn.params)
    return eqn.primitive.bind(*(_full(x, shape) for x in ins), **eqn.params)


def _number(value: Any) -> np.ndarray:
    return np.asarray(value).reshape(())


def _full(value: Value, shape: tuple[int, ...]) -> Array:
    return value if np.shape(value) else jnp.full(shape, value)


# --- Rules ---------------------------------------------------------------------------------------


def _convert(x: Array, new_dtype: Any, **_: Any) -> Array:
    if x.dtype == jnp.bool_ and new_dtype != jnp.bool_:
        return lax.select(x, jnp.ones_like(x, new_dtype), jnp.zeros_like(x, new_dtype))
    if new_dtype == jnp.bool_:
        return x if x.dtype == jnp.bool_ else lax.ne(x, jnp.zeros_like(x))
    return lax.convert_element_type(x, new_dtype)


def _log1p(x: Array, **_: Any) -> Array:
    """Within half of zero, where 1 + x rounds: 2 artanh(s) by its series, s = x / (2 + x)."""
    s = x / (2 + x)
    series = jnp.zeros_like(x)
    for n in range(7, -1, -1):
        series = series * s * s + 2 / (2 * n + 1)
    return lax.select(lax.abs(x) < 0.5, s * series, lax.log(1 + x))


def _expm1(x: Array, **_: Any) -> Array:
    """Taylor's series within half of zero, where exp(x) - 1 cancels."""
    series = jnp.ones_like(x)
    for n in range(9, 1, -1):
        series = 1 + x * series * (1 / n)
    return lax.select(lax.abs(x) < 0.5, x * series, lax.exp(x) - 1)


def _sqrt(x: Array, **_: Any) -> Array:
    proper = (x > 0) & (x < jnp.inf)
    root = x * lax.rsqrt(lax.select(proper, x, jnp.ones_like(x)))
    return lax.select(x < 0, jnp.full_like(x, jnp.nan), lax.select(proper, root, x))


def _floor(x: Array) -> Array:
    nearest = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return lax.select(nearest > x, nearest - 1, nearest)


def _round(x: Array, rounding_method: Any) -> Array:
    if rounding_method == lax.RoundingMethod.TO_NEAREST_EVEN:
        return lax.round(x, rounding_method)
    away = _floor(lax.abs(x) + 0.5)  # of the largest number below one half this makes 1
    return lax.select(x < 0, -away, away)


def _integer_pow(x: Array, y: int) -> Array:
    if y < 0:
        return 1 / _integer_pow(x, -y)
    result, square = None, x
    while y:
        if y & 1:
            result = square if result is None else result * square
        square, y = square * square, y >> 1
    return jnp.ones_like(x) if result is None else result


def _pow(x: Array, y: Array) -> Array:
    y = y if y.dtype == x.dtype else y.astype(x.dtype)
    size = lax.exp(y * lax.log(lax.abs(x)))
    whole, half = _floor(y) == y, _floor(y * 0.5) == y * 0.5
    signed = lax.select(half, size, -size)
    negative = lax.select(whole, signed, jnp.full_like(x, jnp.nan))
    return lax.select(y == 0, jnp.ones_like(x), lax.select(x < 0, negative, size))


def _sinh(x: Array, **_: Any) -> Array:
    small, half = _expm1(x), _half_exp(lax.abs(x))
    near = (small + small / (small + 1)) * 0.5
    return lax.select(lax.abs(x) < 0.5, near, lax.sign(x) * (half - 0.25 / half))


def _cosh(x: Array, **_: Any) -> Array:
    half = _half_exp(lax.abs(x))
    return half + 0.25 / half


def _half_exp(x: Array) -> Array:
    """exp(x) / 2, finite where sinh and cosh still are and exp is not."""
    root = lax.exp(x * 0.5)
    return root * 0.5 * root


def _asinh(x: Array, **_: Any) -> Array:
    size = lax.abs(x)
    near = _log1p(size + size * (size / (1 + _sqrt(size * size + 1))))
    return lax.sign(x) * _or_log_of_twice(size, near)


def _acosh(x: Array, **_: Any) -> Array:
    return _or_log_of_twice(x, lax.log(x + _sqrt(x - 1) * _sqrt(x + 1)))


def _or_log_of_twice(x: Array, near: Array) -> Array:
    """log 2x for large x, which asinh and acosh are, and whose square may overflow."""
    return lax.select(x > 1e4, lax.log(x) + math.log(2), near)


def _not(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        return lax.ne(x, jnp.ones_like(x))
    return lax.bitwise_xor(x, jnp.full_like(x, np.invert(x.dtype.type(0))))


def _cbrt(x: Array, **_: Any) -> Array:
    return lax.sign(x) * lax.exp(lax.log(lax.abs(x)) * (1 / 3))


def _same(x: Array, **_: Any) -> Array:
    return x


RULES: Mapping[str, Callable[..., Array]] = {
    # A tile has the shape of whatever it stands for: what changes shapes changes nothing.
    "broadcast_in_dim": _same,
    "reshape": _same,
    "copy": _same,
    "pvary": _same,
    "stop_gradient": _same,
    "add_any": lax.add,
    "not": _not,
    "select_n": lambda which, no, yes: lax.select(which, yes, no),
    "convert_element_type": _convert,
    "is_finite": lambda x: lax.abs(x) < jnp.inf,
    "log1p": _log1p,
    "expm1": _expm1,
    "sqrt": _sqrt,
    "floor": _floor,
    "ceil": lambda x: -_floor(-x),
    "round": _round,
    "integer_pow": _integer_pow,
    "pow": _pow,
    "erfc": lambda x, **_: 1 - lax.erf(x),
    "tan": lambda x, **_: lax.sin(x) / lax.cos(x),
    "asin": lambda x, **_: lax.atan2(x, _sqrt((1 - x) * (1 + x))),
    "acos": lambda x, **_: lax.atan2(_sqrt((1 - x) * (1 + x)), x),
    "atan": lambda x, **_: lax.atan2(x, jnp.ones_like(x)),
    "sinh": _sinh,
    "cosh": _cosh,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": lambda x, **_: 0.5 * (_log1p(x) - _log1p(-x)),
    "cbrt": _cbrt,
    "one_minus_square": lambda x, **_: (1 - x) * (1 + x),  # JAX 0.11 has it
    "log2": lambda x, **_: lax.log(x) * (1 / math.log(2)),  # JAX 0.11 has it
}
"""Operations that are made of others: name -> rule, with the operation's own parameters."""
