"""An element-wise program, emitted operation by operation with what a kernel's backend has.

Pallas Mosaic GPU lowers fewer operations than XLA: no ``custom_jvp`` (relu, softplus), no log1p,
expm1, floor, and none of those that transposition brings in. An `Emission` says what stands in the
way and runs a traced program on tiles of any shape, every argument being a whole tile.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Jaxpr, JaxprEqn
from jax.typing import DTypeLike

from lstmjax.traced import INLINED, Program, aval_of, callee, interpret, needed

Value = Array | np.ndarray
"""A tile, or the number that all elements of a tile would have."""

_NATIVE = (
    "abs add and bitcast_convert_type clamp cos div eq exp exp2 ge gt le log logistic lt max min "
    "mul ne neg or round rsqrt sign sin square sub tanh xor"
)
NATIVE = frozenset(_NATIVE.split())
"""Operations that are bound as they are."""


@dataclasses.dataclass(frozen=True)
class Emission:
    """A program whose operations run on tiles, from a list of tiles to a list of tiles.

    Attributes:
        program: element-wise, or the derivative of one that is: its sums over rows or units, the
            gradients of what rows or units share, are left to whoever gets the tiles.
    """

    program: Program

    def refusal(self) -> str | None:
        """What keeps the program from being emitted, by the name of the operation; None if nothing.

        Example:
            >>> import jax.numpy as jnp
            >>> from lstmjax.traced import trace
            >>> Emission(trace(lambda x: jnp.cumsum(x, axis=1), jnp.ones((2, 3)))).refusal()
            'it uses cumsum'
        """
        reason = None if self.program.sums else self.program.elementwise()
        closed = self.program.closed
        return reason or next(_refusals(closed.jaxpr, closed.consts, self.program.sums), None)

    def __call__(self, *tiles: Array) -> list[Array]:
        """Run on tiles of one shape, whatever the shapes that the program was traced with."""
        shape, closed = tiles[0].shape, self.program.closed

        def equation(eqn: JaxprEqn, ins: list[Value]) -> Value:
            numbers = all(np.shape(value) == () for value in ins)
            return _fold(eqn, ins) if numbers else _emit(eqn, ins, shape)

        given: list[Value] = list(tiles)
        outs = interpret(closed.jaxpr, closed.consts, given, equation)
        return [_full(out, shape) for out in outs]


# --- What cannot be emitted ----------------------------------------------------------------------


def _refusals(jaxpr: Jaxpr, consts: Iterable[Value], sums: bool) -> Iterator[str]:
    for const in consts:
        if np.size(const) != 1:
            yield f"it holds a constant of shape {np.shape(const)}"
    for eqn in needed(jaxpr):
        name = eqn.primitive.name
        if name in INLINED:
            yield from _refusals(*callee(eqn), sums)
        elif name not in NATIVE and name not in RULES and not (sums and name == "reduce_sum"):
            yield f"it uses {name}"
        elif name == "select_n" and len(eqn.invars) != 3:
            yield "it uses select_n with more than two cases"


# --- Emission ------------------------------------------------------------------------------------


def _fold(eqn: JaxprEqn, ins: list[Value]) -> Value:
    """An operation on numbers only, done now."""
    if eqn.primitive.name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
        return ins[0]
    with jax.ensure_compile_time_eval():
        arrays = [jnp.asarray(x, aval_of(v).dtype) for x, v in zip(ins, eqn.invars, strict=True)]
        return _number(eqn.primitive.bind(*arrays, **eqn.params))


def _emit(eqn: JaxprEqn, ins: list[Value], shape: tuple[int, ...]) -> Value:
    name = eqn.primitive.name
    ins = [
        x if np.shape(x) else np.asarray(x, aval_of(var).dtype)
        for x, var in zip(ins, eqn.invars, strict=True)
    ]
    params = eqn.params
    if "accuracy" in params:  # a tile's functions have one
        params = {**params, "accuracy": None}
    if name in RULES:
        return RULES[name](*(_full(x, shape) for x in ins), **params)
    return eqn.primitive.bind(*(_full(x, shape) for x in ins), **params)


def _number(value: Value) -> np.ndarray:
    return np.asarray(value).reshape(())


def _full(value: Value, shape: tuple[int, ...]) -> Array:
    return jnp.asarray(value) if np.shape(value) else jnp.full(shape, value)


# --- Rules ---------------------------------------------------------------------------------------


def _convert(x: Array, new_dtype: DTypeLike, **_: object) -> Array:
    if x.dtype == jnp.bool_ and new_dtype != jnp.bool_:
        return lax.select(x, jnp.ones_like(x, new_dtype), jnp.zeros_like(x, new_dtype))
    if new_dtype == jnp.bool_:
        return x if x.dtype == jnp.bool_ else lax.ne(x, jnp.zeros_like(x))
    return lax.convert_element_type(x, new_dtype)


def _log1p(x: Array, **_: object) -> Array:
    """Within half of zero, where 1 + x rounds: 2 artanh(s) by its series, s = x / (2 + x)."""
    s = x / (2 + x)
    series = jnp.zeros_like(x)
    for n in range(7, -1, -1):
        series = series * s * s + 2 / (2 * n + 1)
    return lax.select(lax.abs(x) < 0.5, s * series, lax.log(1 + x))


def _atan2(y: Array, x: Array) -> Array:
    """Mosaic has none for tiles. By the angle to the nearer axis, or to the diagonal between."""
    tall, wide = lax.abs(y), lax.abs(x)
    longer = lax.max(tall, wide)
    slope = lax.min(tall, wide) / lax.select(longer > 0, longer, jnp.ones_like(x))
    slope = lax.select(lax.eq(tall, wide) & (longer > 0), jnp.ones_like(x), slope)  # of infinities
    steep = slope > math.sqrt(2) - 1
    z = lax.select(steep, (slope - 1) / (slope + 1), slope)
    fit = jnp.zeros_like(x)
    for coefficient in _ATAN:
        fit = fit * z * z + coefficient
    angle = z + z * z * z * fit
    angle = lax.select(steep, angle + math.pi / 4, angle)
    angle = lax.select(tall > wide, math.pi / 2 - angle, angle)
    angle = lax.select(x < 0, math.pi - angle, angle)
    return lax.select(y < 0, -angle, angle)


_ATAN = (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1)
"""atanf of Moshier's Cephes library (1992), from the highest power down."""


def _rem(x: Array, y: Array) -> Array:
    """Mosaic has none for numbers. To the rounding of x; 0 where that is more than y."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return lax.rem(x, y)
    quotient = x / y
    whole = lax.select(quotient < 0, -_floor(-quotient), _floor(quotient))
    left, size = x - whole * y, lax.abs(y)
    step = lax.select(x < 0, -size, size)
    left = lax.select(left * step < 0, left + step, left)  # where the quotient was rounded
    left = lax.select(lax.abs(left) >= size, left - step, left)
    lost = (left * step < 0) | (lax.abs(left) >= size)
    left = lax.select(lost, jnp.zeros_like(x), left)
    return lax.select(size < jnp.inf, left, lax.select(lax.abs(x) < jnp.inf, x, left))


def _erf_and_erfc(x: Array) -> tuple[Array, Array]:
    """Mosaic has no erf for tiles. Within half of zero, Taylor's series; beyond, erfc by the fit
    of Press et al. 1992 (Numerical Recipes, section 6.2), within 1.2e-7 of itself."""
    square, size = x * x, lax.abs(x)
    series = jnp.zeros_like(x)
    for n in range(7, -1, -1):
        term = 2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1))
        series = series * square + term
    near = x * series
    t = 1 / (1 + 0.5 * size)
    fit = jnp.zeros_like(x)
    for coefficient in reversed(_ERFC):
        fit = fit * t + coefficient
    tail = t * lax.exp(fit - square)
    inside, positive = size < 0.5, x > 0
    far = lax.select(positive, 1 - tail, tail - 1)
    erfc = lax.select(positive, tail, 2 - tail)
    return lax.select(inside, near, far), lax.select(inside, 1 - near, erfc)


_ERFC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)


def _polynomial(x: Array, *coefficients: Array, **_: object) -> Array:
    """By Horner's rule; the constant comes first."""
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = coefficient + x * value
    return value


def _expm1(x: Array, **_: object) -> Array:
    """Taylor's series within half of zero, where exp(x) - 1 cancels."""
    series = jnp.ones_like(x)
    for n in range(9, 1, -1):
        series = 1 + x * series * (1 / n)
    return lax.select(lax.abs(x) < 0.5, x * series, lax.exp(x) - 1)


def _sqrt(x: Array, **_: object) -> Array:
    proper = (x > 0) & (x < jnp.inf)
    root = x * lax.rsqrt(lax.select(proper, x, jnp.ones_like(x)))
    return lax.select(x < 0, jnp.full_like(x, jnp.nan), lax.select(proper, root, x))


def _floor(x: Array) -> Array:
    nearest = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return lax.select(nearest > x, nearest - 1, nearest)


def _round(x: Array, rounding_method: lax.RoundingMethod) -> Array:
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


def _sinh(x: Array, **_: object) -> Array:
    small, half = _expm1(x), _half_exp(lax.abs(x))
    near = (small + small / (small + 1)) * 0.5
    return lax.select(lax.abs(x) < 0.5, near, lax.sign(x) * (half - 0.25 / half))


def _cosh(x: Array, **_: object) -> Array:
    half = _half_exp(lax.abs(x))
    return half + 0.25 / half


def _half_exp(x: Array) -> Array:
    """exp(x) / 2, finite where sinh and cosh still are and exp is not."""
    root = lax.exp(x * 0.5)
    return root * 0.5 * root


def _asinh(x: Array, **_: object) -> Array:
    size = lax.abs(x)
    near = _log1p(size + size * (size / (1 + _sqrt(size * size + 1))))
    return lax.sign(x) * _or_log_of_twice(size, near)


def _acosh(x: Array, **_: object) -> Array:
    return _or_log_of_twice(x, lax.log(x + _sqrt(x - 1) * _sqrt(x + 1)))


def _or_log_of_twice(x: Array, near: Array) -> Array:
    """log 2x for large x, which asinh and acosh are, and whose square may overflow."""
    return lax.select(x > 1e4, lax.log(x) + math.log(2), near)


def _not(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        return lax.ne(x, jnp.ones_like(x))
    return lax.bitwise_xor(x, jnp.full_like(x, np.invert(x.dtype.type(0))))


def _cbrt(x: Array, **_: object) -> Array:
    return lax.sign(x) * lax.exp(lax.log(lax.abs(x)) * (1 / 3))


def _same(x: Array, **_: object) -> Array:
    return x


RULES: Mapping[str, Callable[..., Array]] = {
    # A tile has the shape of whatever it stands for: what changes shapes changes nothing.
    "broadcast_in_dim": _same,
    "reshape": _same,
    "squeeze": _same,
    "expand_dims": _same,
    "reduce_sum": _same,  # in derivatives only: what is shared gets a share a tile
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
    "erf": lambda x, **_: _erf_and_erfc(x)[0],
    "erfc": lambda x, **_: _erf_and_erfc(x)[1],
    "tan": lambda x, **_: lax.sin(x) / lax.cos(x),
    "asin": lambda x, **_: _atan2(x, _sqrt((1 - x) * (1 + x))),
    "acos": lambda x, **_: _atan2(_sqrt((1 - x) * (1 + x)), x),
    "atan": lambda x, **_: _atan2(x, jnp.ones_like(x)),
    "atan2": lambda y, x, **_: _atan2(y, x),
    "rem": lambda x, y, **_: _rem(x, y),
    "sinh": _sinh,
    "cosh": _cosh,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": lambda x, **_: 0.5 * (_log1p(x) - _log1p(-x)),
    "cbrt": _cbrt,
    "one_minus_square": lambda x, **_: (1 - x) * (1 + x),  # JAX 0.11 has it
    "log2": lambda x, **_: lax.log(x) * (1 / math.log(2)),  # JAX 0.11 has it
    "polynomial": _polynomial,  # JAX 0.12 has it
}
"""Operations that are made of others: name -> rule, with the operation's own parameters."""
