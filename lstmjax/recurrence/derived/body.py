"""A cell's transition cut at its products, and what its derivative leaves of them.

Products with parameters are what a recurrence spends its time on. `Body` finds them in the traced
transition and hands each to whoever runs it. Of the gradient little stays in the loop over time:
that of a product's result comes out of every step, and that of its parameters is then one product
over many steps.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.typing import ArrayLike
from jaxtyping import PyTree

from lstmjax.cells.contract import Arguments
from lstmjax.precision import PRODUCT, Dot
from lstmjax.traced import (
    AnyArray,
    Atom,
    Program,
    Runner,
    Value,
    aval_of,
    bind_to_derive,
    callee,
    is_literal,
    live,
    needed,
    shape_of,
)

Kind = Literal["x", "h", "other"]
"""What a product multiplies: the input, h_{t-1} as it is, or something computed."""


class Factor(NamedTuple):
    """One product of a site.

    Attributes:
        kind: of its left side.
        left: the variable that holds it.
        weight: the variable that holds its right side, which depends on parameters alone.
        left_axes: of the left side but the rows: those shared with the weight, then those summed.
        weight_axes: of the weight: shared, then free, then summed.
    """

    kind: Kind
    left: Var
    weight: Var
    left_axes: tuple[tuple[int, ...], tuple[int, ...]]
    weight_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def row(self) -> int:
        """Which axis of the left side the rows are."""
        taken = {a for part in self.left_axes for a in part}
        return next(a for a in range(len(taken) + 1) if a not in taken)


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """Products with parameters, and a bias perhaps, whose sum is all that is used of them.

    Attributes:
        factors: several, or a bias, only where each is an ordinary product of two matrices.
        out: the variable that holds the sum.
        bias: the variable that holds the bias, ``(N,)`` or ``(1, N)``.
    """

    factors: tuple[Factor, ...]
    out: Var
    bias: Var | None = None

    @property
    def row(self) -> int:
        """Which axis of the sum the rows are."""
        return len(self.factors[0].left_axes[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sum without its rows: shared axes, then free ones."""
        shape = shape_of(self.out)
        return tuple(n for axis, n in enumerate(shape) if axis != self.row)


_Item = JaxprEqn | Site
"""What a step is made of."""

_Outs = tuple[list[ArrayLike], list[list[Array]]]
"""Leaves of the new carry, and the left sides of each site."""


class Body:
    """A transition as what depends on parameters alone, products, and the rest."""

    def __init__(self, program: Program, args: Arguments) -> None:
        self.program, self.args = program, args
        jaxpr = program.closed.jaxpr
        counts = [len(jax.tree.leaves(part)) for part in args]
        self.parameters = jaxpr.invars[: counts[0]]
        self.arguments = jaxpr.invars[counts[0] :]  # x, carry, inputs, noise
        self.rows = program.rows[counts[0] :]
        self._parts(jaxpr)
        self._find_sites(jaxpr)

    def _parts(self, jaxpr: Jaxpr) -> None:
        """Sort the operations: on parameters alone, on numbers alone, on rows."""
        kind = dict.fromkeys(map(id, (*self.parameters, *jaxpr.constvars)), "parameters")
        kind |= dict.fromkeys(map(id, self.arguments), "rows")
        self.prelude, self.eqns = [], []
        for eqn in needed(jaxpr):
            kinds = {kind[id(a)] for a in eqn.invars if not is_literal(a)}
            of = next((k for k in ("rows", "parameters") if k in kinds), "numbers")
            of = "rows" if eqn.effects else of
            kind.update(dict.fromkeys(map(id, eqn.outvars), of))
            if of != "rows":
                self.prelude.append(eqn)
            if of != "parameters" or eqn.primitive.name == "broadcast_in_dim":
                self.eqns.append(eqn)
        self.eqns = live(self.eqns, jaxpr.outvars)
        self._kind = kind

    def _find_sites(self, jaxpr: Jaxpr) -> None:
        """Take products with parameters out of the operations."""
        uses = collections.Counter(
            id(a) for a in (*(a for eqn in self.eqns for a in eqn.invars), *jaxpr.outvars)
        )
        made = {id(var): eqn for eqn in self.eqns for var in eqn.outvars}
        found: dict[int, Site] = {}  # by the variable that holds the result
        items: dict[int, _Item] = {}  # by the equation that comes to be one
        for eqn in self.eqns:
            items[id(eqn)] = eqn
            if (factor := self._factor(eqn)) is not None:
                site = Site((factor,), eqn.outvars[0])
                found[id(site.out)] = items[id(eqn)] = site
            elif eqn.primitive.name in ("add", "add_any"):
                alone = [a for a in eqn.invars if id(a) in found and uses[id(a)] == 1]
                if total := self._sum(eqn, [found[id(a)] for a in alone], made):
                    for a in alone:
                        del items[id(made[id(a)])], found[id(a)]
                    found[id(total.out)] = items[id(eqn)] = total
        self.items = list(items.values())
        self.sites = [item for item in self.items if isinstance(item, Site)]
        weights = {id(f.weight): f.weight for site in self.sites for f in site.factors}
        self.weights = list(weights.values())
        biases = {id(s.bias): s.bias for s in self.sites if s.bias is not None}
        self.biases = list(biases.values())
        self.items = [
            item for item in self.items if isinstance(item, Site) or self._kept(item, jaxpr)
        ]
        written = {id(a) for item in self.items for a in _writes(item)}
        written |= set(map(id, self.arguments))
        reads = [a for item in self.items for a in _reads(item)] + list(jaxpr.outvars)
        constants = {id(a): a for a in reads if not is_literal(a) and id(a) not in written}
        self.constants = list(constants.values())

    def _kept(self, eqn: JaxprEqn, jaxpr: Jaxpr) -> bool:
        """Whether somebody reads what an operation gives, now that biases are parts of sites."""
        reads = {id(a) for item in self.items for a in _reads(item)} | set(map(id, jaxpr.outvars))
        return bool(eqn.effects) or any(id(var) in reads for var in eqn.outvars)

    def _sum(self, eqn: JaxprEqn, sites: list["Site"], made: dict[int, JaxprEqn]) -> "Site | None":
        """What adds two plain products without a bias, or a bias to products; else None."""
        out, factors = eqn.outvars[0], tuple(f for site in sites for f in site.factors)
        if not sites or any(site.bias is not None or not _plain(site.factors) for site in sites):
            return None
        if len(sites) == 2:
            return Site(factors, out)
        other = next(a for a in eqn.invars if a is not sites[0].out)
        if not is_literal(other) and self._kind.get(id(other)) == "parameters":
            maker = made.get(id(other))
            if maker is not None and maker.primitive.name == "broadcast_in_dim":
                other = maker.invars[0]
            width = shape_of(out)[-1]
            if isinstance(other, Var) and shape_of(other) in ((width,), (1, width)):
                return Site(factors, out, other)
        return None

    def _factor(self, eqn: JaxprEqn) -> Factor | None:
        """What a product is, if it is one of rows with parameters."""
        if eqn.params.get("name") != PRODUCT:
            return None
        left, right = eqn.invars
        if not (isinstance(left, Var) and isinstance(right, Var)):
            return None
        if self._kind[id(left)] != "rows" or self._kind[id(right)] == "rows":
            return None
        inner, _ = callee(eqn)
        dots = [e for e in inner.eqns if e.primitive.name == "dot_general"]
        if len(inner.eqns) != 1 or len(dots) != 1 or list(dots[0].invars) != list(inner.invars):
            return None
        (summed, shared) = dots[0].params["dimension_numbers"]
        free = [a for a in range(aval_of(left).ndim) if a not in summed[0] and a not in shared[0]]
        if len(free) != 1 or shape_of(left)[free[0]] != self.args.x.shape[0]:
            return None
        weight_free = [
            a for a in range(aval_of(right).ndim) if a not in summed[1] and a not in shared[1]
        ]
        left_axes = tuple(map(int, shared[0])), tuple(map(int, summed[0]))
        axes = tuple(map(int, shared[1])), tuple(weight_free), tuple(map(int, summed[1]))
        kind = self._kind_of(left, left_axes)
        return Factor(kind, left, right, left_axes, axes)

    def _kind_of(self, left: Atom, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Kind:
        """What a left side is; h cut into heads is h."""
        x, h = self.arguments[:2]
        if left is x:
            return "x"
        made = next((eqn for eqn in self.eqns if any(left is var for var in eqn.outvars)), None)
        heads = made is not None and made.primitive.name == "reshape" and made.invars[0] is h
        return "h" if left is h or (heads and axes == ((1,), (2,))) else "other"

    # What depends on parameters alone

    def before(
        self, params: PyTree, consts: Sequence[AnyArray], *, whole: bool
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Weights, biases and constants of the loop, from the parameters.

        Args:
            params: the parameters.
            consts: of the program.
            whole: constants as they were traced; else axes along which they are constant may have
                size 1.
        """
        runner = Runner("last")
        jaxpr = self.program.closed.jaxpr
        args = [*consts, *jax.tree.leaves(params)]
        known = {
            id(var): Value(a)
            for var, a in zip((*jaxpr.constvars, *self.parameters), args, strict=True)
        }
        runner.execute(self.prelude, known)
        weights = [runner.whole(known[id(a)], aval_of(a)).array for a in self.weights]
        biases = [runner.whole(known[id(a)], aval_of(a)).array for a in self.biases]
        constants = [known[id(a)] for a in self.constants]
        if whole:
            pairs = zip(constants, self.constants, strict=True)
            constants = [runner.whole(v, aval_of(a)) for v, a in pairs]
        return weights, biases, [jnp.asarray(value.array) for value in constants]

    # The step, and its derivative

    def forward(
        self,
        runner: Runner,
        constants: Sequence[AnyArray],
        args: Sequence[AnyArray],
        product: Callable[[Site, list[Value]], Value],
    ) -> list[Array]:
        """Run one step: the leaves of the new carry, rows last."""
        known = {id(a): Value(v) for a, v in zip(self.constants, constants, strict=True)}
        arguments = zip(self.arguments, args, self.rows, strict=True)
        known |= {id(a): runner.enter(v, row) for a, v, row in arguments}
        for item in self.items:
            if isinstance(item, Site):
                known[id(item.out)] = product(item, [known[id(f.left)] for f in item.factors])
            else:
                runner.execute([item], known)
        outs = self.program.closed.jaxpr.outvars
        return [runner.leave(runner.read(a, known), 0, aval_of(a)) for a in outs]

    @functools.cached_property
    def backward(self) -> "Backward":
        """The derivative of one step, traced when it is first needed."""
        return Backward(self)


def _plain(factors: Sequence[Factor]) -> bool:
    """Whether products are those of two matrices, rows first."""
    axes = ((), (1,)), ((), (1,), (0,))
    return all((f.left_axes, f.weight_axes) == axes for f in factors)


def _reads(item: _Item) -> Sequence[Atom]:
    return [f.left for f in item.factors] if isinstance(item, Site) else item.invars


def _writes(item: _Item) -> Sequence[Var]:
    return [item.out] if isinstance(item, Site) else item.outvars


class Backward:
    """The derivative of one step as operations.

    ``constants, arguments, d carry -> d constants, d arguments, d product results, left sides``,
    the last for factors whose left side is neither the input nor h.
    """

    def __init__(self, body: Body) -> None:
        self.body = body
        like = jax.ShapeDtypeStruct
        constants = [like(shape_of(a), aval_of(a).dtype) for a in body.constants]
        arguments = [like(shape_of(a), aval_of(a).dtype) for a in body.arguments]
        outs = [like(shape_of(a), aval_of(a).dtype) for a in body.program.closed.jaxpr.outvars]
        self.recorded = [
            (number, k)
            for number, site in enumerate(body.sites)
            for k, f in enumerate(site.factors)
            if f.kind == "other"
        ]
        count = len(constants), len(arguments), len(body.sites)

        def run(
            constants: list[Array], arguments: list[Array], d_outs: list[Array]
        ) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
            zeros = [jnp.zeros(shape_of(site.out), aval_of(site.out).dtype) for site in body.sites]
            floating = [_is_float(a) for a in (*constants, *arguments)]
            every = [*constants, *arguments]

            def step(moving: list[Array], zeros: list[Array]) -> _Outs:
                rest = iter(moving)
                full = [next(rest) if f else a for a, f in zip(every, floating, strict=True)]
                return _evaluate(body, full[: count[0]], full[count[0] :], zeros)

            moving = [a for a, f in zip(every, floating, strict=True) if f]
            _, pull_back, left = jax.vjp(step, moving, zeros, has_aux=True)
            d_moving, d_zeros = pull_back(d_outs)
            rest = iter(d_moving)
            d_every = [next(rest) if f else jnp.zeros(()) for f in floating]
            kept = [left[number][k] for number, k in self.recorded]
            return d_every[: count[0]], d_every[count[0] :], d_zeros, kept

        with jax.disable_jit(False):  # products are found as calls
            self.closed = jax.make_jaxpr(run)(constants, arguments, outs)
        self.pieces = self._find_pieces(sum(count[:2]), count[2])

    def moves_inputs(self, inputs: int) -> list[bool]:
        """Whether the input, and each of the step inputs, has a gradient but through products."""
        made = {id(var): eqn for eqn in self.closed.jaxpr.eqns for var in eqn.outvars}
        outs = self.closed.jaxpr.outvars[len(self.body.constants) :]
        carries = len(self.body.program.closed.jaxpr.outvars)

        def zero(atom: Atom) -> bool:
            if is_literal(atom):
                return not np.any(atom.val)
            eqn = made.get(id(atom))
            return (
                eqn is not None and eqn.primitive.name == "broadcast_in_dim" and zero(eqn.invars[0])
            )

        return [not zero(a) for a in (outs[0], *outs[1 + carries : 1 + carries + inputs])]

    def _find_pieces(self, before: int, sites: int) -> dict[int, int]:
        """Concatenations that make the gradient of a site's result, by variable."""
        outs = self.closed.jaxpr.outvars[before : before + sites]
        wanted = {id(a): n for n, a in enumerate(outs) if not is_literal(a)}
        return {
            id(eqn.outvars[0]): wanted[id(eqn.outvars[0])]
            for eqn in self.closed.jaxpr.eqns
            if eqn.primitive.name == "concatenate"
            and id(eqn.outvars[0]) in wanted
            and eqn.params["dimension"] == len(shape_of(eqn.outvars[0])) - 1
        }


def _evaluate(
    body: Body, constants: list[Array], arguments: list[Array], zeros: list[Array]
) -> _Outs:
    """One step as it was traced, zeros added to what products give: outputs, left sides."""
    known = dict(zip(map(id, body.constants), constants, strict=True))
    known |= dict(zip(map(id, body.arguments), arguments, strict=True))
    left: list[list[Array]] = []
    for item in body.items:
        if isinstance(item, Site):
            left.append([known[id(f.left)] for f in item.factors])
            known[id(item.out)] = _cut(item, len(left) - 1, tuple(left[-1])) + zeros[len(left) - 1]
        else:
            ins = [a.val if is_literal(a) else known[id(a)] for a in item.invars]
            known.update(zip(map(id, item.outvars), bind_to_derive(item, ins), strict=True))
    outs = body.program.closed.jaxpr.outvars
    return [a.val if is_literal(a) else known[id(a)] for a in outs], left


def _is_float(a: Array) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def _cut(site: Site, number: int, left: tuple[Array, ...]) -> Array:
    """Stands for a site's products in a traced derivative: a call that names it."""
    like = aval_of(site.out)
    shapes = [(a.shape, a.dtype) for a in left]

    @jax.custom_vjp
    def product(*left: Array) -> Array:
        return _call(f"{PRODUCT}:{number}:forward", [(like.shape, like.dtype)], left)[0]

    def pull_back(_: None, d: Array) -> tuple[Array | None, ...]:
        some = [k for k, f in enumerate(site.factors) if f.kind != "x"]
        found = _call(f"{PRODUCT}:{number}:back", [shapes[k] for k in some], (d,)) if some else []
        rest = iter(found)
        return tuple(next(rest) if k in some else None for k in range(len(left)))

    product.defvjp(lambda *left: (product(*left), None), pull_back)
    return product(*left)


def _call(
    name: str, shapes: Sequence[tuple[tuple[int, ...], np.dtype]], args: Sequence[Array]
) -> list[Array]:
    def stand_in(*args: Array) -> list[Array]:
        return [jnp.zeros(*shape) for shape in shapes]

    stand_in.__name__ = stand_in.__qualname__ = name
    return jax.jit(stand_in)(*args)


def plain_product(dot: Dot, eqn: JaxprEqn, ins: list[Value]) -> list[Value] | None:
    """The products of a traced transition by ``dot``, for a runner that goes as traced."""
    if eqn.params.get("name") != PRODUCT:
        return None
    inner, _ = callee(eqn)
    (summed, shared) = inner.eqns[0].params["dimension_numbers"]
    one = dot
    for k in range(len(shared[0])):
        axes = [sorted(side)[k] - k for side in shared]
        one = jax.vmap(one, (axes[0], axes[1]))
    if len(summed[0]) != 1:
        raise NotImplementedError("a product that sums along several axes")
    return [Value(one(*(value.array for value in ins)))]
