"""How near two arrays must be: one rule for every numerical comparison.

The error of an array is measured against its largest element,

    error(actual, expected) = max |actual - expected| / max |expected|,

because rounding errors are of the size of the numbers that were added up, not of their sum: an
element that cancels to almost zero is no more exact than its neighbours. It has to be at most

    float64      1e-10                         flat
    float32      16 u √n      u = 2^-24        sums, products and functions in float32
    bfloat16        u √n      u = 2^-8         operands of products rounded, all else in float32

where u is the unit roundoff and n, the `reduction`, the number of terms that are added, one after
another, on the longest way to one element of the array: rounding errors are independent enough to
add up as √n. The factor of float32 covers σ and tanh, which are exact to a few u only. In a
recurrence over T steps with inputs of D and G gates of H units (`recurrence_terms`)

    n = T (D + H)                     outputs and final states
    n = T (D + H + G H) + B T         gradients, parameters included

An array that has to be zero throughout has to be so exactly.

The factors leave a margin of three and more over what was seen on a CPU. With the cells and cases
of `test_every_cell.py` and forty seeds, the worst array had 0.28 of the error allowed in float32
and 0.33 in bfloat16; in float64 its error was below 1e-14.
"""

import math

import numpy as np

FLOAT64 = 1e-10
OPTIMIZED = {"xla_backend_optimization_level": 3}
"""Compiler options as everywhere but in the tests: for what is compared in float32 or bfloat16."""
PER_ROOT_OF_TERMS = {"float32": 16 * 2.0**-24, "bfloat16": 2.0**-8}


def tolerance(dtype: str, reduction: int = 1) -> float:
    """The largest error allowed: `dtype` is that of the computation, `reduction` is n above."""
    name = str(np.dtype(dtype)) if dtype != "bfloat16" else "bfloat16"
    if name == "float64":
        return FLOAT64
    return PER_ROOT_OF_TERMS[name] * math.sqrt(reduction)


def recurrence_terms(
    batch: int, time: int, inputs: int, hidden: int, gates: int, *, gradient: bool
) -> int:
    """The n of the rule for a recurrence: of its values, or of its gradients."""
    forward = time * (inputs + hidden)
    return forward + time * gates * hidden + batch * time if gradient else forward


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """max |actual - expected| / max |expected|; 0 for two equal arrays, also of zeros."""
    difference = np.max(np.abs(actual - expected), initial=0.0)
    scale = np.max(np.abs(expected), initial=0.0)
    return float(difference / max(scale, np.finfo(np.float64).tiny))


def assert_close(
    actual: object,
    expected: object,
    *,
    reduction: int = 1,
    dtype: str | None = None,
    what: str = "",
) -> None:
    """Assert that two arrays have one shape and agree by the rule above.

    `dtype` is that of `actual` unless said otherwise; NaN and infinity never agree with anything.
    """
    actual = np.asarray(actual)
    dtype = dtype or str(actual.dtype)
    actual, expected = actual.astype(np.float64), np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} is not {expected.shape}"
    assert np.all(np.isfinite(actual)), f"{what}: not finite"
    error, allowed = relative_error(actual, expected), tolerance(dtype, reduction)
    assert error <= allowed, f"{what}: error {error:.2e} is more than {allowed:.2e} ({dtype})"
