"""Flax (NNX) layers. They hold parameters and nothing else: keys, masks and carries are arguments.

Shapes: ``B`` rows, ``T`` steps, ``D`` features, ``H`` units. Random bits are drawn row by row from
one key a row, so they do not depend on how a batch is spread over devices.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray, PyTree

from lstmjax.cells.base import Activation, Carry, Cell, Initializer, Params, start
from lstmjax.cells.contract import shapes_of
from lstmjax.precision import DotGeneral, as_precision
from lstmjax.recurrence import Engine, length_mask, unroll
from lstmjax.recurrence.noise import Keys, as_keys, row_keys
from lstmjax.traced import Size

__all__ = [
    "Bidirectional",
    "ConvPool",
    "Keys",
    "Layer",
    "Recurrent",
    "Stack",
    "dense",
    "dropout",
    "embedding",
    "fold_keys",
    "last_valid",
    "pool",
    "row_keys",
]

Padding = Literal["left", "right"]
Pooling = Literal["last", "mean", "max"]
Merge = Literal["concat", "sum", "mean"] | Callable[[Array, Array], Array]
OneOrBoth = Cell | tuple[Cell, Cell]
"""The recurrence, or those forward and backward."""
PrecisionLike = DTypeLike | jax.lax.Precision | None
"""What `lstmjax.precision.as_precision` takes."""
AnyKeys = Keys | Array | None
"""`Keys`, one key a row, or one key for a whole batch; None evaluates."""
AnyRngs = nnx.Rngs | nnx.RngStream | Array | None
"""Where Flax' own layers take their randomness from."""
Carries: TypeAlias = PyTree
"""A `Carry`; of both directions a pair of them; of a stack a list, an entry a layer."""


# --- Randomness ----------------------------------------------------------------------------------


def keys_of_call(
    keys: AnyKeys, rngs: AnyRngs, deterministic: bool | None, rows: Size
) -> Keys | None:
    """The keys that a call means, said in our way or in Flax'; None evaluates.

    Args:
        keys: `Keys`, one key a row, or one for a whole batch.
        rngs: `nnx.Rngs`, of which the stream ``dropout`` is used, a stream, or a key.
        deterministic: True evaluates whatever else is given; False needs one of the others.
        rows: of the batch.

    Raises:
        ValueError: both are given, or none where one is needed.
    """
    if deterministic:
        return None
    if keys is not None and rngs is not None:
        raise ValueError("keys and rngs are given: leave out one of them")
    if rngs is not None:
        stream = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        keys = stream() if isinstance(stream, nnx.RngStream) else stream
    if keys is None and deterministic is False:
        raise ValueError("deterministic=False needs keys=jax.random.key(0), say, or rngs=")
    return as_keys(keys, rows)


def fold_keys(keys: AnyKeys, uses: int) -> tuple[PyTree, ...]:
    """Fresh keys for each of several uses, all derived at once; of None, as many None.

    Args:
        keys: one key a row, `Keys`, or None.
        uses: how many of the same kind are wanted.

    Example:
        >>> [k.shape for k in fold_keys(row_keys(jax.random.key(0), 4), uses=2)]
        [(4,), (4,)]
    """
    if keys is None:
        return (None,) * uses
    if isinstance(keys, Keys):
        shared = (None,) * uses if keys.shared is None else fold_keys(keys.shared[None], uses)
        return tuple(
            Keys(rows, one if one is None else one[0])
            for rows, one in zip(fold_keys(keys.rows, uses), shared, strict=True)
        )
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return tuple(fold(keys, jnp.arange(uses)))


def dropout(x: Float[Array, "B ..."], rate: float, keys: AnyKeys) -> Float[Array, "B ..."]:
    """Zero each element with probability ``rate``, scale the rest (Srivastava et al. 2014).

    Args:
        x: values, the rows first.
        rate: at least 0 and less than 1.
        keys: one key a row, or one for all, or None to return ``x`` as it is.

    Raises:
        ValueError: a rate out of range.

    Example:
        >>> x = jnp.ones((2, 1000))
        >>> kept = dropout(x, 0.25, row_keys(jax.random.key(0), 2)) != 0
        >>> bool(abs(kept.mean() - 0.75) < 0.03)
        True
    """
    check_rates(rate=rate)
    found = as_keys(keys, x.shape[0])
    if found is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(found.rows)
    return jnp.where(keep, x / (1 - rate), 0)


def check_rates(**rates: float) -> None:
    """Raise `ValueError` for a share dropped that is no number in [0, 1)."""
    for name, rate in rates.items():
        if not (isinstance(rate, int | float | np.number) and 0 <= rate < 1):
            raise ValueError(f"{name} must be a number, at least 0 and less than 1; got {rate!r}")


# --- Layers over time ----------------------------------------------------------------------------


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


class Layer(nnx.Module):
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
        use_bias, kernel_init, recurrent_init, activation: hyper-parameters of the cell in place of
            its own; None leaves that.
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
        known = {n: a for n, a in options.inputs.items() if n in self.cell.step_inputs}
        found = unroll(
            self.cell,
            self.arrays(),
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


def _concatenated(forward: Array, backward: Array) -> Array:
    return jnp.concatenate([forward, backward], axis=-1)


def _mean(forward: Array, backward: Array) -> Array:
    return (forward + backward) / 2


_MERGES: dict[str, Callable[[Array, Array], Array]] = {
    "concat": _concatenated,
    "sum": jnp.add,
    "mean": _mean,
}


class Bidirectional(Layer):
    """A cell run in both directions, outputs side by side (Schuster & Paliwal 1997).

    Each direction has parameters of its own. Outputs are ``(B, T, 2H)``; the carries form a pair
    (forward, backward).

    Args:
        cell: the recurrence, or a pair of them, forward and backward.
        input_size: features D.
        merge: ``"concat"``, ``"sum"``, ``"mean"``, or a function of both outputs; on masked steps
            both are zero.
        return_carry: whether a call returns the final carries, too.
        rngs: draws the parameters.
        settings: as of `Recurrent`, for both directions.

    Raises:
        ValueError: outputs that cannot be merged, or ``reverse``, which means nothing here.

    Example:
        >>> from lstmjax.cells import GRU, LSTM
        >>> layer = Bidirectional((LSTM(8), GRU(8)), 3, merge="sum", rngs=nnx.Rngs(0))
        >>> hs, (last, first) = layer(jnp.ones((2, 5, 3)))
        >>> hs.shape, first.h.shape
        ((2, 5, 8), (2, 8))
    """

    def __init__(
        self,
        cell: OneOrBoth,
        input_size: int,
        *,
        merge: Merge = "concat",
        return_carry: bool = True,
        rngs: nnx.Rngs,
        **settings: Unpack[Settings],
    ) -> None:
        if settings.pop("reverse", False):
            raise ValueError("Bidirectional runs in both directions: leave out reverse")
        if callable(merge) or merge in _MERGES:
            self.merge = merge
        else:
            raise ValueError(f"merge must be one of {', '.join(_MERGES)} or a function: {merge!r}")
        forward, backward = cell if isinstance(cell, tuple) else (cell, cell)
        self.forward = Recurrent(forward, input_size, rngs=rngs, **settings)
        self.backward = Recurrent(backward, input_size, rngs=rngs, **settings | {"reverse": True})
        self.return_carry = return_carry
        sizes = self.forward.output_size, self.backward.output_size
        if merge in ("sum", "mean") and sizes[0] != sizes[1]:
            raise ValueError(
                f'merge="{merge}" needs outputs of one size, these are {sizes[0]} and {sizes[1]}; '
                'merge="concat" takes any'
            )

    @property
    def output_size(self) -> int:
        """Features of the output."""
        outs = [
            jax.ShapeDtypeStruct((1, 1, layer.output_size), jnp.float32)
            for layer in (self.forward, self.backward)
        ]
        return jax.eval_shape(self._merged, *outs).shape[-1]

    def initial_carry(self, *batch: Size) -> tuple[Carry, Carry]:
        """The pair of carries before the first step of each direction."""
        return self.forward.initial_carry(*batch), self.backward.initial_carry(*batch)

    def _run(
        self,
        x: Array,
        initial: Sequence[Carry | None] | None,
        keys: Keys | None,
        options: Options,
    ) -> Unrolled:
        last, first = _one_each(initial, 2, "a pair: forward and backward")
        forward_keys, backward_keys = fold_keys(keys, 2)
        forward = self.forward._run(x, last, forward_keys, options)
        backward = self.backward._run(x, first, backward_keys, options)
        outputs = self._merged(forward.outputs, backward.outputs)
        states = (forward.states, backward.states) if options.return_states else None
        return Unrolled(outputs, (forward.carry, backward.carry), states)

    def _merged(self, forward: Array, backward: Array) -> Array:
        merge = self.merge if callable(self.merge) else _MERGES[self.merge]
        return merge(forward, backward)

    def _step_inputs(self) -> set[str]:
        return self.forward._step_inputs() | self.backward._step_inputs()


def _one_each(initial: Sequence[Carries] | None, count: int, what: str) -> Sequence[Carries]:
    """The entries of a nested carry; None is as many of them."""
    if initial is None:
        return (None,) * count
    if isinstance(initial, Carry) or not isinstance(initial, Sequence) or len(initial) != count:
        kind = type(initial).__name__
        many = f" of {len(initial)}" if kind in ("list", "tuple") else ""
        raise ValueError(f"initial must be {what}, each a carry or None; got a {kind}{many}")
    return initial


class Stack(Layer):
    """Recurrent layers on top of one another, with dropout between them.

    Args:
        cell: the recurrence of all layers, or a list, one a layer; pairs, forward and backward, if
            ``bidirectional``.
        input_size: features D of the first layer.
        num_layers: 1 by default, or as many as are listed.
        bidirectional: each layer runs in both directions.
        merge: of the directions, as in `Bidirectional`.
        dropout_rate: dropped of the input of each layer but the first.
        residual: adds a layer's input to its output, in every layer where both have one size.
        layer_norm: ``"pre"`` normalises each layer's input, ``"post"`` its output, after the
            residual (Ba et al. 2016, arXiv:1607.06450).
        return_carry: whether a call returns the final carries, too.
        rngs: draws the parameters.
        settings: as of `Recurrent`, for all layers.

    Raises:
        ValueError: settings that contradict each other.

    Example:
        >>> from lstmjax.cells import GRU, LSTM
        >>> stack = Stack(GRU(8), 3, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> hs, finals = stack(jnp.ones((2, 5, 3)))
        >>> hs.shape, len(finals)
        ((2, 5, 16), 2)
        >>> deep = Stack([LSTM(8), GRU(8)], 3, residual=True, layer_norm="pre", rngs=nnx.Rngs(0))
        >>> deep(jnp.ones((2, 5, 3)))[0].shape
        (2, 5, 8)
    """

    def __init__(
        self,
        cell: OneOrBoth | Sequence[OneOrBoth],
        input_size: int,
        *,
        num_layers: int | None = None,
        bidirectional: bool = False,
        merge: Merge = "concat",
        dropout_rate: float = 0.0,
        residual: bool = False,
        layer_norm: Literal["pre", "post"] | None = None,
        return_carry: bool = True,
        rngs: nnx.Rngs,
        **settings: Unpack[Settings],
    ) -> None:
        check_rates(dropout_rate=dropout_rate)
        if layer_norm not in (None, "pre", "post"):
            raise ValueError(f'layer_norm must be "pre", "post" or None, got {layer_norm!r}')
        sizes, layers = [input_size], []
        kind: Callable[..., Recurrent | Bidirectional] = Recurrent
        if bidirectional:
            kind = functools.partial(Bidirectional, merge=merge)
        for one in _cells(cell, num_layers, bidirectional):
            layers.append(kind(one, sizes[-1], rngs=rngs, **settings))
            sizes.append(layers[-1].output_size)
        if residual and not any(a == b for a, b in itertools.pairwise(sizes)):
            raise ValueError(
                f"residual=True has no layer whose input and output have one size: {sizes}"
            )
        self.layers = nnx.List(layers)
        self.dropout_rate = dropout_rate
        self.residual = residual
        self.layer_norm = layer_norm
        self.return_carry = return_carry
        if layer_norm:
            normed = sizes[:-1] if layer_norm == "pre" else sizes[1:]
            norm = functools.partial(
                nnx.LayerNorm,
                dtype=settings.get("dtype"),
                param_dtype=settings.get("param_dtype", jnp.float32),
                use_fast_variance=False,
                rngs=rngs,
            )
            self.norms = nnx.List(norm(size) for size in normed)

    @property
    def output_size(self) -> int:
        """Features of the output."""
        return self.layers[-1].output_size

    def initial_carry(self, *batch: Size) -> list[Carries]:
        """A list of what each layer begins with."""
        return [layer.initial_carry(*batch) for layer in self.layers]

    def _run(
        self,
        x: Array,
        initial: Sequence[Carries] | None,
        keys: Keys | None,
        options: Options,
    ) -> Unrolled:
        found = [part for _, part in stages(self, x, initial, keys, options)]
        states = [part.states for part in found] if options.return_states else None
        return Unrolled(found[-1].outputs, [part.carry for part in found], states)

    def _step_inputs(self) -> set[str]:
        return set().union(*(layer._step_inputs() for layer in self.layers))


def _cells(
    cell: OneOrBoth | Sequence[OneOrBoth], num_layers: int | None, bidirectional: bool
) -> Sequence[OneOrBoth]:
    """One entry a layer."""
    if isinstance(cell, list):
        cells = cell
        if num_layers not in (None, len(cells)):
            raise ValueError(f"num_layers is {num_layers}, but {len(cells)} cells are listed")
    else:
        cells = [cell] * (1 if num_layers is None else num_layers)
    if not cells:
        raise ValueError("a stack needs at least one layer")
    if not bidirectional and any(isinstance(one, tuple) for one in cells):
        raise ValueError("a pair of cells needs bidirectional=True; list those of the layers")
    return cells


def stages(
    stack: Stack,
    x: Array,
    initial: Sequence[Carries] | None,
    keys: Keys | None,
    options: Options,
) -> Iterator[tuple[Layer, Unrolled]]:
    """A stack layer by layer: the layer, and what it makes of what the one below made."""
    count = len(stack.layers)
    initial = _one_each(initial, count, f"a list of {count}, one a layer")
    # The first keys are those for dropout, whatever the layers need beside them.
    folded = fold_keys(keys, 2 * count)
    clears = stack.residual or stack.layer_norm is not None
    valid = options.valid(x.shape) if clears else None
    x = _cleared(x, valid)
    for number, layer in enumerate(stack.layers):
        below = x
        if stack.layer_norm == "pre":
            x = stack.norms[number](x)
        if number:
            x = _dropout_rows(x, stack.dropout_rate, folded[number], options)
        found = layer._run(x, initial[number], folded[count + number], options)
        x = found.outputs
        if stack.residual and x.shape == below.shape:
            x = x + below
        if stack.layer_norm == "post":
            x = stack.norms[number](x)
        x = _cleared(x, valid)
        yield layer, found._replace(outputs=x)


def _cleared(x: Array, valid: Bool[Array, "..."] | None) -> Array:
    return x if valid is None else jnp.where(valid[..., None], x, 0)


def _dropout_rows(x: Array, rate: float, keys: Keys | None, options: Options) -> Array:
    """`dropout` where the rows are on the axes that the options say."""
    if keys is None or rate == 0:
        return x
    rows_first = jnp.moveaxis(x, 0, -2) if options.time_major else x
    flat = rows_first if x.ndim == 3 else rows_first.reshape(-1, *rows_first.shape[-2:])
    dropped = dropout(flat, rate, keys.rows).reshape(rows_first.shape)
    return jnp.moveaxis(dropped, -2, 0) if options.time_major else dropped


# --- Before and behind them ----------------------------------------------------------------------


class ConvPool(nnx.Module):
    """Convolution over time, ReLU, max pooling: a front end that shortens the sequence.

    The convolution pads with zeros ("same"); masked inputs count as zeros, and a pooled step is
    valid if any of its steps was. A last, incomplete window is pooled as it is. Windows are counted
    from the first step, so left padding of a length that they do not divide shifts them.

    Example:
        >>> layer = ConvPool(3, filters=8, pool=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 7, 3)))[0].shape
        (4, 4, 8)
    """

    def __init__(
        self,
        input_size: int,
        filters: int,
        *,
        width: int = 3,
        pool: int = 2,
        precision: PrecisionLike = "float32",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        fast = as_precision(precision) == "bfloat16"
        self.conv = nnx.Conv(
            input_size,
            filters,
            kernel_size=(width,),
            kernel_init=nnx.initializers.glorot_uniform(),
            precision="highest",
            dtype=jnp.bfloat16 if fast else dtype,
            param_dtype=param_dtype,
            preferred_element_type=jnp.float32 if fast else None,
            rngs=rngs,
        )
        self.dtype = dtype
        self.pool = pool

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B P F"], Bool[Array, "B P"] | None]:
        """Pooled features ``(B, ceil(T / pool), filters)`` and their mask."""
        dtype = self.dtype or x.dtype
        x = nnx.relu(self.conv(_cleared(x, mask))).astype(dtype)
        if mask is not None:
            x = _cleared(x, mask)
            mask = self._windows(mask).any(axis=2)
        return self._windows(x).max(axis=2), mask

    def _windows(self, a: Array) -> Array:
        batch, steps, *rest = a.shape
        windows = -(-steps // self.pool)
        a = jnp.pad(a, [(0, 0), (0, windows * self.pool - steps)] + [(0, 0)] * len(rest))
        return a.reshape(batch, windows, self.pool, *rest)


def embedding(
    vocabulary_size: int,
    size: int,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Embed:
    """A table of vectors, uniform in ±0.05 as in Keras."""
    return nnx.Embed(
        vocabulary_size,
        size,
        embedding_init=_uniform,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def dense(
    input_size: int,
    size: int,
    *,
    precision: PrecisionLike = "float32",
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer, Glorot-uniform as in Keras, in the given precision."""
    return nnx.Linear(
        input_size,
        size,
        kernel_init=nnx.initializers.glorot_uniform(),
        dot_general=DotGeneral(as_precision(precision)),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **_: object
) -> Array:
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


def last_valid(
    hs: Float[Array, "*B T H"],
    lengths: Int[Array | np.ndarray, "..."] | Sequence[int] | None = None,
    *,
    padding: Padding = "right",
    mask: Bool[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, "*B H"]:
    """The output of each row's last valid step, where ``hs[:, -1]`` would be that of padding.

    Args:
        hs: outputs of a recurrence.
        lengths: valid steps of each row.
        padding: the side on which rows are padded, for ``lengths``.
        mask: True where a step is valid; combined with ``lengths`` by "and".

    Returns:
        One vector a row; zeros for a row without a valid step.

    Example:
        >>> hs = jnp.arange(6.0).reshape(2, 3, 1)
        >>> last_valid(hs, jnp.array([3, 1]))[:, 0].tolist()
        [2.0, 3.0]
    """
    valid = Options(lengths, padding, mask).valid(hs.shape)
    if valid is None:
        return hs[..., -1, :]
    at = valid.shape[-1] - 1 - jnp.argmax(valid[..., ::-1], axis=-1)
    found = jnp.take_along_axis(hs, at[..., None, None], axis=-2)[..., 0, :]
    return _cleared(found, valid.any(axis=-1))


def pool(
    hs: Float[Array, "B T H"],
    final: Carries,
    mask: Bool[Array, "B T"] | None,
    kinds: Pooling | Sequence[Pooling],
) -> Float[Array, "B F"]:
    """One vector a row from the outputs of a recurrence, the kinds side by side.

    Args:
        hs: outputs, zero on masked steps.
        final: final carry, or the pair of both directions; of a stack's list the top one counts.
        mask: valid steps; None means all.
        kinds: ``"last"`` (the final hidden state), ``"mean"``, ``"max"`` over valid steps, one or
            several; a row with no valid step pools to zeros.

    Raises:
        ValueError: another kind.

    Example:
        >>> hs = jnp.arange(6.0).reshape(1, 3, 2)
        >>> pool(hs, None, None, ("max", "mean")).tolist()
        [[4.0, 5.0, 2.0, 3.0]]
    """
    steps = jnp.ones(hs.shape[:2], bool) if mask is None else mask
    parts = []
    for kind in pooling_kinds(kinds):
        if kind == "last":
            while isinstance(final, list):
                final = final[-1]
            carries = [final] if isinstance(final, Carry) else list(final)
            parts.append(jnp.concatenate([carry.h for carry in carries], axis=-1))
        elif kind == "mean":
            count = jnp.maximum(steps.sum(axis=1), 1).astype(hs.dtype)
            parts.append(jnp.where(steps[..., None], hs, 0).sum(axis=1) / count[:, None])
        else:
            top = jnp.where(steps[..., None], hs, jnp.finfo(hs.dtype).min).max(axis=1)
            parts.append(jnp.where(steps.any(axis=1)[:, None], top, 0))
    return jnp.concatenate(parts, axis=-1)


def pooling_kinds(kinds: Pooling | Sequence[Pooling]) -> tuple[Pooling, ...]:
    """One kind or several, as a tuple; `ValueError` for what is none."""
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds:
        raise ValueError('pooling needs at least one of "last", "mean", "max"')
    for kind in kinds:
        if kind not in ("last", "mean", "max"):
            raise ValueError(f'pooling must be "last", "mean" or "max", got {kind!r}')
    return kinds
