"""Functions of vectors, emitted in place.

Polynomials are fitted when they are asked for, to the precision of the type, so that there is no
table of numbers to trust. Special values follow JAX: NaN stays NaN, exp(-inf) is 0, log(0) is -inf.
Results below the smallest normal number may be 0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import llvmlite.ir as ir
import numpy as np
from jax import lax

from lstmjax.recurrence.cpu.builder import FUSED, I1, I32, I64, REALS, Builder

LOG2 = Fraction("0.693147180559945309417232121458176568075500134360255254120680")
QUARTER = Fraction("1.57079632679489661923132169163975144209858469968755291048747")  # pi / 2


def in_parts(x: Fraction, *places: int) -> tuple[float, ...]:
    """Numbers with so many binary places in all, and what is left: their sum is x.

    Example:
        >>> in_parts(Fraction(1, 3), 2)
        (0.25, 0.08333333333333333)
    """
    parts = []
    for n in places:
        parts.append(Fraction(math.floor(x * 2**n), 2**n))
        x -= parts[-1]
    return (*map(float, parts), float(x))


_QUARTER = in_parts(QUARTER, 32, 65)
_TURNS = 1e6
"""Up to here the products of the first parts with the number of quarters are exact."""


@functools.cache
def fitted(
    f: Callable[[np.ndarray], np.ndarray], low: float, high: float, degree: int
) -> tuple[float, ...]:
    """Coefficients, lowest first, of a polynomial like ``f`` between two numbers.

    Example:
        >>> [round(c, 3) for c in fitted(np.exp, -0.1, 0.1, 2)]
        [1.0, 1.001, 0.5]
    """
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    x = (low + high) / 2 + (high - low) / 2 * nodes
    fit = np.polynomial.Chebyshev.fit(x, f(x), degree, domain=[low, high])
    return tuple(map(float, fit.convert(kind=np.polynomial.Polynomial).coef))


def _exp_tail(r: np.ndarray) -> np.ndarray:
    """(exp(r) - 1 - r) / r^2."""
    return _series(r, lambda n: 1 / math.factorial(n + 2))


def _log_tail(z: np.ndarray) -> np.ndarray:
    """(2 artanh(s) / s - 2) / z for z = s^2."""
    return _series(z, lambda n: 2 / (2 * n + 3))


def _atan_tail(z: np.ndarray) -> np.ndarray:
    """(atan(s) / s - 1) / z for z = s^2."""
    return _series(z, lambda n: (-1) ** (n + 1) / (2 * n + 3))


def _sin_tail(z: np.ndarray) -> np.ndarray:
    """(sin(r) / r - 1) / z for z = r^2."""
    return _series(z, lambda n: (-1) ** (n + 1) / math.factorial(2 * n + 3))


def _cos_tail(z: np.ndarray) -> np.ndarray:
    """(cos(r) - 1 + z / 2) / z^2 for z = r^2."""
    return _series(z, lambda n: (-1) ** n / math.factorial(2 * n + 4))


def _erf_ratio(z: np.ndarray) -> np.ndarray:
    """erf(x) / x - 1 for z = x^2."""
    first = 2 / math.sqrt(math.pi)
    return _series(z, lambda n: first * (-1) ** n / math.factorial(n) / (2 * n + 1)) - 1


_ERFC_MIDDLE = 3.75


def _erfc_ratio(t: np.ndarray) -> np.ndarray:
    """(1 + 2 x) exp(x^2) erfc(x) for t = (x - 3.75) / (x + 3.75): Shepherd and Laframboise 1981."""
    from scipy import special  # slow to import, and nothing else here needs it

    x = _ERFC_MIDDLE * (1 + t) / (1 - t)
    return (1 + 2 * x) * special.erfcx(x)


def _series(x: np.ndarray, term: Callable[[int], float]) -> np.ndarray:
    out = np.zeros_like(x)
    for n in range(40, -1, -1):
        out = out * x + term(n)
    return out


def _constant(kind: ir.VectorType, x: int) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, x)] * kind.count)


class Functions:
    """Of vectors of as many numbers as a `Builder` has lanes, in its type or another.

    Attributes:
        kind: the type of the vectors.
        whole: the same with whole numbers of as many bits.
        digits: binary places of a number.
        bias: of its exponent.
        tiny: the smallest normal number.
        last: the largest one whose exponential is a number.
    """

    def __init__(self, builder: Builder, dtype: str | None = None) -> None:
        self.e, self.b = builder, builder.b
        self.dtype = dtype or builder.dtype
        self.kind = ir.VectorType(REALS[self.dtype], builder.lanes)
        self.wide = self.dtype == "float64"
        self.whole = ir.VectorType(I64 if self.wide else I32, builder.lanes)
        info = np.finfo(self.dtype)
        self.digits, self.bias = int(info.nmant), int(info.maxexp) - 1
        self.tiny = float(info.tiny)
        last = math.log(float(info.max))
        near = info.dtype.type(last)
        self.last = float(near if float(near) <= last else np.nextafter(near, near.dtype.type(0)))
        # The products of the first part with an exponent are exact.
        self.log2_high, self.log2_low = in_parts(LOG2, self.digits - int(info.iexp))

    # --- Numbers and arithmetic ---

    def c(self, x: int | float) -> ir.Value:
        """A vector of one number."""
        return self.e.splat(float(x), self.kind)

    def n(self, x: int) -> ir.Value:
        """A vector of one whole number."""
        return _constant(self.whole, x)

    def of_type(self, single: int, double: int) -> int:
        """What depends on the type."""
        return double if self.wide else single

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """``x + y``."""
        return self.b.fadd(x, y, flags=FUSED)

    def sub(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """``x - y``."""
        return self.b.fsub(x, y, flags=FUSED)

    def mul(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """``x y``."""
        return self.b.fmul(x, y, flags=FUSED)

    def div(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """``x / y``."""
        return self.b.fdiv(x, y)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """``x y + z``."""
        return self.e.fma(x, y, z)

    def neg(self, x: ir.Value) -> ir.Value:
        """``-x``."""
        return self.b.fneg(x)

    def abs(self, x: ir.Value) -> ir.Value:
        """Its size."""
        return self.e.intrinsic("fabs", x)

    def copysign(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The size of x, the sign of y."""
        return self.e.intrinsic("copysign", x, y)

    def less(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Whether x < y; not of NaN."""
        return self.b.fcmp_ordered("<", x, y)

    def equal(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Whether x = y; not of NaN."""
        return self.b.fcmp_ordered("==", x, y)

    def horner(self, x: ir.Value, coefficients: Sequence[int | float]) -> ir.Value:
        """A polynomial, the lowest coefficient first."""
        out = self.c(coefficients[-1])
        for a in coefficients[-2::-1]:
            out = self.fma(out, x, self.c(a))
        return out

    def max(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The larger one; NaN if either is."""
        return self._extremum(">", x, y)

    def min(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The smaller one; NaN if either is."""
        return self._extremum("<", x, y)

    def _extremum(self, sign: str, x: ir.Value, y: ir.Value) -> ir.Value:
        if isinstance(y, ir.Constant):  # where x is a number, this is one instruction
            x, y = y, x
        found = self.b.select(self.b.fcmp_ordered(sign, x, y), x, y)
        return self.b.select(self.b.fcmp_unordered("uno", x, x), x, found)

    def clamp(self, low: ir.Value, x: ir.Value, high: ir.Value) -> ir.Value:
        """x where it is between."""
        return self.min(self.max(x, low), high)

    def between(self, low: int | float, x: ir.Value, high: int | float) -> ir.Value:
        """x where it is between; NaN passes."""
        return self.clamp(self.c(low), x, self.c(high))

    def sign(self, x: ir.Value) -> ir.Value:
        """-1, 0 or 1, or NaN."""
        size = self.b.fcmp_ordered("!=", x, self.c(0))
        return self.b.select(size, self.copysign(self.c(1), x), x)

    def is_finite(self, x: ir.Value) -> ir.Value:
        """Neither infinite nor NaN."""
        return self.less(self.abs(x), self.c(math.inf))

    def floor(self, x: ir.Value) -> ir.Value:
        """Rounded down."""
        return self.e.intrinsic("floor", x)

    def ceil(self, x: ir.Value) -> ir.Value:
        """Rounded up."""
        return self.e.intrinsic("ceil", x)

    def round(self, x: ir.Value, rounding_method: lax.RoundingMethod) -> ir.Value:
        """Rounded to the nearest, halves to even numbers or away from zero."""
        even = rounding_method == lax.RoundingMethod.TO_NEAREST_EVEN
        return self.e.intrinsic("roundeven" if even else "round", x)

    def square(self, x: ir.Value) -> ir.Value:
        """x^2."""
        return self.mul(x, x)

    def one_minus_square(self, x: ir.Value) -> ir.Value:
        """1 - x^2."""
        return self.mul(self.sub(self.c(1), x), self.add(self.c(1), x))

    def polynomial(self, x: ir.Value, *coefficients: ir.Value) -> ir.Value:
        """The lowest coefficient first."""
        value = coefficients[-1]
        for a in coefficients[-2::-1]:
            value = self.fma(x, value, a)
        return value

    def integer_pow(self, x: ir.Value, y: int) -> ir.Value:
        """x^y."""
        out = powered(self.mul, x, abs(y)) or self.c(1)
        return out if y >= 0 else self.div(self.c(1), out)

    def sqrt(self, x: ir.Value) -> ir.Value:
        """The square root."""
        return self.e.intrinsic("sqrt", x)

    def rsqrt(self, x: ir.Value) -> ir.Value:
        """1 / sqrt(x)."""
        return self.div(self.c(1), self.sqrt(x))

    def rem(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """What is left of x by division, with the sign of x: by the C library."""
        return self.b.frem(x, y)

    def reduce_precision(
        self, x: ir.Value, exponent_bits: int, mantissa_bits: int, gradual: bool = False
    ) -> ir.Value:
        """Rounded to fewer digits; what is too small becomes 0, or loses digits if ``gradual``."""
        b, out = self.b, x
        if (drop := self.digits - mantissa_bits) > 0:
            bits = b.bitcast(x, self.whole)
            odd = b.and_(b.lshr(bits, self.n(drop)), self.n(1))
            up = b.add(bits, b.add(odd, self.n(2 ** (drop - 1) - 1)))
            out = b.bitcast(b.and_(up, self.n(-(2**drop))), self.kind)
        if (highest := 2 ** (exponent_bits - 1) - 1) < self.bias:
            size, least = self.abs(out), 2.0 ** (1 - highest)
            over = b.fcmp_ordered(">=", size, self.c(2.0 ** (highest + 1)))
            out = b.select(over, self.copysign(self.c(math.inf), x), out)
            small = self.c(0)
            if gradual:
                magic = self.c(1.5 * 2.0 ** (self.digits - mantissa_bits) * least)
                small = b.fsub(b.fadd(self.abs(x), magic), magic)
            out = b.select(self.less(size, self.c(least)), self.copysign(small, x), out)
        return b.select(b.fcmp_unordered("uno", x, x), x, out)

    # --- Exponentials ---

    def _parts(self, x: ir.Value, lift: int, scale: int = 1) -> tuple[ir.Value, ir.Value]:
        """``(r, bits)``: scale x = n log 2 + scale r, and n + lift in the low bits."""
        magic = 1.5 * 2**self.digits + lift  # rounds to a whole number, the low bits of the sum
        t = self.fma(x, self.c(scale / math.log(2)), self.c(magic))
        n = self.b.fsub(t, self.c(magic))
        r = self.fma(n, self.c(-self.log2_high / scale), x)
        r = self.fma(n, self.c(-self.log2_low / scale), r)
        return r, self.b.bitcast(t, self.whole)

    def _exponent(self, bits: ir.Value) -> ir.Value:
        """Where a number has its exponent."""
        return self.b.shl(bits, self.n(self.digits))

    def _power(self, bits: ir.Value) -> ir.Value:
        return self.b.bitcast(self._exponent(bits), self.kind)

    @property
    def _tail(self) -> tuple[float, ...]:
        return fitted(_exp_tail, -0.3466, 0.3466, self.of_type(4, 9))

    def _expm1_near(self, r: ir.Value, scale: int = 1) -> ir.Value:
        """(exp(scale r) - 1) / scale, for scale r within half of log 2."""
        tail = [a * scale ** (k + 1) for k, a in enumerate(self._tail)]
        return self.fma(self.mul(r, r), self.horner(r, tail), r)

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x."""
        r, bits = self._parts(x, 0)
        near = self.b.bitcast(self.horner(r, (1.0, 1.0, *self._tail)), self.whole)
        return self._scaled(x, near, bits, math.log(self.tiny), self.last)

    def exp2(self, x: ir.Value) -> ir.Value:
        """2^x."""
        magic = self.c(1.5 * 2**self.digits)
        t = self.b.fadd(x, magic)
        r = self.mul(self.b.fsub(x, self.b.fsub(t, magic)), self.c(math.log(2)))
        near = self.b.bitcast(self.horner(r, (1.0, 1.0, *self._tail)), self.whole)
        bits = self.b.bitcast(t, self.whole)
        return self._scaled(x, near, bits, 1 - self.bias, self.bias + 1 - 2.0**-self.digits)

    def _scaled(
        self, x: ir.Value, near: ir.Value, bits: ir.Value, low: int | float, high: int | float
    ) -> ir.Value:
        """A number times 2^n, 0 and infinity where x is too small or too large."""
        y = self.b.add(near, self._exponent(bits))
        y = self.b.bitcast(self.b.select(self.less(x, self.c(low)), self.n(0), y), self.kind)
        outside = self.b.fcmp_unordered(">", x, self.c(high))
        return self.b.select(outside, self.b.fadd(x, self.c(math.inf)), y)  # NaN stays NaN

    def expm1(self, x: ir.Value) -> ir.Value:
        """e^x - 1, right near zero."""
        x = self.between(-60, x, self.last + 0.3)
        r, bits = self._parts(x, self.bias - 1)
        half = self._power(bits)  # of the largest 2^n there is no number
        y = self.fma(half, self._expm1_near(r), self.b.fsub(half, self.c(0.5)))
        return self.b.fadd(y, y)

    def logistic(self, x: ir.Value) -> ir.Value:
        """1 / (1 + e^-x)."""
        x = self.between(-self.last - 0.1, x, self.last - 2)
        r, bits = self._parts(x, self.bias, -1)
        near = [a * (-1) ** k for k, a in enumerate((1.0, 1.0, *self._tail))]
        return self.div(self.c(1), self.fma(self._power(bits), self.horner(r, near), self.c(1)))

    def tanh(self, x: ir.Value) -> ir.Value:
        """(e^2x - 1) / (e^2x + 1)."""
        end = self.of_type(10, 20)
        r, bits = self._parts(self.between(-end, x, end), self.bias + 1, 2)
        twice = self._power(bits)
        y = self.fma(twice, self._expm1_near(r, 2), self.fma(twice, self.c(0.5), self.c(-1)))
        return self.div(y, self.b.fadd(y, self.c(2)))

    def sinh(self, x: ir.Value) -> ir.Value:
        """(e^x - e^-x) / 2."""
        small, size = self.expm1(x), self.abs(x)
        near = self.mul(self.add(small, self.div(small, self.add(small, self.c(1)))), self.c(0.5))
        half = self._half_exp(size)
        far = self.copysign(self.sub(half, self.div(self.c(0.25), half)), x)
        return self.b.select(self.less(size, self.c(0.5)), near, far)

    def cosh(self, x: ir.Value) -> ir.Value:
        """(e^x + e^-x) / 2."""
        half = self._half_exp(self.abs(x))
        return self.add(half, self.div(self.c(0.25), half))

    def _half_exp(self, x: ir.Value) -> ir.Value:
        """e^x / 2, finite where sinh and cosh still are and e^x is not."""
        root = self.exp(self.mul(x, self.c(0.5)))
        return self.mul(self.mul(root, self.c(0.5)), root)

    # --- Logarithms ---

    def _split(self, x: ir.Value) -> ir.Value:
        """n, where x = 2^n m and m is from sqrt(1/2) to sqrt(2); x is positive and normal."""
        dtype = np.dtype(self.dtype).type
        least = int(dtype(math.sqrt(0.5)).view(f"int{self.whole.element.width}"))
        return self.b.ashr(
            self.b.sub(self.b.bitcast(x, self.whole), self.n(least)), self.n(self.digits)
        )

    def _log_near(self, f: ir.Value) -> ir.Value:
        """log(1 + f) - f, for 1 + f from sqrt(1/2) to sqrt(2)."""
        s = self.div(f, self.b.fadd(f, self.c(2)))
        z = self.mul(s, s)
        rest = self.mul(z, self.horner(z, fitted(_log_tail, 0.0, 0.02945, self.of_type(2, 7))))
        half = self.mul(self.mul(f, f), self.c(0.5))
        return self.b.fsub(self.mul(s, self.b.fadd(half, rest)), half)

    def _log_parts(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """``(n, f, log(1 + f) - f)``, where x = 2^n (1 + f)."""
        n = self._split(x)
        bits = self.b.sub(self.b.bitcast(x, self.whole), self._exponent(n))
        f = self.b.fsub(self.b.bitcast(bits, self.kind), self.c(1))
        return self.b.sitofp(n, self.kind), f, self._log_near(f)

    def _log_sum(self, n: ir.Value, f: ir.Value, near: ir.Value) -> ir.Value:
        near = self.fma(n, self.c(self.log2_low), near)
        return self.fma(n, self.c(self.log2_high), self.b.fadd(f, near))

    def _log_ends(self, x: ir.Value, y: ir.Value, pole: int) -> ir.Value:
        """The logarithm ``y`` of ``x - pole``, put right where x is no positive number."""
        y = self.b.select(self.less(x, self.c(math.inf)), y, x)
        least = self.c(pole or self.tiny)
        outside = self.b.fcmp_ordered("<=", x, least) if pole else self.less(x, least)
        lost = self.b.select(self.less(x, self.c(pole)), self.c(math.nan), self.c(-math.inf))
        return self.b.select(outside, lost, y)

    def log(self, x: ir.Value) -> ir.Value:
        """The natural logarithm."""
        return self._log_ends(x, self._log_sum(*self._log_parts(x)), 0)

    def log2(self, x: ir.Value) -> ir.Value:
        """To the base 2."""
        n, f, near = self._log_parts(x)
        return self._log_ends(x, self.fma(self.b.fadd(f, near), self.c(1 / math.log(2)), n), 0)

    def log1p(self, x: ir.Value) -> ir.Value:
        """log(1 + x), right near zero."""
        n = self._split(self.b.fadd(x, self.c(1)))
        # 1 + x = 2^n (1 + f), computed with 2^(2 - n), which is a number whatever n.
        power = self._power(self.b.sub(self.n(self.bias + 2), n))
        f = self.fma(self.mul(x, self.c(0.25)), power, self.fma(power, self.c(0.25), self.c(-1)))
        y = self._log_sum(self.b.sitofp(n, self.kind), f, self._log_near(f))
        return self._log_ends(x, y, -1)

    def asinh(self, x: ir.Value) -> ir.Value:
        """The inverse of sinh."""
        size = self.abs(x)
        root = self.sqrt(self.fma(size, size, self.c(1)))
        more = self.mul(size, self.div(size, self.add(root, self.c(1))))
        near = self.log1p(self.add(size, more))
        return self.copysign(self._or_log_of_twice(size, near), x)

    def acosh(self, x: ir.Value) -> ir.Value:
        """The inverse of cosh."""
        d = self.sub(x, self.c(1))
        root = self.sqrt(self.mul(d, self.add(x, self.c(1))))
        found = self._or_log_of_twice(x, self.log1p(self.add(d, root)))
        return self.b.select(self.less(x, self.c(1)), self.c(math.nan), found)

    def _or_log_of_twice(self, x: ir.Value, near: ir.Value) -> ir.Value:
        """log 2 x for large x, which asinh and acosh are, and whose square may overflow."""
        far = self.add(self.log(x), self.c(math.log(2)))
        return self.b.select(self.less(self.c(2.0 ** (self.digits // 2 + 2)), x), far, near)

    def atanh(self, x: ir.Value) -> ir.Value:
        """The inverse of tanh."""
        size = self.abs(x)
        ratio = self.div(self.add(size, size), self.sub(self.c(1), size))
        return self.copysign(self.mul(self.c(0.5), self.log1p(ratio)), x)

    # --- Powers ---

    def pow(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """x^y."""
        b, size, half = self.b, self.abs(x), self.mul(y, self.c(0.5))
        out = b.select(self.equal(size, self.c(1)), self.c(1), self._power_of(size, y))
        whole = self.equal(self.floor(y), y)
        odd = b.and_(whole, b.not_(self.equal(self.floor(half), half)))
        out = b.select(odd, self.copysign(out, x), out)
        fine = b.or_(whole, self.equal(size, self.c(math.inf)))
        lost = b.and_(self.less(x, self.c(0)), b.not_(fine))
        out = b.select(lost, self.c(math.nan), out)
        one = b.or_(self.equal(y, self.c(0)), self.equal(x, self.c(1)))
        return b.select(one, self.c(1), out)

    def _power_of(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """x^y of a positive x."""
        if not self.wide:
            twice = Functions(self.e, "float64")
            x, y = (self.b.fpext(a, twice.kind) for a in (x, y))
            return self.b.fptrunc(twice.exp(twice.mul(y, twice.log(x))), self.kind)
        return self._exact_power(x, y)

    def _exact_power(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """By a logarithm in two numbers, and their products with y in two."""
        b = self.b
        n, f, _ = self._log_parts(x)
        below = b.fadd(f, self.c(2))
        s = self.div(f, below)
        lost = b.fsub(f, b.fsub(below, self.c(2)))
        left = self._fused(b.fneg(s), below, f)
        low = self.div(self._fused(b.fneg(s), lost, left), below)
        z = self.mul(s, s)
        rest = self.mul(self.mul(z, s), self.horner(z, fitted(_log_tail, 0.0, 0.02945, 7)))
        small = b.fadd(rest, self.fma(n, self.c(self.log2_low), b.fadd(low, low)))
        large, twice = self.mul(n, self.c(self.log2_high)), b.fadd(s, s)
        high = b.fadd(large, twice)  # n is 0, or large is the larger one
        back = b.select(self.equal(n, self.c(0)), self.c(0), b.fsub(twice, b.fsub(high, large)))
        small = b.fadd(small, back)
        high, small = self._two(high, small)
        usual = self.less(self.c(self.tiny), x)
        usual = b.and_(usual, self.less(x, self.c(math.inf)))
        product = self.mul(y, b.select(usual, high, self.log(x)))
        error = self._fused(y, high, b.fneg(product))
        error = self.fma(y, small, error)
        near = self.exp(product)
        inside = b.and_(usual, self.less(self.abs(product), self.c(self.last)))
        return b.select(inside, self.fma(near, error, near), near)

    def _fused(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """``x y + z``, rounded once on every machine."""
        return self.e.intrinsic("fma", x, y, z)

    def _two(self, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Their sum in two numbers; x is the larger one."""
        total = self.b.fadd(x, y)
        return total, self.b.fsub(y, self.b.fsub(total, x))

    def cbrt(self, x: ir.Value) -> ir.Value:
        """The cube root."""
        b, size = self.b, self.abs(x)
        root = self.exp2(self.mul(self.log2(size), self.c(1 / 3)))
        step = self.sub(self.div(size, self.mul(root, root)), root)
        root = self.fma(step, self.c(1 / 3), root)  # Newton's
        ends = b.or_(self.less(size, self.c(self.tiny)), self.equal(size, self.c(math.inf)))
        return b.select(ends, x, self.copysign(root, x))

    # --- Angles ---

    def sin(self, x: ir.Value) -> ir.Value:
        """The sine."""
        return self._wave("sin", x, 0)

    def cos(self, x: ir.Value) -> ir.Value:
        """The cosine."""
        return self._wave("cos", x, 1)

    def _wave(self, name: str, x: ir.Value, quarter: int) -> ir.Value:
        """The sine of x and so many quarters of a turn; of large numbers by the C library."""
        b = self.b
        r, quarters = self._turned(x)
        quarters, z = b.add(quarters, self.n(quarter)), self.mul(r, r)
        fit = fitted(_sin_tail, 0.0, 0.6169, self.of_type(2, 6))
        sine = self.fma(self.mul(z, r), self.horner(z, fit), r)
        fit = fitted(_cos_tail, 0.0, 0.6169, self.of_type(2, 6))
        cosine = self.fma(z, self.c(-0.5), self.mul(self.mul(z, z), self.horner(z, fit)))
        odd = b.trunc(quarters, ir.VectorType(I1, self.e.lanes))
        near = b.select(odd, b.fadd(cosine, self.c(1)), sine)
        second = b.shl(b.and_(quarters, self.n(2)), self.n(self.whole.element.width - 2))
        near = b.bitcast(b.xor(b.bitcast(near, self.whole), second), self.kind)
        large = b.fcmp_ordered(">", self.abs(x), self.c(_TURNS))
        several = ir.IntType(self.e.lanes)
        before = b.block
        with b.if_then(b.icmp_unsigned("!=", b.bitcast(large, several), several(0)), likely=False):
            far, there = b.select(large, self.e.intrinsic(name, x), near), b.block
        out = b.phi(self.kind)
        out.add_incoming(near, before)
        out.add_incoming(far, there)
        return out

    def _turned(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """``(r, n)``: x = r + n quarters of a turn, r within half of one."""
        if not self.wide:
            twice = Functions(self.e, "float64")
            r, n = twice._turned(self.b.fpext(x, twice.kind))
            return self.b.fptrunc(r, self.kind), self.b.trunc(n, self.whole)
        magic = self.c(1.5 * 2**self.digits)
        t = self.fma(x, self.c(2 / math.pi), magic)
        n = self.b.fsub(t, magic)
        for part in _QUARTER:
            x = self.fma(n, self.c(-part), x)
        return x, self.b.bitcast(t, self.whole)

    def tan(self, x: ir.Value) -> ir.Value:
        """The tangent."""
        return self.div(self.sin(x), self.cos(x))

    def atan(self, x: ir.Value) -> ir.Value:
        """The inverse of tan."""
        return self.atan2(x, self.c(1))

    def asin(self, x: ir.Value) -> ir.Value:
        """The inverse of sin."""
        return self.atan2(x, self.sqrt(self.one_minus_square(x)))

    def acos(self, x: ir.Value) -> ir.Value:
        """The inverse of cos."""
        return self.atan2(self.sqrt(self.one_minus_square(x)), x)

    def atan2(self, y: ir.Value, x: ir.Value) -> ir.Value:
        """By the angle to the nearer axis, or to the diagonal between."""
        b, c = self.b, self.c
        tall, wide = self.abs(y), self.abs(x)
        longer, shorter = self.max(tall, wide), self.min(tall, wide)
        endless = self.equal(shorter, c(math.inf))
        longer, shorter = (b.select(endless, c(1), a) for a in (longer, shorter))
        steep = self.less(self.mul(longer, c(math.sqrt(2) - 1)), shorter)
        above = b.select(steep, b.fsub(shorter, longer), shorter)
        below = b.select(steep, self.add(shorter, longer), longer)
        z = self.div(above, below)
        z = b.select(self.equal(longer, c(0)), c(0), z)
        square = self.mul(z, z)
        tail = self.horner(square, fitted(_atan_tail, 0.0, 0.1716, self.of_type(5, 13)))
        angle = self.fma(self.mul(square, z), tail, z)
        angle = b.select(steep, self.add(angle, c(math.pi / 4)), angle)
        angle = b.select(self.less(wide, tall), self.sub(c(math.pi / 2), angle), angle)
        left = self.less(self.copysign(c(1), x), c(0))
        angle = b.select(left, self.sub(c(math.pi), angle), angle)
        return self.copysign(angle, y)

    # --- Error functions ---

    def erf(self, x: ir.Value) -> ir.Value:
        """The error function."""
        size = self.abs(x)
        far = self.copysign(self.sub(self.c(1), self._erfc_far(size)), x)
        return self.b.select(self.less(size, self.c(1)), self._erf_near(x), far)

    def erfc(self, x: ir.Value) -> ir.Value:
        """1 - erf(x)."""
        size = self.abs(x)
        tail, near = self._erfc_far(size), self.sub(self.c(1), self._erf_near(x))
        far = self.b.select(self.less(x, self.c(0)), self.sub(self.c(2), tail), tail)
        return self.b.select(self.less(size, self.c(0.5)), near, far)

    def _erf_near(self, x: ir.Value) -> ir.Value:
        """Within 1 of zero."""
        fit = fitted(_erf_ratio, 0.0, 1.0, self.of_type(6, 13))
        return self.fma(x, self.horner(self.mul(x, x), fit), x)

    def _erfc_far(self, x: ir.Value) -> ir.Value:
        """From 1 / 2."""
        b, c = self.b, self.c
        x = self.min(x, c(30))
        t = self.div(b.fsub(x, c(_ERFC_MIDDLE)), b.fadd(x, c(_ERFC_MIDDLE)))
        fit = self.horner(t, fitted(_erfc_ratio, -0.77, 0.8, self.of_type(9, 22)))
        # x^2 in two numbers: the first of x has half the digits.
        mask = self.n(-(2 ** (self.digits // 2 + 1)))
        high = b.bitcast(b.and_(b.bitcast(x, self.whole), mask), self.kind)
        first = b.fmul(high, high)
        rest = self.mul(b.fsub(x, high), b.fadd(x, high))
        power = self.exp(b.fneg(first))
        power = self.mul(power, self.exp(b.fneg(rest)))
        return self.div(self.mul(power, fit), self.fma(c(2), x, c(1)))


def powered(
    multiply: Callable[[ir.Value, ir.Value], ir.Value], x: ir.Value, y: int
) -> ir.Value | None:
    """x^y by squaring; None for what 1 is, if y is 0."""
    result, square = None, x
    while y:
        if y & 1:
            result = square if result is None else multiply(result, square)
        if y := y >> 1:
            square = multiply(square, square)
    return result


class Wholes:
    """Functions of vectors of whole numbers, which wrap around; bits, if they have one.

    Attributes:
        kind: the type of the vectors.
    """

    def __init__(self, builder: Builder, width: int, signed: bool) -> None:
        self.e, self.b, self.width, self.signed = builder, builder.b, width, signed
        self.kind = ir.VectorType(ir.IntType(width), builder.lanes)

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """``x + y``."""
        return self.b.add(x, y)

    def sub(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """``x - y``."""
        return self.b.sub(x, y)

    def mul(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """``x y``."""
        return self.b.mul(x, y)

    def neg(self, x: ir.Value) -> ir.Value:
        """``-x``."""
        return self.b.neg(x)

    def both(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Bits that both have."""
        return self.b.and_(x, y)

    def either(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Bits that one of them has."""
        return self.b.or_(x, y)

    def differ(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Bits in which they differ."""
        return self.b.xor(x, y)

    def invert(self, x: ir.Value) -> ir.Value:
        """The other bits."""
        return self.b.not_(x)

    def n(self, x: int) -> ir.Value:
        """A vector of one number."""
        return _constant(self.kind, x)

    def compare(self, sign: str, x: ir.Value, y: ir.Value) -> ir.Value:
        """``x < y``, or another comparison."""
        return (self.b.icmp_signed if self.signed else self.b.icmp_unsigned)(sign, x, y)

    def max(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The larger one."""
        return self.b.select(self.compare(">", x, y), x, y)

    def min(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The smaller one."""
        return self.b.select(self.compare("<", x, y), x, y)

    def clamp(self, low: ir.Value, x: ir.Value, high: ir.Value) -> ir.Value:
        """x where it is between."""
        return self.min(self.max(x, low), high)

    def abs(self, x: ir.Value) -> ir.Value:
        """Its size."""
        return self.b.select(self.compare("<", x, self.n(0)), self.neg(x), x)

    def sign(self, x: ir.Value) -> ir.Value:
        """-1, 0 or 1."""
        above = self.b.zext(self.compare(">", x, self.n(0)), self.kind)
        return self.b.select(self.compare("<", x, self.n(0)), self.n(-1), above)

    def square(self, x: ir.Value) -> ir.Value:
        """x^2."""
        return self.mul(x, x)

    def integer_pow(self, x: ir.Value, y: int) -> ir.Value:
        """x^y; y is not negative."""
        return powered(self.mul, x, y) or self.n(1)

    def div(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The quotient, rounded to zero; by 0 all bits."""
        divide = self.b.sdiv if self.signed else self.b.udiv
        safe, zero, turned = self._divisor(x, y)
        quotient = self.b.select(turned, x, divide(x, safe))
        return self.b.select(zero, self.n(-1), quotient)

    def rem(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """What is left, with the sign of x; by 0 all of it."""
        divide = self.b.srem if self.signed else self.b.urem
        safe, zero, _ = self._divisor(x, y)
        return self.b.select(zero, x, divide(x, safe))

    def _divisor(self, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """What can be divided by; where that is not y: of zero, and of a quotient too large."""
        zero, turned = self.compare("==", y, self.n(0)), _constant(self._bits, 0)
        if self.signed:
            least = self.compare("==", x, self.n(-(2 ** (self.width - 1))))
            turned = self.b.and_(least, self.compare("==", y, self.n(-1)))
        return self.b.select(self.b.or_(zero, turned), self.n(1), y), zero, turned

    @property
    def _bits(self) -> ir.VectorType:
        return ir.VectorType(I1, self.e.lanes)

    def shift_left(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """By y bits; 0 where there are not so many."""
        return self._shift(self.b.shl, x, y)

    def shift_right_logical(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """By y bits; 0 where there are not so many."""
        return self._shift(self.b.lshr, x, y)

    def shift_right_arithmetic(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """By y bits; all like the first where there are not so many."""
        most = self.n(self.width - 1)
        return self.b.ashr(x, self.b.select(self.b.icmp_unsigned("<", y, most), y, most))

    def _shift(
        self, shift: Callable[[ir.Value, ir.Value], ir.Value], x: ir.Value, y: ir.Value
    ) -> ir.Value:
        inside = self.b.icmp_unsigned("<", y, self.n(self.width))
        return self.b.select(inside, shift(x, y), self.n(0))

    def population_count(self, x: ir.Value) -> ir.Value:
        """How many bits are set."""
        return self.e.intrinsic("ctpop", x)
