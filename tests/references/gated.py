"""LSTMs and GRUs with fewer or other gates."""

import numpy as np

from tests.references.functions import Array, Params, Step, blocks, sigmoid


def simple_rnn(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """h_t = tanh(x W + h R + b): Elman 1990."""
    (a,) = blocks(params, x, h, 1)
    return np.tanh(a), (), {}


def coupled(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """CIFG without peepholes: Greff et al. 2017."""
    i, g, o = blocks(params, x, h, 3)
    i = sigmoid(i)
    c = (1 - i) * state[0] + i * np.tanh(g)
    return sigmoid(o) * np.tanh(c), (c,), {}


def janet(params: Params, x: Array, h: Array, state: tuple, beta: float = 1.0) -> Step:
    """van der Westhuizen & Lasenby 2018, equations 6 and 7: s, c̃, c, h = c."""
    s, g = blocks(params, x, h, 2)
    return sigmoid(s) * h + (1 - sigmoid(s - beta)) * np.tanh(g), (), {}


def reset_first_gru(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Cho et al. 2014, equations 5 to 8, with biases; its z keeps the past."""
    from_x = np.split(x @ params["kernel"] + params["bias"], 3, axis=-1)
    from_h = np.split(h @ params["recurrent_kernel"], 2, axis=-1)
    r, z = sigmoid(from_x[0] + from_h[0]), sigmoid(from_x[1] + from_h[1])
    candidate = np.tanh(from_x[2] + (r * h) @ params["step"]["candidate_kernel"])
    return z * h + (1 - z) * candidate, (), {}


def mgu(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Zhou et al. 2016, equations 5a to 5c."""
    from_x = np.split(x @ params["kernel"] + params["bias"], 2, axis=-1)
    f = sigmoid(from_x[0] + h @ params["recurrent_kernel"])
    candidate = np.tanh(from_x[1] + (f * h) @ params["step"]["candidate_kernel"])
    return (1 - f) * h + f * candidate, (), {}


def layer_norm_lstm(
    params: Params, x: Array, h: Array, state: tuple, epsilon: float = 1e-5
) -> Step:
    """Ba et al. 2016, equations 20 to 22, the three biases of the first as one."""

    def normalised(z: Array, gain: Array) -> Array:
        mean = z.mean(-1, keepdims=True)
        variance = ((z - mean) ** 2).mean(-1, keepdims=True)
        return gain.reshape(-1) * (z - mean) / np.sqrt(variance + epsilon)

    p = params["step"]
    a = normalised(x @ params["kernel"], p["gain_x"]) + p["bias"].reshape(-1)
    a = a + normalised(h @ params["recurrent_kernel"], p["gain_h"])
    i, f, g, o = np.split(a, 4, axis=-1)
    c = sigmoid(f) * state[0] + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(normalised(c, p["gain_c"]) + p["bias_c"]), (c,), {}
