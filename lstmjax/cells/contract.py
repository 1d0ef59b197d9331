"""One step of a cell as a traced program, and whether it keeps the contract."""

import collections
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import PyTreeDef
from jax.typing import DTypeLike
from jaxtyping import PyTree

from lstmjax.cells.base import Carry, Cell, Params, arguments, start, where_defined
from lstmjax.errors import ContractError, UserError, user_line
from lstmjax.precision import marked_dot
from lstmjax.traced import MixedRows, Program, trace


class Arguments(NamedTuple):
    """What one step takes, as arrays or shapes.

    Attributes:
        params: after `Cell.prepare`.
        x: ``(B, D)``.
        carry: what the step before left.
        inputs: by name, ``(B, width)``.
        noise: by name, ``(B, width)``; empty in evaluation.
    """

    params: Params
    x: Array
    carry: Carry
    inputs: dict[str, Array]
    noise: dict[str, Array]


ROWS = (-1, 0, 0, 0, 0)
"""Which axis of each argument the rows are, -1 for none."""

_KEPT = 256
_programs: collections.OrderedDict[Hashable, tuple[Program, str | None]] = collections.OrderedDict()


def transition_program(cell: Cell, args: Arguments) -> Program:
    """``cell.transition``, traced once for arguments of these shapes: ``(*args) -> Carry``.

    Its products are `lstmjax.precision.marked_dot`.

    Raises:
        ContractError: it does not fit the contract.
    """
    return _traced(cell, args)[0]


def not_mapped(cell: Cell, args: Arguments) -> str | None:
    """Why a step can only run as it was traced, rows first; None where any layout will do."""
    return _traced(cell, args)[1]


def _traced(cell: Cell, args: Arguments) -> tuple[Program, str | None]:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    leaves, structure = jax.tree.flatten(shapes)
    sizes = tuple((a.shape, a.dtype) for a in leaves)
    key = cell, structure, sizes, jax.config.jax_enable_x64  # type: ignore[attr-defined]
    if key in _programs:
        _programs.move_to_end(key)
        return _programs[key]
    program = trace_transition(cell, shapes)
    reason = _checked(cell, program, shapes)
    if not any(isinstance(const, jax.core.Tracer) for const in program.consts):
        _programs[key] = program, reason
        if len(_programs) > _KEPT:
            _programs.popitem(last=False)
    return program, reason


def trace_transition(cell: Cell, args: Arguments) -> Program:
    """``cell.transition`` as a program, traced anew and not checked.

    Raises:
        ContractError: it does not run with arguments of these shapes.
    """

    def one_step(
        params: Params,
        x: Array,
        carry: Carry,
        inputs: dict[str, Array],
        noise: dict[str, Array],
    ) -> Carry:
        more = arguments(cell, x, {"x": x} | inputs, noise)
        return cell.transition(params, x, carry, marked_dot, **more)

    name = type(cell).__name__
    try:
        with jax.default_matmul_precision("highest"):
            return trace(one_step, *args, rows=ROWS)
    except UserError:
        raise
    except Exception as error:
        raise ContractError(f"cell {name} breaks the contract: {_told(error)}") from error


def _told(error: Exception) -> str:
    """What went wrong in a step, in one line, with the user's own."""
    at = user_line(error)
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return f"its step hands a traced array to NumPy{at}; use jax.numpy"
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return f"its step asks whether a traced value is true{at}; use jnp.where"
    if isinstance(error, jax.errors.ConcretizationTypeError):
        return f"its step needs the number in a traced value{at}; use jax.numpy on arrays"
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and not text:
        text = "an assertion failed"
    return f"{type(error).__name__}: {text[:300]}{at}"


def _checked(cell: Cell, program: Program, args: Arguments) -> str | None:
    """Raise `ContractError` if a step is not one; else why it runs as traced only, if so."""
    broken = f"cell {type(cell).__name__} breaks the contract: "
    at, after, before = where_defined(cell), program.shapes(), args.carry
    structure: PyTreeDef = jax.tree.structure(before)
    if structure != jax.tree.structure(after):
        raise ContractError(
            f"{broken}its step must return (h, state) as {layout(before)}, not {layout(after)}{at}"
        )
    want, got = layout(before), layout(after)
    if want != got:
        raise ContractError(f"{broken}its step must return (h, state) as {want}, not {got}{at}")
    rows = args.x.shape[0]
    if any(a.ndim < 1 or a.shape[0] != rows for a in jax.tree.leaves(before)):
        raise ContractError(
            f"{broken}every array carried, {want}, needs the batch ({rows} here) as its first axis"
        )
    try:
        reason = program.mapped()
        if reason is not None and _rows_mixed(program, args):
            raise MixedRows(reason)
    except MixedRows as error:
        if rows == 1:  # whatever it does to several rows, there is only one
            return str(error)
        raise ContractError(
            f"{broken}its step mixes the rows of a batch: {error}. A row must depend on itself "
            "alone; use axis=-1 for the units of a row"
        ) from error
    return reason


def _rows_mixed(program: Program, args: Arguments) -> bool:
    """Whether other numbers in the first row change any other row."""
    if any(isinstance(const, jax.core.Tracer) for const in program.consts):
        return False
    rng = np.random.default_rng(0)

    def draw(a: Array | jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(rng.integers(2**31)), a.shape)
        return jnp.asarray(
            rng.uniform(0.1, 0.9, a.shape) * (1 + 8 * (a.dtype.kind in "iu")), a.dtype
        )

    def other(a: Array) -> Array:
        return jnp.where((jnp.arange(len(a)) == 0).reshape(-1, *[1] * (a.ndim - 1)), draw(a), a)

    def rest(a: Array) -> np.ndarray:
        keys = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(a) if keys else a)[1:]

    with jax.ensure_compile_time_eval():
        drawn = jax.tree.map(draw, args)
        changed = drawn.params, *jax.tree.map(other, drawn[1:])
        pairs = zip(
            jax.tree.leaves(program(*drawn)), jax.tree.leaves(program(*changed)), strict=True
        )
        return not all(np.array_equal(rest(a), rest(b), equal_nan=True) for a, b in pairs)


def layout(carry: PyTree) -> str:
    """Names, types and shapes of the arrays of a carry."""
    leaves = jax.tree_util.tree_leaves_with_path(carry)
    return ", ".join(
        f"{jax.tree_util.keystr(path).lstrip('.')} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    )


def shapes_of(
    cell: Cell, batch: int, features: int, dtype: DTypeLike = jnp.float32, *, training: bool = False
) -> Arguments:
    """The arguments of one step, as shapes, with parameters as `Cell.init` draws them."""
    if not cell.gates and type(cell).transition is Cell.transition:
        raise ContractError(
            f'cell {type(cell).__name__} declares no gates; write e.g. gates = ("i", "f", "g", "o")'
        )

    def make() -> Arguments:
        params = cell.prepare(cell.init(jax.random.key(0), features, dtype))
        carry = start(cell, params, batch, features, dtype)
        inputs = {
            name: jnp.zeros((batch, cell.width(width, features)), dtype)
            for name, width in cell.step_inputs.items()
        }
        noise = {
            name: jnp.zeros((batch, cell.width(n.width, features)), dtype)
            for name, n in cell.noise.items()
            if training
        }
        return Arguments(params, jnp.zeros((batch, features), dtype), carry, inputs, noise)

    try:
        return jax.eval_shape(make)
    except UserError:
        raise
    except Exception as error:
        raise ContractError(
            f"cell {type(cell).__name__} breaks the contract: {_told(error)}"
        ) from error


def check_contract(cell: Cell) -> None:
    """Raise `UserError` if one step of ``cell`` does not fit the contract.

    Only shapes and dtypes are computed, so this costs milliseconds. The carry that a step returns
    must have the structure, shapes and dtypes of `Cell.initial_carry`, and no row of a batch may
    depend on another.

    Example:
        >>> class Halved(Cell):
        ...     gates = ("a",)
        ...     def step(self, pre, state, params):
        ...         return pre.a[:, ::2], state
        >>> check_contract(Halved(4))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lstmjax.errors.ContractError: ...
    """
    if isinstance(cell, type):
        raise ContractError(f"{cell.__name__} is the class; pass an instance, {cell.__name__}(100)")
    features = cell.hidden_size if "D" in cell.step_inputs.values() else 3
    for training in (False, True) if cell.noise else (False,):
        transition_program(cell, shapes_of(cell, 2, features, training=training))
