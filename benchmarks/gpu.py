"""The recurrence on a GPU: lstmjax' engines, Flax, PyTorch and cuDNN through JAX.

    python -m benchmarks.gpu --all      under 8 minutes, no network: what only a device can say, by
                                        `benchmarks.signoff`, then all of the below; called again,
                                        it goes on where it stopped; writes
                                        benchmarks/results/gpu/<device>-all.json
    python -m benchmarks.gpu --all --interpreted    the same, small, without a GPU
    python -m benchmarks.gpu            prints a table, draws it and writes
                                        benchmarks/results/gpu/<device>.json
    python -m benchmarks.gpu --check    tiny shapes, with or without a GPU, writes nothing: only
                                        shows that every contender that is present runs

Every contender runs forward, and forward with all gradients, on the same parameters, inputs and
cotangents. Its values and gradients are compared with the plain scan in float64 before it is timed:
``error`` is the largest distance, as a share of the largest element, of the hidden states and of
the gradients. Times are from the first to the last thing that the device does (by CUPTI, through
JAX' profiler, and by CUDA's events), the median of several runs, compilation excluded, divided by
the time steps. ``bound`` is the larger of what the products take at the peak of the device and what
the inputs and outputs take at its bandwidth: the time of a step cannot be less.

One that is not installed, cannot run here, or fails, has one line that says so.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import (
    Bench,
    CannotRunError,
    Contender,
    Problem,
    Runs,
    Shape,
    jax_contenders,
    jax_runs,
    kernel_contenders,
    main,
    on_the_host,
)
from benchmarks.signoff import Item, checks, more_cases, training
from lstmjax.recurrence.engine import platform
from lstmjax.recurrence.gpu.engine import PallasGPU

SHAPES = (
    Shape(500, 64, 100, 32),
    Shape(500, 64, 256, 256),
    Shape(1024, 16, 768, 768),
    Shape(500, 256, 512, 512),
    Shape(500, 64, 1024, 1024),
)


def cudnn_runs(problem: Problem) -> Runs:
    """`jax.experimental.rnn`: cuDNN's LSTM, in float32."""
    from jax.experimental import rnn

    if platform() != "gpu":
        raise CannotRunError(f"cuDNN needs a GPU, this is a {platform()}")
    batch, steps, features = problem.x.shape
    hidden, ours = problem.cell.hidden_size, problem.params
    parts = (ours["kernel"].T, ours["recurrent_kernel"].T, ours["bias"], 0 * ours["bias"])
    weights = np.concatenate([part.ravel() for part in parts])
    zeros, lengths = jnp.zeros((1, batch, hidden)), jnp.full((batch,), steps, jnp.int32)

    def f(weights: Any, x: Any) -> Any:
        highest = jax.lax.Precision.HIGHEST
        sizes = {"input_size": features, "hidden_size": hidden, "num_layers": 1}
        rest = {"dropout": 0.0, "bidirectional": False, "precision": highest}
        return rnn.lstm(x, zeros, zeros, weights, lengths, **sizes, **rest)[0]

    return jax_runs(f, weights, problem)


def torch_runs(mode: str, problem: Problem) -> Runs:
    """`nn.LSTM` or `nn.GRU` of PyTorch, on cuDNN; without a GPU, on the CPU."""
    import torch

    device = "cuda" if platform() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CannotRunError("this PyTorch has no CUDA")
    if device == "cpu" and mode != "float32":
        raise CannotRunError(f"{mode} needs a GPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    ours, cell = problem.params, problem.cell
    layer = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}[type(cell).__name__]
    module = layer(problem.x.shape[-1], cell.hidden_size, batch_first=True).to(device, dtype)
    second = ours.get("recurrent_bias", 0 * ours["bias"])
    values = (ours["kernel"].T, ours["recurrent_kernel"].T, ours["bias"], second)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    module.flatten_parameters()  # one piece of memory, without which every call copies them
    x = torch.tensor(problem.x).to(device, dtype).requires_grad_()
    d_hs = torch.tensor(problem.d_hs).to(device, dtype)

    def forward() -> Any:
        with torch.no_grad():
            return module(x)[0]

    def gradient() -> tuple[Any, Any]:
        hs = module(x)[0]
        return hs, torch.autograd.grad(hs, (x, *module.parameters()), d_hs)[0]

    def to_numpy(a: Any) -> np.ndarray:
        return a.detach().float().cpu().numpy()

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def events(run: Callable[[], Any], repeats: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    # What allow_tf32 says when the work is started is what counts; contenders run one by one.
    clock = events if device == "cuda" else on_the_host(wait)
    return Runs(forward, gradient, wait, to_numpy, clock)


def contenders() -> Iterator[Contender]:
    """All of them, the most telling first."""
    yield from kernel_contenders(PallasGPU())
    for mode in ("bfloat16", "tf32", "float32"):
        make = functools.partial(torch_runs, mode)
        yield Contender("PyTorch cuDNN", mode, ("LSTM", "GRU"), make, "torch")
    yield Contender("jax.experimental.rnn", "float32", ("LSTM",), cudnn_runs, late=True)
    yield from jax_contenders("tf32")


def checked(interpreted: bool) -> dict[str, Item]:
    """Of the kernels, and training; interpreted, little of each."""
    from tests.gpu_interpreter import INTERPRET
    from tests.test_kernels_gpu import CASES

    if interpreted:
        cases = {"LSTM": CASES["LSTM"]._replace(steps=5)}
        found = checks(PallasGPU(interpret=INTERPRET), cases, 2)
        return found | training("auto", "--accelerator", "cpu", "--max-length", "16")
    return checks(PallasGPU(), CASES | more_cases(512), 1000) | training("pallas_gpu")


BENCH = Bench("gpu", contenders, checked, SHAPES, processes=6, seconds=420.0)

if __name__ == "__main__":
    sys.exit(main(BENCH, __doc__, sys.argv[1:]))
