"""Several processes, by JAX's own distributed runtime: joining, one voice, stopping together.

All processes run the same program on their share of each batch. The first alone has the run's
folder; what it reads there it tells the others.
"""

import collections
import ctypes
import json
import os
import signal
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lstmjax import stopping
from lstmjax.errors import PeerError, UserError, first_line
from lstmjax.training.devices import place, replicated, sharded

ResultT = TypeVar("ResultT")

HEARTBEAT = 20
"""Seconds without a sign of life after which a process counts as gone."""
_DELAY = 5  # steps: more than are under way, so that nothing waits for the newest


def join(coordinator: str = "", processes: int = 0, process_id: int = -1) -> None:
    """Join the other processes of this run, if there are any; call it before JAX starts.

    Args:
        coordinator: ``host:port`` of the first process; without it, JAX finds the others under
            Slurm and on TPU slices.
        processes: how many there are.
        process_id: number of this one, from 0.

    Raises:
        UserError: the three do not fit together.
        PeerError: the others do not answer.
    """
    given = (bool(coordinator), processes > 0, process_id >= 0)
    if any(given) and not (all(given) and process_id < processes and ":" in coordinator):
        raise UserError(
            "--coordinator host:port, --processes N and --process-id I (0 to N-1) belong "
            f"together; got {coordinator!r}, {processes}, {process_id}"
        )
    if not (any(given) or _under_a_scheduler()):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    _speak_at_the_end()
    stopping.say(f"waiting for the other processes{f', at {coordinator}' * bool(coordinator)}\n")
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator if any(given) else None,
            num_processes=processes if any(given) else None,
            process_id=process_id if any(given) else None,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except Exception as error:
        raise PeerError(
            f"the processes of this run do not find each other ({first_line(error)[:200]}): start "
            "all of them within five minutes, with the same --coordinator"
        ) from error
    if jax.process_count() > 1:
        stopping.stop_together()
    if jax.process_index():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the first one speaks for all
        os.environ["TQDM_DISABLE"] = "1"


def _speak_at_the_end() -> None:
    """Turn the abort by which JAX ends a process whose peers are gone into a line and a status."""
    libc = ctypes.CDLL(None)

    def last_words(number: int) -> None:
        stopping.say(
            "\nerror: another process of this run is gone or did not come, so this one stops: "
            "start all of them again with --resume\n"
        )
        os._exit(PeerError.status)

    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(last_words)
    libc.signal(signal.SIGABRT, _handler)


_handler: object = None  # must outlive the call that installs it


def _under_a_scheduler() -> bool:
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return (tasks.isdigit() and int(tasks) > 1) or "," in workers


def is_first() -> bool:
    """Whether this process has the run's folder and speaks for all."""
    return jax.process_index() == 0


def from_first(make: Callable[[], ResultT]) -> ResultT:
    """What ``make`` returns, or raises as a `UserError`, in the first process; JSON, for all."""
    if jax.process_count() == 1:
        return make()
    told: dict[str, object] = {}
    problem = None
    if is_first():
        try:
            told = {"value": make()}
        except UserError as error:
            problem, told = error, {"error": str(error)}
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, size) if is_first() else np.zeros(size, np.uint8)
    heard = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))))
    if problem is not None:
        raise problem
    if "error" in heard:
        raise UserError(f"the first process says: {heard['error']}")
    return heard["value"]


def arrays_from_first(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The first process's arrays; the others give some of the same shapes and dtypes."""
    if jax.process_count() == 1:
        return arrays
    return [np.asarray(a) for a in multihost_utils.broadcast_one_to_all(arrays)]


def any_told(stop: object) -> bool:
    """Whether any of the processes was told to stop; all of them ask."""
    if jax.process_count() == 1:
        return bool(stop)
    return bool(multihost_utils.process_allgather(np.int32(bool(stop))).any())


def meet() -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("meet")


class Agreement:
    """All processes stop at the same step when one of them is told to.

    Each step sums the processes' flags, ordered between two steps by the number of the step, which
    passes through; the sum is read some steps later, so that no step waits for it.
    """

    def __init__(self, mesh: Mesh, stop: object) -> None:
        self._mesh, self._stop = mesh, stop
        self._sums: collections.deque[Array] = collections.deque()
        self._sum = jax.jit(
            lambda step, flags: (jnp.copy(step), flags.sum()), out_shardings=replicated(mesh)
        )

    def __call__(self, step: Array) -> tuple[Array, bool]:
        """The step's number, and whether to stop before the next one."""
        if jax.process_count() == 1:
            return step, bool(self._stop)
        local = len(self._mesh.local_devices)
        flags = place(np.full(local, int(bool(self._stop)), np.int32), sharded(self._mesh))
        step, total = self._sum(step, flags)
        self._sums.append(total)
        return step, len(self._sums) > _DELAY and int(self._sums.popleft()) > 0
