"""The cell contract. Start here to change the LSTM: `lstm.py` is the shortest example.

Every cell of this family computes pre-activations, one block a gate, and then a function that
needs no other row of the batch::

    pre_t = x_t W + h_{t-1} R + b            (the only matrix products)
    h_t, state_t = step(pre_t, state_{t-1})  (what a researcher writes)

Shapes: ``B`` rows, ``D`` input features, ``H`` units (``hidden_size``), ``G`` gates.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from lstmjax.precision import Dot

Initializer = Callable[..., Array]
"""``(key, shape, dtype) -> Array``, as in `jax.nn.initializers`."""

Params = dict[str, Any]
"""A cell's parameters: what `Cell.init` draws, a plain pytree of arrays."""


class Carry(NamedTuple):
    """What passes from one time step to the next.

    Attributes:
        h: hidden state, ``(B, H)``; also the output of the step.
        state: the cell's own `Cell.State`, each array ``(B, H)``.
    """

    h: Array
    state: Any


class NoState(NamedTuple):
    """The state of a cell that has nothing but its hidden state (a GRU, say)."""


class Parts(NamedTuple):
    """Pre-activations of a cell that declares ``parts_apart``: input part and recurrent part."""

    x: Any
    h: Any


@functools.cache
def _record(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


@dataclass_transform(frozen_default=True)
@dataclasses.dataclass(frozen=True)
class Cell:
    """Base class of all cells: a frozen, hashable value whose fields are hyper-parameters.

    A subclass states its ``gates``, its ``State`` and its ``step``. It becomes a frozen
    dataclass by itself: annotated attributes are hyper-parameters, plain ones declarations.

    Declarations, each with a default:
        gates: names of the blocks of the pre-activation, in the order they are stored.
        State: a `typing.NamedTuple` of the arrays carried beside the hidden state.
        bias_init: initial bias of a gate, a number or an initializer; 0 for gates not named.
        unit_params: per-unit parameters (peepholes, say), name -> number or initializer;
            ``step`` sees them as ``params.<name>``, shape ``(1, H)``.
        uses_h: ``step`` takes h_{t-1} as a further argument, ``h (B, H)``.
        parts_apart: ``step`` gets ``pre.x.<gate>`` and ``pre.h.<gate>`` instead of their sum;
            the recurrent part then has a bias of its own, ``recurrent_bias``.
        elementwise: unit k of ``step``'s results depends on unit k of its arguments only. A
            step that mixes the units of a row (layer normalisation, say) says False.
        heads: blocks of a block-diagonal recurrent kernel; must divide ``hidden_size``.

    Example:
        >>> class Leaky(Cell):
        ...     gates = ("a",)
        ...     leak: float = 0.5
        ...     uses_h = True
        ...     def step(self, pre, state, params, h):
        ...         return (1 - self.leak) * h + self.leak * jnp.tanh(pre.a), state
        >>> Leaky(8, leak=0.1)
        Leaky(hidden_size=8, leak=0.1)
    """

    hidden_size: int

    gates: ClassVar[tuple[str, ...]] = ()
    State: ClassVar[Any] = NoState
    bias_init: ClassVar[Mapping[str, float | Initializer]] = {}
    unit_params: ClassVar[Mapping[str, float | Initializer]] = {}
    uses_h: ClassVar[bool] = False
    parts_apart: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    heads = 1  # no ClassVar: a cell may make it a hyper-parameter, ``heads: int = 4``

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True)(cls)
        named = cls.bias_init if isinstance(cls.bias_init, Mapping) else ()  # may be a property
        if unknown := set(named) - set(cls.gates):
            raise TypeError(
                f"{cls.__name__}.bias_init names {sorted(unknown)}, the gates are {cls.gates}"
            )

    def __post_init__(self) -> None:
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")
        if self.heads < 1 or self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} must divide hidden_size={self.hidden_size}")

    def step(self, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
        """One time step after the products: ``step(pre, state, params[, h]) -> (h, state)``.

        Args:
            pre: named blocks ``pre.<gate>``, each ``(B, H)``.
            state: the cell's ``State`` of the previous step, arrays ``(B, H)``.
            params: per-unit parameters ``params.<name>``, each ``(1, H)``.
            h: the previous hidden state, only where the cell declares ``uses_h``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step(pre, state, params)")

    def init(
        self, key: PRNGKeyArray, input_size: int, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> Params:
        """Draw the parameters, distributed as Keras' except for the recurrent kernel.

        ``kernel (D, G*H)`` is Glorot-uniform over the whole matrix. ``recurrent_kernel (H, G*H)``
        (``(H/heads, G*H)`` with heads) is orthogonal gate by gate (and head by head): one
        orthogonal draw of the fused matrix would leave single gates nearly singular.
        ``bias (G*H,)`` follows ``bias_init``.

        Example:
            >>> from lstmjax.cells import LSTM
            >>> params = LSTM(5).init(jax.random.key(0), input_size=3)
            >>> {name: value.shape for name, value in params.items()}
            {'kernel': (3, 20), 'recurrent_kernel': (5, 20), 'bias': (20,)}
        """
        keys = jax.random.split(key, 4)
        gates, units, block = len(self.gates), self.hidden_size, self.hidden_size // self.heads
        orthogonal = jax.vmap(lambda k: jax.nn.initializers.orthogonal()(k, (block, block), dtype))
        blocks = orthogonal(jax.random.split(keys[1], gates * self.heads))
        params: Params = {
            "kernel": jax.nn.initializers.glorot_uniform()(
                keys[0], (input_size, gates * units), dtype
            ),
            "recurrent_kernel": jnp.moveaxis(blocks, 0, 1).reshape(block, gates * units),
            "bias": jnp.concatenate(
                [
                    _draw(self.bias_init.get(gate, 0.0), k, (units,), dtype)
                    for gate, k in zip(self.gates, jax.random.split(keys[2], gates), strict=True)
                ]
            ),
        }
        if self.parts_apart:
            params["recurrent_bias"] = jnp.zeros((gates * units,), dtype)
        if self.unit_params:
            unit_keys = jax.random.split(keys[3], len(self.unit_params))
            params["units"] = {
                name: _draw(init, k, (units,), dtype)
                for (name, init), k in zip(self.unit_params.items(), unit_keys, strict=True)
            }
        return params

    def initial_carry(self, batch_size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Carry:
        """The carry before the first step: zeros ``(B, H)``. Override for another start."""
        zeros = jnp.zeros((batch_size, self.hidden_size), dtype)
        return Carry(zeros, self.State(*(zeros for _ in self.State._fields)))

    def transition(self, params: Params, x: Float[Array, "B D"], carry: Carry, dot: Dot) -> Carry:
        """One whole time step, products included.

        A cell with more than one product a step (a projection, say) overrides this and, where
        its parameters differ, `init`. Such a cell runs on the plain scan only, since the other
        engines are derived from ``step``.

        Args:
            params: what `init` drew.
            x: the input of this step.
            carry: what the step before left.
            dot: the matrix product ``(..., K) x (K, N)`` in the precision asked for.
        """
        pre_x = dot(x, params["kernel"]) + params["bias"][None]
        pre_h = self.recurrent_product(params["recurrent_kernel"], carry.h, dot)
        if self.parts_apart:
            pre = Parts(self._named(pre_x), self._named(pre_h + params["recurrent_bias"][None]))
        else:
            pre = self._named(pre_x + pre_h)
        return self.apply_step(pre, carry, params)

    def recurrent_product(
        self, recurrent_kernel: Float[Array, "K GH"], h: Float[Array, "B H"], dot: Dot
    ) -> Float[Array, "B GH"]:
        """``h R``, block by block where the cell has heads: ``(B, G*H)``."""
        if self.heads == 1:
            return dot(h, recurrent_kernel)
        gates, block = len(self.gates), recurrent_kernel.shape[0]

        def one_head(h: Array, kernel: Array) -> Array:
            return dot(h, kernel.reshape(block, gates * block)).reshape(-1, gates, block)

        out = jax.vmap(one_head, in_axes=(1, 2), out_axes=2)(
            h.reshape(-1, self.heads, block),
            recurrent_kernel.reshape(block, gates, self.heads, block),
        )
        return out.reshape(-1, gates * self.hidden_size)

    def apply_step(self, pre: Any, carry: Carry, params: Params) -> Carry:
        """Call ``step`` with the arguments that the cell declares."""
        names = tuple(self.unit_params)
        units = _record("Units", names)(*(params["units"][name][None] for name in names))
        h = (carry.h,) if self.uses_h else ()
        return Carry(*self.step(pre, carry.state, units, *h))

    def named(self, blocks: Sequence[Array]) -> Any:
        """The blocks of a pre-activation under the names of the gates."""
        return _record("Pre", self.gates)(*blocks)

    def _named(self, pre: Array) -> Any:
        return self.named(jnp.split(pre, len(self.gates), axis=-1))


def _draw(
    init: float | Initializer, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any
) -> Array:
    return init(key, shape, dtype) if callable(init) else jnp.full(shape, init, dtype)
