"""Models made of the layers: a classifier of token sequences and a per-step tagger."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from lstmjax.cells.base import Cell
from lstmjax.layers import (
    ConvPool,
    Pooling,
    Recurrent,
    RowKeys,
    Stack,
    dense,
    dropout,
    embedding,
    fold_keys,
    pool,
)
from lstmjax.precision import Precision
from lstmjax.recurrence import Engine


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


class Classifier(nnx.Module):
    """Token ids to one logit a row: embedding, optional convolution, recurrence, pooling, head.

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
        precision: Precision = "float32",
        engine: str | Engine | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.embedding = embedding(config.top_words, config.embedding_size, rngs=rngs)
        features = config.embedding_size
        self.front = (
            ConvPool(
                features,
                config.conv_filters,
                width=config.conv_width,
                pool=config.conv_pool,
                precision=precision,
                rngs=rngs,
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
        )
        features = self.recurrent.output_size * len(config.pooling)
        self.head = dense(features, 1, precision=precision, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        keys: RowKeys | None = None,
    ) -> Float[Array, " B"]:
        """Logits; ``mask`` marks valid steps, ``keys`` (one a row) switch dropout on."""
        *_, (_, _, logits) = self.stages(ids, mask, keys)
        return logits

    def stages(
        self,
        ids: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        keys: RowKeys | None = None,
    ) -> Iterator[tuple[str, nnx.Module | None, Array]]:
        """The forward pass layer by layer: name, module (if it has parameters), output."""
        config = self.config
        key_words, key_before, key_between, key_after = fold_keys(keys, 4)
        x = self.embedding(ids)
        yield "embedding", self.embedding, x
        if config.dropout_words:
            kept = dropout(jnp.ones(ids.shape, x.dtype), config.dropout_words, key_words)
            x = x * kept[..., None]
            yield "dropout_words", None, x
        if config.dropout_before:
            x = dropout(x, config.dropout_before, key_before)
            yield "dropout_before", None, x
        if self.front is not None:
            x, mask = self.front(x, mask)
            yield "conv_pool", self.front, x
        layers = self.recurrent.stages(x, keys=key_between, mask=mask)
        for number, (layer, hs, final) in enumerate(layers, 1):  # noqa: B007 (used below)
            yield f"recurrent_{number}", layer, hs
        x = pool(hs, final, mask, config.pooling)
        yield "pool_" + "_".join(config.pooling), None, x
        if config.dropout_after:
            x = dropout(x, config.dropout_after, key_after)
            yield "dropout_after", None, x
        yield "dense", self.head, self.head(x)[..., 0]


class Tagger(nnx.Module):
    """Features to one logit a step: a recurrence and a dense layer shared by all steps.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> Tagger(LSTM(20), 1, rngs=nnx.Rngs(0))(jnp.ones((4, 10, 1))).shape
        (4, 10)
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        *,
        precision: Precision = "float32",
        engine: str | Engine | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.recurrent = Recurrent(cell, input_size, precision=precision, engine=engine, rngs=rngs)
        self.head = dense(self.recurrent.output_size, 1, precision=precision, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T"]:
        """Logits of every step."""
        *_, (_, _, logits) = self.stages(x, mask)
        return logits

    def stages(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> Iterator[tuple[str, nnx.Module | None, Array]]:
        """The forward pass layer by layer: name, module, output."""
        hs, _ = self.recurrent(x, mask=mask)
        yield "recurrent", self.recurrent, hs
        yield "dense", self.head, self.head(hs)[..., 0]


def count_parameters(model: nnx.Module) -> int:
    """Number of trainable numbers in a model or layer."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def summary(model: Any, *inputs: Any) -> str:
    """A table of layer, output shape and parameters.

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

    def outputs(state: Any, *args: Any) -> list[Array]:
        values = []
        for name, module, value in nnx.merge(graphdef, state).stages(*args):
            names.append((name, 0 if module is None else count_parameters(module)))
            values.append(value)
        return values

    shapes = [value.shape for value in jax.eval_shape(outputs, state, *inputs)]
    table = [("layer", "output shape", "parameters")]
    for (name, count), shape in zip(names, shapes, strict=True):
        table.append((name, str(shape), f"{count:,}"))
    table.append(("total", "", f"{count_parameters(model):,}"))
    wide = [max(len(row[column]) for row in table) for column in range(3)]
    lines = [f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}" for a, b, c in table]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
