"""The CPU engine's machine code for AArch64, run by an emulator: values and gradients."""

import types

import jax
import pytest
from jax.interpreters import mlir

pytest.importorskip("llvmlite")
pytest.importorskip("unicorn")

from lstmjax.recurrence.cpu import calls, run
from lstmjax.recurrence.cpu.machine import Machine
from tests import emulator
from tests.test_kernels_cpu import CASES, DULL, LONG, compare, expected, solve

# Of 128 bits, as all but Neoverse V1 have them; the last one's may be scalable.
CPUS = ("neoverse-n1", "apple-m1", "neoverse-v2")
SOME = (
    "everything",
    "everything, float64",
    "heads of a vector",
    "two blocks of rows, many units",
    "rows mixed",
    "learned start, masked, reverse",
)


PAIRS = [(cpu, name) for cpu in CPUS for name in CASES]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("cpu", "name"), PAIRS if LONG else [*zip(2 * CPUS, SOME, strict=True)], ids=str
)
def test_values_and_all_gradients(cpu, name, monkeypatch):
    there = Machine(128, 6, 4, cpu, "", "aarch64-unknown-linux-gnu")
    emulated = []

    def lowered(*args, kernel):
        emulated.append(kernel.back)
        return emulator.lowered(*args, kernel=kernel)

    monkeypatch.setattr(run, "Machine", types.SimpleNamespace(host=lambda: there))
    monkeypatch.setattr(calls.Kernel, "begin", lambda kernel: None)  # XLA would call it, here
    monkeypatch.setattr(calls, "_lower_call", mlir.lower_fun(lowered, multiple_results=True))
    case = CASES[name]
    dull = ("value", "gradient") if "nothing" in case.flags else DULL
    with jax.enable_x64(case.dtype == "float64"):
        compare(case, solve("cpu", case), expected(case), dull)
    assert sorted(emulated) == [False, True]
