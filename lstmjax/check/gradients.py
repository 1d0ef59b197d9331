"""Checks of gradients and engines: what is computed one way against what is computed another."""

import functools

import jax
import numpy as np
from jax import Array

from lstmjax.cells.base import Carry, Params
from lstmjax.check import source
from lstmjax.check.behaviour import DERIVED
from lstmjax.check.problem import (
    EVERY_STEP,
    FAST,
    MIXED,
    B,
    Found,
    Numbers,
    Problem,
    T,
    distance,
    named,
    values,
    weights,
    worst,
)
from lstmjax.check.report import Failure
from lstmjax.check.structure import other, untrained
from lstmjax.check.subject import Subject, agree, allowed, listed, value_name
from lstmjax.recurrence import CPU, Associative, Engine, PallasGPU, PallasTPU, Workload
from lstmjax.recurrence.gpu.plain import plain_kernel

LOST = 1e-3
"""How far float32 may be from float64 before a cell counts as losing digits."""
_OURS = "if all checks above pass, it is a fault of lstmjax: please report it with the cell"


def gradient(subject: Subject) -> str:
    """JAX' gradient is that of the values, by central differences along random directions."""
    problem = subject.problem
    step, tolerance = (1e-5, 1e-6) if problem.dtype == "float64" else (1e-2, 5e-2)
    rng, odd = np.random.default_rng(5), []
    leaves, structure = jax.tree.flatten(problem.moving)
    gradients = problem.run().gradients
    assert gradients is not None
    slopes = jax.tree.leaves(gradients)
    scale = max(float(np.max(np.abs(a), initial=0.0)) for a in slopes)
    for k, (name, a) in enumerate(named(problem.moving).items()):
        direction = rng.choice([-1.0, 1.0], a.shape) * rng.uniform(0.5, 1, a.shape)
        size = step * max(float(np.max(np.abs(a), initial=0.0)), 0.1)

        def moved(by: Numbers, k: int = k, a: Numbers = a) -> float:
            near = [*leaves[:k], np.asarray(a + by, a.dtype), *leaves[k + 1 :]]
            return _weighted(problem.run(moving=jax.tree.unflatten(structure, near)))

        measured, wider = (
            (moved(by * direction) - moved(-by * direction)) / (2 * by) for by in (size, 2 * size)
        )
        said = float(np.sum(slopes[k] * direction))
        most = tolerance * max(abs(measured), abs(said), 1e-3 * scale) + 2 * abs(measured - wider)
        if not abs(measured - said) <= most:  # where it bends, wider differences say another slope
            odd.append(f"along {name} JAX says {said:.5g}, differences say {measured:.5g}")
    program, _ = source.fresh_trace(subject.cell, problem.features, problem.dtype)
    if odd:
        more = f" (and along {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise Failure(
            f"it is not that of the values: {odd[0]}{more}",
            ", ".join(source.blocked(program)) or "a jump at these numbers: where, argmax, a cast",
            "mend the derivative; if it is meant so (a straight-through estimator, say), skip this "
            "check",
        )
    if dead := untrained(subject.cell, gradients.params):
        raise Failure(
            f"no gradient reaches {listed(dead)}: training leaves it as it begins",
            ", ".join(source.blocked(program)) or "a step function: round, sign, floor, argmax",
            "use a function that has a derivative; if meant so (a reservoir), skip this check",
        )
    return f"JAX' gradient is that of finite differences, to {tolerance:.0e}, in {problem.dtype}"


def _weighted(found: Found) -> float:
    """The sum that `Problem.run` differentiates."""
    floats = [a for a in jax.tree.leaves(found.values) if a.dtype.kind == "f"]
    return sum(float(np.sum(weights(np, k, a) * a)) for k, a in enumerate(floats))


def engines(subject: Subject) -> str:
    """Every engine that runs it against the plain scan, values and gradients."""
    cell, problem = subject.cell, subject.problem
    training = bool(cell.noise)
    work = Workload(
        "cpu", problem.dtype, "float32", T, B, problem.features, training=training, resets=True
    )
    plain, names = problem.run(flags=MIXED), ["scan"]
    own: tuple[Engine, ...] = (CPU(), DERIVED, Associative())
    for engine in own:
        if engine.refusal(cell, work) is None:
            agree(
                f"{engine.name} and the plain scan differ",
                problem.run(engine, flags=MIXED),
                plain,
                problem,
                "an operation whose result depends on how often or in which order it is run",
                _OURS,
            )
            names.append(engine.name)
    kernels: dict[str, Engine] = {
        "TPU kernel": PallasTPU(interpret=True, unroll=1),
        "GPU kernel": PallasGPU(interpret=plain_kernel),
    }
    work = work._replace(dtype="float32")
    with jax.enable_x64(False):
        single = problem.as_dtype("float32")
        rounded = single.run(DERIVED, flags=MIXED)
        if cell.noise:  # which is another one in float32
            plain = single.run(flags=MIXED)
        for name, engine in kernels.items():
            if engine.refusal(cell, work) is None:
                _kernel_agrees(name, single.run(engine, flags=MIXED), rounded, plain, single)
                names.append(f"{name} (interpreted)")
    return f"the same values and gradients from {', '.join(names)}"


def _kernel_agrees(name: str, a: Found, rounded: Found, exact: Found, problem: Problem) -> None:
    """No further from float64 than rounding, or four times the derived engine in float32."""
    for part in ("values", "gradients"):
        ours, single, double = (named(getattr(f, part)) for f in (a, rounded, exact))
        for what, b in double.items():
            most = max(
                allowed(problem, gradient=part == "gradients"), 4 * distance(single[what], b)
            )
            if (apart := distance(ours[what], b)) > most:
                shown = f"the gradient of {what}" if part == "gradients" else value_name(what)
                raise Failure(
                    f"the {name} and the plain scan differ: {shown} by {apart:.1e}",
                    "an operation of the step that loses digits in float32",
                    _OURS,
                )


def float32(subject: Subject) -> str:
    """float32 against float64."""
    problem = subject.problem.quiet  # noise is another one in float32
    exact = problem.run(flags=MIXED)
    with jax.enable_x64(False):
        found = problem.as_dtype("float32").run(DERIVED, flags=MIXED)
    (value, what), (slope, where) = (
        worst(getattr(found, part), getattr(exact, part)) for part in ("values", "gradients")
    )
    if max(value, slope) > LOST:
        apart = f"{value_name(what)} is {value:.1e}, the gradient of {where} {slope:.1e} from that"
        raise Failure(
            f"{apart} in {problem.dtype}",
            "a difference of large numbers, or a function where it is steep",
            "rearrange it: log1p, expm1, log_sigmoid, logaddexp, a maximum subtracted",
        )
    return f"values within {value:.0e} of those in {problem.dtype}, gradients {slope:.0e}"


def mapped(subject: Subject) -> str:
    """Under jax.vmap over parameters, as for many seeds in one program."""
    problem, m = subject.problem, subject.problem.moving
    both = jax.tree.map(lambda a: np.stack([a, other(a)]), m.params)

    @functools.partial(jax.jit, compiler_options=FAST)
    @jax.vmap
    def together(params: Params) -> tuple[Array, Carry]:
        one = m._replace(params=params)
        return values(problem.cell, DERIVED, one, problem.fixed, EVERY_STEP, problem.keys)

    found = together(both)
    for k in range(2):
        ours, params = jax.tree.map(lambda a, k=k: np.asarray(a[k]), (found, both))
        agree(
            "jax.vmap over parameters is not the loop",
            ours,
            problem.run(moving=m._replace(params=params)).values,
            problem,
            "an operation with a rule of its own for batches",
        )
    return "jax.vmap over parameters, as for many seeds at once, is the loop"
