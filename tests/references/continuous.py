"""Cells in continuous time."""

import numpy as np

from tests.numpy_reference import lstm_step
from tests.references.functions import Array, Params, Step, blocks, sigmoid


def cfc(params: Params, x: Array, h: Array, state: tuple, *, dt: Array) -> Step:
    """Hasani et al. 2022, equation 3, without a backbone."""
    f, g, k = blocks(params, x, h, 3)
    gate = sigmoid(-f * dt)
    return gate * np.tanh(g) + (1 - gate) * np.tanh(k), (), {}


def phased(params: Params, x: Array, h: Array, state: tuple, *, t: Array) -> Step:
    """Neil et al. 2016, equations 6 to 11."""
    p = params["units"]
    tau, s, r = np.exp(p["log_period"]), p["shift"], p["open"]
    turns = (t - s) / tau
    phi = turns - np.floor(np.real(turns))
    opening, closing = np.real(phi) < np.real(r) / 2, np.real(phi) < np.real(r)
    k = np.where(opening, 2 * phi / r, np.where(closing, 2 - 2 * phi / r, 1e-3 * phi))
    new_h, (c,), _ = lstm_step(params, x, h, state)
    return k * new_h + (1 - k) * h, (k * c + (1 - k) * state[0],), {}


def antisymmetric(
    params: Params, x: Array, h: Array, state: tuple, epsilon: float = 0.1, gamma: float = 0.01
) -> Step:
    """Chang et al. 2019, equations 15 and 16, rows for columns."""
    r = params["recurrent_kernel"]
    a, z = np.split(x @ params["kernel"] + params["bias"], 2, axis=-1)
    from_h = h @ (r - r.T - gamma * np.eye(len(r)))
    return h + epsilon * sigmoid(from_h + z) * np.tanh(from_h + a), (), {}


def lmu(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Voelker et al. 2019, equations 1, 2 and 4 to 7; A and B by the series of exp(A)."""
    (m,), own = state, params["step"]
    order, window = m.shape[-1], 5.0
    a, b = np.zeros((order, order)), np.zeros(order)
    for i in range(order):
        b[i] = (2 * i + 1) * (-1) ** i / window
        for j in range(order):
            a[i, j] = (2 * i + 1) / window * (-1 if i < j else (-1) ** (i - j + 1))
    # m' = A m + B u, u constant for one step: ē = exp(A), B̄ = A^-1 (exp(A) - 1) B.
    held, integral, term = np.eye(order), np.zeros((order, order)), np.eye(order)
    for k in range(1, 60):
        integral = integral + term / k
        term = term @ a / k
        held = held + term
    u = x @ own["e_x"] + h @ own["e_h"] + m @ own["e_m"]
    m = m @ held.T + u * (integral @ b)
    hidden = x @ params["kernel"] + h @ params["recurrent_kernel"] + m @ own["memory_kernel"]
    return np.tanh(hidden), (m,), {}
