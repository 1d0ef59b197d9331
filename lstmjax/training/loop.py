"""The training loop: epochs, progress, evaluation, checkpoints, going on after an interruption."""

import collections
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from lstmjax.data import Batch, Batches
from lstmjax.errors import UserError
from lstmjax.training.checkpoint import Checkpoints, Interruption, Position
from lstmjax.training.devices import replicated, sharded
from lstmjax.training.report import RunFolder
from lstmjax.training.step import Steps, Sums, TrainState, training_key

LOG_EVERY = 10
"""A line of ``metrics.jsonl`` is written at every multiple of so many steps, and at the end of an
epoch; it gives the means since the line before."""


class NonFiniteLossError(UserError):
    """The loss of a step is not a finite number."""


class Interrupted(Exception):
    """The run was told to stop; its state is saved.

    Attributes:
        signal: number of the signal that said so.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def on_device(
    batches: Iterable[Batch],
    mesh: Mesh,
    prepare: Callable[[Batch], None] = lambda batch: None,
    ahead: int = 8,
) -> Iterator[Batch]:
    """The batches, put on the devices before they are asked for, all but the first.

    Args:
        batches: what to put there.
        mesh: the devices.
        prepare: called with every batch that waits, each time another one has been used.
        ahead: how many wait.
    """
    placed = (jax.device_put(batch, sharded(mesh)) for batch in batches)
    waiting = collections.deque(itertools.islice(placed, 1))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(placed, ahead - len(waiting)))
        for batch in waiting:
            prepare(batch)


def fit(
    steps: Steps,
    train: Batches,
    evaluations: dict[str, Batches],
    run: RunFolder,
    mesh: Mesh,
    *,
    epochs: int,
    seed: int,
    resume: bool = False,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Train for ``epochs`` epochs, evaluating after each.

    Every epoch's end is checkpointed, and so is the place where SIGINT or SIGTERM arrives.

    Args:
        steps: the compiled functions.
        train: training batches; their order is a function of ``(seed, epoch)``.
        evaluations: what to measure after each epoch, by name.
        run: where everything is written.
        mesh: the devices.
        epochs: passes over the training data.
        seed: of the order of batches and of dropout.
        resume: go on from the newest checkpoint in ``run``, if there is one.

    Returns:
        The final state and one record an epoch: ``epoch`` (from 1), ``step``, ``train_loss``,
        ``train_accuracy``, ``seconds`` (training alone), ``<name>_loss``, ``<name>_accuracy``.

    Raises:
        NonFiniteLossError: naming step and epoch; the last good checkpoint is kept.
        Interrupted: after a signal, once the state is saved.
    """
    checkpoints = Checkpoints(run.checkpoints)
    state, at = _beginning(steps, checkpoints, resume)
    history = run.rewind(int(state.step), at.epoch + 1)
    try:
        with Interruption().watching() as stop:
            while at.epoch < epochs:
                meter = _Meter(run, at, len(train), epochs, checkpoints.latest())
                state, at = _train_epoch(steps, state, at, train, mesh, seed, meter, stop)
                checkpoints.save(state, at)
                _raise_if(stop)
                record = _record(at, int(state.step), len(train))
                for name, batches in evaluations.items():
                    sums = evaluate(steps, state.params, batches, mesh, name, stop)
                    record |= _means(name, sums, at.epoch + 1)
                history.append(record)
                run.log(record)
                at = Position(at.epoch + 1)
    finally:
        checkpoints.close()
    return state, history


def _beginning(steps: Steps, checkpoints: Checkpoints, resume: bool) -> tuple[TrainState, Position]:
    """The state and place to go on from: the newest checkpoint's if asked for, else the start."""
    state = steps.init()
    restored = checkpoints.restore(state) if resume else None
    return restored or (state, Position())


def evaluate(
    steps: Steps,
    params: Any,
    batches: Batches,
    mesh: Mesh,
    name: str = "",
    stop: Interruption | None = None,
) -> Sums:
    """Sums over every row of ``batches``, each row once.

    Raises:
        Interrupted: a signal arrived.
    """
    from tqdm import tqdm

    pending: collections.deque[Sums] = collections.deque()
    total = Sums()
    placed = on_device(batches.in_order(), mesh, steps.prepare_evaluate)
    bar = tqdm(placed, f"  {name}", len(batches), leave=False, unit="batch")
    with bar:
        for batch in bar:
            if stop is not None:
                _raise_if(stop)
            pending.append(steps.evaluate(params, batch))
            while pending and pending[0].loss.is_ready():
                total = _add(total, _on_host(pending.popleft()))
    for sums in pending:
        total = _add(total, _on_host(sums))
    return total


def _train_epoch(
    steps: Steps,
    state: TrainState,
    at: Position,
    batches: Batches,
    mesh: Mesh,
    seed: int,
    meter: "_Meter",
    stop: Interruption,
) -> tuple[TrainState, Position]:
    """Train from ``at`` to the epoch's end, or to the step at which a signal was noticed."""
    key, first = jax.device_put(training_key(seed), replicated(mesh)), int(state.step)
    pending: collections.deque[tuple[int, Sums]] = collections.deque()
    done, started = at.batch, time.perf_counter()

    def look_back() -> None:
        while pending and pending[0][1].loss.is_ready():
            meter.account(*pending.popleft())

    def prepare(batch: Batch) -> None:
        look_back()  # tracing takes a while
        steps.prepare_train(batch)

    for batch in on_device(batches.epoch(seed, at.epoch, start=at.batch), mesh, prepare):
        state, sums = steps.train(state, batch, key)
        done += 1
        pending.append((first + done - at.batch, sums))
        look_back()
        if stop:
            break
    while pending:
        meter.account(*pending.popleft())
    meter.close(first + done - at.batch)
    seconds = at.seconds + time.perf_counter() - started
    return state, Position(at.epoch, done, meter.total, seconds)


class _Meter:
    """Takes in the sums of an epoch's finished steps: checks, adds up, shows, logs."""

    def __init__(
        self, run: RunFolder, at: Position, batches: int, epochs: int, checkpoint: int | None
    ) -> None:
        from tqdm import tqdm

        self.total = at.sums
        self._run, self._epoch, self._checkpoint = run, at.epoch + 1, checkpoint
        self._since = Sums()
        self._tokens_before, self._started = at.sums.tokens, time.perf_counter()
        self._bar = tqdm(
            desc=f"epoch {self._epoch}/{epochs}",
            total=batches,
            initial=at.batch,
            unit="step",
            dynamic_ncols=True,
        )

    def account(self, step: int, sums: Sums) -> None:
        """Take in one step.

        Raises:
            NonFiniteLossError: its loss is not finite.
        """
        sums = _on_host(sums)
        if not math.isfinite(sums.loss):
            self._bar.close()
            kept = (
                "no checkpoint was written yet"
                if self._checkpoint is None
                else f"the checkpoint of step {self._checkpoint} is kept"
            )
            raise NonFiniteLossError(
                f"loss or gradient is {sums.loss} at step {step} of epoch {self._epoch}; {kept}. "
                "Lower --learning-rate, or set --clip-norm 1"
            )
        self.total, self._since = _add(self.total, sums), _add(self._since, sums)
        rate = (self.total.tokens - self._tokens_before) / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(
            f"loss {self.total.loss / self.total.rows:.3f} "
            f"acc {self.total.correct / self.total.rows:.3f} {rate / 1e3:.0f}k tok/s",
            refresh=False,
        )
        self._bar.update()
        if step % LOG_EVERY == 0:
            self._log(step)

    def close(self, step: int) -> None:
        """Log what is left over and end the bar."""
        if self._since.rows:
            self._log(step)
        self._bar.close()

    def _log(self, step: int) -> None:
        means = {
            "loss": self._since.loss / self._since.rows,
            "accuracy": self._since.correct / self._since.rows,
        }
        self._run.log({"kind": "step", "step": step, "epoch": self._epoch, **means})
        self._since = Sums()


def _record(at: Position, step: int, batches: int) -> dict[str, Any]:
    assert at.batch == batches, "an epoch is recorded once it is complete"
    return {
        "kind": "epoch",
        "epoch": at.epoch + 1,
        "step": step,
        "train_loss": at.sums.loss / at.sums.rows,
        "train_accuracy": at.sums.correct / at.sums.rows,
        "seconds": at.seconds,
    }


def _means(name: str, sums: Sums, epoch: int) -> dict[str, float]:
    """What an evaluation adds to the epoch's record.

    Raises:
        NonFiniteLossError: its loss is not finite.
    """
    if not math.isfinite(sums.loss):
        raise NonFiniteLossError(
            f"{name} loss is {sums.loss} after epoch {epoch}; "
            "lower --learning-rate, or set --clip-norm 1"
        )
    return {f"{name}_loss": sums.loss / sums.rows, f"{name}_accuracy": sums.correct / sums.rows}


def _on_host(sums: Sums) -> Sums:
    return Sums(*map(float, jax.device_get(sums)))


def _add(total: Sums, more: Sums) -> Sums:
    return Sums(*(a + b for a, b in zip(total, more, strict=True)))


def _raise_if(stop: Interruption) -> None:
    if stop:
        raise Interrupted(stop.signal)
