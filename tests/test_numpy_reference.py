"""The hand-written derivatives of the NumPy reference against central differences.

For a loss L = Σ w * (outputs and final carry), with random weights w, every element of every input
and parameter is moved by ±ε and

    (L(p + ε) - L(p - ε)) / 2ε  =  ∂L/∂p + O(ε²) + O(u L / ε),        u = 1.1e-16.

At ε = 1e-5 both errors are near 1e-10 of the gradient's scale. The worst seen is 7.2e-10, relative
to the largest element of that gradient, and the tolerance is 2e-9. An error in a derivative is of
the order of 1.
"""

import numpy as np
import pytest

from tests import numpy_reference as reference

EPSILON = 1e-5
TOLERANCE = 2e-9
B, T, D, H = 3, 7, 2, 5


def central_difference(loss, array):
    """∂loss/∂array, element by element; `loss` reads the array, which is moved in place."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + EPSILON
        above = loss()
        array[index] = kept - EPSILON
        below = loss()
        array[index] = kept
        gradient[index] = (above - below) / (2 * EPSILON)
    return gradient


# Row 1 has a reset on a masked step, row 2 one on the first step.
MASK = np.array([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1, 1]], bool)
RESETS = np.array([[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0]], bool)
CASES = {
    "plain": (None, None),
    "mask": (MASK, None),
    "resets": (None, RESETS),
    "mask and resets": (MASK, RESETS),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", reference.REFERENCES)
def test_backward_is_the_derivative_of_forward(name, case, reverse):
    cell = reference.REFERENCES[name]
    rng = np.random.default_rng(20)
    params = reference.random_params(cell, rng, D, H)
    x = rng.normal(0, 1, (B, T, D))
    h0 = rng.normal(0, 1, (B, H))
    state0 = tuple(rng.normal(0, 1, (B, H)) for _ in range(cell.states))
    w_hs = rng.normal(0, 1, (B, T, H))
    w_h = rng.normal(0, 1, (B, H))
    w_state = tuple(rng.normal(0, 1, (B, H)) for _ in range(cell.states))
    mask, resets = CASES[case]
    how = {"mask": mask, "resets": resets, "reverse": reverse}

    def loss():
        out = reference.forward(cell, params, x, h0, state0, **how)
        return (
            np.sum(w_hs * out.hs)
            + np.sum(w_h * out.h)
            + sum(np.sum(w * s) for w, s in zip(w_state, out.state, strict=True))
        )

    unrolled = reference.forward(cell, params, x, h0, state0, **how)
    gradients = reference.backward(cell, params, x, unrolled, w_hs, w_h, w_state, **how)

    def check(what, array, gradient):
        difference = central_difference(loss, array)
        assert gradient.shape == array.shape, what
        scale = np.max(np.abs(difference))
        assert scale > 1e-3, f"{what}: the case says nothing about this gradient"
        error = np.max(np.abs(gradient - difference)) / scale
        assert error <= TOLERANCE, f"{what}: {error:.2e}"

    check("x", x, gradients.x)
    check("initial h", h0, gradients.h)
    for array, gradient in zip(state0, gradients.state, strict=True):
        check("initial state", array, gradient)
    for key, array in params.items():
        if key != "units":
            check(key, array, gradients.params[key])
    for key, array in params.get("units", {}).items():
        check(key, array, gradients.params["units"][key])


def by_hand(params, x, hs, cs):
    """The cell equations with Python's floats, one unit of H = 1, to pin the gates' order."""
    import math

    def s(a):
        return 1 / (1 + math.exp(-a))

    pre = [x * w + hs * r + b for w, r, b in zip(*params, strict=True)]
    c = s(pre[1]) * cs + s(pre[0]) * math.tanh(pre[2])
    return s(pre[3]) * math.tanh(c), c


def test_an_lstm_step_with_one_unit_agrees_with_scalar_arithmetic():
    kernel, recurrent, bias = [0.1, -0.2, 0.3, 0.4], [0.5, 0.6, -0.7, 0.8], [0.9, 1.0, 1.1, -1.2]
    h, c = by_hand((kernel, recurrent, bias), x=0.7, hs=0.3, cs=-0.4)
    params = {
        "kernel": np.array([kernel]),
        "recurrent_kernel": np.array([recurrent]),
        "bias": np.array(bias),
    }
    one = np.ones((1, 1))
    got_h, (got_c,), _ = reference.lstm_step(params, 0.7 * one, 0.3 * one, (-0.4 * one,))
    assert abs(got_h.item() - h) < 1e-15
    assert abs(got_c.item() - c) < 1e-15


@pytest.mark.parametrize("padding", ["right", "left"])
def test_mask_from_lengths_counts_the_valid_steps_at_the_right_end(padding):
    mask = reference.mask_from_lengths(np.array([0, 2, 3]), 3, padding)
    right = np.array([[0, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    np.testing.assert_array_equal(mask, right if padding == "right" else right[:, ::-1])


@pytest.mark.parametrize("name", reference.REFERENCES)
def test_reverse_with_resets_is_each_sequence_run_backward_by_itself(name):
    cell = reference.REFERENCES[name]
    rng = np.random.default_rng(21)
    params = reference.random_params(cell, rng, D, H)
    x = rng.normal(0, 1, (B, T, D))
    zero = np.zeros((B, H))
    zeros = (zero,) * cell.states
    border = 3
    resets = np.zeros((B, T), bool)
    resets[:, border] = True
    packed = reference.forward(cell, params, x, zero, zeros, resets=resets, reverse=True)
    for part in (slice(0, border), slice(border, T)):
        flipped = reference.forward(cell, params, x[:, part][:, ::-1], zero, zeros)
        np.testing.assert_array_equal(packed.hs[:, part], flipped.hs[:, ::-1])
