"""The checks, in the order in which a person wants to read them: causes before consequences.

A check is a function of a `Problem` that returns what it found in one line, or raises `Failure`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax.cells.base import Carry, Cell, start
from lstmjax.cells.contract import Arguments, check_contract, shapes_of, transition_program
from lstmjax.check import source
from lstmjax.check.problem import (
    EVERY_STEP,
    FAST,
    MIXED,
    B,
    Flags,
    Found,
    Moving,
    Problem,
    T,
    distance,
    features_of,
    make_problem,
    named,
    run_values,
    values,
    worst,
)
from lstmjax.check.report import Failure
from lstmjax.errors import UserError, first_line, user_line
from lstmjax.recurrence import (
    Associative,
    Derived,
    Engine,
    Keys,
    PallasGPU,
    PallasTPU,
    Scan,
    Workload,
    unroll,
)
from lstmjax.recurrence.gpu.plain import plain_kernel
from lstmjax.training.compilation import counting_compilations

DERIVED = Derived(chunk=3)
"""Three of seven steps a chunk, so that the last is not full."""
LONG = 2_000
"""Steps of the long sequence."""
EXTREME = 100.0
LOST = 1e-3
"""How far float32 may be from float64 before a cell counts as losing digits."""

Reference = Callable[..., Any]
"""``(params, x, h, state, **inputs) -> (h, state)`` in NumPy; see `lstmjax.check_cell`."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        cell: the cell.
        reference: the same step in NumPy.
    """

    cell: Cell
    reference: Reference | None = None

    @functools.cached_property
    def problem(self) -> Problem:
        """Numbers for it, in float64 if it can do that."""
        features = features_of(self.cell)
        try:
            with jax.enable_x64(True):
                training = bool(self.cell.noise)
                shapes = shapes_of(self.cell, 2, features, jnp.float64, training=training)
                transition_program(self.cell, shapes)
                return make_problem(self.cell, "float64")
        except Exception:  # whatever it is, check dtype tells
            return make_problem(self.cell, "float32")


class Check(NamedTuple):
    """One check.

    Attributes:
        name: what reports and ``skip`` call it.
        run: see the head of this module.
        needs: checks without which it means nothing.
    """

    name: str
    run: Callable[[Subject], str]
    needs: tuple[str, ...] = ("contract", "finite")


# --- The contract --------------------------------------------------------------------------------


def contract(subject: Subject) -> str:
    """Shapes, dtypes, rows: what can be seen without a number."""
    cell = subject.cell
    try:
        check_contract(cell)
    except UserError as error:
        cause = ""
        try:
            program, _ = source.fresh_trace(cell, features_of(cell), "float32")
            if (line := source.draws(program)) is not None:
                cause = f"it draws random numbers itself{line}: the same for every batch"
        except Exception:  # then the message itself has to do
            cause = ""
        raise Failure(str(error), cause, "" if not cause else _OWN_NOISE) from error
    return "one step takes and returns what the contract says"


def dtype(subject: Subject) -> str:
    """No less precise numbers inside than outside."""
    for name in ("float32", subject.problem.dtype):
        with jax.enable_x64(name == "float64"):
            program, _ = source.fresh_trace(subject.cell, subject.problem.features, name)
        if (found := source.narrowed(program, name)) is not None:
            raise Failure(
                f"with {name} inputs its step computes in {found}",
                "a cast, or a constant of that type",
                "take the type from an argument, a.astype(pre.f.dtype); for fast products there is "
                'precision="bfloat16"',
            )
    if subject.problem.dtype != "float64":
        raise Failure(
            "it does not run in float64",
            "float32 written down in init, initial_carry or step",
            "take the type from an argument (dtype=, x.dtype); gradients are checked in float32 "
            "only",
        )
    return "float32 and float64 throughout"


_OWN_NOISE = "declare noise = {...}: drawn from keys, for each row and step, none in evaluation"


def pure(subject: Subject) -> str:
    """The same program each time, from the same arguments."""
    cell, problem = subject.cell, subject.problem
    remedy = "a step must depend on its arguments and hyper-parameters alone"
    try:
        ours, theirs = (source.fresh_trace(cell, problem.features, problem.dtype)[0] for _ in "ab")
    except Exception as error:
        raise Failure(
            f"it could be traced once, but not again: {told(error)}",
            "it keeps a traced value in a global or an attribute",
            remedy,
        ) from error
    if (line := source.difference(ours, theirs)) is not None:
        raise Failure(
            f"traced twice, its step is two different programs{line}",
            "time, NumPy's random numbers, or a global that changes",
            f"{remedy}; random numbers are declared as noise = {{...}}",
        )
    if (line := source.draws(ours)) is not None:
        raise Failure(
            f"its step draws random numbers itself{line}: the same at every step, for every batch",
            "a key made inside of the step",
            _OWN_NOISE,
        )
    one, other = problem.run(), problem.run()
    if worst(one, other)[0] > 0:
        raise Failure(
            "twice the same arguments give different numbers", "a callback into Python", remedy
        )
    return "the same program whenever it is traced, the same numbers whenever it runs"


def compiled(subject: Subject) -> str:
    """A second call compiles nothing."""
    cell, problem = subject.cell, subject.problem
    again = dataclasses.replace(cell)
    if again != cell or hash(again) != hash(cell):
        fields = [f.name for f in dataclasses.fields(cell)]
        odd = [n for n in fields if getattr(again, n) != getattr(cell, n)]
        raise Failure(f"a copy of it is another cell: {', '.join(odd) or 'its hash'}")
    made = []
    for one in (cell, again, _anew(cell)):
        with counting_compilations() as found:
            x = problem.moving.x[::-1] if made else problem.moving.x
            unroll(one, problem.moving.params, x, inputs=problem.moving.inputs)
        made.append(found.programs.total())
    if any(made[1:]):
        raise Failure(
            f"a new {type(cell).__name__} of the same hyper-parameters compiles {max(made[1:])} "
            "programs again",
            "a hyper-parameter that equals no other of its kind: a lambda, an object",
            "use functions of a module, tuples, or frozen dataclasses as hyper-parameters",
        )
    return "a second call with the same shapes compiles nothing"


def _anew(cell: Cell) -> Cell:
    """As a user would build it again, if that takes no arguments that are not known."""
    try:
        built = type(cell)(cell.hidden_size)
    except Exception:
        return cell
    plain = (bool, int, float, str, tuple, type(None))
    fields = [f.name for f in dataclasses.fields(cell)]
    known = {n: getattr(cell, n) for n in fields if isinstance(getattr(cell, n), plain)}
    return dataclasses.replace(built, **known)


def init(subject: Subject) -> str:
    """Parameters come from the key alone, are finite and of the type asked for."""
    cell, problem = subject.cell, subject.problem

    def draw(seed: int) -> Any:
        return named(cell.init(jax.random.key(seed), problem.features, jnp.dtype(problem.dtype)))

    one, again = draw(0), draw(0)
    for name, a in one.items():
        if not np.array_equal(a, again[name]):
            raise Failure(
                f"the same key draws other numbers for {name}",
                "NumPy's random numbers, or a key made inside of init",
                "draw from the key that init is given",
            )
        if not np.all(np.isfinite(a)):
            raise Failure(f"init draws {name} with numbers that are not finite")
    other = draw(1)
    if one and all(np.array_equal(a, other[n]) for n, a in one.items() if np.ptp(a) > 0):
        if any(np.ptp(a) > 0 for a in one.values()):
            raise Failure(
                "every key draws the same parameters",
                "a key made inside of init",
                "draw from the key that init is given",
            )
    return f"{sum(np.size(a) for a in one.values()):,} parameters, all from the key"


# --- Numbers -------------------------------------------------------------------------------------


def finite(subject: Subject) -> str:
    """At ordinary numbers, values and gradients."""
    found = subject.problem.run()
    if told := _not_finite(found):
        raise _overflow(f"{told} at ordinary inputs", subject.problem, subject.problem.moving.x)
    return "values and gradients are finite at ordinary inputs"


def _not_finite(found: Found) -> str:
    odd = [name for name, a in named(found).items() if not np.all(np.isfinite(a))]
    return f"{_listed(odd)} {'is' if len(odd) == 1 else 'are'} not finite" if odd else ""


def _listed(names: Sequence[str]) -> str:
    shown = [n.replace("gradients.", "d ") for n in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _overflow(told: str, problem: Problem, x: Any, initial: Carry | None = None) -> Failure:
    """A failure with the operation that is to blame."""
    cell, m = problem.cell, problem.moving
    if initial is None:
        initial = Carry(m.h, _whole_state(problem, m.state))
    at = None
    try:
        noise: dict[str, Any] = {}
        inputs = {name: a[:, 0] for name, a in m.inputs.items()} | (
            {"x": x[:, 0]} if "x" in cell.step_inputs else {}
        )
        params = cell.prepare(m.params)
        args = jax.tree.map(jnp.asarray, Arguments(params, x[:, 0], initial, inputs, noise))
        xs = np.swapaxes(x[:, : 2 * T], 0, 1)
        at = source.first_not_finite(cell, args, xs)
    except Exception:
        at = None
    return Failure(
        told,
        at or "",
        "keep arguments of exp and log, and divisors, in range: subtract a maximum, add 1e-6; "
        "under jnp.where guard the argument, too",
    )


def _whole_state(problem: Problem, state: Any) -> Any:
    return jax.tree.map(
        lambda a, b: b if a is None else a, state, problem.fixed, is_leaf=lambda a: a is None
    )


def used(subject: Subject) -> str:
    """Every gate, parameter, input and noise that is declared does something."""
    cell, problem = subject.cell, subject.problem
    m, base = problem.moving, problem.run().values

    def idle(moving: Moving, keys: Keys | None = None) -> bool:
        return worst(problem.run(moving=moving, keys=keys).values, base)[0] == 0

    unused = [f"gate {gate!r}" for gate in cell.gates if idle(_without_gate(cell, m, gate))]
    for group in ("units", "step"):
        for name in m.params.get(group, {}):
            changed = {**m.params[group], name: _other(m.params[group][name])}
            if idle(m._replace(params={**m.params, group: changed})):
                unused.append(f"parameter {name!r}")
    known = {"kernel", "recurrent_kernel", "bias", "recurrent_bias", "units", "step"}
    for name in sorted({*m.params} - known):
        changed = jax.tree.map(_other, m.params[name])
        if idle(m._replace(params={**m.params, name: changed})):
            unused.append(f"parameter {name!r}")
    for name in m.inputs:
        if idle(m._replace(inputs={**m.inputs, name: _other(m.inputs[name])})):
            unused.append(f"step input {name!r}")
    if cell.noise and problem.keys is not None:
        rows = jax.random.split(jax.random.key(7), B)
        if idle(m, Keys(rows, problem.keys.shared)):
            unused.append(f"noise {_listed(list(cell.noise))}")
    if idle(m._replace(x=_other(m.x))):
        unused.append("the input x")
    if unused:
        raise Failure(
            f"nothing depends on {_listed(unused)}",
            "declared, but its step does not use it, or multiplies it with zero",
            "use it in the step, or take it out of the declaration",
        )
    return "every gate, parameter and input that is declared has an effect"


def _other(a: Any) -> Any:
    """Other numbers of the same sign."""
    ramp = np.linspace(0.55, 1.45, np.size(a)).reshape(np.shape(a)) if np.size(a) > 1 else 1.4
    return np.asarray(a * ramp, np.asarray(a).dtype)


def _without_gate(cell: Cell, m: Moving, gate: str) -> Moving:
    """The same with other weights for one gate."""
    params, units = dict(m.params), cell.hidden_size
    columns = {
        "kernel": cell.gates,
        "recurrent_kernel": cell.recurrent,
        "bias": cell.biased,
        "recurrent_bias": cell.recurrent_bias_gates,
    }
    for name, gates in columns.items():
        a = params.get(name)
        if a is None or gate not in gates or a.shape[-1] != len(gates) * units:
            continue
        a, k = np.array(a), gates.index(gate)
        a[..., k * units : (k + 1) * units] = _other(a[..., k * units : (k + 1) * units])
        params[name] = a
    return m._replace(params=params)


def state(subject: Subject) -> str:
    """What is carried changes, is read, and is handed on under its own name."""
    cell, problem = subject.cell, subject.problem
    fields = cell.State._fields
    if not fields:
        return "nothing but h is carried"
    base = problem.run()
    whole = _whole_state(problem, problem.moving.state)
    told = []
    for name in fields:
        begun, final = getattr(whole, name), getattr(base.final.state, name)
        if _same(begun, final):
            told.append(f"state {name!r} never changes: the step returns what it was given")
            continue
        part = getattr(problem.moving.state, name)
        if part is None:
            continue
        m = problem.moving
        changed = m._replace(state=m.state._replace(**{name: jax.tree.map(_other, part)}))
        if np.array_equal(problem.run(moving=changed).hs, base.hs):
            told.append(f"state {name!r} never reaches the output: what it holds is forgotten")
    if told:
        raise Failure(
            "; ".join(told),
            "the step computes the new state without the old one, or the output without it",
            "c = f * state.c + ..., and return it as self.State(c)",
        )
    program, args = source.fresh_trace(cell, problem.features, problem.dtype)
    reads = source.state_reads(program, args)
    for k, one in enumerate(fields):
        for other in fields[k + 1 :]:
            crossed = other in reads[one] and one in reads[other]
            if crossed and one not in reads[one] and other not in reads[other]:
                order = ", ".join(fields)
                raise Failure(
                    f"states {one!r} and {other!r} change places at every step",
                    f"returned in another order than class State has them: {order}",
                    f"name them: self.State({', '.join(f'{f}={f}' for f in fields)})",
                )
    return f"{', '.join(fields)}: changed by every step, and read by later ones"


def _same(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def rows(subject: Subject) -> str:
    """A row alone gives what it gives in a batch."""
    problem = subject.problem
    base = problem.run()
    for k in range(B):
        row = slice(k, k + 1)
        m = problem.moving
        alone = m._replace(**{n: jax.tree.map(lambda a: a[row], getattr(m, n)) for n in _BY_ROW})
        keys = problem.keys
        if keys is not None:
            keys = Keys(keys.rows[row], keys.shared)
        fixed = jax.tree.map(lambda a: a[row], problem.fixed)
        flags = Flags(*(f[row] for f in EVERY_STEP))
        found = run_values(problem.cell, Scan(), alone, fixed, flags, keys)
        error, what = worst(found, jax.tree.map(lambda a: a[row], base.values))
        if error > _allowed(problem):
            raise Failure(
                f"row {k} alone gives another {_value(what)} than in a batch of {B} "
                f"({error:.1e} apart)",
                "the step reads the size of the batch, or numbers rows",
                "compute a row from itself alone; axis=-1 are the units of a row",
            )
    return f"a row gives the same alone and in a batch of {B}"


_BY_ROW = ("x", "inputs", "h", "state")


def _value(name: str) -> str:
    return {"0": "hs"}.get(name, name.replace("1.", "final "))


def _allowed(problem: Problem, *, gradient: bool = False, steps: int = T) -> float:
    """How far two ways to compute the same may be apart, of the largest number: rounding only."""
    if problem.dtype == "float64":
        return 1e-10
    gates, units = len(problem.cell.gates), problem.cell.hidden_size
    terms = steps * (problem.features + units) + gradient * (steps * gates * units + B * steps)
    return float(16 * 2.0**-24 * math.sqrt(terms))


def _agree(told: str, a: Any, b: Any, problem: Problem, cause: str, remedy: str = "") -> None:
    """Raise `Failure` where two results differ; `Found`s with their gradients."""
    for gradient in (False, True):
        if gradient and not isinstance(a, Found):
            return
        both = (x.gradients if gradient else x[:2] for x in (a, b))
        error, what = worst(*both)
        if error > _allowed(problem, gradient=gradient):
            name = f"the gradient of {what}" if gradient else _value(what)
            raise Failure(f"{told}: {name} differs by {error:.1e}", cause, remedy)


def carried(subject: Subject) -> str:
    """One step at a time, and two halves, give what one run gives."""
    cell, problem = subject.cell, subject.problem
    m = problem.moving
    cause = "something is carried beside h and state, or a start is not taken from the carry"
    whole = problem.evaluate() if problem.keys is not None else problem.run().values
    carry, hs = Carry(m.h, _whole_state(problem, m.state)), []
    for t in range(T):
        inputs = {name: a[:, t] for name, a in m.inputs.items()}
        carry = cell(m.params, m.x[:, t], carry, inputs=inputs)
        hs.append(carry.h)
    _agree(
        "one step at a time, the carry handed on, is not the whole run",
        (np.stack(hs, 1), carry),
        whole,
        problem,
        cause,
    )
    half = T // 2
    late = np.arange(T)[None] >= half + np.zeros((B, 1), int)
    first = problem.run(flags=EVERY_STEP._replace(mask=~late))
    floats = jax.tree.map(lambda a: a if a.dtype.kind == "f" else None, first.final.state)
    others = jax.tree.map(lambda a: None if a.dtype.kind == "f" else a, first.final.state)
    middle = dataclasses.replace(problem, fixed=others)
    second = middle.run(
        moving=m._replace(h=first.final.h, state=floats), flags=EVERY_STEP._replace(mask=late)
    )
    joined = np.where(late[..., None], second.hs, first.hs)
    _agree(
        "a sequence cut in two, the carry handed on, is not the whole run",
        (joined, second.final),
        problem.run().values,
        problem,
        cause,
    )
    return "one step at a time, and two halves, give what one run gives"


def masks(subject: Subject) -> str:
    """Masked steps have no influence, whatever they hold."""
    problem, m = subject.problem, subject.problem.moving
    clean = problem.run(DERIVED, flags=MIXED)
    if told := _not_finite(clean):
        raise Failure(f"with masked steps {told}", "a start, or a step from it, is not finite")
    garbage = np.where(MIXED.mask[..., None], m.x, np.nan)
    dirty = problem.run(DERIVED, flags=MIXED, moving=m._replace(x=garbage))
    _agree("what masked steps hold has an influence", dirty, clean, problem, "")
    if np.any(clean.hs[~MIXED.mask]):
        raise Failure("a masked step has an output that is not zero")
    lengths = EVERY_STEP._replace(mask=np.arange(T)[None] < np.array([[4], [T], [0]]))
    short, full = problem.run(DERIVED, flags=lengths), problem.run(DERIVED)
    _agree(
        "a padded row is not the row without its padding",
        (short.hs[0, :4], Carry(short.final.h[0], ())),
        (full.hs[0, :4], Carry(_last(full.hs[0, :4], short.final.h[0]), ())),
        problem,
        "",
    )
    if told := _not_finite(short):
        raise Failure(f"with a row that is masked throughout {told}")
    return "masked steps have no influence; a row of nothing is harmless"


def _last(hs: Any, like: Any) -> Any:
    return hs[-1].reshape(np.shape(like))


def resets(subject: Subject) -> str:
    """A reset in the middle makes two sequences of one."""
    cell, problem = subject.cell, subject.problem
    m, half = problem.moving, T // 2
    flags = EVERY_STEP._replace(resets=np.tile(np.arange(T) == half, (B, 1)))
    both = problem.run(DERIVED, flags=flags)
    if told := _not_finite(both):
        raise Failure(f"after a reset {told}", "initial_carry, or a step from it, is not finite")
    begun = start(cell, m.params, B, problem.features, jnp.dtype(problem.dtype))
    late = np.tile(np.arange(T) >= half, (B, 1))
    floats = jax.tree.map(lambda a: a if a.dtype.kind == "f" else None, begun.state)
    others = jax.tree.map(lambda a: None if a.dtype.kind == "f" else a, begun.state)
    again = dataclasses.replace(problem, fixed=others).run(
        moving=m._replace(h=begun.h, state=floats), flags=EVERY_STEP._replace(mask=late)
    )
    if any(noise.every == "sequence" for noise in cell.noise.values()):
        return "finite after a reset; what is drawn once a sequence is drawn anew"
    _agree(
        "after a reset it is not as from the start",
        (both.hs[:, half:], both.final),
        (again.hs[:, half:], again.final),
        problem,
        "initial_carry gives another carry than a run starts from",
    )
    return "a reset makes two sequences of one"


def directions(subject: Subject) -> str:
    """Backwards is forwards on the turned sequence."""
    cell, problem = subject.cell, subject.problem
    m = problem.moving
    back = problem.run(DERIVED, reverse=True, flags=MIXED)
    if cell.noise:
        plain = problem.run(reverse=True, flags=MIXED)
        _agree("backwards the engines differ", back, plain, problem, "")
        return "both engines agree backwards"
    turned = m._replace(
        x=m.x[:, ::-1], inputs=jax.tree.map(lambda a: np.asarray(a[:, ::-1]), m.inputs)
    )
    entering = np.roll(MIXED.resets[:, ::-1], 1, axis=1)
    entering[:, 0] = False
    flags = Flags(MIXED.mask[:, ::-1], entering)
    forth = problem.run(moving=turned, flags=flags)
    assert forth.gradients is not None
    _agree(
        "backwards is not forwards on the turned sequence",
        (back.hs, back.final),
        (forth.hs[:, ::-1], forth.final),
        problem,
        "",
    )
    return "backwards is forwards on the turned sequence"


# --- Gradients -----------------------------------------------------------------------------------


def gradient(subject: Subject) -> str:
    """JAX' gradient is that of the values, by central differences."""
    problem = subject.problem
    double = problem.dtype == "float64"
    step, tolerance = (1e-5, 1e-6) if double else (1e-2, 5e-2)
    found = problem.run()
    assert found.gradients is not None
    rng, bad = np.random.default_rng(5), []
    scale = max(np.max(np.abs(a), initial=0.0) for a in jax.tree.leaves(found.gradients))
    leaves, structure = jax.tree.flatten(problem.moving)
    slopes = jax.tree.leaves(found.gradients)
    for k, name in enumerate(named(problem.moving)):
        direction = rng.choice([-1.0, 1.0], np.shape(leaves[k])) * rng.uniform(
            0.5, 1, np.shape(leaves[k])
        )
        size = step * max(np.max(np.abs(leaves[k]), initial=0.0), 0.1)

        def along(sign: float, k: int = k, by: Any = size * direction) -> float:
            moved = [*leaves]
            moved[k] = np.asarray(leaves[k] + sign * by, leaves[k].dtype)
            return _weighted(problem.run(moving=jax.tree.unflatten(structure, moved)))

        measured = (along(1.0) - along(-1.0)) / (2 * size)
        said = float(np.sum(slopes[k] * direction))
        most = max(abs(measured), abs(said), scale * 1e-3)
        if not abs(measured - said) <= tolerance * most:
            bad.append(f"along {name} JAX says {said:.4g}, differences say {measured:.4g}")
    if bad:
        program, _ = source.fresh_trace(subject.cell, problem.features, problem.dtype)
        suspects = source.blocked(program)
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise Failure(
            f"it is not that of the values: {bad[0]}{more}",
            ", ".join(suspects) or "a kink or a jump at these numbers: max, where, argmax",
            "mend the derivative; if it is meant (a straight-through estimator, say), skip the "
            "check: gradient",
        )
    return f"JAX' gradient is that of finite differences, to {tolerance:.0e}, in {problem.dtype}"


def _weighted(found: Found) -> float:
    """The sum that `Problem.run` differentiates."""
    floats = [a for a in jax.tree.leaves(found.values) if a.dtype.kind == "f"]
    places = (np.arange(a.size, dtype=np.float64).reshape(a.shape) for a in floats)
    return float(
        sum(
            np.sum((np.cos(1.7 * p + k) + 0.1) * a)
            for k, (p, a) in enumerate(zip(places, floats, strict=True))
        )
    )


def engines(subject: Subject) -> str:
    """Every engine that runs it against the plain scan, values and gradients."""
    problem = subject.problem
    plain = problem.run(flags=MIXED)
    single = problem.as_dtype("float32")
    work = Workload(
        "cpu", problem.dtype, "float32", T, B, problem.features, training=_trains(problem)
    )._replace(resets=True)
    told = ["scan"]
    own: tuple[Engine, ...] = (DERIVED, Associative())
    for engine in own:
        if engine.refusal(problem.cell, work) is not None:
            continue
        _engine_agrees(engine.name, problem.run(engine, flags=MIXED), plain, problem)
        if engine.name not in told:
            told.append(engine.name)
    kernels: dict[str, Engine] = {
        "TPU kernel": PallasTPU(interpret=True),
        "GPU kernel": PallasGPU(interpret=plain_kernel),
    }
    with jax.enable_x64(False):
        serving = {
            name: engine
            for name, engine in kernels.items()
            if engine.refusal(problem.cell, work._replace(dtype="float32")) is None
        }
        rounded = single.run(DERIVED, flags=MIXED) if serving else None
        for name, engine in serving.items():
            found = single.run(engine, flags=MIXED)
            assert rounded is not None
            _kernel_agrees(name, found, rounded, plain, single)
            told.append(f"{name} (interpreted)")
    return f"the same values and gradients from {', '.join(told)}"


def _trains(problem: Problem) -> bool:
    return bool(problem.cell.noise)


def _engine_agrees(name: str, a: Found, b: Found, problem: Problem) -> None:
    _agree(
        f"{name} and the plain scan differ",
        a,
        b,
        problem,
        "the step is another program when it is traced again (see pure), or an operation whose "
        "result depends on the order of sums",
        "if pure and rows pass, this is a fault of lstmjax: please report it with the cell",
    )


def _kernel_agrees(name: str, a: Found, rounded: Found, exact: Found, problem: Problem) -> None:
    """No further from float64 than four times the derived engine in float32, or rounding."""
    for part in ("values", "gradients"):
        ours, single, double = (named(getattr(f, part)) for f in (a, rounded, exact))
        for what, b in double.items():
            most = max(
                _allowed(problem, gradient=part == "gradients"), 4 * distance(single[what], b)
            )
            if (error := distance(ours[what], b)) > most:
                raise Failure(
                    f"the {name} and the plain scan differ: {part} {what} by {error:.1e}",
                    "an operation of the step that loses digits in float32",
                    "if float32 passes, this is a fault of lstmjax: please report it with the cell",
                )


def float32(subject: Subject) -> str:
    """float32 against float64."""
    problem = subject.problem
    if problem.dtype != "float64":
        return "compared with nothing: there is no float64"
    exact = problem.run(flags=MIXED)
    with jax.enable_x64(False):
        found = problem.as_dtype("float32").run(DERIVED, flags=MIXED)
    errors = {
        "values": worst(found.values, exact.values),
        "gradients": worst(found.gradients, exact.gradients),
    }
    for part, (error, what) in errors.items():
        if error > LOST:
            raise Failure(
                f"{part} {what} are {error:.1e} from those in float64",
                "a difference of large numbers, or a function where it is steep",
                "rearrange it: log1p, expm1, log_sigmoid, logaddexp, a maximum subtracted",
            )
    most = max(error for error, _ in errors.values())
    return f"within {most:.0e} of float64, gradients included"


def extremes(subject: Subject) -> str:
    """Finite at inputs of ±100."""
    with jax.enable_x64(False):
        problem = subject.problem.as_dtype("float32")
        x = np.float32(EXTREME) * np.sign(problem.moving.x)
        found = problem.run(DERIVED, flags=MIXED, moving=problem.moving._replace(x=x))
        if told := _not_finite(found):
            raise _overflow(f"{told} at inputs of ±{EXTREME:.0f}", problem, x)
    return f"values and gradients are finite at inputs of ±{EXTREME:.0f}"


def long(subject: Subject) -> str:
    """Neither infinite nor exploding over a long sequence, as initialised."""
    cell, problem = subject.cell, subject.problem
    with jax.enable_x64(False):
        rng = np.random.default_rng(2)
        params = cell.init(jax.random.key(0), problem.features)
        x = rng.normal(size=(2, LONG, problem.features)).astype(np.float32)
        inputs = {
            name: rng.uniform(0.1, 1, (2, LONG, a.shape[-1])).astype(np.float32)
            for name, a in problem.moving.inputs.items()
        }
        peaks, final, slope = jax.tree.map(np.asarray, _long(cell, params, x, inputs))
        odd = not all(np.all(np.isfinite(a)) for a in jax.tree.leaves((peaks, slope)))
        early, late = peaks[LONG // 4], peaks[-1]
        if odd or late > 1e3 * max(early, 1.0):
            where = next((t for t, a in enumerate(peaks) if not np.isfinite(a)), None)
            if where is not None:
                told = f"the output is not finite from step {where + 1} of {LONG:,}"
            elif late > 1e3 * max(early, 1.0):
                told = f"the largest output grows from {early:.2g} to {late:.2g}"
            else:
                told = "the gradient is not finite"
            raise Failure(
                f"over {LONG:,} steps {told}",
                "something is multiplied at every step by more than one",
                "bound what is carried: a gate between 0 and 1, a normalisation, a contraction",
            )
    return f"finite and bounded over {LONG:,} steps, gradient included"


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _long(cell: Cell, params: Any, x: Any, inputs: Any) -> Any:
    def run(params: Any, x: Any) -> Any:
        hs, final = unroll(cell, params, x, inputs=inputs, engine=Derived())
        peaks = jax.lax.cummax(jnp.max(jnp.abs(hs), axis=(0, 2)))
        return jnp.mean(hs), (peaks, final)

    slope, (peaks, final) = jax.grad(run, argnums=(0, 1), has_aux=True)(params, x)
    return peaks, final, slope


def mapped(subject: Subject) -> str:
    """Under jax.vmap over parameters, as for many seeds in one program."""
    cell, problem = subject.cell, subject.problem
    m = problem.moving
    both = jax.tree.map(lambda a: np.stack([a, _other(a)]), m.params)

    @functools.partial(jax.jit, compiler_options=FAST)
    @jax.vmap
    def together(params: Any) -> Any:
        moving = m._replace(params=params)
        return values(cell, DERIVED, moving, problem.fixed, EVERY_STEP, problem.keys)

    found = together(both)
    for k in range(2):
        params = jax.tree.map(lambda a, k=k: a[k], both)
        _agree(
            "jax.vmap over parameters is not the loop",
            jax.tree.map(lambda a, k=k: a[k], found),
            problem.run(moving=m._replace(params=params)).values,
            problem,
            "an operation with a rule for batches of its own that is wrong",
        )
    return "jax.vmap over parameters, as for many seeds at once, is the loop"


def reference(subject: Subject) -> str:
    """The user's own NumPy function, step by step."""
    cell, problem = subject.cell, subject.problem
    assert subject.reference is not None
    m = problem.moving
    hs, final = problem.evaluate() if problem.keys is not None else problem.run().values
    params = jax.tree.map(np.asarray, cell.prepare(m.params))
    h, state, seen = m.h, _whole_state(problem, m.state), []
    for t in range(T):
        more = {name: a[:, t] for name, a in m.inputs.items()}
        more |= {f"d_{name}": np.full((B, 1), n.evaluation) for name, n in cell.noise.items()}
        try:
            h, state = tuple(subject.reference(params, m.x[:, t], h, state, **more))[:2]
            state = cell.State(*state)
        except Exception as error:
            raise Failure(
                f"the reference does not run: {told(error)}",
                "",
                "write it as reference(params, x, h, state) -> (h, state) for rows of x (B, D)",
            ) from error
        error = distance(h, hs[:, t])
        seen.append(h)
        if np.shape(h) != np.shape(hs[:, t]) or error > _allowed(problem):
            raise Failure(
                f"from step {t + 1} on the reference gives another h ({error:.1e} apart)",
                "another formula, order of gates or of states: kernel columns come in the order "
                f"of gates, {', '.join(cell.gates)}",
                "compare the two step by step; the reference gets float64",
            )
    for name, a in named(final.state).items():
        if (error := distance(named(state)[name], a)) > _allowed(problem):
            raise Failure(
                f"the reference ends with another {name} ({error:.1e} apart)",
                f"its state is not in the order of State: {', '.join(cell.State._fields)}",
            )
    return f"the reference gives the same over {T} steps, in {problem.dtype}"


def told(error: BaseException) -> str:
    """An exception in one line, with the user's own."""
    return f"{type(error).__name__}: {first_line(error)[:200]}{user_line(error)}"


CHECKS: tuple[Check, ...] = (
    Check("contract", contract, ()),
    Check("finite", finite, ("contract",)),
    Check("pure", pure, ("contract",)),
    Check("dtype", dtype, ("contract",)),
    Check("init", init, ("contract",)),
    Check("used", used),
    Check("state", state),
    Check("rows", rows),
    Check("carried", carried),
    Check("masks", masks),
    Check("resets", resets),
    Check("directions", directions),
    Check("gradient", gradient, ("contract", "finite", "pure")),
    Check("engines", engines, ("contract", "finite", "pure")),
    Check("float32", float32),
    Check("extremes", extremes),
    Check("long", long),
    Check("vmap", mapped),
    Check("compiled", compiled, ("contract",)),
    Check("reference", reference),
)
"""All of them, in order."""
