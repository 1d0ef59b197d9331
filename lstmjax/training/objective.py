"""What is minimised, and what is counted beside it: loss and score of a model's outputs."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int


@runtime_checkable
class Objective(Protocol):
    """Loss and score, element by element."""

    @property
    def score(self) -> str:
        """What the mean of the scores is called."""
        ...

    def __call__(self, outputs: Array, labels: Array) -> tuple[Array, Array]:
        """Losses and scores, each of the shape of ``labels``."""
        ...


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Classification: cross-entropy, and whether the most probable class is the right one.

    Attributes:
        class_weights: what an error of each class costs, as a multiple; empty is one for all.

    Example:
        >>> losses, right = CrossEntropy()(jnp.array([0.0, 2.0]), jnp.array([1, 1]))
        >>> (1000 * losses).astype(int).tolist(), right.tolist()
        ([693, 126], [0.0, 1.0])
    """

    class_weights: tuple[float, ...] = ()
    score = "accuracy"

    def __call__(
        self, outputs: Float[Array, "..."], labels: Int[Array, "*L"]
    ) -> tuple[Float[Array, "*L"], Float[Array, "*L"]]:
        """Losses and scores.

        Args:
            outputs: logits, of the shape of ``labels`` for labels 0 and 1, or with an axis of K
                more for labels 0 to K - 1.
            labels: of rows or of steps.
        """
        if outputs.ndim == labels.ndim:
            losses = optax.sigmoid_binary_cross_entropy(outputs, labels.astype(outputs.dtype))
            right = (outputs > 0) == (labels == 1)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
            right = outputs.argmax(axis=-1) == labels
        if self.class_weights:
            losses = losses * jnp.asarray(self.class_weights, losses.dtype)[labels]
        return losses, right.astype(losses.dtype)


CROSS_ENTROPY = CrossEntropy()


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Regression: the squared error, and whether the error is small enough, or how large it is.

    Attributes:
        tolerance: an answer counts as right if it is off by less; 0: the score is the absolute
            error.

    Example:
        >>> losses, right = SquaredError(0.04)(jnp.array([1.0, 0.53]), jnp.array([1.5, 0.5]))
        >>> (1e5 * losses).round().astype(int).tolist(), right.tolist()
        ([25000, 90], [0.0, 1.0])
    """

    tolerance: float = 0.0

    @property
    def score(self) -> str:
        """``"accuracy"``, or without a tolerance ``"absolute_error"``."""
        return "accuracy" if self.tolerance else "absolute_error"

    def __call__(
        self, outputs: Float[Array, "*L"], labels: Float[Array, "*L"]
    ) -> tuple[Float[Array, "*L"], Float[Array, "*L"]]:
        """Losses and scores of ``outputs`` of the shape of ``labels``."""
        error = outputs - labels.astype(outputs.dtype)
        size = jnp.abs(error)
        right = (size < self.tolerance).astype(error.dtype) if self.tolerance else size
        return error**2, right
