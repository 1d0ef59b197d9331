"""Which line of a cell makes a number that is not finite."""

import contextlib
import inspect
import traceback
from collections.abc import Iterator

import jax

from lstmjax import stopping
from lstmjax.cells import Cell
from lstmjax.precision import make_dot
from lstmjax.training.loop import Interrupted, NonFiniteLossError

_SCALES = (1.0, 30.0)  # of ordinary inputs, and of such that saturate


@contextlib.contextmanager
def explained(cell: Cell) -> Iterator[None]:
    """Around `fit`: what ends it says more.

    Raises:
        NonFiniteLossError: with the cell's line, where that is found.
        Interrupted: after it was printed how to go on.
    """
    try:
        yield
    except NonFiniteLossError as error:
        line = line_of_nan(cell)
        raise NonFiniteLossError(f"{error}; not finite at {line}" if line else error) from error
    except Interrupted:
        stopping.tell_saved()
        raise


def line_of_nan(cell: Cell, features: int = 4, rows: int = 3, steps: int = 3) -> str | None:
    """The cell's line at which ``jax_debug_nans`` stops, ``"my_cell.py:12: h = ..."``, or None.

    Where it is the derivative of that line, it says so. The cell runs a few steps by itself,
    operation by operation, forward and backward, on random inputs; what only the run's own numbers
    bring about is not found so.
    """

    def run(scale: float) -> None:
        params = cell.init(jax.random.key(0), features)
        x = scale * jax.random.normal(jax.random.key(1), (rows, features))
        carry = cell.initial_carry(rows)
        for _ in range(steps):
            carry, pull = jax.vjp(
                lambda p, x, c: cell.transition(p, x, c, make_dot("float32")), params, x, carry
            )
            pull(carry)

    with jax.disable_jit(), jax.debug_nans(True):
        for scale in _SCALES:
            try:
                run(scale)
            except FloatingPointError as error:
                return _line_in(error, inspect.getfile(type(cell)))
            except Exception:  # a cell that cannot be run so; only a hint is lost
                return None
    return None


def _line_in(error: Exception, file: str) -> str | None:
    """On the way back the cell is not running; JAX tells where the operation comes from."""
    for raised, what in ((error, ""), (error.__cause__, "the derivative of ")):
        trace = traceback.extract_tb(raised.__traceback__) if raised else []
        frames = [frame for frame in trace if frame.filename == file]
        if frames:
            return f"{what}{file}:{frames[-1].lineno}: {frames[-1].line}"
    return None
