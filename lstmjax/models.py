"""Models made of the layers: a classifier of token sequences and a per-step tagger."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PyTree

from lstmjax.cells.base import Cell
from lstmjax.layers import ConvPool, Recurrent, Stack, dense, dropout, embedding, fold_keys, pool
from lstmjax.layers.base import Dtypes, Options
from lstmjax.layers.keys import AnyKeys, AnyRngs, check_rates, keys_of_call
from lstmjax.layers.pooling import Pooling, pooling_kinds
from lstmjax.layers.stack import stages
from lstmjax.precision import PrecisionLike
from lstmjax.recurrence import Engine
from lstmjax.recurrence.noise import Keys
from lstmjax.shown import Shown, Table, fields_as_call

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "SequenceConfig",
    "SequenceModel",
    "Stage",
    "Tagger",
    "count_parameters",
    "named_parameters",
    "set_parameters",
    "summary",
]


class Stage(NamedTuple):
    """One step of a forward pass.

    Attributes:
        name: of the row in `summary`.
        module: what has the parameters of this step, if any.
        output: an array.
    """

    name: str
    module: nnx.Module | None
    output: Array


@runtime_checkable
class _Staged(Protocol):
    """A model that says by itself what `summary` shows."""

    def _stages(self, *args: PyTree) -> Iterator[Stage]: ...


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of a `Classifier`."""

    top_words: int = 5000
    """Ids below this have an embedding of their own."""
    embedding_size: int = 32
    """Features of a word."""
    hidden_size: int = 100
    """Units H of each recurrent layer."""
    num_layers: int = 1
    """Recurrent layers on top of one another."""
    bidirectional: bool = False
    """Run each layer in both directions."""
    pooling: tuple[Pooling, ...] = ("last",)
    """What the head sees: the last state, or mean/max over valid steps, side by side."""
    dropout_words: float = 0.0
    """Share of whole words dropped from the input."""
    dropout_before: float = 0.0
    """Dropout between the embedding and the recurrence."""
    dropout_between: float = 0.0
    """Dropout between recurrent layers."""
    dropout_after: float = 0.0
    """Dropout between the recurrence and the head."""
    conv_filters: int = 0
    """Filters of the convolutional front end; 0 leaves it out."""
    conv_width: int = 3
    """Width of its windows, in steps."""
    conv_pool: int = 2
    """Steps that its max pooling makes one."""

    __repr__ = fields_as_call


class _Model(Shown, nnx.Module):
    """What the models below share: they print as their call, and how many parameters they have."""

    def _made_of(self) -> dict[str, object]:
        layer = vars(self)["recurrent"]
        return {**layer._made_of(), **vars(layer)}

    def __repr__(self) -> str:
        return f"{super().__repr__()}: {count_parameters(self):,} parameters"


class Classifier(_Model):
    """Token ids to one logit a row: embedding, optional convolution, recurrence, pooling, head.

    Args:
        cell: the recurrence of every layer, of ``config.hidden_size`` units.
        config: sizes and shares dropped.
        num_outputs: logits a row: 1, or one a class.
        precision: of the products, ``"float32"`` or ``"bfloat16"``.
        engine: runs the recurrence; None lets `lstmjax.recurrence.choose_engine` decide.
        dtype: of the computation; None takes that of the parameters.
        param_dtype: the parameters are drawn in it.
        rngs: draws the parameters.

    Raises:
        ValueError: cell and config disagree, or a share is out of range.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> model = Classifier(LSTM(100), ClassifierConfig(), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 500), jnp.int32)).shape, count_parameters(model)
        ((2,), 213301)
    """

    def __init__(
        self,
        cell: Cell,
        config: ClassifierConfig,
        *,
        num_outputs: int = 1,
        precision: PrecisionLike = "float32",
        engine: str | Engine | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _check_config(cell, config)
        self.config = config
        self.num_outputs = _at_least_one(num_outputs)
        kind = Dtypes(dtype=dtype, param_dtype=param_dtype)
        self.embedding = embedding(config.top_words, config.embedding_size, rngs=rngs, **kind)
        features = config.embedding_size
        self.front = (
            ConvPool(
                features,
                config.conv_filters,
                width=config.conv_width,
                pool=config.conv_pool,
                precision=precision,
                rngs=rngs,
                **kind,
            )
            if config.conv_filters
            else None
        )
        features = config.conv_filters or features
        self.recurrent = Stack(
            cell,
            features,
            num_layers=config.num_layers,
            bidirectional=config.bidirectional,
            dropout_rate=config.dropout_between,
            precision=precision,
            engine=engine,
            rngs=rngs,
            **kind,
        )
        features = self.recurrent.output_size * len(pooling_kinds(config.pooling))
        self.head = dense(features, num_outputs, precision=precision, rngs=rngs, **kind)

    def __call__(
        self,
        ids: Int[Array | np.ndarray, "B T"],
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
        keys: AnyKeys = None,
        *,
        inputs: Mapping[str, Array] | None = None,
        rngs: AnyRngs = None,
        deterministic: bool | None = None,
    ) -> Float[Array, " B"] | Float[Array, "B K"]:
        """Logits, ``(B,)``, or ``(B, num_outputs)`` where there are several.

        Args:
            ids: of words, at least 0 and less than ``top_words``.
            mask: marks valid steps; None is all.
            keys: one a row, one for all, or `Keys`: switch dropout and the cell's noise on.
            inputs: the cell's ``step_inputs`` by name, ``(B, T, width)``.
            rngs: in place of ``keys``, as Flax has it.
            deterministic: likewise; both as in `lstmjax.layers.Layer`.

        Raises:
            ValueError: an id out of range; under `jax.jit` nobody can see that, and the logits of
                the row are NaN.
        """
        self._check_ids(ids)
        found = keys_of_call(keys, rngs, deterministic, ids.shape[0])
        *_, last = self._stages(ids, mask, found, inputs)
        return last.output

    def _check_ids(self, ids: Array | np.ndarray) -> None:
        """Raise `ValueError` for an id without an embedding, where the numbers are known."""
        if isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True):
            return
        known = np.asarray(ids)
        wrong = np.argwhere((known < 0) | (known >= self.config.top_words))
        if len(wrong):
            row, step = wrong[0]
            raise ValueError(
                f"row {row} has the id {known[row, step]} at step {step}; ids must be at least 0 "
                f"and less than top_words={self.config.top_words}"
            )

    def _stages(
        self,
        ids: Int[Array | np.ndarray, "B T"],
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
        keys: Keys | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> Iterator[Stage]:
        """The forward pass layer by layer."""
        x = self.embedding(jnp.asarray(ids))
        yield Stage("embedding", self.embedding, x)
        yield from self._after_embedding(x, mask, keys, inputs)

    def _after_embedding(
        self,
        x: Float[Array, "B T E"],
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
        keys: Keys | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> Iterator[Stage]:
        """The forward pass from the vectors of words on; the last stage has the logits."""
        config = self.config
        key_words, key_before, key_between, key_after = fold_keys(keys, 4)
        mask = None if mask is None else jnp.asarray(mask)
        if config.dropout_words:
            kept = dropout(jnp.ones(x.shape[:2], x.dtype), config.dropout_words, key_words)
            x = x * kept[..., None]
            yield Stage("dropout_words", None, x)
        if config.dropout_before:
            x = dropout(x, config.dropout_before, key_before)
            yield Stage("dropout_before", None, x)
        if self.front is not None:
            x, mask = self.front(x, mask)
            yield Stage("conv_pool", self.front, x)
        options = Options(mask=mask, inputs=dict(inputs or {}))
        layers = stages(self.recurrent, x, None, key_between, options)
        for number, (layer, found) in enumerate(layers, 1):
            yield Stage(f"recurrent_{number}", layer, found.outputs)
        kinds = pooling_kinds(config.pooling)
        x = pool(found.outputs, found.carry, mask, kinds)
        yield Stage("pool_" + "_".join(kinds), None, x)
        if config.dropout_after:
            x = dropout(x, config.dropout_after, key_after)
            yield Stage("dropout_after", None, x)
        yield Stage("dense", self.head, _logits(self.head(x)))


class Tagger(_Model):
    """Features to one logit a step: a recurrence and a dense layer shared by all steps.

    Args:
        cell: the recurrence.
        input_size: features D.
        num_outputs: logits a step: 1, or one a class.
        precision: as in `Classifier`.
        engine: likewise.
        dtype: likewise.
        param_dtype: likewise.
        rngs: draws the parameters.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> Tagger(LSTM(20), 1, rngs=nnx.Rngs(0))(jnp.ones((4, 10, 1))).shape
        (4, 10)
        >>> Tagger(LSTM(20), 1, num_outputs=3, rngs=nnx.Rngs(0))(jnp.ones((4, 10, 1))).shape
        (4, 10, 3)
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        *,
        num_outputs: int = 1,
        precision: PrecisionLike = "float32",
        engine: str | Engine | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_outputs = _at_least_one(num_outputs)
        kind = Dtypes(dtype=dtype, param_dtype=param_dtype)
        self.recurrent = Recurrent(
            cell,
            input_size,
            precision=precision,
            engine=engine,
            return_carry=False,
            rngs=rngs,
            **kind,
        )
        size = self.recurrent.output_size
        self.head = dense(size, num_outputs, precision=precision, rngs=rngs, **kind)

    def __call__(
        self,
        x: Float[Array | np.ndarray, "B T D"],
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
        keys: AnyKeys = None,
        *,
        inputs: Mapping[str, Array] | None = None,
        rngs: AnyRngs = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "B T"] | Float[Array, "B T K"]:
        """Logits of every step, ``(B, T)``, or ``(B, T, num_outputs)`` where there are several.

        Args:
            x: inputs.
            mask: marks valid steps; None is all.
            keys: one a row, one for all, or `Keys`: switch the cell's noise on.
            inputs: the cell's ``step_inputs`` by name, ``(B, T, width)``.
            rngs: in place of ``keys``, as Flax has it.
            deterministic: likewise; both as in `lstmjax.layers.Layer`.
        """
        found = keys_of_call(keys, rngs, deterministic, x.shape[0])
        *_, last = self._stages(x, mask, found, inputs)
        return last.output

    def _stages(
        self,
        x: Float[Array | np.ndarray, "B T D"],
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
        keys: Keys | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> Iterator[Stage]:
        """The forward pass layer by layer."""
        hs = self.recurrent(x, mask=mask, keys=keys, inputs=inputs)
        yield Stage("recurrent", self.recurrent, hs)
        yield Stage("dense", self.head, _logits(self.head(hs)))


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Sizes of a `SequenceModel`."""

    hidden_size: int = 64
    """Units H of each recurrent layer."""
    embedding_size: int = 32
    """Features of a token, where the input is tokens."""
    num_layers: int = 1
    """Recurrent layers on top of one another."""
    bidirectional: bool = False
    """Run each layer in both directions."""
    dropout_before: float = 0.0
    """Dropout between the input and the recurrence."""
    dropout_between: float = 0.0
    """Dropout between recurrent layers."""
    dropout_after: float = 0.0
    """Dropout between the recurrence and the head."""

    __repr__ = fields_as_call


class SequenceModel(_Model):
    """Tokens or features to outputs of every step, or of the sequence: recurrence and head.

    Args:
        cell: the recurrence of every layer, of ``config.hidden_size`` units.
        config: sizes and shares dropped.
        tokens: how many there are, for ids ``(B, T)``; 0: the input is features ``(B, T, D)``.
        features: D, if there are no tokens.
        per_step: an output at every step; else one of the last state.
        num_outputs: of each: 1, or one a class.
        precision: as in `Classifier`.
        engine: likewise.
        rngs: draws the parameters.

    Raises:
        ValueError: cell and config disagree, or a share is out of range.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> config = SequenceConfig(hidden_size=8, embedding_size=4)
        >>> model = SequenceModel(LSTM(8), config, tokens=9, num_outputs=9, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 5), jnp.int32)).shape
        (2, 5, 9)
        >>> outputs, carry = model(jnp.ones((2, 5), jnp.int32), carry=model.initial_carry(2))
        >>> carry[0].h.shape
        (2, 8)
    """

    def __init__(
        self,
        cell: Cell,
        config: SequenceConfig,
        *,
        tokens: int = 0,
        features: int = 1,
        per_step: bool = True,
        num_outputs: int = 1,
        precision: PrecisionLike = "float32",
        engine: str | Engine | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        _check_config(cell, config)
        self.config, self.per_step = config, per_step
        self.num_outputs = _at_least_one(num_outputs)
        self.embedding = embedding(tokens, config.embedding_size, rngs=rngs) if tokens else None
        self.recurrent = Stack(
            cell,
            config.embedding_size if tokens else features,
            num_layers=config.num_layers,
            bidirectional=config.bidirectional,
            dropout_rate=config.dropout_between,
            precision=precision,
            engine=engine,
            rngs=rngs,
        )
        size = self.recurrent.output_size
        self.head = dense(size, num_outputs, precision=precision, rngs=rngs)

    def _made_of(self) -> dict[str, object]:
        made = super()._made_of()
        if self.embedding is None:
            return {**made, "features": made["input_size"]}
        return {**made, "tokens": self.embedding.num_embeddings}

    def initial_carry(self, rows: int) -> PyTree:
        """The state of every layer before the first step, to be given as ``carry``."""
        return self.recurrent.initial_carry(rows)

    def __call__(
        self,
        x: Int[Array | np.ndarray, "B T"] | Float[Array | np.ndarray, "B T D"],
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
        keys: AnyKeys = None,
        *,
        carry: PyTree = None,
        resets: Bool[Array | np.ndarray, "B T"] | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> PyTree:
        """Outputs ``(B, T, K)`` or ``(B, K)``, without the last axis where K is 1.

        Args:
            x: ids less than ``tokens``, or features.
            mask: marks valid steps; None is all.
            keys: one a row, one for all, or `Keys`: switch dropout and the cell's noise on.
            carry: to go on from; then the outputs come with the carry after the last step.
            resets: where a new sequence begins.
            inputs: the cell's ``step_inputs`` by name, ``(B, T, width)``.
        """
        found = keys_of_call(keys, None, None, x.shape[0])
        *_, (last, final) = self._run(x, mask, found, carry, resets, inputs)
        return last.output if carry is None else (last.output, final)

    def _stages(
        self,
        x: Array,
        mask: Array | None = None,
        keys: Keys | None = None,
    ) -> Iterator[Stage]:
        """The forward pass layer by layer."""
        return (stage for stage, _ in self._run(x, mask, keys))

    def _run(
        self,
        x: Array | np.ndarray,
        mask: Array | np.ndarray | None = None,
        keys: Keys | None = None,
        carry: PyTree = None,
        resets: Array | np.ndarray | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> Iterator[tuple[Stage, PyTree]]:
        config = self.config
        key_before, key_between, key_after = fold_keys(keys, 3)
        x, mask = jnp.asarray(x), None if mask is None else jnp.asarray(mask)
        if self.embedding is not None:
            x = self.embedding(x)
            yield Stage("embedding", self.embedding, x), None
        if config.dropout_before:
            x = dropout(x, config.dropout_before, key_before)
            yield Stage("dropout_before", None, x), None
        resets = None if resets is None else jnp.asarray(resets)
        options = Options(mask=mask, resets=resets, inputs=dict(inputs or {}))
        layers = [*stages(self.recurrent, x, carry, key_between, options)]
        for number, (layer, found) in enumerate(layers, 1):
            yield Stage(f"recurrent_{number}", layer, found.outputs), None
        final = [found.carry for _, found in layers]
        x = layers[-1][1].outputs
        if not self.per_step:
            x = pool(x, final, mask, "last")
            yield Stage("last", None, x), None
        if config.dropout_after:
            x = dropout(x, config.dropout_after, key_after)
            yield Stage("dropout_after", None, x), None
        yield Stage("dense", self.head, _logits(self.head(x))), final


def _logits(outputs: Float[Array, "*B K"]) -> Float[Array, "..."]:
    """Without the last axis where there is but one number on it."""
    return outputs[..., 0] if outputs.shape[-1] == 1 else outputs


def _at_least_one(num_outputs: int) -> int:
    if num_outputs < 1:
        raise ValueError(f"num_outputs must be at least 1, got {num_outputs}")
    return num_outputs


def _check_config(cell: Cell, config: ClassifierConfig | SequenceConfig) -> None:
    """Raise `ValueError` where a model cannot be what it says."""
    if cell.hidden_size != config.hidden_size:
        raise ValueError(
            f"the cell has {cell.hidden_size} units, but config.hidden_size is "
            f"{config.hidden_size}: give both the same"
        )
    shares = {n: rate for n, rate in vars(config).items() if n.startswith("dropout_")}
    check_rates(**shares)


def count_parameters(model: nnx.Module) -> int:
    """Number of trainable numbers in a model or layer.

    Example:
        >>> count_parameters(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        8
    """
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def named_parameters(model: nnx.Module | PyTree) -> dict[str, PyTree]:
    """The parameters of a model, or those that `nnx.split` took out of it, by name.

    Arrays, or shapes where the model has those.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> model = Tagger(LSTM(20), 1, rngs=nnx.Rngs(0))
        >>> {name: a.shape for name, a in named_parameters(model).items()}["head.kernel"]
        (20, 1)
    """
    state = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model
    found = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): leaf for path, leaf in found}


def set_parameters(model: nnx.Module, named: Mapping[str, Array | np.ndarray]) -> None:
    """Put arrays in the place of a model's parameters, which may be mere shapes.

    Args:
        model: changed in place.
        named: all of its parameters, as `named_parameters` names them.

    Raises:
        ValueError: one is missing, is not of this model, or has another shape or dtype.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> model, other = (Tagger(LSTM(20), 1, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        >>> set_parameters(other, named_parameters(model))
        >>> bool((other.head.kernel[...] == model.head.kernel[...]).all())
        True
    """
    wanted = named_parameters(model)
    for name in (*wanted, *named):
        there, here = (
            f"{a.dtype}{[*a.shape]}" if (a := d.get(name)) is not None else "missing"
            for d in (named, wanted)
        )
        if there != here:
            raise ValueError(f"{name} is {there}; this model has {here}")
    state = nnx.state(model, nnx.Param)
    filled = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(named[_name(path)]), state
    )
    nnx.update(model, filled)


def _name(path: tuple[object, ...]) -> str:
    """``recurrent.layers.0.params.kernel`` for the path to a leaf of a state."""
    keys = path[:-1] if isinstance(path[-1], jax.tree_util.GetAttrKey) else path
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def summary(model: nnx.Module, *inputs: PyTree) -> Table:
    """A table of layer, output shape and parameters, of any model.

    For `Classifier` and `Tagger` it goes step by step; for a model of one's own its rows are the
    sub-modules that it calls, in that order.

    Nothing is computed: parameters and ``inputs`` may be `jax.ShapeDtypeStruct`.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> model = Tagger(LSTM(20), 1, rngs=nnx.Rngs(0))
        >>> print(summary(model, jax.ShapeDtypeStruct((1, 10, 1), jnp.float32)))
        layer      output shape  parameters
        -----------------------------------
        recurrent  (1, 10, 20)        1,760
        dense      (1, 10)               21
        -----------------------------------
        total                         1,781
    """
    graphdef, state = nnx.split(model)
    names: list[tuple[str, int]] = []

    def outputs(state: PyTree, *args: PyTree) -> list[Array]:
        model, values = nnx.merge(graphdef, state), []
        steps = model._stages(*args) if isinstance(model, _Staged) else _calls(model, *args)
        for name, module, value in steps:
            names.append((name, 0 if module is None else count_parameters(module)))
            values.append(value)
        return values

    shapes = [value.shape for value in jax.eval_shape(outputs, state, *inputs)]
    table = [("layer", "output shape", "parameters")]
    for (name, count), shape in zip(names, shapes, strict=True):
        table.append((name, str(shape), f"{count:,}"))
    return Table.of(table, ("total", "", f"{count_parameters(model):,}"))


def _calls(model: nnx.Module, *args: PyTree) -> list[Stage]:
    """What the sub-modules that a model calls itself return, the first array of each.

    The modules become of a class that keeps record, so the model must be one to throw away.
    """
    found: list[Stage] = []
    seen: set[int] = set()
    within = 0

    def watch(name: str, module: nnx.Module) -> None:
        kind = type(module)

        def call(self: nnx.Module, *args: PyTree, **more: PyTree) -> PyTree:
            nonlocal within
            within += 1
            out = kind.__call__(self, *args, **more)
            within -= 1
            if within == 0 and (arrays := jax.tree.leaves(out)):
                found.append(Stage(name, None if id(self) in seen else self, arrays[0]))
                seen.add(id(self))
            return out

        object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"__call__": call}))

    for path, module in list(nnx.iter_modules(model)):
        if path and callable(module):
            watch(".".join(map(str, path)), module)
    out = model(*args)
    return found or [Stage(type(model).__name__, model, jax.tree.leaves(out)[0])]
