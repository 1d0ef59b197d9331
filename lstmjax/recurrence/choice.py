"""Which engine runs a cell: the one asked for, or the first that serves, and why."""

from collections.abc import Mapping
from typing import Literal

from lstmjax.cells.base import Cell
from lstmjax.recurrence.associative import Associative
from lstmjax.recurrence.cpu.engine import CPU
from lstmjax.recurrence.derived.engine import Derived
from lstmjax.recurrence.engine import Engine, Workload
from lstmjax.recurrence.gpu.engine import PallasGPU
from lstmjax.recurrence.scan import Scan
from lstmjax.recurrence.tpu.engine import PallasTPU

ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (PallasTPU(), PallasGPU(), CPU(), Associative(), Derived(), Scan())
}
"""Every engine in its default settings, the most wanted first."""

EngineName = Literal["pallas_tpu", "pallas_gpu", "cpu", "associative", "derived", "scan"]
"""Their names, for flags and type checkers."""


def choose_engine(
    cell: Cell, work: Workload, engine: str | Engine | None = None
) -> tuple[Engine, str]:
    """Which engine runs ``cell`` on ``work``, and why.

    Args:
        cell: the cell to run.
        work: what to run it on.
        engine: one asked for by name or as a value, or None to choose.

    Returns:
        The engine and the reason for the choice.

    Raises:
        ValueError: no engine of that name, or it cannot run this: an engine asked for never falls
            back silently.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> work = Workload("cpu", "float32", "float32", steps=500, batch=64, features=32)
        >>> choose_engine(LSTM(100), work, "scan")
        (Scan(recompute=True), 'asked for')
    """
    if engine is None:
        reasons: list[str] = []
        for candidate in ENGINES.values():
            if not candidate.offers(cell, work):
                continue
            refusal = candidate.refusal(cell, work)
            if refusal is None:
                return candidate, "; ".join(reasons) or "the first choice"
            reasons.append(f"no {candidate.name}: {refusal}")
        raise ValueError(f"no engine runs {cell}: {'; '.join(reasons)}")
    if isinstance(engine, str):
        if engine not in ENGINES:
            raise ValueError(f"no engine {engine!r}; there are: {', '.join(ENGINES)}")
        engine = ENGINES[engine]
    refusal = engine.refusal(cell, work)
    if refusal is not None:
        raise ValueError(f"engine {engine.name!r} cannot run {cell}: {refusal}")
    return engine, "asked for"
