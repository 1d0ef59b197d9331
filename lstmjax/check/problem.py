"""A cell and the numbers that it is tried on: one small batch, compiled once for all checks."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from lstmjax.cells.base import Carry, Cell, start
from lstmjax.recurrence import Engine, Keys, Scan, unroll
from lstmjax.recurrence.noise import as_keys

B, T = 3, 7
FAST: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiler options: these programs run for less time than it takes to make them."""


class Moving(NamedTuple):
    """What values are computed from and gradients taken of, as pytrees of float arrays."""

    params: Any
    x: Any
    inputs: dict[str, Any]
    h: Any
    state: Any


class Flags(NamedTuple):
    """What says which steps count, ``(B, T)``; given always, so that one program serves all."""

    mask: Any
    resets: Any


EVERY_STEP = Flags(np.ones((B, T), bool), np.zeros((B, T), bool))
MIXED = Flags(  # row 1 has a reset on a masked step, row 2 one on the first step
    np.array([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1, 1]], bool),
    np.array([[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0]], bool),
)


class Found(NamedTuple):
    """What a recurrence gave.

    Attributes:
        hs: ``(B, T, H)``.
        final: the last carry.
        gradients: a `Moving`, of a random weighting of all outputs; None where none were asked for.
    """

    hs: Any
    final: Carry
    gradients: Moving | None = None

    @property
    def values(self) -> tuple[Any, Carry]:
        """Without the gradients."""
        return self.hs, self.final


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=FAST)
def _run(
    cell: Cell, engine: Engine, reverse: bool, moving: Moving, fixed: Any, flags: Any, keys: Any
) -> Found:
    def outputs(m: Moving) -> tuple[list[Array], Any]:
        hs, final = values(cell, engine, m, fixed, flags, keys, reverse=reverse)
        leaves = jax.tree.leaves((hs, final))
        return [a for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)], (hs, final)

    outs, pull_back, both = jax.vjp(outputs, moving, has_aux=True)
    (gradients,) = pull_back([weights(jnp, k, a) for k, a in enumerate(outs)])
    hs, final = both
    return Found(hs, final, gradients)


def values(
    cell: Cell, engine: Engine | None, m: Moving, fixed: Any, flags: Any, keys: Any, **how: Any
) -> tuple[Any, Carry]:
    """By `unroll`."""
    initial = Carry(m.h, _merged(m.state, fixed))
    options = {} if flags is None else flags._asdict()
    return unroll(
        cell,
        m.params,
        m.x,
        initial,
        inputs=m.inputs,
        keys=keys,
        engine=engine,
        **options,
        **how,
    )


def _merged(floats: PyTree, others: PyTree) -> PyTree:
    """One tree of two that have None where the other has arrays."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, floats, others, is_leaf=lambda a: a is None
    )


def _parted(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The opposite: floating-point arrays, and all others."""

    def those(floating: bool) -> PyTree:
        return jax.tree.map(lambda a: a if (a.dtype.kind == "f") == floating else None, tree)

    return those(True), those(False)


run_values = jax.jit(values, static_argnums=(0, 1), compiler_options=FAST)


def weights(numpy: Any, number: int, like: Any) -> Any:
    """Of the outputs in the sum that is differentiated: none is zero, no two are alike."""
    places = numpy.arange(like.size, dtype=like.dtype).reshape(like.shape)
    return numpy.cos(1.7 * places + number) + 0.1


@dataclasses.dataclass(frozen=True)
class Problem:
    """A cell, numbers for it, and how to run them.

    Attributes:
        cell: the cell.
        features: D.
        dtype: ``"float64"``, or ``"float32"`` where the cell knows nothing else.
        moving: parameters near those that ``init`` draws, inputs, initial carry.
        fixed: arrays of the carry that are no floating-point numbers; None in place of the others.
        keys: where it has noise or a ``prepare`` of its own.
    """

    cell: Cell
    features: int
    dtype: str
    moving: Moving
    fixed: Any
    keys: Keys | None

    def run(
        self,
        engine: Engine = Scan(recompute=False),  # noqa: B008
        *,
        reverse: bool = False,
        flags: Flags = EVERY_STEP,
        moving: Moving | None = None,
        keys: Keys | None = None,
    ) -> Found:
        """Values and gradients, as NumPy arrays."""
        moving, keys = moving or self.moving, keys or self.keys
        found = _run(self.cell, engine, reverse, moving, self.fixed, flags, keys)
        return jax.tree.map(np.asarray, found)

    @property
    def quiet(self) -> "Problem":
        """The same in evaluation, without noise."""
        return dataclasses.replace(self, keys=None)

    @property
    def initial(self) -> Carry:
        """The carry that runs start from."""
        return Carry(self.moving.h, _merged(self.moving.state, self.fixed))

    @property
    def start(self) -> Carry:
        """The carry that the cell itself starts from."""
        begun = start(self.cell, self.moving.params, B, self.features, jnp.dtype(self.dtype))
        return jax.tree.map(np.asarray, begun)

    def begun(self, carry: Carry) -> "Problem":
        """The same from another carry."""
        floats, fixed = _parted(carry.state)
        return dataclasses.replace(
            self, moving=self.moving._replace(h=carry.h, state=floats), fixed=fixed
        )

    def alone(self, row: int) -> Found:
        """The values of one row, run without the others, by the plain scan."""

        def one(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda a: a[row : row + 1], tree)

        m = self.moving
        moving = Moving(m.params, *(one(part) for part in m[1:]))
        keys = None if self.keys is None else Keys(one(self.keys.rows), self.keys.shared)
        found = run_values(self.cell, Scan(), moving, one(self.fixed), one(EVERY_STEP), keys)
        return Found(*jax.tree.map(np.asarray, found))

    def as_dtype(self, dtype: str) -> "Problem":
        """The same numbers, rounded."""
        moving = jax.tree.map(lambda a: np.asarray(a, dtype), self.moving)
        return dataclasses.replace(self, moving=moving, dtype=dtype)


def features_of(cell: Cell) -> int:
    """A number of features that the cell takes."""
    return cell.hidden_size if {"H", "D"} & {*map(str, cell.step_inputs.values())} else 3


def make_problem(cell: Cell, dtype: str) -> Problem:
    """Random numbers for a cell, always the same."""
    rng, features = np.random.default_rng(0), features_of(cell)

    def near(a: Any) -> Any:
        """Of the sign that it has, for what must be positive, say; but nowhere zero."""
        a = np.asarray(a)
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        u = rng.uniform(-0.3, 0.3, a.shape)
        return np.where(a == 0, u, a * (1 + u)).astype(dtype)

    params = jax.tree.map(near, cell.init(jax.random.key(0), features, dtype))
    begun = start(cell, params, B, features, jnp.dtype(dtype))
    h, state = jax.tree.map(near, begun)
    floats, others = _parted(state)
    inputs = {
        name: rng.uniform(0.1, 1, (B, T, cell.width(width, features))).astype(dtype)
        for name, width in cell.step_inputs.items()
        if name != "x"
    }
    x = rng.normal(0, 1, (B, T, features)).astype(dtype)
    random = bool(cell.noise) or type(cell).prepare is not Cell.prepare
    keys = as_keys(jax.random.key(1), B) if random else None
    return Problem(cell, features, dtype, Moving(params, x, inputs, h, floats), others, keys)


def named(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by a name that a person reads: ``params.units.p_o``."""

    def plain(key: Any) -> str:
        for attribute in ("name", "key", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(map(plain, path)): a for path, a in leaves}


def distance(a: Any, b: Any) -> float:
    """max |a - b| / max |b|; infinite where either is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return float("inf")
    difference = np.max(np.abs(a - b), initial=0.0)
    return float(difference / max(np.max(np.abs(b), initial=0.0), np.finfo(np.float64).tiny))


def worst(a: PyTree, b: PyTree) -> tuple[float, str]:
    """The largest `distance` of the arrays of two trees, and the array's name."""
    ours, theirs = named(a), named(b)
    return max(((distance(ours[n], theirs[n]), n) for n in ours), default=(0.0, ""))
