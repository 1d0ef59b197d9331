"""Beck et al. 2024, without the stabiliser: what the library keeps is divided by exp(m)."""

import numpy as np

from tests.references.functions import Array, Params, Step, absolute, maximum, sigmoid


def _stabiliser(n: Array, m: Array, i: Array, f: Array) -> Array:
    """Equation 15; at the beginning of a sequence nothing is there to be stabilised."""
    return np.where(np.real(n) == 0, i, maximum(np.log(sigmoid(f)) + m, i))


def slstm(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Equations 8 to 14, with two heads."""
    c, n, m = state
    half = h.shape[-1] // 2
    r = params["recurrent_kernel"].reshape(half, 4, 2, half)
    heads = np.stack([h[:, :half], h[:, half:]], axis=1)
    from_h = np.einsum("bhk,kghj->bghj", heads, r).reshape(len(x), -1)
    z, i, f, o = np.split(x @ params["kernel"] + from_h + params["bias"], 4, axis=-1)
    new_m = _stabiliser(n, m, i, f)
    c = sigmoid(f) * c * np.exp(m) + np.exp(i) * np.tanh(z)
    n = sigmoid(f) * n * np.exp(m) + np.exp(i)
    return sigmoid(o) * c / n, (c * np.exp(-new_m), n * np.exp(-new_m), new_m), {}


def mlstm(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Equations 19 to 27, head by head, of two."""
    size, own = h.shape[-1] // 2, params["step"]
    a = np.split(x @ params["kernel"] + params["bias"], 4, axis=-1)
    gates = x @ own["gates"] + own["gates_bias"]
    hs, states = [], []
    for head in range(2):
        c, n, m = (s[:, head] for s in state)
        q, k, v, o = (one[:, head * size : (head + 1) * size] for one in a)
        i, f = gates[:, head], gates[:, 2 + head]
        new_m = _stabiliser(n[:, 0], m, i, f)
        f, i, k = (sigmoid(f) * np.exp(m))[:, None], np.exp(i)[:, None], k / np.sqrt(size)
        c = f[..., None] * c + i[..., None] * (v[:, :, None] @ k[:, None])
        n = f * n + i * k
        weight = absolute(np.sum(n * q, axis=-1, keepdims=True))
        hs.append(sigmoid(o) * (c @ q[..., None])[..., 0] / maximum(weight, np.ones_like(weight)))
        scale = np.exp(-new_m)
        states.append((c * scale[:, None, None], n * scale[:, None], new_m))
    return np.concatenate(hs, -1), tuple(np.stack(s, 1) for s in zip(*states, strict=True)), {}
