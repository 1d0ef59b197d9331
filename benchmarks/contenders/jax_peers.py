"""The recurrence in other JAX libraries, time-major, each on JAX's one default CPU device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import problems
from benchmarks.contenders import Job
from benchmarks.contenders.ours import jax_job, with_gradient
from benchmarks.problems import Case


def _job(case: Case, forward: Callable[[Any, Any], Any], from_ours: Callable[[Any], Any]) -> Job:
    """Time ``forward(weights, x) -> hs``, with its gradient where asked.

    ``from_ours`` turns our weights into the library's by moving numbers, so its transpose brings
    the gradient back.
    """
    params, x, d_hs = jax.tree.map(jnp.asarray, problems.recurrence(case))
    weights, to_ours = jax.vjp(from_ours, params)
    if case["mode"] == "forward":
        return jax_job(jax.jit(forward), (weights, x))
    both = jax.jit(with_gradient(forward))
    return jax_job(both, (weights, x, d_hs), to_ours=lambda d_weights: to_ours(d_weights)[0])


def linen(case: Case) -> Job:
    """``flax.linen.RNN(OptimizedLSTMCell)``: a kernel a gate, bias on the recurrent product."""
    import flax.linen as nn

    def from_ours(params: Any) -> Any:
        kernels, recurrent, biases = (
            jnp.split(params[name], 4, axis=-1) for name in ("kernel", "recurrent_kernel", "bias")
        )
        cell: dict[str, Any] = {}
        for gate, kernel, r, bias in zip("ifgo", kernels, recurrent, biases, strict=True):
            cell[f"i{gate}"] = {"kernel": kernel}
            cell[f"h{gate}"] = {"kernel": r, "bias": bias}
        return {"params": {"cell": cell}}

    rnn = nn.RNN(nn.OptimizedLSTMCell(case["hidden"]), time_major=True)
    return _job(case, rnn.apply, from_ours)


def nnx_rnn(case: Case) -> Job:
    """``flax.nnx.RNN(OptimizedLSTMCell)``, its carry given: drawing one would mutate a counter."""
    from flax import nnx

    rngs = nnx.Rngs(0)
    cell = nnx.OptimizedLSTMCell(case["features"], case["hidden"], rngs=rngs)
    rnn = nnx.RNN(cell, time_major=True, rngs=rngs)
    graph, weights, *rest = nnx.split(rnn, nnx.Param, ...)
    zeros = jnp.zeros((case["batch"], case["hidden"]))

    def from_ours(params: Any) -> Any:
        leaves = [params[name] for name in ("bias", "recurrent_kernel", "kernel")]
        return jax.tree.unflatten(jax.tree.structure(weights), leaves)

    def forward(weights: Any, x: Any) -> Any:
        return nnx.merge(graph, weights, *rest)(x, initial_carry=(zeros, zeros))

    return _job(case, forward, from_ours)


def haiku(case: Case) -> Job:
    """``haiku.dynamic_unroll(haiku.LSTM)``: one kernel for x and h, gates i g f o, 1 added to f."""
    import haiku as hk

    def swapped(a: Any) -> Any:
        i, f, g, o = jnp.split(a, 4, axis=-1)
        return jnp.concatenate([i, g, f, o], axis=-1)

    def from_ours(params: Any) -> Any:
        w = jnp.concatenate([params["kernel"], params["recurrent_kernel"]])
        one = jnp.repeat(jnp.array([0.0, 0.0, 1.0, 0.0]), case["hidden"])
        return {"lstm/linear": {"w": swapped(w), "b": swapped(params["bias"]) - one}}

    def network(x: Any) -> Any:
        core = hk.LSTM(case["hidden"])
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    return _job(case, hk.without_apply_rng(hk.transform(network)).apply, from_ours)


def equinox(case: Case) -> Job:
    """``equinox.nn.LSTMCell`` in a `jax.lax.scan`, a row at a time under `jax.vmap`."""
    import equinox as eqx

    cell = eqx.nn.LSTMCell(case["features"], case["hidden"], key=jax.random.key(0))

    def from_ours(params: Any) -> Any:
        weights = (params["kernel"].T, params["recurrent_kernel"].T, params["bias"])
        return eqx.tree_at(lambda c: (c.weight_ih, c.weight_hh, c.bias), cell, weights)

    def forward(cell: Any, x: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            state = cell(x, state)
            return state, state[0]

        def row(xs: Any) -> Any:
            zeros = jnp.zeros(case["hidden"])
            return jax.lax.scan(step, (zeros, zeros), xs)[1]

        return jax.vmap(row, in_axes=1, out_axes=1)(x)

    return _job(case, forward, from_ours)
