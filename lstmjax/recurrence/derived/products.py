"""The matrix products of a transition, feature-major, and their gradients."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from lstmjax.recurrence.derived.body import Factor, Site
from lstmjax.traced import Runner, Value, aval_of, shape_of, vary_alike

Sums = tuple[Array, Array | None]
"""Gradients of a site's stacked weights and of its bias, so far."""


def zeros(shape: Sequence[int], like: Array) -> Array:
    """Zeros of the type of another array."""
    return vary_alike(jnp.zeros(shape, like.dtype), like)


def in_one(room: Array, pieces: list[Array]) -> Array:
    """Pieces written one after the other into ``room``.

    The same as their concatenation; but XLA:CPU fuses that with the arithmetic of all pieces into
    one loop that it does not vectorise.
    """
    start = 0
    for piece in pieces:
        room = lax.dynamic_update_slice_in_dim(room, piece.astype(room.dtype), start, 0)
        start += piece.shape[0]
    return room


class Product:
    """The products of a site, feature-major: ``Wᵀ x + Rᵀ h + b``, and their gradients.

    Those that are added up are one product, with the kernels stacked.
    """

    def __init__(
        self,
        matmul: Callable[[Array, Array], Array],
        narrow: DTypeLike,
        site: Site,
        weights: list[Array],
        bias: Array | None,
    ) -> None:
        self.matmul, self.narrow, self.site = matmul, narrow, site
        self.like = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights]
        self.bias = bias
        self.shared = 1
        blocks = []
        for factor, weight in zip(site.factors, weights, strict=True):
            axes = factor.weight_axes
            shared, free, summed = (math.prod(weight.shape[a] for a in part) for part in axes)
            self.shared = shared
            blocks.append(weight.transpose(sum(axes, ())).reshape(shared, free, summed))
        self.lefts = [shared * b.shape[2] for b in blocks]
        self.widths = [b.shape[2] for b in blocks]
        if self.shared == 1:
            blocks = [b[0] for b in blocks]
        self.there = self.cast(jnp.concatenate(blocks, -1))
        self.backs = [self.cast(b.swapaxes(-1, -2)) for b in blocks]
        self.dtype = weights[0].dtype

    def cast(self, a: Array) -> Array:
        """As an operand."""
        return a.astype(self.narrow)

    def leave(self, runner: Runner, left: list[Value], only: int | None = None) -> list[Array]:
        """Left sides, rows last: of all factors, or of one."""
        factors = self.site.factors if only is None else [self.site.factors[only]]
        return [
            runner.leave(value, f.row, aval_of(f.left))
            for value, f in zip(left, factors, strict=True)
        ]

    def forward(self, left: list[Array]) -> Array:
        """The result, rows last, from the left sides."""
        rows = left[0].shape[-1]
        canonical = [self.turned_left(a, f) for a, f in zip(left, self.site.factors, strict=True)]
        out = self.matmul(self.there, jnp.concatenate(canonical, -2))
        if self.bias is not None:
            out = out + self.bias.reshape(-1, 1)
        return out.reshape(*self.site.shape, rows)

    def turned_left(self, left: Array, factor: Factor) -> Array:
        """``(K, B)``, or with shared axes ``(S, K, B)``."""
        order = sorted((*factor.left_axes[0], *factor.left_axes[1]))
        places = [order.index(a) for part in factor.left_axes for a in part]
        left = left.transpose(*places, left.ndim - 1)
        shape = (-1, left.shape[-1]) if self.shared == 1 else (self.shared, -1, left.shape[-1])
        return left.reshape(shape)

    def back(self, d: Array) -> list[tuple[Array, int]]:
        """Gradients of the left sides but the input, rows last, and which axis the rows were."""
        found = []
        d = self.cast(d if self.shared == 1 else d.reshape(self.shared, -1, d.shape[-1]))
        for factor, weight in zip(self.site.factors, self.backs, strict=True):
            if factor.kind == "x":
                continue
            left = shape_of(factor.left)
            axes = [a for part in factor.left_axes for a in part]
            one = self.matmul(weight, d).reshape(*(left[a] for a in axes), d.shape[-1])
            order = sorted(axes)
            found.append((one.transpose(*(axes.index(a) for a in order), len(axes)), factor.row))
        return found

    def room(self, size: int, batch: int, like: Array) -> Array:
        """For the gradients of a chunk's results.

        Never narrower than they are: XLA:CPU would copy all of it to write a part.
        """
        return zeros((math.prod(self.site.shape), size, batch), like)

    def no_gradient(self, like: Array) -> Sums:
        """Zeros to add `shares` to."""
        bias = None if self.bias is None else zeros((self.bias.size,), like)
        return zeros(self.there.shape, like), bias

    def shares(self, d: Array, lefts: list[Array]) -> Sums:
        """A chunk's share of the gradients of weights and bias.

        Args:
            d: of the results, ``(N, chunk, B)``.
            lefts: left sides, ``(chunk, B, n)``.
        """
        d = d.reshape(d.shape[0], math.prod(d.shape[1:]))
        bias = None if self.bias is None else d.sum(1, dtype=self.dtype)
        rows = [a.reshape(d.shape[1], a.shape[-1]) for a in lefts]
        if self.shared == 1:
            return self.matmul(self.cast(d), jnp.concatenate(rows, 1)), bias
        heads = rows[0].reshape(-1, self.shared, self.widths[0]).swapaxes(0, 1)
        return self.matmul(self.cast(d.reshape(self.shared, -1, d.shape[-1])), heads), bias

    def input_share(self, d: Array) -> Array | None:
        """Of the input, ``(D, chunk B)``; None where no factor multiplies it."""
        d, share = self.cast(d.reshape(d.shape[0], -1)), None
        for factor, weight in zip(self.site.factors, self.backs, strict=True):
            if factor.kind == "x":
                one = self.matmul(weight, d)
                share = one if share is None else share + one
        return share

    def turned(self, sums: Sums) -> tuple[list[Array], Array | None]:
        """Sums of `shares`, shaped like weights and bias."""
        # Else XLA would turn the operands instead, and XLA:CPU has no such product in bfloat16.
        whole, bias = lax.optimization_barrier(sums)
        found, start = [], 0
        for factor, like, width in zip(self.site.factors, self.like, self.widths, strict=True):
            one = lax.slice_in_dim(whole, start, start + width, axis=-1)
            start += width
            axes = sum(factor.weight_axes, ())
            one = one.reshape([like.shape[a] for a in axes])
            found.append(one.transpose([axes.index(a) for a in range(len(axes))]))
        return found, None if self.bias is None else bias.reshape(self.bias.shape)
