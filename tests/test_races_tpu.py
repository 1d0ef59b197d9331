"""The TPU kernels with the race detector of Pallas' interpreter, and without what they need.

Copies and waits are Mosaic's: a kernel says by its grid and index maps what goes where, and clears
what it adds to. A mutant lacks one of these, and is told from the kernel by a race, or by values:
memory that nothing was written to holds NaN. What neither sees is in `docs/kernels.md`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are kept: private
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lstmjax.cells import PeepholeLSTM
from lstmjax.recurrence import PallasTPU
from lstmjax.recurrence.tpu import calls, kernel
from lstmjax.recurrence.tpu.plan import TPUPlan
from tests.kernel_cases import Case, compare, draw, expected, values_and_gradients

# Two blocks of rows, which two cores share, of two chunks.
CASE = Case(PeepholeLSTM(5), batch=20, flags=("mask", "resets"))

OPTIONS = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
WARN = dict.fromkeys(OPTIONS & {"on_race"}, "warn")  # since JAX 0.12 it raises, by default


@pytest.fixture
def anew():
    """`unroll` is traced once for an engine; a mutant must be, too, and leaves nothing behind."""
    jax.clear_caches()
    yield
    jax.clear_caches()
    pltpu.reset_tpu_interpret_mode_state()


def run(cores):
    """The results, and whether there was a race."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores, **WARN)
    engine = PallasTPU(rows=16, chunk=2, unroll=1, interpret=params)
    args, options = draw(CASE)
    got = jax.jit(lambda *a: values_and_gradients(engine, CASE.cell, *a, **options))(*args)
    jax.block_until_ready(got)
    return got, interpret_pallas_call.races.races_found


@functools.cache
def wanted():
    args, options = draw(CASE)
    return expected(CASE, args, options)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("cores", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_cores_race_nowhere(cores):
    got, races = run(cores)
    assert not races
    compare(CASE, got, wanted())


def one_slot(monkeypatch, name):
    """All blocks of rows in the place of the first."""
    true = getattr(calls.Blocks, name)

    def first(self, a):
        spec = true(self, a)

        def index(b, i):
            return tuple(0 if k is b else k for k in spec.index_map(b, i))

        return pl.BlockSpec(spec.block_shape, index)

    monkeypatch.setattr(calls.Blocks, name, first)


def one_chunk(monkeypatch, name):
    """All chunks of time in the place of the first."""
    true = getattr(calls.Blocks, name)
    monkeypatch.setattr(
        calls.Blocks, name, lambda self, a: true(self._replace(chunk=lambda i: 0 * i), a)
    )


def nothing_done(monkeypatch, name):
    """Leave out what a function of the kernels' does."""
    monkeypatch.setattr(kernel, name, lambda *_: None)


def no_carry_over(monkeypatch, _):
    """Every chunk begins as the first one does: nothing is handed from one to the next."""
    monkeypatch.setattr(pl, "when", lambda condition: lambda f: f())


def never_begun(monkeypatch, _):
    """No chunk is the first one: sums are not cleared, the carry is whatever is there."""
    monkeypatch.setattr(pl, "when", lambda condition: lambda f: None)


def one_step(monkeypatch, _):
    """The steps of a chunk share one place."""
    monkeypatch.setattr(TPUPlan, "place", lambda self, k: 0 * k)


@pytest.mark.slow
@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(
    ("mutate", "what", "cores", "by_race"),
    [
        (one_slot, "sums", 2, True),
        (one_slot, "steps", 2, True),
        (one_slot, "rows", 2, True),
        (one_slot, "sums", 1, False),
        (one_chunk, "steps", 1, False),
        (one_chunk, "chunks", 1, False),
        (one_chunk, "flags", 1, False),
        (nothing_done, "_clear", 1, False),
        (nothing_done, "_clear_lanes", 1, False),
        (nothing_done, "_weight_gradients", 1, False),
        (no_carry_over, "", 1, False),
        (never_begun, "", 1, False),
        (one_step, "", 1, False),
    ],
    ids=lambda a: getattr(a, "__name__", str(a)),
)
def test_a_mutant_is_caught(mutate, what, cores, by_race, monkeypatch):
    mutate(monkeypatch, what)
    got, races = run(cores)
    assert races == by_race
    if not by_race:
        with pytest.raises(AssertionError):
            compare(CASE, got, wanted())
    assert jax.tree.all(jax.tree.map(lambda a: a.dtype == jnp.float32, got))
