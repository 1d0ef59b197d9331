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
import importlib
import inspect
import keyword
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    TypeAlias,
    TypedDict,
    TypeVar,
    dataclass_transform,
)

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray

from lstmjax.cells.noise import Noise
from lstmjax.errors import ContractError
from lstmjax.precision import Dot, Precision, make_dot
from lstmjax.shown import fields_as_call
from lstmjax.traced import Size

Initializer = Callable[..., Array]
"""``(key, shape, dtype) -> Array``, as in `jax.nn.initializers`."""

Activation = Callable[[Array], Array]
"""A function of each element, ``jnp.tanh`` say; a cell's hyper-parameter."""

UnitParams = Mapping[str, float | Initializer]
"""What `Cell.unit_params` declares: name -> number or initializer."""

StepParams = Mapping[str, tuple[Sequence[int | str], float | Initializer]]
"""What `Cell.step_params` declares: name -> (shape, number or initializer)."""


class Params(TypedDict, total=False):
    """A cell's parameters: what `Cell.init` draws, a plain pytree of arrays.

    ``units`` and ``step`` are ``unit_params`` and ``step_params`` by name.
    """

    kernel: Array
    recurrent_kernel: Array
    bias: Array
    recurrent_bias: Array
    units: dict[str, Array]
    step: dict[str, Array]


if TYPE_CHECKING:
    Record: TypeAlias = type[NamedTuple]

    class Named:
        """Arrays by name: ``pre.f``, ``params.p_o``, ``noise.keep``, ``inputs.dt``."""

        def __getattr__(self, name: str) -> Array: ...

        def __iter__(self) -> Iterator[Array]: ...
else:
    Named = object
    Record = type
    """A class of named arrays, a `typing.NamedTuple`."""


StateT = TypeVar("StateT")
"""A cell's own `Cell.State`: ``Carry[State]`` in a `Cell.transition` of its own."""

GatesT = TypeVar("GatesT")
"""A cell's own `Cell.Gates`, or `Named`."""


class Carry(NamedTuple, Generic[StateT]):
    """What passes from one time step to the next.

    Attributes:
        h: hidden state, ``(B, H)``; also the output of the step.
        state: the cell's own `Cell.State`, each array ``(B, H)``.
    """

    h: Array
    state: StateT


class NoState(NamedTuple):
    """The state of a cell that has nothing but its hidden state (a GRU, say)."""


class Parts(NamedTuple, Generic[GatesT]):
    """Pre-activations of a cell that declares ``parts_apart``: input part and recurrent part."""

    x: GatesT
    h: GatesT


# For beartype, which checks types in the tests and knows no named tuples that are generic.
del Carry.__orig_bases__, Parts.__orig_bases__  # type: ignore[attr-defined]


@functools.cache
def _record(
    what: str, fields: tuple[str, ...], declared: Record | None = None
) -> Callable[..., Named]:
    """A type of arrays by name, which names them all to whoever asks for another.

    It is one of the type ``declared``, if that has these names.
    """

    def missing(self: object, name: str) -> Array:
        have = ", ".join(fields) or "none"
        raise AttributeError(f"no {what} {name!r}; there are: {have}")

    make = collections.namedtuple  # by another name: where it is called mypy asks for the fields
    fits = declared is not None and declared._fields == fields
    base = declared if declared and fits else make(what.title().replace(" ", ""), fields)
    return type(base.__name__, (base,), {"__slots__": (), "__getattr__": missing})


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclasses.dataclass(frozen=True, repr=False)
class Cell:
    """Base class of all cells: a frozen, hashable value whose fields are hyper-parameters.

    A subclass states its ``gates``, its ``State`` and its ``step``. It becomes a frozen
    dataclass by itself: annotated attributes are hyper-parameters, by keyword; plain ones are
    declarations.

    Declarations, each with a default; any of them may be a property:

    - ``gates``: names of the blocks of the pre-activation, in the order they are stored.
    - ``Gates``: in place of ``gates``, for whoever annotates ``pre``: a `typing.NamedTuple` of
      them.
    - ``State``: a `typing.NamedTuple` of the arrays carried beside the hidden state.
    - ``bias_init``: initial bias of a gate, a number or an initializer; 0 for gates not named.
    - ``unit_params``: per-unit parameters (peepholes, say), name -> number or initializer;
      ``step`` sees them as ``params.<name>``, shape ``(1, H)``.
    - ``step_params``: parameters of any shape, name -> (shape, number or initializer), with
      ``"H"`` for the number of units and ``"D"`` for that of features; ``step`` sees them as
      ``params.<name>``.
    - ``step_inputs``: arrays of each step that no product sees, name -> numbers a row, ``"H"`` for
      one a unit, ``"D"`` for as many as features; ``step`` takes them as ``inputs.<name>``. One
      named ``x`` is the input itself, unless it is given.
    - ``noise``: random arrays, name -> `Noise`; ``step`` takes them as ``noise.<name>``,
      ``(B, H)``.
    - ``uses_h``: ``step`` takes h_{t-1} as a further argument, ``h (B, H)``.
    - ``parts_apart``: ``step`` gets ``pre.x.<gate>`` and ``pre.h.<gate>`` instead of their sum;
      the recurrent part then has a bias of its own, ``recurrent_bias``.
    - ``recurrent_gates``: the gates that h_{t-1} has a product for; None is all, () saves it.
    - ``bias_gates``: the gates that have a bias; None is all.
    - ``heads``: blocks of a block-diagonal recurrent kernel; must divide ``hidden_size``.
    - ``output_size``: numbers a row of h; as many as units by default.

    Args:
        hidden_size: number of units H.
        use_bias: False is ``bias_gates = ()``.
        kernel_init: initializer of the input kernel.
        recurrent_init: that of the recurrent kernel, called gate by gate and head by head.

    Example:
        >>> class Leaky(Cell):
        ...     gates = ("a",)
        ...     leak: float = 0.5
        ...     uses_h = True
        ...     def step(self, pre, state, params, h):
        ...         return (1 - self.leak) * h + self.leak * jnp.tanh(pre.a), state
        >>> Leaky(8, leak=0.1)
        Leaky(8, leak=0.1)
    """

    hidden_size: int
    use_bias: bool = dataclasses.field(default=True, kw_only=True)
    kernel_init: Initializer | None = dataclasses.field(default=None, kw_only=True)
    recurrent_init: Initializer | None = dataclasses.field(default=None, kw_only=True)

    gates: ClassVar[tuple[str, ...]] = ()
    Gates: ClassVar[Record | None] = None
    State: ClassVar[Record] = NoState
    bias_init: ClassVar[Mapping[str, float | Initializer]] = {}
    unit_params: ClassVar[UnitParams] = {}
    step_params: ClassVar[StepParams] = {}
    step_inputs: ClassVar[Mapping[str, int | str]] = {}
    noise: ClassVar[Mapping[str, Noise]] = {}
    uses_h: ClassVar[bool] = False
    parts_apart: ClassVar[bool] = False
    recurrent_gates: ClassVar[tuple[str, ...] | None] = None
    bias_gates: ClassVar[tuple[str, ...] | None] = None
    heads = 1  # no ClassVar: a cell may make it a hyper-parameter, ``heads: int = 4``

    @property
    def output_size(self) -> int:
        """Numbers a row of h, and rows of the recurrent kernel. Override for a projection, say."""
        return self.hidden_size

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if (declared := vars(cls).get("Gates")) is not None:
            names = getattr(declared, "_fields", None)
            if names is None or vars(cls).get("gates", names) != names:
                raise ContractError(
                    f"{cls.__name__}.Gates must be a typing.NamedTuple, and stands for gates: "
                    "leave out one of them"
                )
            cls.gates = names
        try:
            dataclasses.dataclass(frozen=True, repr=False, kw_only=True)(cls)
            # As if not done yet, for those who write @dataclass themselves.
            del cls.__setattr__, cls.__delattr__
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]
        except ValueError as error:
            raise ContractError(
                f"cell {cls.__name__}: {error}. A hyper-parameter must be hashable: make an array "
                "a tuple, or a parameter in step_params"
            ) from error
        _check_names(cls, cls.gates)

    def __post_init__(self) -> None:
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")
        if self.heads < 1 or self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} must divide hidden_size={self.hidden_size}")
        for field in dataclasses.fields(self):
            try:
                hash(getattr(self, field.name))
            except TypeError:
                raise ContractError(
                    f"cell {type(self).__name__}: hyper-parameter {field.name} is not hashable "
                    f"({type(getattr(self, field.name)).__name__}); make it a tuple, or a "
                    "parameter in step_params"
                ) from None

    def __repr__(self) -> str:
        return fields_as_call(self)

    def __reduce__(self) -> tuple[Callable[..., "Cell"], tuple[object, ...]]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _unpickled, (type(self), {name: _by_name(value) for name, value in fields.items()})

    # What a researcher writes

    def step(self, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
        """One time step after the products: ``step(pre, state, params, ...) -> (h, state)``.

        It is traced once, with the shapes below, and what was traced is what every engine runs.
        Under `jax.vmap` and inside `jax.shard_map`, ``B`` is what a caller there sees.

        It takes, in this order,

        - ``pre``: named blocks ``pre.<gate>``, each ``(B, H)``;
        - ``state``: the cell's ``State`` of the previous step, arrays ``(B, H)``;
        - ``params``: per-unit parameters ``params.<name>``, each ``(1, H)``, and ``step_params``;
        - ``h``: the previous hidden state, where the cell declares ``uses_h``;
        - ``inputs``: by keyword, where it declares ``step_inputs``, each ``(B, width)``;
        - ``noise``: by keyword, where it declares ``noise``, each ``(B, H)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step(pre, state, params)")

    def prepare(self, params: Params, key: PRNGKeyArray | None = None) -> Params:
        """Parameters as the time loop sees them: run once a call, differentiated through.

        Override for weight normalisation, weight drop, quantised or low-rank recurrent kernels.

        Args:
            params: what `init` drew, or what training made of it.
            key: one for the whole batch while training; None in evaluation.
        """
        return params

    def recur(self, h: Float[Array, "B H"], noise: Named) -> Float[Array, "B H"]:
        """What the recurrent product sees of h_{t-1}; element-wise. Override for variational
        dropout, say: ``return h * noise.h``."""
        return h

    # Parameters and start

    def init(
        self, key: PRNGKeyArray, input_size: int, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> Params:
        """Draw the parameters, distributed as Keras' except for the recurrent kernel.

        ``kernel (D, G*H)`` is Glorot-uniform over the whole matrix. ``recurrent_kernel (H, G*H)``
        (``(H/heads, G*H)`` with heads) is orthogonal gate by gate (and head by head): one
        orthogonal draw of the fused matrix would leave single gates nearly singular. With a head
        for each unit it is uniform in ±1. ``bias (G*H,)`` follows ``bias_init``.

        Example:
            >>> from lstmjax.cells import LSTM
            >>> params = LSTM(5).init(jax.random.key(0), input_size=3)
            >>> {name: value.shape for name, value in params.items()}
            {'kernel': (3, 20), 'recurrent_kernel': (5, 20), 'bias': (20,)}
        """
        dtype = jnp.dtype(dtype)
        keys = jax.random.split(key, 4)
        units = self.hidden_size
        kernel_init = self.kernel_init or jax.nn.initializers.glorot_uniform()
        if not input_size:  # which has no such bounds
            kernel_init = jax.nn.initializers.zeros
        params: Params = {
            "kernel": _draw(kernel_init, keys[0], (input_size, len(self.gates) * units), dtype)
        }
        if self.recurrent:
            params["recurrent_kernel"] = self._draw_recurrent(keys[1], dtype)
        if self.biased:
            biases = [
                _draw(self.bias_init.get(gate, 0.0), k, (units,), dtype)
                for gate, k in zip(
                    self.gates, jax.random.split(keys[2], len(self.gates)), strict=True
                )
                if gate in self.biased
            ]
            params["bias"] = jnp.concatenate(biases)
        if self.recurrent_bias_gates:
            params["recurrent_bias"] = jnp.zeros((len(self.recurrent_bias_gates) * units,), dtype)
        if self.unit_params:
            unit_keys = jax.random.split(keys[3], len(self.unit_params))
            params["units"] = {
                name: _draw(init, k, (units,), dtype)
                for (name, init), k in zip(self.unit_params.items(), unit_keys, strict=True)
            }
        if self.step_params:
            step_keys = jax.random.split(jax.random.fold_in(keys[3], 1), len(self.step_params))
            params["step"] = {
                name: _draw(init, k, tuple(self.width(n, input_size) for n in shape), dtype)
                for (name, (shape, init)), k in zip(
                    self.step_params.items(), step_keys, strict=True
                )
            }
        return params

    def _draw_recurrent(self, key: PRNGKeyArray, dtype: DTypeLike) -> Array:
        gates, block = len(self.recurrent), self.hidden_size // self.heads
        rows = block if self.heads > 1 else self.output_size
        orthogonal, uniform = jax.nn.initializers.orthogonal(), jax.nn.initializers.uniform(2.0)
        init = self.recurrent_init or orthogonal
        if self.recurrent_init is None and block == 1:  # orthogonal numbers are 1 and -1

            def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
                return uniform(key, shape, dtype) - 1

        draw = jax.vmap(lambda k: _draw(init, k, (rows, block), dtype))
        blocks = draw(jax.random.split(key, gates * self.heads))
        return jnp.moveaxis(blocks, 0, 1).reshape(rows, gates * self.hidden_size)

    def initial_carry(
        self,
        batch_size: Size,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        params: Params | None = None,
        input_size: int | None = None,
    ) -> Carry:
        """The carry before the first step, and after a reset: zeros ``(B, H)``.

        Override for another start. An override may leave out ``params`` and ``input_size``; one
        that takes ``params`` makes the start a function of them (a learned one, say), and gets
        None where there are none, as in `lstmjax.layers`' shapes.
        """
        h = jnp.zeros((batch_size, self.output_size), dtype)
        zeros = jnp.zeros((batch_size, self.hidden_size), dtype)
        return Carry(h, self.State._make(zeros for _ in self.State._fields))

    # One step

    def transition(
        self, params: Params, x: Float[Array, "B D"], carry: Carry, dot: Dot, **more: Named
    ) -> Carry:
        """One whole time step, products included.

        A cell with more than one product a step (a projection, say) overrides this. The fused
        kernels, which are derived from ``step``, refuse such a cell.

        Args:
            params: what `init` drew, after `prepare`.
            x: the input of this step.
            carry: what the step before left.
            dot: the matrix product ``(..., K) x (K, N)`` in the precision asked for.
            more: ``inputs`` and ``noise``, where the cell declares them; pass them on.
        """
        pre = self.pre_activations(params, x, carry.h, dot, **more)
        return self.apply_step(pre, carry, params, **more)

    def pre_activations(
        self, params: Params, x: Float[Array, "B D"], h: Array, dot: Dot, **more: Named
    ) -> Any:
        """What ``step`` gets as ``pre``: the products and biases by name, or both parts of them.

        That is `Named` (or the cell's ``Gates``), or with ``parts_apart`` `Parts` of them.
        """
        from_x = dot(x, params["kernel"])
        from_h = None
        if self.recurrent:
            seen = self.recur(h, more.get("noise", _record("noise", ())())) if recurs(self) else h
            from_h = self.recurrent_product(params["recurrent_kernel"], seen, dot)
        bias = params.get("bias")
        if self.parts_apart:
            recurrent = self._with_bias(
                from_h, self.recurrent, params.get("recurrent_bias"), self.recurrent_bias_gates
            )
            return Parts(
                self.named(self._with_bias(from_x, self.gates, bias, self.biased)),
                _record("gate with recurrence", self.recurrent)(*recurrent),
            )
        if from_h is not None and self.recurrent == self.gates:
            from_x = from_x + from_h
        elif from_h is not None:
            blocks = dict(zip(self.gates, self._split(from_x, self.gates), strict=True))
            for gate, block in zip(
                self.recurrent, self._split(from_h, self.recurrent), strict=True
            ):
                blocks[gate] = blocks[gate] + block
            from_x = jnp.concatenate(list(blocks.values()), axis=-1)
        return self.named(self._with_bias(from_x, self.gates, bias, self.biased))

    def _with_bias(
        self,
        pre: Array | None,
        gates: tuple[str, ...],
        bias: Array | None,
        biased: tuple[str, ...],
    ) -> Sequence[Array]:
        """The blocks of the gates, with the biases that there are."""
        if pre is None:
            return ()
        if bias is None:
            return self._split(pre, gates)
        if biased == gates:
            return self._split(pre + bias[None], gates)
        blocks = dict(zip(biased, jnp.split(bias[None], len(biased), axis=-1), strict=True))
        return [
            block + blocks[gate] if gate in blocks else block
            for gate, block in zip(gates, self._split(pre, gates), strict=True)
        ]

    def recurrent_product(
        self, recurrent_kernel: Float[Array, "K GH"], h: Float[Array, "B H"], dot: Dot
    ) -> Float[Array, "B GH"]:
        """``h R``, block by block where the cell has heads: ``(B, G*H)``."""
        if self.heads == 1:
            return dot(h, recurrent_kernel)
        block = recurrent_kernel.shape[0]
        gates = recurrent_kernel.shape[1] // (self.heads * block)

        def one_head(h: Array, kernel: Array) -> Array:
            return dot(h, kernel.reshape(block, gates * block))

        out = jax.vmap(one_head, in_axes=(1, 2), out_axes=1)(
            h.reshape(-1, self.heads, block),
            recurrent_kernel.reshape(block, gates, self.heads, block),
        )
        out = out.reshape(-1, self.heads, gates, block).swapaxes(1, 2)
        return out.reshape(-1, gates * self.hidden_size)

    def apply_step(
        self, pre: Named | Parts[Named], carry: Carry, params: Params, **more: Named
    ) -> Carry:
        """Call ``step`` with the arguments that the cell declares."""
        h = (carry.h,) if self.uses_h else ()
        return as_carry(self, self.step(pre, carry.state, self.seen(params), *h, **more))

    def __call__(
        self,
        params: Params,
        x: Float[Array, "B D"],
        carry: Carry,
        *,
        inputs: Mapping[str, Array] | None = None,
        precision: Precision = "float32",
    ) -> Carry:
        """One step outside of a loop: generation, reinforcement learning, streaming.

        The same numbers as from `lstmjax.recurrence.unroll` with ``engine="scan"``.

        Args:
            params: what `init` drew.
            x: one input a row, ``(B, D)``.
            carry: from the step before, or from `initial_carry`.
            inputs: by name, each ``(B, width)``, where the cell declares ``step_inputs``.
            precision: of the products.

        Example:
            >>> from lstmjax.cells import LSTM
            >>> cell = LSTM(5)
            >>> params = cell.init(jax.random.key(0), input_size=3)
            >>> cell(params, jnp.ones((2, 3)), cell.initial_carry(2)).h.shape
            (2, 5)
        """
        given = dict(inputs or {})
        return _one_step(self, make_dot(precision), self.prepare(params), x, carry, given)

    # What the declarations come to

    @property
    def recurrent(self) -> tuple[str, ...]:
        """The gates that have a product of h."""
        return self.gates if self.recurrent_gates is None else tuple(self.recurrent_gates)

    @property
    def biased(self) -> tuple[str, ...]:
        """The gates that have a bias."""
        if not self.use_bias:
            return ()
        return self.gates if self.bias_gates is None else tuple(self.bias_gates)

    @property
    def recurrent_bias_gates(self) -> tuple[str, ...]:
        """The gates whose recurrent part has a bias of its own."""
        apart = self.recurrent if self.parts_apart else ()
        return tuple(gate for gate in apart if gate in self.biased)

    def named(self, blocks: Sequence[Array]) -> Named:
        """The blocks of a pre-activation under the names of the gates."""
        return _record("gate", self.gates, self.Gates)(*blocks)

    def seen(self, params: Params) -> Named:
        """The parameters that ``step`` sees, by name."""
        units = {name: params["units"][name][None] for name in self.unit_params}
        others = {name: params["step"][name] for name in self.step_params}
        return _record("parameter", (*units, *others))(*units.values(), *others.values())

    def width(self, size: int | str | None, input_size: int) -> int:
        """The number that a declaration means: ``"H"`` (or None) units, ``"D"`` features."""
        if isinstance(size, int):
            return size
        return input_size if size == "D" else self.hidden_size

    def _split(self, pre: Array, gates: tuple[str, ...]) -> Sequence[Array]:
        return jnp.split(pre, len(gates), axis=-1)


def _frozen(cell: Cell, name: str, *value: object) -> None:
    raise dataclasses.FrozenInstanceError(
        f"{type(cell).__name__}.{name}: a cell cannot be changed; use dataclasses.replace"
    )


Cell.__setattr__ = Cell.__delattr__ = _frozen  # type: ignore[assignment,method-assign]


class _Name(NamedTuple):
    """Where a function is found; pickle itself cannot say that of ``jnp.tanh`` and its like."""

    module: str
    name: str


def _by_name(value: object) -> object:
    place = _Name(getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
    known = getattr(sys.modules.get(place.module), place.name, None)
    return place if callable(value) and known is value else value


def _unpickled(kind: type[Cell], fields: Mapping[str, object]) -> Cell:
    def found(value: object) -> Any:
        if not isinstance(value, _Name):
            return value
        return getattr(importlib.import_module(value.module), value.name)

    return kind(**{name: found(value) for name, value in fields.items()})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_step(
    cell: Cell, dot: Dot, params: Params, x: Array, carry: Carry, given: dict[str, Array]
) -> Carry:
    inputs = {"x": x} | given
    return cell.transition(params, x, carry, dot, **arguments(cell, x, inputs, {}))


def arguments(
    cell: Cell,
    x: Array | jax.ShapeDtypeStruct,
    inputs: Mapping[str, Array | None],
    noise: Mapping[str, Array],
) -> dict[str, Named]:
    """The keyword arguments of a step: ``inputs`` and ``noise``, where the cell declares them.

    In place of noise that is not given comes the number for evaluation. Of the input, ``(B, D)``,
    only shape and type count.
    """
    (batch, features), dtype = x.shape, x.dtype
    more: dict[str, Named] = {}
    if names := tuple(cell.step_inputs):
        more["inputs"] = _record("step input", names)(*(inputs[name] for name in names))
    if names := tuple(cell.noise):
        known = {
            name: jnp.full((batch, cell.width(n.width, features)), n.evaluation, dtype)
            for name, n in cell.noise.items()
        } | dict(noise)
        more["noise"] = _record("noise", names)(*(known[name] for name in names))
    return more


def start(
    cell: Cell, params: Params | None, batch: Size, features: int | None, dtype: DTypeLike
) -> Carry:
    """`Cell.initial_carry`, with the arguments that the cell's own takes."""
    takes = inspect.signature(cell.initial_carry).parameters
    known: dict[str, Any] = {"params": params, "input_size": features}
    every = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return cell.initial_carry(
        batch, dtype, **{name: a for name, a in known.items() if every or name in takes}
    )


def recurs(cell: Cell) -> bool:
    """Whether the recurrent product sees something else than h."""
    return type(cell).recur is not Cell.recur


def as_carry(cell: Cell, result: object) -> Carry:
    """What a step returned, if it is ``(h, state)``; `ContractError` says what it is instead."""
    where = f"cell {type(cell).__name__} breaks the contract: its step must return (h, state)"
    fields = cell.State._fields
    wanted = f"self.State({', '.join(fields)})" if fields else "the state that it got"
    if isinstance(result, Carry):
        return result
    if not isinstance(result, tuple) or len(result) != 2:
        raise ContractError(
            f"{where}, not {_told(result)}; return h, {wanted}{where_defined(cell)}"
        )
    h, state = result
    if isinstance(h, tuple):
        raise ContractError(f"{where}, in that order; return h, {wanted}{where_defined(cell)}")
    if not isinstance(state, tuple) or getattr(state, "_fields", None) != fields:
        raise ContractError(
            f"{where}, its state structured as {cell.State.__name__}({', '.join(fields)}), not "
            f"{_told(state)}; return h, {wanted}{where_defined(cell)}"
        )
    return Carry(h, state)


def _told(value: object) -> str:
    if isinstance(value, tuple):
        name = type(value).__name__ if hasattr(value, "_fields") else "a tuple"
        return f"{name} of {len(value)}"
    if hasattr(value, "shape"):
        return "one array"
    return "nothing" if value is None else f"a {type(value).__name__}"


def where_defined(cell: Cell) -> str:
    """File and line of a cell's own step, as `` (my_cell.py:12)``."""
    method = cell.step if type(cell).transition is Cell.transition else cell.transition
    code = inspect.unwrap(method).__code__
    return f" ({code.co_filename.rpartition('/')[2]}:{code.co_firstlineno})"


def _check_names(cls: type[Cell], gates: object) -> None:
    """Raise `ContractError` where a class's declarations cannot be meant."""
    if isinstance(gates, property):
        return
    fix = 'write e.g. gates = ("i", "f", "g", "o")'
    if isinstance(gates, str) or not isinstance(gates, tuple):
        raise ContractError(f"{cls.__name__}.gates must be a tuple of names, got {gates!r}; {fix}")
    for gate in gates:
        if not isinstance(gate, str) or not gate.isidentifier() or keyword.iskeyword(gate):
            raise ContractError(f"{cls.__name__}.gates has {gate!r}, which is no name; {fix}")
        if gate.startswith("_"):
            raise ContractError(f"{cls.__name__}.gates has {gate!r}; a name cannot start with _")
    if len(set(gates)) < len(gates):
        raise ContractError(f"{cls.__name__}.gates names a gate twice: {gates}")
    for what in ("bias_init", "recurrent_gates", "bias_gates"):
        named = getattr(cls, what)
        if isinstance(named, property) or named is None:
            continue
        if unknown := sorted(set(named) - set(gates)):
            raise ContractError(f"{cls.__name__}.{what} names {unknown}, the gates are {gates}")


def _draw(
    init: float | Initializer, key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
) -> Array:
    if not callable(init):
        return jnp.full(shape, init, dtype)
    narrow = jnp.finfo(dtype).bits < 32  # a decomposition, as orthogonal ones need, has no such
    return init(key, shape, jnp.float32 if narrow else dtype).astype(dtype)
