"""Cells whose units do not see each other of the step before."""

from collections.abc import Callable

import numpy as np

from tests.references.functions import Array, Params, Step, relu, sigmoid, softplus


def indrnn(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Li et al. 2018, equation 2."""
    return relu(x @ params["kernel"] + params["units"]["u"] * h + params["bias"]), (), {}


def sru(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Lei et al. 2018, equations 1 to 4, and the scaled highway of section 3.2."""
    (c_prev,), v = state, params["units"]
    w, w_f, w_r = np.split(params["kernel"], 3, axis=-1)
    b_f, b_r = np.split(params["bias"], 2)
    f = sigmoid(x @ w_f + v["v_f"] * c_prev + b_f)
    c = f * c_prev + (1 - f) * (x @ w)
    r = sigmoid(x @ w_r + v["v_r"] * c_prev + b_r)
    return r * c + (1 - r) * x * np.sqrt(3), (c,), {}


def qrnn(pooling: str) -> Callable[..., Step]:
    """Bradbury et al. 2017, equations 2 to 5, with biases."""

    def step(params: Params, x: Array, h: Array, state: tuple) -> Step:
        c, x_prev = state
        first = np.split(params["kernel"], len(pooling) + 1, axis=-1)
        names = {"f": "zf", "fo": "zfo", "ifo": "zfoi"}[pooling]
        b = np.split(params["bias"], len(names))
        a = {
            name: x_prev @ params["step"]["kernel_before"][:, k] + x @ first[k] + b[k]
            for k, name in enumerate(names)
        }
        z, f = np.tanh(a["z"]), sigmoid(a["f"])
        c = f * c + (sigmoid(a["i"]) if pooling == "ifo" else 1 - f) * z
        return c if pooling == "f" else sigmoid(a["o"]) * c, (c, x), {}

    return step


def min_gru(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Feng et al. 2024, section 3.1."""
    z, n = np.split(x @ params["kernel"] + params["bias"], 2, axis=-1)
    return (1 - sigmoid(z)) * h + sigmoid(z) * n, (), {}


def min_lstm(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Feng et al. 2024, section 3.2."""
    f, i, n = np.split(x @ params["kernel"] + params["bias"], 3, axis=-1)
    f, i = sigmoid(f), sigmoid(i)
    return f / (f + i) * h + i / (f + i) * n, (), {}


def lru(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Orvieto et al. 2023, equations 1, 4 and 7.

    Complex numbers as pairs, as the complex step is in both parts.
    """
    b_re, b_im, d = np.split(params["kernel"], 3, axis=-1)
    p, c = params["units"], params["step"]
    modulus = np.exp(-np.exp(p["nu"]))
    l_re, l_im = modulus * np.cos(np.exp(p["theta"])), modulus * np.sin(np.exp(p["theta"]))
    s_re, s_im = state
    u_re, u_im = np.exp(p["gamma"]) * (x @ b_re), np.exp(p["gamma"]) * (x @ b_im)
    new_re, new_im = l_re * s_re - l_im * s_im + u_re, l_re * s_im + l_im * s_re + u_im
    return new_re @ c["c_re"] - new_im @ c["c_im"] + x @ d, (new_re, new_im), {}


def rg_lru(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """De et al. 2024, equations 1 to 4 and 6, c = 8; a = σ(-Λ)."""
    r, i = np.split(x @ params["kernel"] + params["bias"], 2, axis=-1)
    a = np.exp(-8 * softplus(params["units"]["Λ"]) * sigmoid(r))
    return a * h + np.sqrt(1 - a**2) * (sigmoid(i) * x), (), {}
