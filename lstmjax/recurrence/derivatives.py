"""A first derivative that is given, and higher ones that are another function's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Tree = Any
"""A pytree of arrays."""


def with_derivative(
    forward: Callable[[Tree], tuple[Tree, Tree]],
    backward: Callable[[Tree, Tree, Tree, Tree], Tree],
    plain: Callable[[Tree], Tree],
    values: Callable[[Tree], Tree] | None = None,
) -> Callable[[Tree], Tree]:
    """A function with a vector-Jacobian product of its own, differentiable any number of times.

    Nothing is computed, nor filled with zeros, for what JAX knows to have no influence.

    Args:
        forward: ``inputs -> outputs, saved``. Inputs may be flags or integers, too.
        backward: ``inputs, saved, d outputs, wanted -> d inputs``. ``d outputs`` has None in place
            of the arrays that are known to be zero. ``wanted`` is True in place of the inputs whose
            gradient somebody asks for; in place of the others any result will do.
        plain: ``inputs -> outputs``, the same function as JAX differentiates it: what second and
            higher reverse-mode derivatives are taken from.
        values: ``inputs -> outputs``, the same function where nobody asks for a derivative; by
            default ``forward`` without what it saves.

    Returns:
        ``inputs -> outputs``. Forward mode is refused by JAX, as for every `jax.custom_vjp`.

    Example:
        >>> cube = with_derivative(
        ...     lambda x: (x * x * x, x * x),
        ...     lambda x, saved, d, wanted: 3 * saved * d,
        ...     lambda x: x**3,
        ... )
        >>> float(cube(2.0)), float(jax.grad(cube)(2.0)), float(jax.grad(jax.grad(cube))(2.0))
        (8.0, 12.0, 12.0)
    """

    there, back = _forward_pass(forward, plain), _backward_pass(backward, plain)

    @jax.custom_vjp
    def function(inputs: Tree) -> Tree:
        return values(inputs) if values else there(inputs)[0]

    def keep(inputs: Tree) -> tuple[Tree, Any]:
        chosen = jax.tree.map(lambda a: a.value if a.perturbed else None, inputs)
        others = jax.tree.map(lambda a: None if a.perturbed else a.value, inputs)
        outputs, saved = there(_combined(chosen, others))
        return outputs, (chosen, others, saved)

    def pull_back(kept: Any, d_outputs: Tree) -> tuple[Tree]:
        known = jax.tree.map(lambda d: None if isinstance(d, SymbolicZero) else d, d_outputs)
        return (back(*kept, known),)

    function.defvjp(keep, pull_back, symbolic_zeros=True)
    return function


def _forward_pass(
    forward: Callable[[Tree], tuple[Tree, Tree]], plain: Callable[[Tree], Tree]
) -> Callable[[Tree], tuple[Tree, Tree]]:
    """``forward``, differentiated as ``plain`` is."""

    @jax.custom_vjp
    def there(inputs: Tree) -> tuple[Tree, Tree]:
        return forward(inputs)

    # What is saved leads to nothing but the backward pass, whose rule has its whole derivative.
    there.defvjp(
        lambda inputs: (there(inputs), inputs),
        lambda inputs, d: jax.vjp(plain, inputs)[1](d[0]),
    )
    return there


def _backward_pass(
    backward: Callable[[Tree, Tree, Tree, Tree], Tree], plain: Callable[[Tree], Tree]
) -> Callable[..., Tree]:
    """``backward``, differentiated as the gradient of ``plain`` is.

    Its inputs come in two trees, None in each for what is in the other: ``chosen`` by somebody who
    asks for their gradient, and the others.
    """

    @jax.custom_vjp
    def back(chosen: Tree, others: Tree, saved: Tree, d_outputs: Tree) -> Tree:
        wanted = jax.tree.map(lambda a: a is not None, chosen, is_leaf=_is_none)
        d_inputs = backward(_combined(chosen, others), saved, d_outputs, wanted)
        return jax.tree.map(lambda asked, d: d if asked else None, wanted, d_inputs)

    def plain_back(chosen: Tree, others: Tree, d_outputs: Tree) -> Tree:
        outputs, pull_back = jax.vjp(lambda a: plain(_combined(a, others)), chosen)
        return pull_back(or_zeros(d_outputs, outputs))[0]

    def differentiate_back(kept: Any, dd_chosen: Tree) -> tuple[Tree, Tree, None, Tree]:
        d_chosen, d_others, dd_outputs = jax.vjp(plain_back, *kept)[1](dd_chosen)
        return d_chosen, d_others, None, dd_outputs

    back.defvjp(
        lambda chosen, others, saved, d: (back(chosen, others, saved, d), (chosen, others, d)),
        differentiate_back,
    )
    return back


def or_zeros(tree: Tree, like: Tree) -> Tree:
    """A tree with zeros in place of None, like what is there in another tree."""

    def filled(a: Tree, b: Tree) -> Tree:
        return jax.tree.map(jnp.zeros_like, b) if a is None else a

    return jax.tree.map(filled, tree, like, is_leaf=_is_none)


def _combined(one: Tree, other: Tree) -> Tree:
    """Two trees in one, each None where the other has something."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=_is_none)


def _is_none(a: Any) -> bool:
    return a is None
