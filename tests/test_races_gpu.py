"""The GPU kernels with the race detector of Pallas' interpreter, and without what they need.

A mutant lacks one wait, commit or slot. Each is told from the kernel by one of the interpreters:
else the detector would say nothing of a kernel that has no races. What none of them sees (waiting
for the copies of outputs, and all that is between the blocks of a cluster) `lstmjax.aot.assembly`
looks for in what is compiled.
"""

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lstmjax.cells import GRU
from lstmjax.recurrence import unroll
from lstmjax.recurrence.gpu import engine as gpu_engine
from lstmjax.recurrence.gpu import kernel
from lstmjax.recurrence.gpu.engine import PallasGPU
from tests.gpu_interpreter import AS_DEVICE, RACES, all_races
from tests.kernel_cases import Case, draw, values_and_gradients

CASE = Case(GRU(70), steps=5, batch=2, flags=("mask", "resets"))
ENGINE = PallasGPU(interpret=RACES, depth=2)


@pytest.fixture
def anew():
    """Kernels are made once; not so those that are looked at here."""
    gpu_engine._recurrence.cache_clear()
    yield
    gpu_engine._recurrence.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("anew")
def test_two_warpgroups_race_nowhere():
    args, options = draw(CASE)
    with all_races() as races:
        run = jax.jit(lambda *a: values_and_gradients(ENGINE, CASE.cell, *a, **options))
        jax.block_until_ready(run(*args))
        assert not races()


def skip(monkeypatch, name, which):
    """Leave out the calls of a function of Pallas that ``which`` says."""
    true = getattr(plgpu, name)

    def some(*args, **kwargs):
        if not which(*args):
            true(*args, **kwargs)

    monkeypatch.setattr(plgpu, name, some)


def no_wait(monkeypatch, name):
    waited, unpack = [], kernel._Body._unpack

    def remember(self, refs, scratch):
        waited.append(scratch[name])
        unpack(self, refs, scratch)

    monkeypatch.setattr(kernel._Body, "_unpack", remember)
    skip(monkeypatch, "barrier_wait", lambda ref: any(ref.ref is each for each in waited))


def no_commit(monkeypatch, _):
    skip(monkeypatch, "commit_smem", lambda: True)


def one_slot(monkeypatch, method):
    true = getattr(kernel._Body, method)
    monkeypatch.setattr(kernel._Body, method, lambda self, i, *rest: true(self, 0, *rest))


BARE, FULL = False, True


@pytest.mark.slow
@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(
    ("mutate", "what", "seen_by"),
    [
        (no_wait, "exchanged_here", {BARE, FULL}),
        (no_wait, "inputs_here", {BARE, FULL}),
        (no_wait, "constants_here", {BARE}),
        (no_commit, "", {FULL}),
        (one_slot, "_exchanged", {BARE}),
        (one_slot, "_output", {FULL}),
    ],
    ids=lambda a: getattr(a, "__name__", a if isinstance(a, str) else ""),
)
def test_a_mutant_is_caught(mutate, what, seen_by, monkeypatch):
    """By a race, or by a barrier that ends twice before anybody has waited for it once."""
    if AS_DEVICE not in seen_by:
        pytest.skip(f"the interpreter of JAX {jax.__version__} does not see it")
    mutate(monkeypatch, what)
    (params, x, *_), options = draw(CASE)
    run = jax.jit(lambda *a: unroll(CASE.cell, *a, engine=ENGINE, **options))
    with all_races() as races:
        try:
            jax.block_until_ready(run(params, x))
            said = ""
        except jax.errors.JaxRuntimeError as error:
            said = str(error)
        assert "Barrier" in said or races()
