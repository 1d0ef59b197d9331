"""Checks of what a cell is: its contract, its program, its parameters, its state."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lstmjax.cells.base import Cell
from lstmjax.cells.contract import check_contract
from lstmjax.check import source
from lstmjax.check.problem import B, Found, Moving, Numbers, Problem, features_of, named, worst
from lstmjax.check.report import Failure
from lstmjax.check.subject import Subject, listed, told
from lstmjax.errors import UserError
from lstmjax.recurrence import Keys, unroll
from lstmjax.training.compilation import counting_compilations

_OWN_NOISE = "declare noise = {...}: drawn from keys, for each row and step, none in evaluation"


def contract(subject: Subject) -> str:
    """Shapes, dtypes, rows: what can be seen without a number."""
    cell, cause = subject.cell, ""
    try:
        check_contract(cell)
    except UserError as error:
        try:
            program, _ = source.fresh_trace(cell, features_of(cell), "float32")
            if (line := source.draws(program)) is not None:
                cause = f"it draws random numbers itself{line}: the same for every batch"
        except UserError:  # then it cannot be traced, and the message says why
            pass
        raise Failure(str(error), cause, _OWN_NOISE if cause else "") from error
    return "one step takes and returns what the contract says"


def pure(subject: Subject) -> str:
    """The same program each time, the same numbers from the same arguments."""
    cell, problem = subject.cell, subject.problem
    remedy = "let a step depend on its arguments and hyper-parameters alone"
    try:
        ours, theirs = (source.fresh_trace(cell, problem.features, problem.dtype)[0] for _ in "ab")
    except Exception as error:
        raise Failure(
            f"it could be traced once, but not again: {told(error)}",
            "it keeps a traced value in a global",
            remedy,
        ) from error
    if (line := source.difference(ours, theirs)) is not None:
        raise Failure(
            f"traced twice, its step is two different programs{line}",
            "the time, NumPy's random numbers, or a global that the step changes",
            f"{remedy}; for random numbers {_OWN_NOISE}",
        )
    if (line := source.draws(ours)) is not None:
        raise Failure(
            f"its step draws random numbers itself{line}: the same at every step, for every batch",
            "a key made inside of the step",
            _OWN_NOISE,
        )
    twice = (
        (
            "prepare",
            lambda: cell.prepare(problem.moving.params),
            "NumPy's random numbers, a counter",
        ),
        ("initial_carry", lambda: problem.start, "NumPy's random numbers, a counter"),
        ("the step", problem.run, "a callback into Python"),
    )
    for what, call, cause in twice:
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in _pairs(call(), call())):
            raise Failure(f"called twice, {what} gives different numbers", cause, remedy)
    return "the same program whenever it is traced, the same numbers whenever it runs"


def _pairs(a: PyTree, b: PyTree) -> Iterator[tuple[Numbers, Numbers]]:
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def dtype(subject: Subject) -> str:
    """No less precise numbers inside than outside."""
    kind = subject.problem.dtype
    for name in dict.fromkeys(("float32", kind)):
        with jax.enable_x64(name == "float64"):
            program, _ = source.fresh_trace(subject.cell, subject.problem.features, name)
        if (found := source.narrowed(program, name)) is not None:
            raise Failure(
                f"with {name} inputs its step computes in {found}",
                "a cast, or a constant of that type",
                "take the type from an argument, a.astype(pre.f.dtype); for fast products there is "
                'precision="bfloat16"',
            )
    if kind != "float64":
        raise Failure(
            "it does not run in float64, so its gradient cannot be checked well",
            "float32 written down in init, initial_carry or step",
            "take the type from an argument: dtype, x.dtype; if you skip this check, the gradient "
            "is checked to 5 % in float32",
        )
    return "float32 and float64 throughout"


def init(subject: Subject) -> str:
    """Parameters come from the key alone, and are finite."""
    cell, problem = subject.cell, subject.problem

    def draw(seed: int) -> dict[str, Numbers]:
        return named(cell.init(jax.random.key(seed), problem.features, jnp.dtype(problem.dtype)))

    one, again, other = draw(0), draw(0), draw(1)
    remedy = "draw from the key that init is given"
    for name, a in one.items():
        if not np.array_equal(a, again[name], equal_nan=True):
            cause = "NumPy's random numbers"
            raise Failure(f"the same key draws other numbers for {name}", cause, remedy)
        if not np.all(np.isfinite(a)):
            raise Failure(f"init draws {name} with numbers that are not finite")
    random = [name for name, a in one.items() if np.size(a) > 1 and np.ptp(a) > 0]
    if random and all(np.array_equal(one[name], other[name]) for name in random):
        raise Failure("every key draws the same parameters", "a key made inside of init", remedy)
    return f"{sum(np.size(a) for a in one.values()):,} parameters, all from the key"


def used(subject: Subject) -> str:
    """Every gate, parameter, input and noise that is declared does something."""
    cell, problem = subject.cell, subject.problem
    m, base = problem.moving, problem.run().values

    def idle(moving: Moving, keys: Keys | None = None) -> bool:
        return worst(problem.run(moving=moving, keys=keys).values, base)[0] == 0

    unused = [f"gate {gate!r}" for gate in cell.gates if idle(_without_gate(cell, m, gate))]
    for group in ("units", "step"):
        for name, a in m.params.get(group, {}).items():
            changed = m.params[group] | {name: other(a)}
            if idle(m._replace(params=m.params | {group: changed})):
                unused.append(f"parameter {name!r}")
    for name in sorted({*m.params} - {*_columns(cell), "units", "step"}):
        if idle(m._replace(params=m.params | {name: jax.tree.map(other, m.params[name])})):
            unused.append(f"parameter {name!r}")
    for name, a in m.inputs.items():
        if idle(m._replace(inputs=m.inputs | {name: other(a)})):
            unused.append(f"step input {name!r}")
    if cell.noise and problem.keys is not None:
        rows = jax.random.split(jax.random.key(7), B)
        if idle(m, Keys(rows, problem.keys.shared)):
            unused.append(f"noise {listed(list(cell.noise))}")
    if idle(m._replace(x=other(m.x))):
        unused.append("the input x")
    if unused:
        raise Failure(
            f"nothing depends on {listed(unused)}",
            "it is declared, but the step does not use it, or multiplies it with zero",
            "use it in the step, or take it out of the declaration",
        )
    return "every gate, parameter and input that is declared has an effect"


def other(a: Numbers) -> Numbers:
    """Other numbers of the same sign."""
    ramp = np.linspace(0.55, 1.45, np.size(a)).reshape(np.shape(a)) if np.size(a) > 1 else 1.4
    return np.asarray(a * ramp, np.asarray(a).dtype)


def _columns(cell: Cell) -> dict[str, tuple[str, ...]]:
    """The gates that have columns in a parameter, by name."""
    return {
        "kernel": cell.gates,
        "recurrent_kernel": cell.recurrent,
        "bias": cell.biased,
        "recurrent_bias": cell.recurrent_bias_gates,
    }


def untrained(cell: Cell, gradients: Mapping[str, PyTree]) -> list[str]:
    """The gates and parameters whose gradient is zero throughout."""
    units, columns = cell.hidden_size, _columns(cell)

    def of_gate(gate: str) -> Iterator[Numbers]:
        for name, gates in columns.items():
            if name in gradients and gate in gates:
                k = gates.index(gate)
                yield np.asarray(gradients[name])[..., k * units : (k + 1) * units]

    found = [f"gate {gate!r}" for gate in cell.gates if not any(map(np.any, of_gate(gate)))]
    others = {n: a for n, a in gradients.items() if n not in (*columns, "units", "step")}
    others |= {**gradients.get("units", {}), **gradients.get("step", {})}
    idle = (n for n, a in others.items() if not any(map(np.any, jax.tree.leaves(a))))
    return found + [f"parameter {name!r}" for name in idle]


def _without_gate(cell: Cell, m: Moving, gate: str) -> Moving:
    """The same with other weights for one gate."""
    params, units = dict(m.params), cell.hidden_size
    for name, gates in _columns(cell).items():
        if name not in params or gate not in gates:
            continue
        a, k = np.array(params[name]), gates.index(gate)
        a[..., k * units : (k + 1) * units] = other(a[..., k * units : (k + 1) * units])
        params[name] = a
    return m._replace(params=params)


def state(subject: Subject) -> str:
    """What is carried changes, is read, and is handed on under its own name."""
    cell, problem = subject.cell, subject.problem
    fields = cell.State._fields
    if not fields:
        return "nothing but h is carried"
    base, odd = problem.run(), []
    for name in fields:
        begun, final = (getattr(s, name) for s in (problem.initial.state, base.final.state))
        if all(np.array_equal(a, b) for a, b in _pairs(begun, final)):
            odd.append(f"state {name!r} never changes: the step returns what it was given")
        elif not any(_reaches(problem, base, name, times) for times in (1.0, 30.0)):
            odd.append(f"state {name!r} is carried, but no output depends on it")
    if odd:
        raise Failure(
            "; ".join(odd),
            "the step computes the new state, or h, without the old state",
            f"read state.{fields[0]} and return the new one: self.State({', '.join(fields)})",
        )
    program, args = source.fresh_trace(cell, problem.features, problem.dtype)
    reads = source.state_reads(program, args)
    for k, one in enumerate(fields):
        for two in fields[k + 1 :]:
            crossed = two in reads[one] and one in reads[two]
            if crossed and one not in reads[one] and two not in reads[two]:
                raise Failure(
                    f"states {one!r} and {two!r} change places at every step",
                    f"returned in another order than that of State, {', '.join(fields)}",
                    f"name them: self.State({', '.join(f'{f}={f}' for f in fields)})",
                )
    return f"{', '.join(fields)}: changed by the step, and read by later ones"


def _reaches(problem: Problem, base: Found, name: str, times: float) -> bool:
    """Whether another start of a state changes the outputs: near the old one, or far away."""
    m = problem.moving
    if getattr(m.state, name) is None:  # no floating-point number: nothing to move a little
        return True
    near = jax.tree.map(lambda a: times * other(a), getattr(m.state, name))
    moving = m._replace(state=m.state._replace(**{name: near}))
    return not np.array_equal(problem.run(moving=moving).hs, base.hs)


def compiled(subject: Subject) -> str:
    """A second call, and the same cell built again, compile nothing."""
    cell, m = subject.cell, subject.problem.moving
    kind = type(cell)
    try:
        again, third = kind(cell.hidden_size), kind(cell.hidden_size)
    except Exception:  # it needs more than a number of units: then only the cell itself
        again = third = cell
    if again != third or hash(again) != hash(third):
        fields = [f.name for f in dataclasses.fields(cell)]
        odd = [name for name in fields if getattr(again, name) != getattr(third, name)]
        raise Failure(
            f"two {kind.__name__}({cell.hidden_size}) are not equal, so each compiles anew: "
            f"{listed(odd) or 'they hash differently'}",
            "a hyper-parameter that equals no other of its kind: a lambda, an object",
            "use functions of a module, tuples or frozen dataclasses as hyper-parameters",
        )
    unroll(cell, m.params, m.x, inputs=m.inputs)
    with counting_compilations() as made:
        unroll(dataclasses.replace(cell), m.params, m.x + 1, inputs=m.inputs)
    if made.programs:
        raise Failure(f"a second call compiles again: {made}", "it does not equal a copy of itself")
    return "a second call with the same shapes compiles nothing"
