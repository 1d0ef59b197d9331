"""Random numbers that a cell's step asks for: what is drawn, when, and what evaluation uses."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from lstmjax.shown import fields_as_call


@dataclasses.dataclass(frozen=True)
class Noise:
    """A random array of ``step``, drawn row by row.

    Each row of the global batch draws from its own key, so the numbers depend neither on how a
    batch is spread over devices nor on the engine.

    Attributes:
        draw: ``(key, shape, dtype) -> Array``, one row's numbers.
        evaluation: the number used where no keys are given.
        every: new numbers at each ``"step"``, or once for each ``"sequence"``, that is until the
            next reset.
        width: numbers a row; None is one a unit.

    Example:
        >>> gaussian = Noise(lambda key, shape, dtype: jax.random.normal(key, shape, dtype), 0.0)
        >>> gaussian.every
        'step'
    """

    draw: Callable[[PRNGKeyArray, tuple[int, ...], DTypeLike], Array]
    evaluation: float
    every: Literal["step", "sequence"] = "step"
    width: int | None = None

    __repr__ = fields_as_call


def dropped(rate: float, every: Literal["step", "sequence"] = "step") -> Noise:
    """What dropout multiplies with: 0 with probability ``rate``, else ``1 / (1 - rate)``; 1 in
    evaluation (Srivastava et al. 2014).

    Example:
        >>> dropped(0.5).draw(jax.random.key(0), (4,), jnp.float32).max()
        Array(2., dtype=float32)
    """
    _check_rate(rate)

    def draw(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.random.bernoulli(key, np.float32(1 - rate), shape).astype(dtype) / (1 - rate)

    draw.__name__ = f"dropped({rate})"  # what `Noise` prints
    return Noise(draw, 1.0, every)


def kept(rate: float, every: Literal["step", "sequence"] = "step") -> Noise:
    """What zoneout weighs the past with: 1 with probability ``rate``, else 0; its mean, ``rate``,
    in evaluation (Krueger et al. 2017, arXiv:1606.01305).

    Example:
        >>> kept(0.1).evaluation
        0.1
    """
    _check_rate(rate)

    def draw(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.random.bernoulli(key, np.float32(rate), shape).astype(dtype)

    draw.__name__ = f"kept({rate})"
    return Noise(draw, rate, every)


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"a rate must be at least 0 and less than 1, got {rate}")
