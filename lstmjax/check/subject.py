"""What is checked, and how a check compares."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lstmjax.cells.base import Cell
from lstmjax.cells.contract import Arguments, shapes_of, transition_program
from lstmjax.check import source
from lstmjax.check.problem import (
    B,
    Found,
    Numbers,
    Problem,
    T,
    features_of,
    make_problem,
    named,
    worst,
)
from lstmjax.check.report import Failure
from lstmjax.errors import first_line, user_line

Reference = Callable[..., Sequence[PyTree]]
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
        run: of a `Subject`; returns what it found in one line, or raises `Failure`.
        needs: checks without which it means nothing.
    """

    name: str
    run: Callable[[Subject], str]
    needs: tuple[str, ...] = ("contract", "pure", "finite")


def allowed(problem: Problem, *, gradient: bool = False) -> float:
    """How far two ways to compute the same may be apart, of the largest number: rounding only."""
    if problem.dtype == "float64":
        return 1e-10
    gates, units = len(problem.cell.gates), problem.cell.hidden_size
    terms = T * (problem.features + units) + gradient * (T * gates * units + B * T)
    return float(16 * 2.0**-24 * math.sqrt(terms))


def agree(
    told: str, a: PyTree, b: PyTree, problem: Problem, cause: str = "", remedy: str = ""
) -> None:
    """Raise `Failure` where two results differ; two `Found` with gradients, in those, too."""
    parts = [(a[:2], b[:2], False)]
    if isinstance(a, Found) and isinstance(b, Found) and None not in (a.gradients, b.gradients):
        parts.append((a.gradients, b.gradients, True))
    for one, other, gradient in parts:
        error, what = worst(one, other)
        if error > allowed(problem, gradient=gradient):
            name = f"the gradient of {what}" if gradient else value_name(what)
            raise Failure(f"{told}: {name} differs by {error:.1e}", cause, remedy)


def value_name(name: str) -> str:
    """What a person calls an array of ``(hs, final)``."""
    return {"0": "hs"}.get(name, name.replace("1.", "final "))


def not_finite(found: Found) -> str:
    """The values and gradients that are not finite, in words; "" if all are."""
    odd = [name for name, a in named(found).items() if not np.all(np.isfinite(a))]
    return f"{listed(odd)} {'is' if len(odd) == 1 else 'are'} not finite" if odd else ""


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    shown = [name.replace("gradients.", "d ") for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def overflow(told: str, problem: Problem, x: Numbers) -> Failure:
    """A failure that names the operation which first gives what is not finite."""
    cell, m = problem.cell, problem.moving
    at = None
    try:
        inputs = {name: a[:, 0] for name, a in m.inputs.items()}
        inputs |= {"x": x[:, 0]} if "x" in cell.step_inputs else {}
        args = Arguments(cell.prepare(m.params), x[:, 0], problem.initial, inputs, {})
        args, xs = jax.tree.map(jnp.asarray, (args, np.swapaxes(x, 0, 1)))
        at = source.first_not_finite(cell, args, xs)
    except Exception:  # a guess is all that is wanted
        at = None
    return Failure(
        told,
        at or "",
        "keep divisors and the arguments of exp, log and sqrt in range: subtract a maximum, add "
        "1e-6; a jnp.where needs its guard around the argument, for the gradient",
    )


def told(error: BaseException) -> str:
    """An exception in one line, with the user's own."""
    return f"{type(error).__name__}: {first_line(error)[:200]}{user_line(error)}"
