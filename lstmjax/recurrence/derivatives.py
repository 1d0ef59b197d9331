"""A first derivative that is given, and higher ones that are another function's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
"""A pytree of floating-point arrays."""


def with_derivative(
    forward: Callable[[Tree], tuple[Tree, Tree]],
    backward: Callable[[Tree, Tree, Tree], Tree],
    plain: Callable[[Tree], Tree],
) -> Callable[[Tree], Tree]:
    """A function with a vector-Jacobian product of its own, differentiable any number of times.

    Args:
        forward: ``inputs -> outputs, saved``.
        backward: ``inputs, saved, d outputs -> d inputs``.
        plain: ``inputs -> outputs``, the same function as JAX differentiates it: what second and
            higher reverse-mode derivatives are taken from.

    Returns:
        ``inputs -> outputs``. Forward mode is refused by JAX, as for every `jax.custom_vjp`.

    Example:
        >>> cube = with_derivative(
        ...     lambda x: (x * x * x, x * x), lambda x, saved, d: 3 * saved * d, lambda x: x**3
        ... )
        >>> float(cube(2.0)), float(jax.grad(cube)(2.0)), float(jax.grad(jax.grad(cube))(2.0))
        (8.0, 12.0, 12.0)
    """

    def plain_gradient(inputs: Tree, d_outputs: Tree) -> Tree:
        return jax.vjp(plain, inputs)[1](d_outputs)[0]

    @jax.custom_vjp
    def there(inputs: Tree) -> tuple[Tree, Tree]:
        return forward(inputs)

    # What is saved leads to nothing but `back`, whose rule has its whole derivative already.
    there.defvjp(
        lambda inputs: (there(inputs), inputs),
        lambda inputs, d: (plain_gradient(inputs, d[0]),),
    )

    @jax.custom_vjp
    def back(inputs: Tree, saved: Tree, d_outputs: Tree) -> Tree:
        return backward(inputs, saved, d_outputs)

    def differentiate_back(kept: Any, dd_inputs: Tree) -> tuple[Tree, Tree, Tree]:
        inputs, saved, d_outputs = kept
        d_inputs, dd_outputs = jax.vjp(plain_gradient, inputs, d_outputs)[1](dd_inputs)
        return d_inputs, jax.tree.map(jnp.zeros_like, saved), dd_outputs

    back.defvjp(lambda *a: (back(*a), a), differentiate_back)

    @jax.custom_vjp
    def function(inputs: Tree) -> Tree:
        return there(inputs)[0]

    def keep(inputs: Tree) -> tuple[Tree, Any]:
        outputs, saved = there(inputs)
        return outputs, (inputs, saved)

    function.defvjp(keep, lambda kept, d: (back(*kept, d),))
    return function
