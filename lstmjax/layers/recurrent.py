"""One cell run over time."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from lstmjax.cells.base import Activation, Carry, Cell, Initializer, Params, start
from lstmjax.cells.contract import shapes_of
from lstmjax.layers.base import Layer, Options, Unrolled
from lstmjax.precision import PrecisionLike, as_precision
from lstmjax.recurrence import Engine, unroll
from lstmjax.recurrence.noise import Keys
from lstmjax.traced import Size


class Recurrent(Layer):
    """One cell run over time.

    Args:
        cell: the recurrence.
        input_size: features D.
        reverse: run from the last step to the first.
        precision: of the products, ``"float32"`` or ``"bfloat16"``.
        engine: by name or as a value; None lets `lstmjax.recurrence.choose_engine` decide.
        dtype: inputs, carries and parameters are cast to it; None takes them as they are.
        param_dtype: the parameters are drawn in it.
        use_bias: a hyper-parameter of the cell in place of its own; None leaves that.
        kernel_init: likewise.
        recurrent_init: likewise.
        activation: likewise.
        return_carry: whether a call returns the final carry, too.
        rngs: draws the parameters.

    Raises:
        ValueError: the cell has no such hyper-parameter.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> layer = Recurrent(LSTM(100), input_size=32, rngs=nnx.Rngs(0))
        >>> hs, final = layer(jnp.ones((64, 500, 32)))
        >>> hs.shape, final.h.shape
        ((64, 500, 100), (64, 100))
        >>> model = nnx.Sequential(
        ...     Recurrent(LSTM(8), 3, return_carry=False, rngs=nnx.Rngs(0)),
        ...     nnx.Linear(8, 2, rngs=nnx.Rngs(1)),
        ... )
        >>> model(jnp.ones((4, 5, 3))).shape
        (4, 5, 2)
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        *,
        reverse: bool = False,
        precision: PrecisionLike = "float32",
        engine: str | Engine | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool | None = None,
        kernel_init: Initializer | None = None,
        recurrent_init: Initializer | None = None,
        activation: Activation | None = None,
        return_carry: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.cell = _changed(
            cell,
            use_bias=use_bias,
            kernel_init=kernel_init,
            recurrent_init=recurrent_init,
            activation=activation,
        )
        self.input_size = input_size
        self.reverse = reverse
        self.precision = as_precision(precision)
        self.engine = engine
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.return_carry = return_carry
        params = _init(self.cell, rngs.params(), input_size, self.param_dtype)
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    @property
    def output_size(self) -> int:
        """Features of the output."""
        return _output_size(self.cell, self.input_size)

    def arrays(self) -> Params:
        """The parameters as the plain pytree that `unroll` takes."""
        arrays = jax.tree.map(
            lambda param: param[...], self.params, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )
        return self._cast(arrays)

    def initial_carry(self, *batch: Size) -> Carry:
        """The carry before the first step, arrays ``(*batch, H)``.

        Example:
            >>> from lstmjax.cells import LSTM
            >>> Recurrent(LSTM(5), 3, rngs=nnx.Rngs(0)).initial_carry(2).state.c.shape
            (2, 5)
        """
        params, rows = self.cell.prepare(self.arrays(), None), math.prod(batch)
        carry = start(self.cell, params, rows, self.input_size, self.dtype or self.param_dtype)
        if len(batch) == 1:
            return carry
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), carry)

    def _run(
        self, x: Array, initial: Carry | None, keys: Keys | None, options: Options
    ) -> Unrolled:
        return self._with(self.arrays(), x, initial, keys, options)

    def _with(
        self, params: Params, x: Array, initial: Carry | None, keys: Keys | None, options: Options
    ) -> Unrolled:
        """The layer with parameters in place of its own."""
        known = {n: a for n, a in options.inputs.items() if n in self.cell.step_inputs}
        found = unroll(
            self.cell,
            params,
            self._cast(x),
            self._cast(initial),
            keys=keys,
            reverse=self.reverse,
            precision=self.precision,
            engine=self.engine,
            **options._replace(inputs=self._cast(known))._asdict(),
        )
        return Unrolled(*found, *(() if options.return_states else (None,)))

    def _step_inputs(self) -> set[str]:
        return set(self.cell.step_inputs)

    def _cast(self, tree: PyTree) -> PyTree:
        """In the layer's ``dtype``, if it has one: every array of floating-point numbers."""
        if self.dtype is None:
            return tree

        def cast(a: Array) -> Array:
            return a.astype(self.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

        return jax.tree.map(cast, tree)


def _changed(cell: Cell, **hyper: PyTree) -> Cell:
    """The cell with the hyper-parameters that are not None in place of its own."""
    wanted = {name: value for name, value in hyper.items() if value is not None}
    have = [field.name for field in dataclasses.fields(cell)] if wanted else []
    for name in wanted:
        if name not in have:
            raise ValueError(
                f"{type(cell).__name__} has no hyper-parameter {name!r}; it has: {', '.join(have)}"
            )
    return dataclasses.replace(cell, **wanted) if wanted else cell


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _init(cell: Cell, key: PRNGKeyArray, input_size: int, dtype: np.dtype) -> Params:
    return cell.init(key, input_size, dtype)


@functools.lru_cache(maxsize=256)
def _output_size(cell: Cell, input_size: int) -> int:
    return shapes_of(cell, 1, input_size).carry.h.shape[-1]
