"""Products: full precision by default, bfloat16 operands with wide sums on request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax.precision import DotGeneral, make_dot


def rounded(a):
    return np.asarray(a.astype(jnp.bfloat16).astype(jnp.float32), np.float64)


@pytest.fixture
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(3, 5, 7), (7, 4), (3, 5, 4)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def products(x, w, g):
    return x @ w, g @ w.T, np.einsum("abk,abn->kn", x, g)


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_values_and_gradients_are_products_of_the_operands(mode, operands):
    """In bfloat16 mode: exactly of the rounded ones, the cotangent's too, summed in float32."""
    out, vjp = jax.vjp(make_dot(mode), *operands[:2])
    exact = [rounded(a) if mode == "bfloat16" else np.asarray(a, np.float64) for a in operands]
    for got, want in zip((out, *vjp(operands[2])), products(*exact), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=4e-6)
    if mode == "bfloat16":
        plain = products(*(np.asarray(a, np.float64) for a in operands))
        assert np.abs(np.asarray(out) - plain[0]).max() > 1e-3


def test_bfloat16_products_have_bfloat16_operands_in_both_directions(operands):
    def loss(x, w):
        return make_dot("bfloat16")(x, w).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*operands[:2]))
    assert text.count("dot_general[") == 3
    assert text.count("preferred_element_type=float32") == 3
    assert text.count("convert_element_type[new_dtype=bfloat16") == 3


def test_float32_products_ask_for_full_precision(operands):
    def loss(x, w):
        return make_dot("float32")(x, w).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*operands[:2]))
    assert text.count("dot_general[") == 3
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 3


def test_the_form_for_flax_layers(operands):
    x, w, _ = operands
    dims = (((2,), (0,)), ((), ()))
    np.testing.assert_array_equal(
        DotGeneral("float32")(x, w, dims, precision=None), make_dot("float32")(x, w)
    )
