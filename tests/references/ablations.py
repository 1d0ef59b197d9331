"""Greff et al. 2017, section V and appendix: the vanilla LSTM, and what each ablation changes."""

from collections.abc import Callable

import numpy as np

from tests.references.functions import Array, Params, Step, blocks, sigmoid


def without(*gone: str) -> Callable[..., Step]:
    """The vanilla LSTM without a gate ("i", "f", "o"), or "input" or "output" activation; CIFG."""
    gates = [gate for gate in "ifgo" if gate not in gone and (gate, "cifg") != ("f", *gone)]

    def step(params: Params, x: Array, h: Array, state: tuple) -> Step:
        (c,), a = state, dict(zip(gates, blocks(params, x, h, len(gates)), strict=True))

        def gate(name: str, c: Array) -> Array:
            if name not in gates:
                return np.ones_like(c)
            return sigmoid(a[name] + params["units"][f"p_{name}"] * c)

        i = gate("i", c)
        f = 1 - i if "cifg" in gone else gate("f", c)
        c = f * c + i * (a["g"] if "input" in gone else np.tanh(a["g"]))
        return gate("o", c) * (c if "output" in gone else np.tanh(c)), (c,), {}

    return step


def full_gate_recurrence(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Nine more matrices, from each gate of the step before to each gate."""
    c, *before = state
    p, recurrence = params["units"], params["step"]["gate_kernel"]
    a_i, a_f, a_g, a_o = blocks(params, x, h, 4)

    def from_gates(gate: int) -> Array:
        return sum(before[k] @ recurrence[k, :, gate] for k in range(3))

    i = sigmoid(a_i + p["p_i"] * c + from_gates(0))
    f = sigmoid(a_f + p["p_f"] * c + from_gates(1))
    c = f * c + i * np.tanh(a_g)
    o = sigmoid(a_o + p["p_o"] * c + from_gates(2))
    return o * np.tanh(c), (c, i, f, o), {}
