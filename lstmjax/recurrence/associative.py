"""Parallel over time: cells whose state is affine in the state before, as an associative scan.

Such a cell has no product of h, and every array of its state is, given those solved before it,

    s_t = a_t ⊙ s_{t-1} + b_t            or            m_t = max(a_t + m_{t-1}, b_t),

with a_t and b_t made of inputs and parameters (minGRU, SRU, QRNN, linear recurrent units, the
memory of an mLSTM, whose stabiliser is of the second kind). That is found in the traced step, not
declared. Arrays that depend on one another are solved together.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jaxtyping import PyTree

from lstmjax.cells.base import Carry, Cell
from lstmjax.cells.contract import Arguments, shapes_of, transition_program
from lstmjax.precision import make_dot
from lstmjax.recurrence.derived.body import plain_product
from lstmjax.recurrence.engine import (
    Engine,
    How,
    Inputs,
    Outputs,
    Workload,
    cleared,
    select_rows,
    step_arguments,
)
from lstmjax.recurrence.scan import harmless
from lstmjax.traced import (
    AsTraced,
    Atom,
    Hook,
    Program,
    Value,
    callee,
    is_literal,
    needed,
    shape_of,
)

FEW = 2**17
"""Rows times units up to which a device is idle most of the time in a loop over steps."""

LONG = 256
"""Steps from which that costs more than the scan's passes over memory."""


@dataclasses.dataclass(frozen=True)
class Associative(Engine):
    """All steps at once, in memory for all of them; derivatives of any kind and order by JAX.

    On CPUs a loop over time is faster at every length that was tried (docs/performance.md), so
    nobody gets this engine there without asking. On accelerators it is taken for `LONG` sequences
    of `FEW` rows and units, where a loop is bound by the time to launch a step; that bound is an
    estimate.

    Example:
        >>> from lstmjax.cells import Cell
        >>> from lstmjax.recurrence import unroll
        >>> class Leaky(Cell):
        ...     gates = ("a", "f")
        ...     recurrent_gates = ()
        ...     uses_h = True
        ...     def step(self, pre, state, params, h):
        ...         f = jax.nn.sigmoid(pre.f)
        ...         return f * h + (1 - f) * pre.a, state
        >>> cell = Leaky(5)
        >>> params = cell.init(jax.random.key(0), input_size=3)
        >>> unroll(cell, params, jnp.ones((2, 9, 3)), engine="associative")[0].shape
        (2, 9, 5)
    """

    name: ClassVar[str] = "associative"

    def refusal(self, cell: Cell, work: Workload) -> str | None:
        """Why its step is not affine."""
        args = work.args or shapes_of(cell, 2, work.features, training=work.training)
        found = affine(transition_program(cell, args), args)
        return found if isinstance(found, str) else None

    def offers(self, cell: Cell, work: Workload) -> bool:
        """On accelerators, for long sequences of few rows."""
        sizes = work.steps, work.batch
        if work.platform == "cpu" or not all(isinstance(n, int) for n in sizes):
            return False
        few = work.batch * cell.hidden_size <= FEW
        return work.steps >= LONG and few and self.refusal(cell, work) is None

    def __call__(self, cell: Cell, inputs: Inputs, how: How) -> tuple[Outputs, Carry]:
        """Run ``cell`` over time."""
        args = step_arguments(cell, inputs)
        program = transition_program(cell, args)
        stages = affine(program, args)
        assert not isinstance(stages, str), stages
        if how.reverse:
            inputs = _turned(inputs)
        run = _Run(cell, program, inputs, how)
        outs, final = run.solve(stages)
        if how.reverse:
            outs = jax.tree.map(lambda a: a[::-1], outs)
        return outs, final


def _turned(inputs: Inputs) -> Inputs:
    """In the order of the run."""
    turn = functools.partial(jax.tree.map, lambda a: a[::-1])
    noises = inputs.noises
    if noises is not None:
        steps, sequences = turn((noises.steps, noises.sequences))
        noises = noises._replace(steps=steps, sequences=sequences)
    xs, more, mask, resets = turn((inputs.xs, inputs.inputs, inputs.mask, inputs.resets))
    return inputs._replace(xs=xs, inputs=more, noises=noises, mask=mask, resets=resets)


# --- What a step does to its carry ---------------------------------------------------------------


class Stage(NamedTuple):
    """Arrays of the carry, by their number among its leaves, that are solved together.

    Attributes:
        leaves: one, or several that depend on one another.
        maximum: of the second kind, ``max(a + m, b)``.
    """

    leaves: tuple[int, ...]
    maximum: bool


Form = Literal["none", "itself", "shifted", "affine", "maximum", "other"]
"""How a value depends on the arrays of a stage, element by element: ``shifted`` is ``s + b``."""

_MAXIMUM: frozenset[Form] = frozenset({"none", "itself", "shifted", "maximum"})
_AFFINE: frozenset[Form] = frozenset({"none", "itself", "shifted", "affine"})


def affine(program: Program, args: Arguments) -> list[Stage] | str:
    """The stages in which a step can be solved for all of time, or why it cannot."""
    paths, _ = jax.tree_util.tree_flatten_with_path(args.carry)
    first = len(jax.tree.leaves((args.params, args.x)))
    variables = program.closed.jaxpr.invars[first : first + len(paths)]
    reads = _reads(program.closed.jaxpr, variables)
    stages = []
    for leaves in _components(reads):
        own = {id(variables[leaf]) for leaf in leaves}
        outs = _forms(program.closed.jaxpr, own)
        forms = {outs[leaf] for leaf in leaves}
        alike = len({shape_of(variables[leaf]) for leaf in leaves}) == 1
        if forms <= _AFFINE and alike:
            stages.append(Stage(leaves, maximum=False))
        elif forms <= _MAXIMUM and len(leaves) == 1:
            stages.append(Stage(leaves, maximum=True))
        else:
            names = (jax.tree_util.keystr(paths[leaf][0]).lstrip(".") for leaf in leaves)
            return f"its step is not affine in {', '.join(names)}"
    return stages


def _reads(jaxpr: Jaxpr, variables: Sequence[Var]) -> list[set[int]]:
    """For each array of the new carry, those of the old one that it depends on."""
    known = {id(var): {number} for number, var in enumerate(variables)}
    for eqn in needed(jaxpr):
        found = [known.get(id(a), set()) for a in eqn.invars if not is_literal(a)]
        known.update(dict.fromkeys(map(id, eqn.outvars), set().union(*found)))
    return [set() if is_literal(a) else known.get(id(a), set()) for a in jaxpr.outvars]


def _components(reads: list[set[int]]) -> list[tuple[int, ...]]:
    """Arrays that something depends on, in groups that depend on one another, the first first."""
    reach = [set(r) for r in reads]
    for _ in reads:
        reach = [r.union(*(reach[k] for k in r)) for r in reach]
    fed = sorted(set().union(*reads), key=lambda k: (len(reach[k]), k))
    groups: list[tuple[int, ...]] = []
    for k in fed:
        together = tuple(j for j in fed if j == k or (j in reach[k] and k in reach[j]))
        if together not in groups:
            groups.append(together)
    return groups


def _forms(jaxpr: Jaxpr, own: set[int], given: Sequence[Form] | None = None) -> list[Form]:
    """How the outputs depend on the variables ``own``, or on arguments of given forms."""
    forms: dict[int, Form] = dict.fromkeys(own, "itself")
    if given is not None:
        forms = dict(zip(map(id, jaxpr.invars), given, strict=True))

    def form(atom: Atom) -> Form:
        return "none" if is_literal(atom) else forms.get(id(atom), "none")

    for eqn in needed(jaxpr):
        ins = [form(a) for a in eqn.invars]
        if set(ins) == {"none"} or not ins:
            continue
        if eqn.primitive.name in ("jit", "pjit", "closed_call"):
            outs = _forms(callee(eqn)[0], set(), ins)
        else:
            outs = [_form(eqn, ins)] * len(eqn.outvars)
        forms.update(zip(map(id, eqn.outvars), outs, strict=True))
    return [form(a) for a in jaxpr.outvars]


def _form(eqn: JaxprEqn, ins: list[Form]) -> Form:
    """The form of an operation's result."""
    name, some = eqn.primitive.name, {f for f in ins if f != "none"}
    shape = shape_of(eqn.outvars[0])
    moved = any(shape_of(a) != shape for a, f in zip(eqn.invars, ins, strict=True) if f != "none")
    if moved or "other" in some:
        return "other"
    alone = len(some) == 1 and ins.count("none") == len(ins) - 1
    if name in ("convert_element_type", "copy", "copy_p", "pvary", "broadcast_in_dim", "reshape"):
        return ins[0]
    if name in ("add", "add_any", "sub"):
        if alone and ins[-1] == "none" and some <= {"itself", "shifted"}:
            return "shifted"
        if alone and some == {"maximum"} and (name != "sub" or ins[1] == "none"):
            return "maximum"
        if alone and name != "sub" and some <= {"itself", "shifted"}:
            return "shifted"
        return "affine" if some <= _AFFINE else "other"
    if name == "neg" or (name == "mul" and alone) or (name == "div" and ins[1] == "none"):
        return "affine" if some <= _AFFINE else "other"
    if name == "max":
        return "maximum" if some <= _MAXIMUM else "other"
    if name == "select_n" and ins[0] == "none":
        if some <= _AFFINE:
            return "affine"
        return "maximum" if some <= _MAXIMUM else "other"
    return "other"


# --- Solving -------------------------------------------------------------------------------------


class _Max(NamedTuple):
    """``max(a + m, b)`` as a value of a running program."""

    a: Array
    b: Array


_Now = tuple[Array, dict[str, Array], dict[str, Array]]
"""x, step inputs and noise of one step."""

_Affine = tuple[list[list[Array]], list[Array]]
"""A and b of all steps, or of some together, array by array of the carry."""


class _Run:
    """One recurrence; arrays of the carry are numbered, ``(T, B, ...)`` over time."""

    def __init__(self, cell: Cell, program: Program, inputs: Inputs, how: How) -> None:
        self.program, self.inputs, self.how = program, inputs, how
        self.steps = inputs.xs.shape[0]
        self.initial, self.structure = jax.tree.flatten(inputs.initial)
        self.start = jax.tree.leaves(inputs.start)
        noises = inputs.noises
        drawn = {} if noises is None else noises.draw(cell, inputs.xs.dtype, 0, self.steps)
        self.over_time = inputs.xs, inputs.inputs, drawn
        self.product = functools.partial(plain_product, make_dot(how.precision))
        self.before: dict[int, Array] = {}

    def solve(self, stages: list[Stage]) -> tuple[Outputs, Carry]:
        """Outputs and final carry."""
        final = list(self.initial)
        for stage in stages:
            solved = self.maximum(stage) if stage.maximum else self.affine(stage)
            for leaf, after in zip(stage.leaves, solved, strict=True):
                final[leaf] = after[-1]
                first = self.initial[leaf][None]
                before = jnp.concatenate([first, after[:-1]])
                if self.inputs.resets is not None:
                    before = select_rows(self.inputs.resets, self._all(self.start[leaf]), before)
                self.before[leaf] = before
        new = jax.tree.leaves(self.every_step(self.evaluate, self.carry({})))
        solved_leaves = {leaf for stage in stages for leaf in stage.leaves}
        for leaf, value in enumerate(new):
            if leaf not in solved_leaves:
                final[leaf] = self.last(leaf, value)
        outs = jax.tree.unflatten(self.structure, new)
        outs = outs if self.how.states else outs._replace(state=None)
        return cleared(self.inputs.mask, outs), jax.tree.unflatten(self.structure, final)

    def _all(self, a: Array) -> Array:
        """The same at all steps."""
        return jnp.broadcast_to(a[None], (self.steps, *a.shape))

    def carry(self, own: dict[int, Array]) -> Carry:
        """Before each step: what is solved, ``own``, and zeros that nobody reads."""
        known = self.before | own
        zeros = [jnp.zeros((self.steps, *a.shape), a.dtype) for a in self.initial]
        leaves = [known.get(k, zero) for k, zero in enumerate(zeros)]
        carry = jax.tree.unflatten(self.structure, leaves)
        if self.inputs.mask is None:
            return carry
        rest = jax.vmap(harmless)(self.inputs.mask, carry)
        others = jax.tree.leaves(rest)
        leaves = [a if k in own else b for k, (a, b) in enumerate(zip(leaves, others, strict=True))]
        return jax.tree.unflatten(self.structure, leaves)

    def every_step(self, function: Callable[..., PyTree], carry: Carry) -> PyTree:
        """Of the arguments of all steps."""
        return jax.vmap(function)(self.over_time, carry)

    def evaluate(self, now: _Now, carry: Carry) -> Carry:
        """The carry after a step."""
        x, more, noise = now
        given = Arguments(self.inputs.params, x, carry, more, noise)
        return self.program.evaluate(jax.tree.leaves(given), None, self.product)

    def affine(self, stage: Stage) -> list[Array]:
        """Solve ``s_t = A_t s_{t-1} + b_t``: the arrays after each step."""
        leaves = stage.leaves
        zeros = {leaf: self._all(jnp.zeros_like(self.initial[leaf])) for leaf in leaves}

        def new(now: _Now, carry: Carry) -> tuple[list[Array], list[list[Array]]]:
            held = jax.tree.leaves(carry)

            def of(own: list[Array]) -> list[Array]:
                full = list(held)
                for leaf, a in zip(leaves, own, strict=True):
                    full[leaf] = a
                after = self.evaluate(now, jax.tree.unflatten(self.structure, full))
                return [jax.tree.leaves(after)[leaf] for leaf in leaves]

            b, push = jax.linearize(of, [held[leaf] for leaf in leaves])
            unit = [jnp.zeros_like(a) for a in b]
            columns = [
                push(
                    [
                        jnp.ones_like(a) if k == j else z
                        for k, (a, z) in enumerate(zip(b, unit, strict=True))
                    ]
                )
                for j in range(len(leaves))
            ]
            return b, [list(row) for row in zip(*columns, strict=True)]

        offsets, factors = self.every_step(new, self.carry(zeros))
        a, b = self._with_flags(stage, factors, offsets)
        first = [self.initial[leaf][None] for leaf in leaves]
        begun = [
            sum((f[:1] * s for f, s in zip(row, first, strict=True)), x[:1])
            for row, x in zip(a, b, strict=True)
        ]
        b = [jnp.concatenate([one, x[1:]]) for one, x in zip(begun, b, strict=True)]

        def combine(one: _Affine, two: _Affine) -> _Affine:
            (a1, b1), (a2, b2) = one, two
            n = range(len(b1))
            a = [[_total(a2[i][k] * a1[k][j] for k in n) for j in n] for i in n]
            return a, [b2[i] + _total(a2[i][k] * b1[k] for k in n) for i in n]

        return lax.associative_scan(combine, (a, b))[1]

    def _with_flags(self, stage: Stage, a: list[list[Array]], b: list[Array]) -> _Affine:
        """Masked steps pass the carry on; resets put their own in its place."""
        n, mask, resets = range(len(b)), self.inputs.mask, self.inputs.resets
        if mask is not None:
            a = [
                [select_rows(mask, a[i][j], jnp.full_like(a[i][j], float(i == j))) for j in n]
                for i in n
            ]
            b = [select_rows(mask, x, jnp.zeros_like(x)) for x in b]
        if resets is not None:
            start = [self._all(self.start[leaf]) for leaf in stage.leaves]
            begun = [b[i] + _total(a[i][j] * start[j] for j in n) for i in n]
            b = [select_rows(resets, begun[i], b[i]) for i in n]
            a = [[select_rows(resets, jnp.zeros_like(x), x) for x in row] for row in a]
        return a, b

    def maximum(self, stage: Stage) -> list[Array]:
        """Solve ``m_t = max(a_t + m_{t-1}, b_t)``."""
        (leaf,) = stage.leaves
        mask, resets, least = self.inputs.mask, self.inputs.resets, -jnp.inf

        def new(now: _Now, carry: Carry) -> tuple[Array, Array]:
            held: list[Array | _Max] = jax.tree.leaves(carry)
            a = jax.tree.leaves(carry)[leaf]
            held[leaf] = _Max(jnp.zeros_like(a), jnp.full_like(a, least))
            x, more, noise = now
            ins = [
                *jax.tree.leaves((self.inputs.params, x)),
                *held,
                *jax.tree.leaves((more, noise)),
            ]
            found = _evaluate_maximum(self.program, ins, self.product, leaf)
            return found.a, found.b

        own = {leaf: self._all(jnp.zeros_like(self.initial[leaf]))}
        a, b = self.every_step(new, self.carry(own))
        if mask is not None:
            a = select_rows(mask, a, jnp.zeros_like(a))
            b = select_rows(mask, b, jnp.full_like(b, least))
        if resets is not None:
            begun = jnp.maximum(a + self._all(self.start[leaf]), b)
            b = select_rows(resets, begun, b)
            a = select_rows(resets, jnp.full_like(a, least), a)
        b = b.at[0].max(a[0] + self.initial[leaf])

        def combine(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
            return one[0] + two[0], jnp.maximum(two[0] + one[1], two[1])

        return [lax.associative_scan(combine, (a, b))[1]]

    def last(self, leaf: int, after: Array) -> Array:
        """What is carried out of the last step, of an array that no step reads."""
        mask, resets = self.inputs.mask, self.inputs.resets
        if mask is None:
            return after[-1]
        happens = mask if resets is None else mask | resets
        at = self.steps - 1 - jnp.argmax(happens[::-1], axis=0)
        place = at.reshape(1, -1, *[1] * (after.ndim - 2))
        found = jnp.take_along_axis(after, place, axis=0)[0]
        if resets is not None:
            valid = jnp.take_along_axis(mask, at[None], axis=0)[0]
            found = select_rows(valid, found, self.start[leaf])
        return select_rows(happens.any(0), found, self.initial[leaf])


def _total(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def _evaluate_maximum(
    program: Program, ins: Sequence[Array | _Max], product: Hook, leaf: int
) -> _Max:
    """Run a program on arrays, one of which is a `_Max`: the new array of its place."""

    def take(eqn: JaxprEqn, values: list[Value]) -> list[Value] | None:
        arrays = [value.array for value in values]
        if not any(isinstance(a, _Max) for a in arrays):
            return product(eqn, values)
        if eqn.primitive.name in ("jit", "pjit", "closed_call"):
            return runner.evaluate(*callee(eqn), values)
        return [held(_on_maximum(eqn.primitive.name, arrays, eqn))]

    def held(array: Array | _Max) -> Value:  # which a runner hands on, and does not look at
        return Value(cast(Array, array))

    runner = AsTraced(take)
    jaxpr = program.closed.jaxpr
    wanted = [k == leaf for k in range(len(jaxpr.outvars))]
    outs = runner.evaluate(jaxpr, program.consts, [held(a) for a in ins], wanted)
    found = outs[leaf].array
    assert isinstance(found, _Max)
    return found


def _on_maximum(name: str, arrays: Sequence[Array | _Max], eqn: JaxprEqn) -> _Max:
    """An operation that leaves a `_Max` one."""
    shape = shape_of(eqn.outvars[0])

    def both(x: Array | _Max) -> _Max:
        if isinstance(x, _Max):
            return x
        x = jnp.broadcast_to(x, shape)
        return _Max(jnp.full_like(x, -jnp.inf), x)

    if name == "max":
        (a, b), (c, d) = map(both, arrays)
        return _Max(jnp.maximum(a, c), jnp.maximum(b, d))
    if name in ("add", "add_any", "sub"):
        one = next(x for x in arrays if isinstance(x, _Max))
        other = next(x for x in arrays if not isinstance(x, _Max))
        other = -other if name == "sub" else other
        return _Max(one.a + other, one.b + other)
    if name == "select_n":
        which, cases = arrays[0], [both(x) for x in arrays[1:]]
        assert not isinstance(which, _Max)
        a, b = (lax.select_n(which, *part) for part in zip(*cases, strict=True))
        return _Max(a, b)
    return both(arrays[0])  # what changes neither shape nor number
