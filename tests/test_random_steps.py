"""Every engine against the plain scan on random steps, values and all gradients.

``LSTMJAX_RANDOM_STEPS`` says on how many, 8 by default and the same ones every time;
``make test-slow`` takes 200, ``make test-random`` 5,000.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings

from lstmjax.recurrence import CPU, Derived, PallasGPU, Scan, Workload, unroll
from lstmjax.recurrence.gpu.plain import plain_kernel
from tests.random_steps import Flags, H, Probed, Random, cells, flags
from tests.tolerances import assert_close, recurrence_terms

B, T, D = 3, 4, 2
EXAMPLES = int(os.environ.get("LSTMJAX_RANDOM_STEPS", "8"))
pytestmark = [pytest.mark.slow] * ("LSTMJAX_RANDOM_STEPS" in os.environ)
SHARDS = range(4)  # so that several processes share the work
often = settings(
    max_examples=max(EXAMPLES // len(SHARDS), 1),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LENGTHS, RESETS = np.array([4, 2, 0]), np.zeros((B, T), bool)
RESETS[[0, 1], [2, 1]] = True


def problem(cell, how, dtype):
    """Parameters, none of them zero, inputs, and the options of `unroll`."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = cell.init(jax.random.key(0), D, dtype)
    params = jax.tree.map(lambda a: a + 0.3 * normal(*a.shape), params)
    inputs = {"dt": normal(B, T), "drive": normal(B, T, H)} if cell.with_inputs else {}
    options = {"reverse": how.reverse}
    if how.lengths:
        options["lengths"] = jnp.asarray(LENGTHS)
    if how.resets:
        options["resets"] = jnp.asarray(RESETS)
    if cell.with_noise:
        options["keys"] = jax.random.key(1)
    return (params, normal(B, T, D), inputs), options


def run(cell, engine, given, options, states):
    """Outputs, and the gradients of all arguments of a number that depends on each."""

    def value(params, x, inputs):
        out = unroll(cell, params, x, inputs=inputs, engine=engine, return_states=states, **options)
        total = sum(
            (jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) * a**2).sum()
            for a in jax.tree.leaves(out)
        )
        return total, out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(*given)
    return out, gradients


def largest_term(cell, given, options):
    """The largest of the terms whose sums are the gradients of a step's parameters.

    The sums are few, one of them a single number, and all may cancel; rounding errors are of the
    size of what was added up.
    """
    params, x, inputs = given
    probed = Probed(**{f.name: getattr(cell, f.name) for f in dataclasses.fields(cell)})
    inputs = inputs | dict.fromkeys(Probed.PROBES, jnp.zeros((B, T, H), x.dtype))
    _, (*_, terms) = run(probed, Scan(), (params, x, inputs), options, states=True)
    return max(float(jnp.abs(terms[name]).max()) for name in Probed.PROBES)


def compare(got, wanted, largest):
    """By the rule of `tolerances`; a step's parameters count as one array, with ``largest()``."""
    terms = recurrence_terms(B, T, D, H, 3, gradient=True)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    (out, (params, *others)), (out_, (params_, *others_)) = jax.device_get((got, wanted))

    def close(a, b):
        assert_close(a, b, reduction=terms)

    def of_the_step(params):
        own = jax.tree.leaves((params.pop("units"), params.pop("step")))
        return np.concatenate([np.ravel(a) for a in own])

    ours, theirs = of_the_step(params), of_the_step(params_)
    jax.tree.map(close, (out, params, others), (out_, params_, others_))
    try:
        close(ours, theirs)
    except AssertionError:
        close(*(np.append(a, a.dtype.type(largest())) for a in (ours, theirs)))


@pytest.mark.parametrize("shard", SHARDS)
def test_the_derived_engine_on_random_steps(shard):
    @seed(shard)
    @often
    @given(cell=cells(), how=flags)
    def agrees(cell: Random, how: Flags) -> None:
        with jax.enable_x64(True):
            given, options = problem(cell, how, jnp.float64)
            engine = Derived(chunk=how.chunk, save=how.save)
            got, wanted = (run(cell, e, given, options, states=True) for e in (engine, Scan()))
            compare(got, wanted, lambda: largest_term(cell, given, options))

    agrees()


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS[:2])
def test_the_cpu_function_on_random_steps(shard):
    """Steps that mix the units of a row in one shard, element-wise ones in the other."""
    pytest.importorskip("llvmlite")

    @seed(shard)
    @often
    @given(cell=cells(elementwise=shard > 0), how=flags)
    def agrees(cell: Random, how: Flags) -> None:
        with jax.enable_x64(True):
            work = Workload("cpu", "float64", "float32", T, B, D, training=cell.with_noise)
            refusal = CPU().refusal(cell, work)
            assert refusal is None or (shard == 0 and "uses" in refusal), refusal
            if refusal is None:
                given, options = problem(cell, how, jnp.float64)
                got, wanted = (run(cell, e, given, options, states=True) for e in (CPU(), Scan()))
                compare(got, wanted, lambda: largest_term(cell, given, options))

    agrees()


def test_the_gpu_kernel_on_random_steps():
    @seed(0)
    @often
    @given(cell=cells(elementwise=True), how=flags)
    def agrees(cell: Random, how: Flags) -> None:
        engine = PallasGPU(interpret=plain_kernel)
        work = Workload("gpu", "float32", "float32", T, B, D, training=cell.with_noise)
        refusal = engine.refusal(cell, work)
        assert refusal is None or "uses" in refusal, refusal
        if refusal is None:
            given, options = problem(cell, how, jnp.float32)
            got, wanted = (run(cell, e, given, options, states=True) for e in (engine, Scan()))
            compare(got, wanted, lambda: largest_term(cell, given, options))

    agrees()
