"""The recurrences of `lstmjax.cells` in float64 NumPy, forward and backward, without JAX.

Nothing here is fast and nothing is shared with the library: one pair of functions per cell,
`*_step` (the equations) and `*_step_backward` (their derivatives, worked out by hand), and one pair
of drivers, `forward` and `backward`, that go through time and know about initial states, masks,
resets and direction. `tests/test_numpy_reference.py` checks the derivatives against central
differences.

Notation. Row vectors, a batch of B rows: x (B, D), h and every state (B, H), kernel W (D, G·H),
recurrent kernel R (H, G·H), bias b (G·H,). The G gates lie side by side along the last axis. σ is
the logistic function, * the elementwise product. In the backward functions `d_a` is ∂L/∂a, for a
scalar loss L, and the two derivatives that come up everywhere are

    σ'(a) = s (1 - s)  for s = σ(a),        tanh'(a) = 1 - t²  for t = tanh(a).

A matrix product y = x W has  d_x = d_y Wᵀ  and  d_W = xᵀ d_y,  and a bias (or a peephole) that all
rows of the batch share collects the sum of its derivative over the rows.

Parameters have the layout of `Cell.init`: a dict of `kernel`, `recurrent_kernel`, `bias`, and,
where the cell has them, `recurrent_bias` and `units` (a dict of vectors of length H). Gradients of
the parameters have the same layout. A state is a tuple of arrays: `(c,)` for the LSTMs, `()` for
the GRU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Params = dict[str, Any]
State = tuple[Array, ...]
Cache = dict[str, Array]


def sigmoid(a: Array) -> Array:
    """σ(a) = 1 / (1 + e^-a), written with tanh so that no argument overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * a))


# --- LSTM ----------------------------------------------------------------------------------------


def lstm_step(params: Params, x: Array, h_prev: Array, state: State) -> tuple[Array, State, Cache]:
    """One step of the LSTM; gates i, f, g, o.

        (a_i, a_f, a_g, a_o) = x W + h_{t-1} R + b
        c_t = σ(a_f) * c_{t-1} + σ(a_i) * tanh(a_g)
        h_t = σ(a_o) * tanh(c_t)

    Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997, with the
    forget gate of Gers, Schmidhuber and Cummins, "Learning to Forget", Neural Computation 12(10),
    2000.
    """
    (c_prev,) = state
    a = x @ params["kernel"] + h_prev @ params["recurrent_kernel"] + params["bias"]
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=-1)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
    c = f * c_prev + i * g
    h = o * np.tanh(c)
    cache = {"x": x, "h_prev": h_prev, "c_prev": c_prev, "i": i, "f": f, "g": g, "o": o, "c": c}
    return h, (c,), cache


def lstm_step_backward(
    params: Params, cache: Cache, d_h: Array, d_state: State
) -> tuple[Array, Array, State, Params]:
    """Derivatives of `lstm_step`: (d_x, d_h_{t-1}, d_state_{t-1}, d_params).

    d_o = d_h * tanh(c)                     d_c += d_h * o * (1 - tanh²(c))
    d_f = d_c * c_{t-1}                     d_i = d_c * g                    d_g = d_c * i
    d_a_s = d_s * s (1 - s)  for s = i, f, o,          d_a_g = d_g * (1 - g²)
    d_c_{t-1} = d_c * f
    """
    (d_c,) = d_state
    i, f, g, o = cache["i"], cache["f"], cache["g"], cache["o"]
    tanh_c = np.tanh(cache["c"])
    d_o = d_h * tanh_c
    d_c = d_c + d_h * o * (1 - tanh_c**2)
    d_f = d_c * cache["c_prev"]
    d_i = d_c * g
    d_g = d_c * i
    d_c_prev = d_c * f
    d_a = np.concatenate(
        [d_i * i * (1 - i), d_f * f * (1 - f), d_g * (1 - g**2), d_o * o * (1 - o)], axis=-1
    )
    d_x = d_a @ params["kernel"].T
    d_h_prev = d_a @ params["recurrent_kernel"].T
    d_params = {
        "kernel": cache["x"].T @ d_a,
        "recurrent_kernel": cache["h_prev"].T @ d_a,
        "bias": d_a.sum(axis=0),
    }
    return d_x, d_h_prev, (d_c_prev,), d_params


# --- LSTM with peepholes -------------------------------------------------------------------------


def peephole_lstm_step(
    params: Params, x: Array, h_prev: Array, state: State
) -> tuple[Array, State, Cache]:
    """One step of the LSTM with peephole connections; gates i, f, g, o.

        (a_i, a_f, a_g, a_o) = x W + h_{t-1} R + b
        i = σ(a_i + p_i * c_{t-1})
        f = σ(a_f + p_f * c_{t-1})
        c_t = f * c_{t-1} + i * tanh(a_g)
        o = σ(a_o + p_o * c_t)                  the output gate sees the new cell state
        h_t = o * tanh(c_t)

    Gers, Schraudolph and Schmidhuber, "Learning Precise Timing with LSTM Recurrent Networks",
    Journal of Machine Learning Research 3, 2002.
    """
    (c_prev,) = state
    p = params["units"]
    a = x @ params["kernel"] + h_prev @ params["recurrent_kernel"] + params["bias"]
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=-1)
    i = sigmoid(a_i + p["p_i"] * c_prev)
    f = sigmoid(a_f + p["p_f"] * c_prev)
    g = np.tanh(a_g)
    c = f * c_prev + i * g
    o = sigmoid(a_o + p["p_o"] * c)
    h = o * np.tanh(c)
    cache = {"x": x, "h_prev": h_prev, "c_prev": c_prev, "i": i, "f": f, "g": g, "o": o, "c": c}
    return h, (c,), cache


def peephole_lstm_step_backward(
    params: Params, cache: Cache, d_h: Array, d_state: State
) -> tuple[Array, Array, State, Params]:
    """Derivatives of `peephole_lstm_step`: (d_x, d_h_{t-1}, d_state_{t-1}, d_params).

    d_a_o = d_h * tanh(c) * o (1 - o)
    d_c += d_h * o * (1 - tanh²(c)) + d_a_o * p_o              c feeds h and, by p_o, the gate o
    d_a_i = d_c * g * i (1 - i)
    d_a_f = d_c * c_{t-1} * f (1 - f)
    d_a_g = d_c * i * (1 - g²)
    d_c_{t-1} = d_c * f + d_a_i * p_i + d_a_f * p_f
    d_p_i = Σ d_a_i * c_{t-1},    d_p_f = Σ d_a_f * c_{t-1},    d_p_o = Σ d_a_o * c_t
    """
    (d_c,) = d_state
    p = params["units"]
    i, f, g, o = cache["i"], cache["f"], cache["g"], cache["o"]
    c, c_prev = cache["c"], cache["c_prev"]
    tanh_c = np.tanh(c)
    d_a_o = d_h * tanh_c * o * (1 - o)
    d_c = d_c + d_h * o * (1 - tanh_c**2) + d_a_o * p["p_o"]
    d_a_i = d_c * g * i * (1 - i)
    d_a_f = d_c * c_prev * f * (1 - f)
    d_a_g = d_c * i * (1 - g**2)
    d_c_prev = d_c * f + d_a_i * p["p_i"] + d_a_f * p["p_f"]
    d_a = np.concatenate([d_a_i, d_a_f, d_a_g, d_a_o], axis=-1)
    d_x = d_a @ params["kernel"].T
    d_h_prev = d_a @ params["recurrent_kernel"].T
    d_params = {
        "kernel": cache["x"].T @ d_a,
        "recurrent_kernel": cache["h_prev"].T @ d_a,
        "bias": d_a.sum(axis=0),
        "units": {
            "p_i": (d_a_i * c_prev).sum(axis=0),
            "p_f": (d_a_f * c_prev).sum(axis=0),
            "p_o": (d_a_o * c).sum(axis=0),
        },
    }
    return d_x, d_h_prev, (d_c_prev,), d_params


# --- GRU -----------------------------------------------------------------------------------------


def gru_step(params: Params, x: Array, h_prev: Array, state: State) -> tuple[Array, State, Cache]:
    """One step of the GRU, its reset gate after the recurrent product; gates r, z, n.

        (x_r, x_z, x_n) = x W + b
        (h_r, h_z, h_n) = h_{t-1} R + b_R
        r = σ(x_r + h_r)
        z = σ(x_z + h_z)
        n = tanh(x_n + r * h_n)
        h_t = (1 - z) * n + z * h_{t-1}

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
    Translation", EMNLP 2014, in the form that multiplies by r after the product, which is cuDNN's.
    """
    assert state == ()
    from_x = x @ params["kernel"] + params["bias"]
    from_h = h_prev @ params["recurrent_kernel"] + params["recurrent_bias"]
    x_r, x_z, x_n = np.split(from_x, 3, axis=-1)
    h_r, h_z, h_n = np.split(from_h, 3, axis=-1)
    r = sigmoid(x_r + h_r)
    z = sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * h_n)
    h = (1 - z) * n + z * h_prev
    return h, (), {"x": x, "h_prev": h_prev, "h_n": h_n, "r": r, "z": z, "n": n}


def gru_step_backward(
    params: Params, cache: Cache, d_h: Array, d_state: State
) -> tuple[Array, Array, State, Params]:
    """Derivatives of `gru_step`: (d_x, d_h_{t-1}, (), d_params).

    d_a_n = d_h * (1 - z) * (1 - n²)                where a_n = x_n + r * h_n
    d_a_z = d_h * (h_{t-1} - n) * z (1 - z)
    d_a_r = d_a_n * h_n * r (1 - r)
    d_(x W + b)         = (d_a_r, d_a_z, d_a_n)
    d_(h_{t-1} R + b_R) = (d_a_r, d_a_z, d_a_n * r)
    d_h_{t-1} = d_h * z + d_(h_{t-1} R + b_R) Rᵀ
    """
    assert d_state == ()
    h_prev, r, z, n = cache["h_prev"], cache["r"], cache["z"], cache["n"]
    d_a_n = d_h * (1 - z) * (1 - n**2)
    d_a_z = d_h * (h_prev - n) * z * (1 - z)
    d_a_r = d_a_n * cache["h_n"] * r * (1 - r)
    d_from_x = np.concatenate([d_a_r, d_a_z, d_a_n], axis=-1)
    d_from_h = np.concatenate([d_a_r, d_a_z, d_a_n * r], axis=-1)
    d_x = d_from_x @ params["kernel"].T
    d_h_prev = d_h * z + d_from_h @ params["recurrent_kernel"].T
    d_params = {
        "kernel": cache["x"].T @ d_from_x,
        "recurrent_kernel": h_prev.T @ d_from_h,
        "bias": d_from_x.sum(axis=0),
        "recurrent_bias": d_from_h.sum(axis=0),
    }
    return d_x, d_h_prev, (), d_params


# --- Through time --------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What the drivers, and whoever draws parameters at random, need to know of a cell."""

    step: Callable[..., tuple[Array, State, Cache]]
    step_backward: (
        Callable[[Params, Cache, Array, State], tuple[Array, Array, State, Params]] | None
    )
    gates: int
    states: int
    units: tuple[str, ...] = ()
    recurrent_bias: bool = False


REFERENCES = {
    "LSTM": Reference(lstm_step, lstm_step_backward, gates=4, states=1),
    "PeepholeLSTM": Reference(
        peephole_lstm_step,
        peephole_lstm_step_backward,
        gates=4,
        states=1,
        units=("p_i", "p_f", "p_o"),
    ),
    "GRU": Reference(gru_step, gru_step_backward, gates=3, states=0, recurrent_bias=True),
}


class Unrolled(NamedTuple):
    """What `forward` gives: the outputs, the final carry, and each step's cache for `backward`."""

    hs: Array
    h: Array
    state: State
    caches: list[Cache]


class Gradients(NamedTuple):
    """What `backward` gives: ∂L/∂ of x, of the initial carry and of the parameters."""

    x: Array
    h: Array
    state: State
    params: Params


def mask_from_lengths(lengths: Array, time: int, padding: str = "right") -> Array:
    """The (B, T) mask that lengths stand for: True on the steps that are not padding."""
    steps = np.arange(time)
    if padding == "right":
        return steps[None, :] < lengths[:, None]
    if padding == "left":
        return steps[None, :] >= time - lengths[:, None]
    raise ValueError(f"padding is {padding!r}, and must be 'right' or 'left'")


def steps_and_resets(
    batch: int, time: int, resets: Array | None, reverse: bool
) -> list[tuple[int, Array]]:
    """The steps in the order of processing, each with the rows (B,) to reset before it.

    `resets[b, t]` says that a new sequence begins at t, so the border lies between t-1 and t. Going
    forward it is crossed on entering t; going backward, on entering t-1.
    """
    if resets is None:
        resets = np.zeros((batch, time), bool)
    if not reverse:
        return [(t, resets[:, t]) for t in range(time)]
    nothing = np.zeros(batch, bool)
    return [(t, resets[:, t + 1] if t + 1 < time else nothing) for t in reversed(range(time))]


def forward(
    cell: Reference,
    params: Params,
    x: Array,
    initial_h: Array,
    initial_state: State,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    over_time: Params | None = None,
) -> Unrolled:
    """The recurrence over x (B, T, D). Before each step, per row of the batch:

        (h, s) = 0                       where a border of two sequences is crossed

    and then

        (h, s), hs_t = step(x_t, h, s), h      where the step is valid
        (h, s), hs_t = (h, s), 0               where it is masked

    `over_time` holds what else a step takes, (B, T, n), by keyword.
    """
    batch, time, _ = x.shape
    if mask is None:
        mask = np.ones((batch, time), bool)
    h, state = initial_h, initial_state
    hs = np.zeros((batch, time, initial_h.shape[-1]), np.result_type(x, initial_h))
    caches = [{} for _ in range(time)]
    for t, reset in steps_and_resets(batch, time, resets, reverse):
        h, *state = (_of_rows(reset, np.zeros_like(a), a) for a in (h, *state))
        now = {name: a[:, t] for name, a in (over_time or {}).items()}
        new_h, new_state, caches[t] = cell.step(params, x[:, t], h, tuple(state), **now)
        valid = mask[:, t]
        hs[:, t] = np.where(valid[:, None], new_h, 0.0)
        pairs = zip((new_h, *new_state), (h, *state), strict=True)
        h, *state = (_of_rows(valid, new, old) for new, old in pairs)
    return Unrolled(hs, h, tuple(state), caches)


def _of_rows(rows: Array, yes: Array, no: Array) -> Array:
    return np.where(rows.reshape(-1, *[1] * (no.ndim - 1)), yes, no)


def backward(
    cell: Reference,
    params: Params,
    x: Array,
    unrolled: Unrolled,
    d_hs: Array,
    d_h: Array,
    d_state: State,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
) -> Gradients:
    """Backpropagation through time: the steps of `forward` in the opposite order.

    `d_hs` is the cotangent of the outputs, `d_h` and `d_state` are that of the final carry. At a
    valid step the new h is an output and is carried on, so its cotangents add; at a masked step the
    output is a constant and the carry passes by unchanged. A reset cuts the carry's cotangent to
    zero.
    """
    assert cell.step_backward is not None
    batch, time, _ = x.shape
    if mask is None:
        mask = np.ones((batch, time), bool)
    d_x = np.zeros_like(x)
    d_params = tree_map(np.zeros_like, params)
    for t, reset in reversed(steps_and_resets(batch, time, resets, reverse)):
        valid = mask[:, t, None]
        d_new_h = np.where(valid, d_h + d_hs[:, t], 0.0)
        d_new_state = tuple(np.where(valid, d_s, 0.0) for d_s in d_state)
        d_x[:, t], d_h_prev, d_state_prev, d_params_t = cell.step_backward(
            params, unrolled.caches[t], d_new_h, d_new_state
        )
        d_params = tree_map(np.add, d_params, d_params_t)
        passed_h = np.where(valid, 0.0, d_h)
        passed_state = tuple(np.where(valid, 0.0, d_s) for d_s in d_state)
        d_h = np.where(reset[:, None], 0.0, passed_h + d_h_prev)
        d_state = tuple(
            np.where(reset[:, None], 0.0, passed + d_s)
            for passed, d_s in zip(passed_state, d_state_prev, strict=True)
        )
    return Gradients(d_x, d_h, d_state, d_params)


# --- Helpers -------------------------------------------------------------------------------------


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply a function to the arrays of nested dicts."""
    if isinstance(tree, dict):
        for other in others:
            assert other.keys() == tree.keys(), (other.keys(), tree.keys())
        return {
            key: tree_map(function, value, *(other[key] for other in others))
            for key, value in tree.items()
        }
    return function(tree, *others)


def random_params(
    cell: Reference, rng: np.random.Generator, input_size: int, hidden_size: int
) -> Params:
    """Parameters drawn at random, every one of them away from zero on average, biases included."""
    width = cell.gates * hidden_size
    params: Params = {
        "kernel": rng.normal(0, 0.6, (input_size, width)),
        "recurrent_kernel": rng.normal(0, 0.5, (hidden_size, width)),
        "bias": rng.normal(0, 0.5, width),
    }
    if cell.recurrent_bias:
        params["recurrent_bias"] = rng.normal(0, 0.5, width)
    if cell.units:
        params["units"] = {name: rng.normal(0, 0.5, hidden_size) for name in cell.units}
    return params
