"""Does my cell do what I think it does? `check_cell`, and ``python -m lstmjax.check``."""

import inspect
import sys
import time
import warnings
from collections.abc import Iterator, Sequence

import jax

from lstmjax.cells.base import Cell, where_defined
from lstmjax.check import facts
from lstmjax.check.checks import CHECKS
from lstmjax.check.report import Failure, Report, Result, Status
from lstmjax.check.subject import Check, Reference, Subject, told
from lstmjax.errors import UserError
from lstmjax.progress import bar

__all__ = ["CHECKS", "Report", "Result", "check_cell"]


def check_cell(
    cell: Cell | type[Cell],
    *,
    reference: Reference | None = None,
    skip: Sequence[str] = (),
    hidden_size: int = 8,
    speed: bool = True,
    targets: Sequence[str] | None = None,
    progress: bool = False,
) -> Report:
    """Try everything that a cell must satisfy, and say what failed, why, and what to do.

    The checks run on the CPU, in float64 where the cell can do that, on three rows of seven steps;
    speed is measured on the default device.

    Args:
        cell: a cell, or its class if it can be built from a number of units.
        reference: the step in NumPy, ``(params, x, h, state) -> (h, state)``, for rows of x
            ``(B, D)``, with the parameters as `Cell.init` lays them out, after `Cell.prepare`, all
            in float64. Step inputs come by keyword under their names, noise as ``d_<name>``.
        skip: checks to leave out, by name (`CHECKS`).
        hidden_size: units of a cell that is given as a class.
        speed: measure it beside the LSTM.
        targets: compile for these with `lstmjax.aot`; None for those whose compiler is installed.
        progress: show a progress bar on stderr.

    Raises:
        UserError: it is no cell, cannot be built, or there is no check of a name in ``skip``.

    Example:
        >>> from lstmjax import GRU
        >>> report = check_cell(GRU(4), skip=[c.name for c in CHECKS[3:]], speed=False, targets=())
        >>> report.ok
        True
    """
    begun = time.perf_counter()
    cell = _built(cell, hidden_size)
    if unknown := sorted({*skip} - {check.name for check in CHECKS}):
        raise UserError(
            f"no check {unknown[0]!r}; there are: {', '.join(check.name for check in CHECKS)}"
        )
    subject = Subject(cell, reference)
    results: dict[str, Result] = {}
    checks = _with_bar(CHECKS) if progress else CHECKS
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for check in checks:
            results[check.name] = _result(check, subject, skip, results)
    known: dict[str, str] = {}
    if "failed" not in (results["contract"].status, results["pure"].status):
        known["kind"] = facts.kind(cell)
        known |= facts.engines(cell)
        if speed:
            known["speed"] = facts.speed(cell)
        known |= facts.compile_targets(_spec(cell), targets)
    seconds = time.perf_counter() - begun
    return Report(repr(cell), where_defined(cell), tuple(results.values()), known, seconds)


def _with_bar(checks: Sequence[Check]) -> Iterator[Check]:
    shown = bar(checks, desc="checks", leave=False)
    for check in shown:
        shown.set_postfix_str(check.name)
        yield check


def _built(cell: Cell | type[Cell], hidden_size: int) -> Cell:
    if isinstance(cell, Cell):
        return cell
    if not (inspect.isclass(cell) and issubclass(cell, Cell)):
        raise UserError(f"{cell!r} is no cell; give a subclass of lstmjax.Cell, or one built")
    try:
        return cell(hidden_size)
    except Exception as error:
        raise UserError(
            f"{cell.__name__}({hidden_size}) cannot be built: {told(error)}; give one that is, "
            f"check_cell({cell.__name__}(...))"
        ) from error


def _result(
    check: Check, subject: Subject, skip: Sequence[str], results: dict[str, Result]
) -> Result:
    """Run one check, unless it would mean nothing."""
    name = check.name
    if name in skip:
        return Result(name, "not run", "left out, as asked for")
    if name == "reference" and subject.reference is None:
        return Result(name, "not run", "no NumPy function reference was given")
    missing = [need for need in check.needs if results[need].status == "failed"]
    if missing:
        return Result(name, "not run", f"means nothing while {missing[0]} fails")
    begun = time.perf_counter()

    def result(status: Status, text: str, cause: str = "", remedy: str = "") -> Result:
        seconds = time.perf_counter() - begun
        return Result(name, status, text, cause, remedy, seconds)

    try:
        double = name != "contract" and subject.problem.dtype == "float64"
        with jax.enable_x64(double), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of what is not finite
            return result("ok", check.run(subject))
    except Failure as failure:
        return result("failed", failure.told, failure.cause, failure.remedy)
    except Exception as error:
        return result("failed", told(error), "the step does not run this way")


def _spec(cell: Cell) -> str | None:
    """The cell as ``file.py:MyCell``, if it is built from its file and a number of units alone."""
    kind = type(cell)
    if kind.__module__.startswith("lstmjax."):
        return kind.__name__
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    found = getattr(module, kind.__name__, None) is kind
    return f"{file}:{kind.__name__}" if file and found else None
