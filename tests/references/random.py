"""LSTMs with random numbers, which are given: drawn by the library, used as the papers say."""

import numpy as np

from tests.numpy_reference import lstm_step
from tests.references.functions import Array, Params, Step, blocks, sigmoid


def zoneout(params: Params, x: Array, h: Array, state: tuple, *, d_c: Array, d_h: Array) -> Step:
    """Krueger et al. 2017, section 3.1; h sees the cell state without zoneout."""
    (c_prev,) = state
    i, f, g, o = blocks(params, x, h, 4)
    updated = sigmoid(f) * c_prev + sigmoid(i) * np.tanh(g)
    c = d_c * c_prev + (1 - d_c) * updated
    return d_h * h + (1 - d_h) * (sigmoid(o) * np.tanh(updated)), (c,), {}


def recurrent_dropout(params: Params, x: Array, h: Array, state: tuple, *, d_g: Array) -> Step:
    """Semeniuta et al. 2016, equation 10: c_t = f c_{t-1} + i d(g)."""
    i, f, g, o = blocks(params, x, h, 4)
    c = sigmoid(f) * state[0] + sigmoid(i) * (d_g * np.tanh(g))
    return sigmoid(o) * np.tanh(c), (c,), {}


def variational(params: Params, x: Array, h: Array, state: tuple, *, d_h: Array) -> Step:
    """Gal & Ghahramani 2016, equation 7, but for the mask of x."""
    return lstm_step(params, x, h * d_h, state)


def weight_drop(params: Params, x: Array, h: Array, state: tuple, *, keep: Array) -> Step:
    """Merity et al. 2018: DropConnect on the hidden-to-hidden matrices, for all time."""
    (one,) = np.unique(keep, axis=0)
    r = params["recurrent_kernel"]
    return lstm_step({**params, "recurrent_kernel": r * one.reshape(r.shape)}, x, h, state)
