"""The training loop: epochs, progress, evaluation, checkpoints, going on after an interruption."""

import collections
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from lstmjax import stopping
from lstmjax.data import Batch, Batches
from lstmjax.errors import UserError
from lstmjax.training.checkpoint import Checkpoints, Position, copied
from lstmjax.training.devices import place, replicated, sharded
from lstmjax.training.processes import Agreement, any_told, meet
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
    placed = (place(batch, sharded(mesh)) for batch in batches)
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
    checkpoint_every: int = 0,
    keep: int = 2,
) -> tuple[TrainState, list[dict[str, float | str]]]:
    """Train for ``epochs`` epochs, evaluating after each.

    Every epoch's end is checkpointed, and so is the place where SIGINT, SIGTERM or SIGHUP arrives.

    Args:
        steps: the compiled functions.
        train: training batches; their order is a function of ``(seed, epoch)``.
        evaluations: what to measure after each epoch, by name.
        run: where everything is written.
        mesh: the devices.
        epochs: passes over the training data.
        seed: of the order of batches and of dropout.
        resume: go on from the newest checkpoint in ``run``, if there is one.
        checkpoint_every: checkpoint every so many steps, too; 0: epochs alone.
        keep: how many checkpoints stay.

    Returns:
        The final state and one record an epoch: ``epoch`` (from 1), ``step``, ``train_loss``,
        ``train_accuracy``, ``seconds`` (training alone), ``<name>_loss``, ``<name>_accuracy``.

    Raises:
        NonFiniteLossError: naming step and epoch; the last good checkpoint is kept.
        Interrupted: after a signal, once the state is saved.
        StorageError: something cannot be written; what was written before is kept.
    """
    checkpoints = Checkpoints(run.checkpoints, keep, before=run.sync)
    try:
        with stopping.saving() as stop:
            state, at = _beginning(steps, checkpoints, resume)
            _check_position(at, int(state.step), len(train), epochs)
            run.rewind(int(state.step), at.history, _logged(at, int(state.step), len(train)))
            epoch_of = _Trainer(steps, train, mesh, seed, run, checkpoints, checkpoint_every, stop)
            while at.epoch < epochs:
                if at.batch < len(train):  # else it was stopped while it was evaluated
                    state, at = epoch_of.train(state, at, epochs)
                    checkpoints.save_later(copied(state), at)
                if any_told(stop):
                    checkpoints.wait()
                    meet()
                    raise Interrupted(stop.signal or signal.SIGTERM)
                record = _record(at, int(state.step), len(train))
                for name, batches in evaluations.items():
                    sums = evaluate(steps, state.params, batches, mesh, name, stop)
                    record |= _means(name, sums, at.epoch + 1)
                run.log(record)
                at = Position(at.epoch + 1, history=(*at.history, record))
            checkpoints.wait()
    except stopping.Stopping as told:  # while it compiled an evaluation, or the start
        checkpoints.wait()
        raise Interrupted(stop.signal) from told
    finally:
        checkpoints.close()
    return state, [dict(record) for record in at.history]


def _beginning(steps: Steps, checkpoints: Checkpoints, resume: bool) -> tuple[TrainState, Position]:
    """The state and place to go on from: the newest checkpoint's if asked for, else the start."""
    state = steps.init()
    restored = checkpoints.restore(state) if resume else None
    return restored or (state, Position())


def _check_position(at: Position, step: int, batches: int, epochs: int) -> None:
    """Raise `UserError` unless the place fits the state, the data and the number of epochs."""
    fits = 0 <= at.batch <= batches and at.epoch * batches + at.batch == step
    if not fits or len(at.history) != at.epoch or (at.epoch >= epochs and step):
        raise UserError(
            f"the checkpoint of step {step} stands at batch {at.batch} of epoch {at.epoch + 1}, "
            f"which is not in a run of {epochs} epochs of {batches} batches: resume with the same "
            "data and settings"
        )


def _logged(at: Position, step: int, batches: int) -> list[int]:
    """The steps up to this one that have a line in the metrics."""
    ends = range(batches, step + 1, batches)
    return sorted({*range(LOG_EVERY, step + 1, LOG_EVERY), *ends})


def evaluate(
    steps: Steps,
    params: PyTree,
    batches: Batches,
    mesh: Mesh,
    name: str = "",
    stop: stopping.Stop | None = None,
) -> Sums:
    """Sums over every row of ``batches``, each row once.

    Raises:
        Interrupted, Stopping: a signal arrived.
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


class _Trainer:
    """Trains epoch by epoch, and checkpoints on the way.

    A checkpoint needs the sums of all steps before it, which are there some steps later; until
    then a copy of the state waits, and no step is delayed.
    """

    def __init__(
        self,
        steps: Steps,
        batches: Batches,
        mesh: Mesh,
        seed: int,
        run: RunFolder,
        checkpoints: Checkpoints,
        checkpoint_every: int,
        stop: stopping.Stop,
    ) -> None:
        self._steps, self._batches, self._mesh, self._seed = steps, batches, mesh, seed
        self._run, self._checkpoints, self._stop = run, checkpoints, stop
        self._every = checkpoint_every
        self._key = jax.jit(lambda: training_key(seed), out_shardings=replicated(mesh))()
        self._agree = Agreement(mesh, stop)

    def train(self, state: TrainState, at: Position, epochs: int) -> tuple[TrainState, Position]:
        """Train from ``at`` to the epoch's end, or to the step at which a signal was noticed."""
        meter = _Meter(self._run, at, len(self._batches), epochs, self._checkpoints)
        pending: collections.deque[tuple[int, Sums, TrainState | None]] = collections.deque()
        first, done, started = int(state.step) - at.batch, at.batch, time.perf_counter()

        def position(batch: int) -> Position:
            seconds = at.seconds + time.perf_counter() - started
            return Position(at.epoch, batch, meter.total, meter.since, seconds, at.history)

        def look_back(wait: bool = False) -> None:
            while pending and (wait or pending[0][1].loss.is_ready()):
                batch, sums, copy = pending.popleft()
                meter.account(first + batch, sums, batch == len(self._batches))
                if copy is not None:
                    self._checkpoints.save_later(copy, position(batch), skip=True)

        def prepare(batch: Batch) -> None:
            look_back()  # tracing takes a while
            self._steps.prepare_train(batch)

        with meter:
            order = self._batches.epoch(self._seed, at.epoch, start=at.batch)
            for batch in on_device(order, self._mesh, prepare):
                step, told = self._agree(state.step)
                state = state._replace(step=step)
                if told:
                    break
                try:
                    state, sums = self._steps.train(state, batch, self._key)
                except stopping.Stopping:
                    break
                done += 1
                due = self._every and (first + done) % self._every == 0
                due = due and done < len(self._batches)  # the epoch's end is saved anyway
                pending.append((done, sums, copied(state) if due else None))
                look_back()
            look_back(wait=True)
        return state, position(done)


class _Meter:
    """Takes in the sums of an epoch's finished steps: checks, adds up, shows, logs."""

    def __init__(
        self, run: RunFolder, at: Position, batches: int, epochs: int, checkpoints: Checkpoints
    ) -> None:
        from tqdm import tqdm

        self.total, self.since = at.sums, at.since
        self._run, self._epoch, self._checkpoints = run, at.epoch + 1, checkpoints
        self._tokens_before, self._started = at.sums.tokens, time.perf_counter()
        self._bar = tqdm(
            desc=f"epoch {self._epoch}/{epochs}",
            total=batches,
            initial=at.batch,
            unit="step",
            dynamic_ncols=True,
        )

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def account(self, step: int, sums: Sums, last: bool) -> None:
        """Take in one step; ``last`` if it is the epoch's.

        Raises:
            NonFiniteLossError: its loss is not finite.
        """
        sums = _on_host(sums)
        if not math.isfinite(sums.loss):
            self._checkpoints.wait()
            newest = self._checkpoints.latest()
            kept = (
                "no checkpoint was written yet"
                if newest is None
                else f"the checkpoint of step {newest} is kept"
            )
            raise NonFiniteLossError(
                f"loss or gradient is {sums.loss} at step {step} of epoch {self._epoch}; {kept}. "
                "Lower --learning-rate, or set --clip-norm 1"
            )
        self.total, self.since = _add(self.total, sums), _add(self.since, sums)
        rate = (self.total.tokens - self._tokens_before) / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(
            f"loss {self.total.loss / self.total.rows:.3f} "
            f"acc {self.total.correct / self.total.rows:.3f} {rate / 1e3:.0f}k tok/s",
            refresh=False,
        )
        self._bar.update()
        if step % LOG_EVERY == 0 or last:
            self._log(step)

    def _log(self, step: int) -> None:
        means = {
            "loss": self.since.loss / self.since.rows,
            "accuracy": self.since.correct / self.since.rows,
        }
        self._run.log({"kind": "step", "step": step, "epoch": self._epoch, **means})
        self.since = Sums()


def _record(at: Position, step: int, batches: int) -> dict[str, float | str]:
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


def _raise_if(stop: stopping.Stop) -> None:
    if stop:
        raise Interrupted(stop.signal)
