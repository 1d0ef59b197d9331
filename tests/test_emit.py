"""Re-emitting element-wise functions: values and derivatives against JAX' own, refusals by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lstmjax.recurrence.gpu.emit import Emission
from lstmjax.traced import trace
from tests.tolerances import assert_close

SHAPE = (2, 3)  # of the trace
TILE = (8, 24)  # of what is computed

ANY = np.linspace(-3, 3, 192, dtype="float32").reshape(TILE)
SMALL = ANY * np.float32(1e-3)
WIDE = ANY * np.float32(20)
POSITIVE = np.abs(ANY) + np.float32(0.01)
UNIT = ANY / np.float32(3.1)


def upper_bits(x):
    bits = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
    return lax.bitcast_convert_type(bits, jnp.float32)


FUNCTIONS = {
    "sigmoid": (jax.nn.sigmoid, ANY),
    "relu": (jax.nn.relu, ANY),
    "relu6": (jax.nn.relu6, WIDE),
    "leaky_relu": (jax.nn.leaky_relu, ANY),
    "elu": (jax.nn.elu, ANY),
    "selu": (jax.nn.selu, ANY),
    "celu": (jax.nn.celu, ANY),
    "gelu": (jax.nn.gelu, ANY),
    "exact gelu": (lambda x: jax.nn.gelu(x, approximate=False), ANY),
    "silu": (jax.nn.silu, ANY),
    "mish": (jax.nn.mish, ANY),
    "softplus": (jax.nn.softplus, WIDE),
    "softplus near zero": (jax.nn.softplus, SMALL),
    "soft_sign": (jax.nn.soft_sign, ANY),
    "log_sigmoid": (jax.nn.log_sigmoid, WIDE),
    "hard_tanh": (jax.nn.hard_tanh, ANY),
    "hard_sigmoid": (jax.nn.hard_sigmoid, WIDE),
    "hard_silu": (jax.nn.hard_silu, WIDE),
    "squareplus": (jax.nn.squareplus, ANY),
    "sparse_plus": (jax.nn.sparse_plus, ANY),
    "tanh": (jnp.tanh, ANY),
    "exp": (jnp.exp, ANY),
    "exp2": (jnp.exp2, ANY),
    "expm1": (jnp.expm1, ANY),
    "expm1 near zero": (jnp.expm1, SMALL),
    "expm1 far out": (jnp.expm1, WIDE),
    "log": (jnp.log, POSITIVE),
    "log2": (jnp.log2, POSITIVE),
    "log10": (jnp.log10, POSITIVE),
    "log1p": (jnp.log1p, POSITIVE),
    "log1p near zero": (jnp.log1p, SMALL),
    "sqrt": (jnp.sqrt, POSITIVE),
    "cbrt": (jnp.cbrt, POSITIVE),
    "cbrt of negatives": (jnp.cbrt, -POSITIVE),
    "reciprocal": (jnp.reciprocal, POSITIVE),
    "rsqrt": (lax.rsqrt, POSITIVE),
    "square": (jnp.square, ANY),
    "cube": (lambda x: x**3, ANY),
    "power of minus two": (lambda x: x**-2, POSITIVE),
    "real power": (lambda x: x**1.5, POSITIVE),
    "power of x": (lambda x: jnp.power(jnp.float32(2.5), x), ANY),
    "x to the x": (lambda x: jnp.power(x, x), POSITIVE),
    "sin": (jnp.sin, ANY),
    "cos": (jnp.cos, ANY),
    "tan": (jnp.tan, UNIT),
    "arcsin": (jnp.arcsin, UNIT),
    "arccos": (jnp.arccos, UNIT),
    "arctan": (jnp.arctan, ANY),
    "arctan2": (lambda x: jnp.arctan2(x, x + 4), ANY),
    "sinh": (jnp.sinh, ANY),
    "sinh near zero": (jnp.sinh, SMALL),
    "cosh": (jnp.cosh, ANY),
    "arcsinh": (jnp.arcsinh, ANY),
    "arccosh": (jnp.arccosh, POSITIVE + np.float32(1.5)),
    "arctanh": (jnp.arctanh, UNIT),
    "arctanh near zero": (jnp.arctanh, SMALL),
    "erf": (lax.erf, ANY),
    "abs": (jnp.abs, ANY),
    "sign": (lambda x: x * jnp.sign(x), ANY),
    "floor": (lambda x: x + jnp.floor(x), ANY),
    "ceil": (lambda x: x + jnp.ceil(x), ANY),
    "round": (lambda x: x + jnp.round(x), ANY),
    "trunc": (lambda x: x + jnp.trunc(x), ANY),
    "mod": (lambda x: jnp.mod(x, 0.7), ANY),
    "clip": (lambda x: jnp.clip(x, -1, 1), ANY),
    "maximum": (lambda x: jnp.maximum(x, 0.5), ANY),
    "where": (lambda x: jnp.where(x > 0, jnp.sin(x), 2 * x), ANY),
    "logical": (lambda x: jnp.where((x > -1) & ~(x > 1), x, x * x), ANY),
    "not": (lambda x: x * (~x.astype(jnp.int32)).astype(x.dtype), WIDE),
    "is_finite": (lambda x: jnp.where(jnp.isfinite(x), x, 0.0), ANY),
    "nan_to_num": (jnp.nan_to_num, ANY),
    "logaddexp": (lambda x: jnp.logaddexp(x, 1 - x), ANY),
    "heaviside": (lambda x: x * jnp.heaviside(x, 0.5), ANY),
    "stop_gradient": (lambda x: x * lax.stop_gradient(jnp.cos(x)), ANY),
    "casts": (lambda x: x * (x > 0).astype(x.dtype) + x.astype(jnp.int32).astype(x.dtype), ANY),
    "bits": (lambda x: x * upper_bits(x), ANY),
    "straight through": (lambda x: x + lax.stop_gradient(jnp.round(x) - x), ANY),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(jnp.cos(x))), ANY),
    "numbers only": (lambda x: x * jnp.sqrt(jnp.float32(2.0)) + jnp.log1p(0.5), ANY),
    "a constant": (lambda x: jnp.zeros_like(x) + 2, ANY),
}


def emit(f, arguments):
    """Of arrays of the shape that is traced."""
    return Emission(trace(f, *[jax.ShapeDtypeStruct(SHAPE, "float32")] * arguments))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_derivatives(name):
    f, x = FUNCTIONS[name]
    ct = np.random.default_rng(0).normal(size=TILE).astype("float32")

    def both(x, ct):
        y, pull = jax.vjp(f, x)
        return [y, *pull(ct)]

    program = emit(both, 2)
    assert program.refusal() is None
    for what, got, expected in zip(
        ("value", "derivative"), jax.jit(program)(x, ct), jax.jit(both)(x, ct), strict=True
    ):
        assert_close(got, expected, reduction=4, what=what)


EDGES = {
    "sqrt": (jnp.sqrt, [0.0, np.inf, -1.0, 1e-30, 3e38]),
    "log1p": (jnp.log1p, [np.inf, -1.0, 0.0, 3e38, 1e-30]),
    "expm1": (jnp.expm1, [np.inf, -np.inf, 0.0, 90.0, -90.0]),
    "floor": (jnp.floor, [-0.5, 1e10, -1e10, 2.0, -2.0]),
    "isfinite": (jnp.isfinite, [0.0, np.inf, -np.inf, np.nan, 3e38]),
    "arcsinh": (jnp.arcsinh, [0.0, 1e20, -1e20, 3e38, np.inf, -np.inf, 9.9e3, 1.01e4, -1.01e4]),
    "arccosh": (jnp.arccosh, [1.0, 1e20, -1e20, 3e38, np.inf, 0.5, 9.9e3, 1.01e4, -5e3]),
    "not": (lambda x: (~x.astype(jnp.uint8)).astype(x.dtype), [0.0, 1.0, 2.0, 254.0, 255.0]),
    "erf": (lax.erf, [0.0, np.inf, -np.inf, 1e-30, np.nan]),
    "erfc": (lax.erfc, [0.0, 3e38, -np.inf, 3.0, np.nan]),
    "arctan": (jnp.arctan, [0.0, np.inf, -np.inf, 1e-30, 0.41421357]),
    "arctan2": (lambda x: jnp.arctan2(x, jnp.float32(-1)), [1e-3, np.inf, -np.inf, -1.0, np.nan]),
    "arctan2 of infinities": (lambda x: jnp.arctan2(x, -jnp.abs(x)), [np.inf, -np.inf, 2.0]),
    "rem": (lambda x: lax.rem(x, jnp.full_like(x, 0.75)), [0.75, -5.0, np.inf, 0.5, 3.0]),
    "rem of infinity": (lambda x: lax.rem(jnp.full_like(x, -2), x), [np.inf, -np.inf, 0.0, 2.0]),
    "to the 2": (lambda x: x**2.0, [0.0, -2.0, -0.5, 3.0, 1.0]),
    "to the 0.5": (lambda x: x**0.5, [0.0, -2.0, 4.0, 9.0, 1.0]),
    "to the 0": (lambda x: x**0.0, [0.0, -2.0, np.inf, 9.0, 1.0]),
}


@pytest.mark.parametrize("name", EDGES)
def test_at_the_edges(name):
    f, numbers = EDGES[name]
    x = np.asarray([numbers], "float32")
    program = emit(lambda x: [f(x)], 1)
    (got,) = program(jnp.asarray(x))
    np.testing.assert_allclose(got, f(jnp.asarray(x)), rtol=1e-6)


@pytest.mark.parametrize("name", ["sinh", "cosh"])
def test_to_where_float32_ends(name):
    x = np.asarray([[0.0, 88.0, 89.0, -89.25, np.inf, -np.inf]], "float32")
    (got,) = emit(lambda x: [getattr(jnp, name)(x)], 1)(jnp.asarray(x))
    np.testing.assert_allclose(got, getattr(np, name)(x.astype("float64")), rtol=1e-6)


@pytest.mark.parametrize(
    ("f", "word"),
    [
        (lambda x: jnp.cumsum(x, axis=1), "cumsum"),
        (lambda x: x - jnp.sum(x, axis=-1, keepdims=True), "reduce_sum"),
        (lambda x: jnp.sort(x), "sort"),
        (lambda x: x[:, ::-1], "rev"),
        (lambda x: lax.digamma(x), "digamma"),
        (lambda x: x * jnp.arange(3.0)[None], "iota"),
        (lambda x: x * np.ones((1, 3), "float32"), "constant of shape (1, 3)"),
        (lambda x: lax.fori_loop(0, 3, lambda i, y: jnp.sin(y), x), "scan"),
        (lambda x: x @ x.T @ x, "transpose"),
    ],
    ids=["cumsum", "sum", "sort", "rev", "digamma", "iota", "constant", "loop", "product"],
)
def test_what_cannot_be_emitted_is_named(f, word):
    assert word in emit(lambda x: [f(x)], 1).refusal()


def test_several_arguments_and_results():
    def f(x, y):
        return [x * y, x + y, jnp.zeros_like(x)]

    x, y = ANY, SMALL
    got = emit(f, 2)(jnp.asarray(x), jnp.asarray(y))
    for one, expected in zip(got, f(x, y), strict=True):
        assert_close(one, expected)
