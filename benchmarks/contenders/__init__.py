"""Who is compared: one small function each, and the process that it runs in."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Job(NamedTuple):
    """What a contender's function makes of a case.

    Attributes:
        run: does it once, to its end.
        check: arrays that must be the same for all contenders, by name.
        warm_up: the first call, compilation included, where that is not ``run``.
        memory: bytes that the compiled program needs, over all devices, where it can tell.
    """

    run: Callable[[], Any]
    check: Callable[[], Mapping[str, np.ndarray]] = dict
    warm_up: Callable[[], Any] | None = None
    memory: Callable[[], int | None] = lambda: None


def training_job(run: Callable[[], float]) -> Job:
    """A job whose runs train and return a loss: those of the first two runs are compared."""
    losses: list[float] = []

    def once() -> None:
        losses.append(run())

    def check() -> dict[str, np.ndarray]:
        once()
        return {"losses": np.array(losses)}

    return Job(once, check)


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


class Contender(NamedTuple):
    """One entry of a comparison: ``source`` is ``"module:function"`` in this folder.

    ``packages`` is what must be installed, ``tolerance`` the largest deviation from the first
    contender, relative to the largest element. A ``slow`` one runs with ``--full`` only.
    """

    name: str
    process: str
    source: str
    packages: str = "lstmjax"
    options: dict[str, Any] = {}
    tolerance: float = 1e-3
    slow: bool = False


PROCESSES: dict[str, dict[str, str]] = {
    "lstmjax": {},  # one CPU device a core, as training.make_mesh sets it up
    "lstmjax, one heap": {"MALLOC_ARENA_MAX": "1"},  # docs/kernels_cpu.md
    "jax": {},  # JAX as it comes: one CPU device that uses all cores
    "torch": {},
    "keras-tensorflow": {"KERAS_BACKEND": "tensorflow"},
    "keras-jax": {"KERAS_BACKEND": "jax"},
    "keras-torch": {"KERAS_BACKEND": "torch"},
}
"""Processes and what their environment adds."""


def _ours(
    name: str, process: str = "lstmjax", tolerance: float = 1e-3, **options: Any
) -> Contender:
    return Contender(name, process, "ours:recurrence", "lstmjax", options, tolerance)


def _keras(function: str, note: str = "", slow: tuple[str, ...] = (), **options: Any) -> Any:
    return tuple(
        Contender(
            f"Keras on {name}{note}",
            f"keras-{package}",
            f"keras_peers:{function}",
            f"keras {package}",
            options,
            slow=package in slow,
        )
        for name, package in (("TensorFlow", "tensorflow"), ("JAX", "jax"), ("PyTorch", "torch"))
    )


CPU = _ours("lstmjax cpu", engine="cpu")
ONE_HEAP = _ours("lstmjax cpu, one heap", "lstmjax, one heap", engine="cpu")
DERIVED = _ours("lstmjax derived", engine="derived")
SCAN = _ours("lstmjax scan", engine="scan")
PLAIN = _ours("lstmjax plain scan", engine="scan", recompute=False)
BFLOAT16 = _ours(
    "lstmjax derived, bfloat16", "lstmjax", 0.1, engine="derived", precision="bfloat16"
)
LINEN = Contender("Flax linen RNN", "jax", "jax_peers:linen", "flax")
TORCH = Contender("PyTorch nn.LSTM", "torch", "torch_peers:recurrence", "torch")
RECURRENCE = (
    *(CPU, ONE_HEAP, DERIVED, SCAN, PLAIN, BFLOAT16),
    _ours("lstmjax cpu, one device", "jax", engine="cpu", devices=1),
    _ours("lstmjax derived, one device", "jax", engine="derived", devices=1),
    _ours("lstmjax plain scan, one device", "jax", engine="scan", recompute=False, devices=1),
    LINEN,
    Contender("Flax NNX RNN", "jax", "jax_peers:nnx_rnn", "flax"),
    Contender("Haiku", "jax", "jax_peers:haiku", "haiku"),
    Contender("Equinox", "jax", "jax_peers:equinox", "equinox"),
    TORCH,
)
CHAINS = (
    Contender("chain of h R", "lstmjax", "ours:chain", options={"both": False}),
    Contender("chain of h R and z Rᵀ", "lstmjax", "ours:chain", options={"both": True}),
)
STEPS = (
    Contender("step", "lstmjax", "ours:steps_alone", options={"both": False}),
    Contender("step and its gradient", "lstmjax", "ours:steps_alone", options={"both": True}),
)
LARGE = (
    Contender("large product, one device", "lstmjax", "ours:large", options={"spread": False}),
    Contender("large product, all devices", "lstmjax", "ours:large", options={"spread": True}),
)
TRAIN_STEP = (
    Contender("lstmjax", "lstmjax", "ours:train_step"),
    *_keras("train_step", slow=("torch",)),
    Contender("PyTorch, own loop", "torch", "torch_peers:train_step", "torch"),
)
EPOCH = (
    Contender("lstmjax", "lstmjax", "ours:epoch"),
    Contender("lstmjax, one shape", "lstmjax", "ours:epoch", options={"one_shape": True}),
    *_keras("epoch", slow=("torch",)),
    Contender("PyTorch, padded", "torch", "torch_peers:epoch", "torch", {"packed": False}),
    Contender("PyTorch, packed", "torch", "torch_peers:epoch", "torch", {"packed": True}),
)
CUMSUM = (
    Contender("lstmjax", "lstmjax", "ours:cumsum"),
    *_keras("cumsum", ", fit once", slow=("torch",), each=False),
    *_keras("cumsum", ", fit each", slow=("tensorflow", "torch"), each=True),
)
