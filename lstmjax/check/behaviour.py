"""Checks of what a cell does over time: rows, carry, masks, resets, directions, extremes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax.cells.base import Cell
from lstmjax.check.problem import EVERY_STEP, FAST, MIXED, B, Flags, T, distance, named
from lstmjax.check.report import Failure
from lstmjax.check.subject import Subject, agree, allowed, not_finite, overflow, told
from lstmjax.recurrence import Derived, unroll

DERIVED = Derived(chunk=3)
"""Three of seven steps a chunk, so that the last is not full."""
LONG = 2_000
"""Steps of the long sequence."""
GROWTH = 1e3
"""What counts as exploding: the last quarter's outputs to the first quarter's."""
EXTREME = 100.0


def finite(subject: Subject) -> str:
    """Values and gradients at ordinary numbers, from the cell's own start, too."""
    problem = subject.problem
    for one, where in ((problem, ""), (problem.begun(problem.start), ", from its own start")):
        if odd := not_finite(one.run()):
            raise overflow(f"{odd} at ordinary inputs{where}", one, one.moving.x)
    return "values and gradients are finite at ordinary inputs"


def rows(subject: Subject) -> str:
    """A row alone gives what it gives in a batch."""
    problem = subject.problem
    together = problem.run().values
    for row in range(B):
        hs, final = jax.tree.map(lambda a, row=row: a[row : row + 1], together)
        agree(
            f"row {row} alone is not what it is in a batch of {B}",
            problem.alone(row),
            (hs, final),
            problem,
            "the step reads the size of the batch, or numbers its rows",
            "compute a row from itself alone; axis=-1 are the units of a row",
        )
    return f"a row is the same alone and in a batch of {B}"


def carried(subject: Subject) -> str:
    """One step at a time, and two halves, give what one run gives."""
    cell, problem = subject.cell, subject.problem
    m, whole = problem.moving, problem.run()
    cause = "something is carried beside h and state, or a start is not taken from the carry"
    carry, hs = jax.tree.map(jnp.asarray, problem.initial), []
    for t in range(T):
        x, inputs = jax.tree.map(lambda a, t=t: jnp.asarray(a[:, t]), (m.x, m.inputs))
        carry = cell(m.params, x, carry, inputs=inputs)
        hs.append(carry.h)
    agree(
        "one step at a time, the carry handed on, is not the whole run",
        (np.stack(hs, 1), carry),
        problem.quiet.run().values,
        problem,
        cause,
    )
    late = np.tile(np.arange(T) >= T // 2, (B, 1))
    first = problem.run(flags=EVERY_STEP._replace(mask=~late))
    second = problem.begun(first.final).run(flags=EVERY_STEP._replace(mask=late))
    agree(
        "a sequence cut in two, the carry handed on, is not the whole run",
        (np.where(late[..., None], second.hs, first.hs), second.final),
        whole.values,
        problem,
        cause,
    )
    return "one step at a time, and two halves, are the whole run"


def masks(subject: Subject) -> str:
    """Masked steps have no influence, whatever they hold."""
    problem, m = subject.problem, subject.problem.moving
    clean = problem.run(DERIVED, flags=MIXED)
    if odd := not_finite(clean):
        raise Failure(f"with masked steps {odd}", "a start, or a step from it, is not finite")
    garbage = m._replace(x=np.where(MIXED.mask[..., None], m.x, np.nan))
    dirty = problem.run(DERIVED, flags=MIXED, moving=garbage)
    agree("what masked steps hold has an influence", dirty, clean, problem)
    if np.any(clean.hs[~MIXED.mask]):
        raise Failure("a masked step has an output that is not zero")
    lengths = np.arange(T)[None] < np.array([[4], [T], [0]])
    padded = problem.run(DERIVED, flags=EVERY_STEP._replace(mask=lengths))
    if odd := not_finite(padded):
        raise Failure(f"with a row that is masked throughout {odd}")
    whole = problem.run(DERIVED)
    agree(
        "a padded row is not the row without its padding",
        (padded.hs[0, :4], padded.final.h[1:]),
        (whole.hs[0, :4], np.stack([whole.final.h[1], problem.initial.h[2]])),
        problem,
    )
    return "masked steps have no influence; a row of nothing is harmless"


def resets(subject: Subject) -> str:
    """A reset in the middle makes two sequences of one."""
    cell, problem = subject.cell, subject.problem
    half = T // 2
    marks = np.tile(np.arange(T) == half, (B, 1))
    both = problem.run(DERIVED, flags=EVERY_STEP._replace(resets=marks))
    if odd := not_finite(both):
        raise Failure(f"after a reset {odd}", "initial_carry, or a step from it, is not finite")
    if any(noise.every == "sequence" for noise in cell.noise.values()):
        return "finite after a reset; what is drawn once a sequence is drawn anew"
    late = np.tile(np.arange(T) >= half, (B, 1))
    again = problem.begun(problem.start).run(flags=EVERY_STEP._replace(mask=late))
    agree(
        "after a reset it is not as from the start",
        (both.hs[:, half:], both.final),
        (again.hs[:, half:], again.final),
        problem,
        "initial_carry does not give the same carry each time",
        "let it depend on its arguments alone",
    )
    return "a reset makes two sequences of one"


def directions(subject: Subject) -> str:
    """Backwards is forwards on the turned sequence."""
    problem, m = subject.problem, subject.problem.moving
    back = problem.run(DERIVED, reverse=True, flags=MIXED)
    if subject.cell.noise:  # a step's noise depends on its place
        plain = problem.run(reverse=True, flags=MIXED)
        agree("backwards two engines differ", back, plain, problem)
        return "backwards the engines agree"
    x, inputs = jax.tree.map(lambda a: np.ascontiguousarray(a[:, ::-1]), (m.x, m.inputs))
    entering = np.roll(MIXED.resets[:, ::-1], 1, axis=1)
    entering[:, 0] = False
    flags = Flags(np.ascontiguousarray(MIXED.mask[:, ::-1]), entering)
    forth = problem.run(moving=m._replace(x=x, inputs=inputs), flags=flags)
    agree(
        "backwards is not forwards on the turned sequence",
        (back.hs, back.final),
        (forth.hs[:, ::-1], forth.final),
        problem,
    )
    return "backwards is forwards on the turned sequence"


def extremes(subject: Subject) -> str:
    """Finite at inputs of ±100."""
    with jax.enable_x64(False):
        problem = subject.problem.as_dtype("float32")
        x = np.float32(EXTREME) * np.sign(problem.moving.x)
        found = problem.run(DERIVED, flags=MIXED, moving=problem.moving._replace(x=x))
        if odd := not_finite(found):
            raise overflow(f"{odd} at inputs of ±{EXTREME:.0f}", problem, x)
    return f"values and gradients are finite at inputs of ±{EXTREME:.0f}"


def long(subject: Subject) -> str:
    """Neither infinite nor exploding over a long sequence, as initialised."""
    cell, problem = subject.cell, subject.problem
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> Any:
        return rng.uniform(0.1, 1, shape).astype(np.float32)

    with jax.enable_x64(False):
        params = cell.init(jax.random.key(0), problem.features)
        x = rng.normal(size=(2, LONG, problem.features)).astype(np.float32)
        inputs = {name: draw(2, LONG, a.shape[-1]) for name, a in problem.moving.inputs.items()}
        peaks, slopes = jax.tree.map(np.asarray, _long(cell, params, x, inputs))
    odd = np.flatnonzero(~np.isfinite(peaks))
    early, late = np.max(peaks[: LONG // 4]), np.max(peaks[-LONG // 4 :])
    if odd.size:
        what = f"the output is not finite from step {odd[0] + 1:,} on"
    elif late > GROWTH * max(early, 1.0):
        what = f"the largest output grows from {early:.2g} to {late:.2g}"
    elif not all(np.all(np.isfinite(a)) for a in jax.tree.leaves(slopes)):
        what = "the gradient is not finite"
    else:
        return f"finite and bounded over {LONG:,} steps, gradient included"
    raise Failure(
        f"over {LONG:,} steps {what}",
        "something carried is multiplied by more than one at every step",
        "bound what is carried: a gate between 0 and 1, a normalisation, a contraction",
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _long(cell: Cell, params: Any, x: Any, inputs: Any) -> Any:
    """The largest output of each step, and the gradient of the mean."""

    def run(params: Any, x: Any) -> Any:
        hs, _ = unroll(cell, params, x, inputs=inputs, engine=Derived())
        return jnp.mean(hs), jnp.max(jnp.abs(hs), axis=(0, 2))

    slopes, peaks = jax.grad(run, argnums=(0, 1), has_aux=True)(params, x)
    return peaks, slopes


def reference(subject: Subject) -> str:
    """The user's own NumPy function, step by step."""
    cell, problem = subject.cell, subject.problem
    assert subject.reference is not None
    m = problem.moving
    hs, final = problem.quiet.run().values
    params = jax.tree.map(np.asarray, cell.prepare(m.params))
    h, state = problem.initial
    remedy = "write it as reference(params, x, h, state) -> (h, state), for x of shape (B, D)"
    for t in range(T):
        more = {name: a[:, t] for name, a in m.inputs.items()}
        more |= {f"d_{name}": np.full((B, 1), n.evaluation) for name, n in cell.noise.items()}
        try:
            h, state, *_ = subject.reference(params, m.x[:, t], h, state, **more)
            state = cell.State(*state)
        except Exception as error:
            raise Failure(f"the reference does not run: {told(error)}", "", remedy) from error
        if np.shape(h) != np.shape(hs[:, t]):
            raise Failure(f"the reference gives h {np.shape(h)}, not {hs[:, t].shape}", "", remedy)
        if (apart := distance(h, hs[:, t])) > allowed(problem):
            raise Failure(
                f"from step {t + 1} on the reference gives another h, {apart:.1e} apart",
                "another formula, or gates in another order: columns of kernels come in that of "
                f"gates, {', '.join(cell.gates)}",
                "compare the two line by line",
            )
    ours, theirs = named(final.state), named(state)
    for name, a in ours.items():
        if (apart := distance(theirs[name], a)) > allowed(problem):
            raise Failure(
                f"the reference ends with another state {name!r}, {apart:.1e} apart",
                f"states in another order than that of State, {', '.join(cell.State._fields)}",
            )
    return f"the reference gives the same over {T} steps, in {problem.dtype}"
