"""What all layers over time share: how they are called, and with what settings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypedDict

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PyTree

from lstmjax.cells.base import Activation, Carry, Initializer
from lstmjax.layers.keys import AnyKeys, AnyRngs, keys_of_call
from lstmjax.precision import PrecisionLike
from lstmjax.recurrence import Engine, length_mask
from lstmjax.recurrence.noise import Keys
from lstmjax.recurrence.unroll import Padding
from lstmjax.shown import Shown
from lstmjax.traced import Size

Carries: TypeAlias = PyTree
"""A `Carry`; of both directions a pair of them; of a stack a list, an entry a layer."""


class Options(NamedTuple):
    """What a call hands down to every recurrence, named as in `unroll`."""

    lengths: Int[Array | np.ndarray, "..."] | Sequence[int] | None = None
    padding: Padding = "right"
    mask: Bool[Array | np.ndarray, "..."] | Sequence[object] | None = None
    resets: Bool[Array | np.ndarray, "..."] | Sequence[object] | None = None
    inputs: Mapping[str, Array] = {}
    time_major: bool = False
    return_states: bool = False

    def batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of rows in the shape of an input."""
        return shape[1:-1] if self.time_major else shape[:-2]

    def valid(self, shape: tuple[int, ...]) -> Bool[Array, "..."] | None:
        """Which steps of an input of this shape are valid; None where all are."""
        batch = self.batch(shape)
        mask = None if self.mask is None else jnp.asarray(self.mask)
        if self.lengths is not None:
            lengths = jnp.asarray(self.lengths)
            if lengths.shape != batch:
                raise ValueError(f"lengths must have shape {batch}, got {lengths.shape}")
            steps = shape[0] if self.time_major else shape[-2]
            valid = length_mask(lengths.reshape(-1), steps, self.padding).reshape(*batch, steps)
            valid = jnp.moveaxis(valid, -1, 0) if self.time_major else valid
            mask = valid if mask is None else mask & valid
        if mask is not None and mask.shape != shape[:-1]:
            raise ValueError(f"mask must have shape {shape[:-1]}, got {mask.shape}")
        return mask


class Unrolled(NamedTuple):
    """What a layer makes of a batch.

    Attributes:
        outputs: ``(B, T, F)``.
        carry: after the last step processed.
        states: after every step, where they were asked for, nested as the carries.
    """

    outputs: Float[Array, "..."]
    carry: Carries
    states: PyTree


class Layer(Shown, nnx.Module):
    """Base of all layers that run over time: `Recurrent`, `Bidirectional`, `Stack`.

    Attributes:
        return_carry: whether a call returns the final carry beside the outputs; without it a layer
            has a place in `nnx.Sequential`.
    """

    return_carry: bool

    def __call__(
        self,
        x: Float[Array | np.ndarray, "..."],
        initial: Carries = None,
        *,
        lengths: Int[Array | np.ndarray, "..."] | Sequence[int] | None = None,
        padding: Padding = "right",
        mask: Bool[Array | np.ndarray, "..."] | Sequence[object] | None = None,
        resets: Bool[Array | np.ndarray, "..."] | Sequence[object] | None = None,
        inputs: Mapping[str, Array] | None = None,
        keys: AnyKeys = None,
        rngs: AnyRngs = None,
        deterministic: bool | None = None,
        time_major: bool = False,
        return_states: bool = False,
    ) -> Any:
        """Run over every time step of a batch.

        The trap is ``outputs[:, -1]``: a padded row has zeros there. Take the carry, or
        `last_valid`.

        Args:
            x: inputs ``(B, T, D)``; ``(T, D)`` without a batch, or with several axes of it.
            initial: carries before the first step, nested as they are returned; None anywhere is
                the cell's own start.
            lengths: valid steps of each row, as in `unroll`; so are ``padding``, ``mask``,
                ``resets``, ``time_major``.
            padding: the side on which rows are padded, for ``lengths``.
            mask: True where a step is valid, ``(B, T)``.
            resets: True at the first step of a sequence, ``(B, T)``.
            inputs: the ``step_inputs`` of the cells by name; each cell gets those it declares.
            keys: one key, one a row, or `Keys`: dropout and the cells' noise; None evaluates.
            rngs: the same as Flax has it: `nnx.Rngs`, whose stream ``dropout`` is used.
            deterministic: True evaluates, whatever keys there are; False needs some.
            time_major: everything is ``(T, B, ...)``.
            return_states: return the states after every step, too.

        Returns:
            Outputs ``(B, T, F)``; the final carry, unless ``return_carry`` is off; with
            ``return_states`` the states, arrays ``(B, T, ...)``, nested as the carries.

        Raises:
            ValueError: shapes that do not fit, or a missing or unknown step input.
            ContractError: a cell or a carry that does not fit the contract (a ValueError, too).
        """
        x = jnp.asarray(x)
        given = dict(inputs or {})
        if unknown := sorted(set(given) - self._step_inputs()):
            have = ", ".join(sorted(self._step_inputs())) or "none"
            raise ValueError(f"no cell has a step input {unknown[0]!r}; declared are: {have}")
        options = Options(lengths, padding, mask, resets, given, time_major, return_states)
        rows = math.prod(options.batch(x.shape))
        if isinstance(keys, Array) and keys.ndim > 1 and keys.shape == options.batch(x.shape):
            keys = keys.reshape(-1)
        found = self._run(x, initial, keys_of_call(keys, rngs, deterministic, rows), options)
        wanted = (True, self.return_carry, return_states)
        results = tuple(part for part, yes in zip(found, wanted, strict=True) if yes)
        return results if len(results) > 1 else found.outputs

    @property
    def output_size(self) -> int:
        """Features of the output."""
        raise NotImplementedError

    def initial_carry(self, *batch: Size) -> Carries:
        """The carry before the first step, nested as a call returns it.

        Args:
            batch: the axes of rows: none, one, or several.
        """
        raise NotImplementedError

    def _run(self, x: Array, initial: Carries, keys: Keys | None, options: Options) -> Unrolled:
        raise NotImplementedError

    def _step_inputs(self) -> set[str]:
        """Names of the step inputs that any of the cells declares."""
        raise NotImplementedError


class Dtypes(TypedDict, total=False):
    """Of the computation (None: that of parameters and inputs), and of the parameters."""

    dtype: DTypeLike | None
    param_dtype: DTypeLike


class Settings(Dtypes, total=False):
    """How a layer's cells are made and run: the keywords of `Recurrent`."""

    reverse: bool
    precision: PrecisionLike
    engine: str | Engine | None
    use_bias: bool | None
    kernel_init: Initializer | None
    recurrent_init: Initializer | None
    activation: Activation | None


def one_each(initial: Sequence[Carries] | None, count: int, what: str) -> Sequence[Carries]:
    """The entries of a nested carry; None is as many of them."""
    if initial is None:
        return (None,) * count
    if isinstance(initial, Carry) or not isinstance(initial, Sequence) or len(initial) != count:
        kind = type(initial).__name__
        many = f" of {len(initial)}" if kind in ("list", "tuple") else ""
        raise ValueError(f"initial must be {what}, each a carry or None; got a {kind}{many}")
    return initial


def cleared(x: Array, valid: Bool[Array, "..."] | None) -> Array:
    """Zeros where a step is not valid."""
    return x if valid is None else jnp.where(valid[..., None], x, 0)
