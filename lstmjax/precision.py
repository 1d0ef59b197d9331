"""Matrix products in the two precisions that every layer and engine offers."""

import dataclasses
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

Precision = Literal["float32", "bfloat16"]
"""What `as_precision` makes of what others call it.

``"float32"``: operands as they are (float64 stays float64), products in full precision.
``"bfloat16"``: operands of every product, those of the gradient too, rounded to bfloat16; sums in
float32; results as wide as the operands came."""

Dot = Callable[[Array, Array], Array]
"""Contracts the last axis of ``x (..., K)`` with the first of ``w (K, N)``."""

PRODUCT = "lstmjax_product"
"""The name under which `marked_dot` is found in a traced program."""

PrecisionLike = DTypeLike | lax.Precision | None
"""What `as_precision` knows."""

_NAMES: dict[object, Precision] = {
    None: "float32",
    "float32": "float32",
    "float64": "float32",
    "highest": "float32",
    lax.Precision.HIGHEST: "float32",
    "bfloat16": "bfloat16",
}


def as_precision(asked: object) -> Precision:
    """The mode that somebody means who knows JAX or Flax.

    Args:
        asked: ``"float32"`` or ``"bfloat16"``, such a dtype; or, for operands as they are,
            ``None``, ``"highest"``, `jax.lax.Precision.HIGHEST`, ``"float64"``.

    Raises:
        ValueError: anything else.

    Example:
        >>> as_precision(None), as_precision(jnp.bfloat16), as_precision("highest")
        ('float32', 'bfloat16', 'float32')
    """
    name: object = asked
    if not isinstance(asked, str | lax.Precision | None):
        try:
            name = jnp.dtype(cast(DTypeLike, asked)).name
        except TypeError:
            name = asked
    try:
        return _NAMES[name.lower() if isinstance(name, str) else name]
    except (KeyError, TypeError):
        raise ValueError(
            f'precision must be "float32" (full products) or "bfloat16" (fast ones), got {asked!r}'
        ) from None


def make_dot(mode: Precision) -> Dot:
    """The product ``(..., K) x (K, N) -> (..., N)`` in the given mode.

    Example:
        >>> x, w = jnp.full((2, 3), 1.001), jnp.ones((3, 4))
        >>> [round(float(make_dot(mode)(x, w)[0, 0]), 3) for mode in ("float32", "bfloat16")]
        [3.003, 3.0]
    """
    return _wide_dot if mode == "float32" else _bfloat16_dot


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """`make_dot` in the form that Flax' layers take as their ``dot_general``.

    A value, so that models which are alike compare as equal, and can be pickled.
    """

    mode: Precision

    def __call__(
        self, x: Array, w: Array, dimension_numbers: lax.DotDimensionNumbers, **_: object
    ) -> Array:
        """The product of `make_dot`, which ``dimension_numbers`` must describe."""
        assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
        return make_dot(self.mode)(x, w)


def make_matmul(
    mode: Precision, dtype: jax.typing.DTypeLike = jnp.float32
) -> Callable[[Array, Array], Array]:
    """`jnp.matmul` in the given mode with results of ``dtype``, for code with its own gradient.

    Operands may have been rounded to bfloat16 beforehand.

    Example:
        >>> a = jnp.full((2, 2), 1.001)
        >>> round(float(make_matmul("bfloat16")(a, a)[0, 0]), 3)
        2.0
    """

    def matmul(a: Array, b: Array) -> Array:
        if mode == "float32":
            return jnp.matmul(a, b, precision="highest")
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)

    return matmul


def _wide_dot(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), precision="highest")


def _marked(x: Array, w: Array) -> Array:
    return _wide_dot(x, w)


_marked.__name__ = _marked.__qualname__ = PRODUCT
marked_dot: Dot = jax.jit(_marked)
"""`make_dot("float32")` for tracing: a traced program shows it as a call of that name."""


# A rule of its own: that of a rounded product would multiply a float32 cotangent with bfloat16
# operands, and round each step's share of the weight gradient.
@jax.custom_vjp
def _bfloat16_dot(x: Array, w: Array) -> Array:
    return _forward(x, w)[0]


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _contract(*narrow, ((x.ndim - 1,), (0,))).astype(x.dtype), narrow


def _backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = operands
    narrow = g.astype(jnp.bfloat16)
    rows = tuple(range(x.ndim - 1))
    dx = _contract(narrow, w, ((g.ndim - 1,), (1,)))
    dw = _contract(x, narrow, (rows, rows))
    return dx.astype(g.dtype), dw.astype(g.dtype)


def _contract(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


_bfloat16_dot.defvjp(_forward, _backward)
