"""The training loop: epochs, progress, evaluation, checkpoints, going on after an interruption."""

import collections
import itertools
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import PyTree

from lstmjax import stopping
from lstmjax.data import Batch, Source
from lstmjax.errors import UserError
from lstmjax.progress import Programs, StepBar
from lstmjax.training.checkpoint import Checkpoints, Position, copied
from lstmjax.training.devices import place, replicated, sharded
from lstmjax.training.processes import Agreement, any_told, meet
from lstmjax.training.report import Figure, Record, RunFolder
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

    def __init__(self, number: int, saved: pathlib.Path | None = None) -> None:
        told = f"stopped by {signal.Signals(number).name}"
        if saved is not None:
            told += f"; saved in {saved}. To go on, do the same with resume=True"
        super().__init__(told)
        self.signal = number

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: there is nothing to be traced."""
        return [str(self)]


def on_device(
    batches: Iterable[Batch],
    where: Mesh | Sharding,
    prepare: Callable[[Batch], None] = lambda batch: None,
    ahead: int = 8,
) -> Iterator[Batch]:
    """The batches, put on the devices before they are asked for, all but the first.

    Args:
        batches: what to put there.
        where: how they lie there; on a mesh, by rows.
        prepare: called with every batch that waits, each time another one has been used.
        ahead: how many wait.
    """
    sharding = sharded(where) if isinstance(where, Mesh) else where
    placed = (place(batch, sharding) for batch in batches)
    waiting = collections.deque(itertools.islice(placed, 1))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(placed, ahead - len(waiting)))
        for batch in waiting:
            prepare(batch)


def fit(
    steps: Steps,
    train: Source,
    evaluations: Mapping[str, Source],
    run: RunFolder,
    mesh: Mesh,
    *,
    epochs: int,
    seed: int | tuple[int, ...],
    resume: bool = False,
    checkpoint_every: int = 0,
    keep: int = 2,
    score: str = "accuracy",
    keep_best: bool = False,
    patience: int = 0,
) -> tuple[TrainState, list[dict[str, Figure]]]:
    """Train for ``epochs`` epochs, evaluating after each.

    Every epoch's end is checkpointed, and so is the place where SIGINT, SIGTERM or SIGHUP arrives.
    The parameters are written by name, too, after each epoch, or after each that is the best so
    far. Which one is best is told by the loss of the first of the evaluations; the earlier of
    equals is.

    Where ``steps`` train replicas, every figure is a list of theirs; one that is not finite is
    None, and only if none is left the run ends. Their parameters are not written by name.

    Args:
        steps: the compiled functions.
        train: training batches; their order is a function of ``(seed, epoch)``.
        evaluations: what to measure after each epoch, by name.
        run: where everything is written.
        mesh: the devices.
        epochs: passes over the training data.
        seed: of the order of batches and of dropout; of replicas, theirs, for batches that are
            `SideBySide`.
        resume: go on from the newest checkpoint in ``run``, if there is one.
        checkpoint_every: checkpoint every so many steps, too; 0: epochs alone.
        keep: how many checkpoints stay.
        score: what the mean of the scores is called.
        keep_best: the parameters written by name are those of the best epoch, not of the last.
        patience: end after so many epochs without a better one; 0: after ``epochs``.

    Returns:
        The final state and one record an epoch: ``epoch`` (from 1), ``step``, ``train_loss``,
        ``train_<score>``, ``seconds`` (training alone), ``<name>_loss``, ``<name>_<score>``.

    Raises:
        NonFiniteLossError: naming step and epoch; the last good checkpoint is kept.
        Interrupted: after a signal, once the state is saved.
        StorageError: something cannot be written; what was written before is kept.
    """
    checkpoints = Checkpoints(run.checkpoints, keep, before=run.sync)
    judged = next(iter(evaluations), None) if keep_best or patience else None
    try:
        with stopping.saving() as stop:
            state, at = _beginning(steps, checkpoints, resume)
            _check_position(at, int(state.step), len(train), epochs)
            run.rewind(int(state.step), at.history, _logged(at, int(state.step), len(train)))
            trainer = _Trainer(
                steps, train, mesh, seed, run, checkpoints, checkpoint_every, stop, score
            )
            while at.epoch < epochs:
                if at.batch < len(train):  # else it was stopped while it was evaluated
                    state, at = trainer.train(state, at, epochs)
                    checkpoints.save_later(copied(state), at)
                trainer.end_if_told()
                record = trainer.measure(state, at, evaluations)
                run.log(record)
                at = Position(at.epoch + 1, history=(*at.history, record))
                best = _best(at.history, judged) + 1 if judged else at.epoch
                if isinstance(seed, int) and (best == at.epoch or not keep_best):
                    run.write_parameters(state.params)
                if patience and at.epoch - best >= patience:
                    break
            checkpoints.wait()
    except stopping.Stopping as told:  # while it evaluated, or compiled the start
        checkpoints.wait()
        raise Interrupted(stop.signal, run.path) from told
    finally:
        checkpoints.close()
    return state, [dict(record) for record in at.history]


def best_epoch(history: Sequence[Record], name: str) -> Record:
    """The record of the epoch with the smallest ``<name>_loss``, the first of equal ones.

    >>> best_epoch([{"epoch": 1, "test_loss": 0.3}, {"epoch": 2, "test_loss": 0.3}], "test")
    {'epoch': 1, 'test_loss': 0.3}
    """
    return history[_best(history, name)]


def _best(history: Sequence[Record], name: str) -> int:
    losses = [float(record[f"{name}_loss"]) for record in history]  # type: ignore[arg-type]
    return losses.index(min(losses))


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


def evaluate(steps: Steps, params: PyTree, batches: Source, mesh: Mesh, name: str = "") -> Sums:
    """Sums over every row of ``batches``, each row once.

    Raises:
        Stopping: a signal was noted; of several processes, each goes on to the end.
    """
    pending: collections.deque[Sums] = collections.deque()
    total = Sums()
    where = steps.evaluation_rows or mesh
    whole = (filled(batch, where) for batch in batches.in_order())
    with StepBar(f"  {name}", len(batches), steps.programs, leave=False) as bar:
        for batch in on_device(whole, where, steps.prepare_evaluate):
            stopping.check()
            pending.append(steps.evaluate(params, batch))
            done = 0
            while pending and pending[0].loss.is_ready():
                total, done = _add(total, _on_host(pending.popleft())), done + 1
            bar.advance(done)
        for sums in pending:
            total = _add(total, _on_host(sums))
            bar.advance(1)
    return total


def filled(batch: Batch, where: Mesh | Sharding) -> Batch:
    """The batch with filler rows behind, as many as let the devices share it."""
    sharding = sharded(where) if isinstance(where, Mesh) else where
    shards = 1 if sharding.is_fully_replicated else len(sharding.device_set) // jax.process_count()
    missing = -len(batch.lengths) % shards
    if not missing:
        return batch
    return jax.tree.map(lambda a: np.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)]), batch)


class _Trainer:
    """Trains epoch by epoch, and checkpoints on the way.

    A checkpoint needs the sums of all steps before it, which are there some steps later; until
    then a copy of the state waits, and no step is delayed.
    """

    def __init__(
        self,
        steps: Steps,
        batches: Source,
        mesh: Mesh,
        seed: int | tuple[int, ...],
        run: RunFolder,
        checkpoints: Checkpoints,
        checkpoint_every: int,
        stop: stopping.Stop,
        score: str,
    ) -> None:
        self._steps, self._batches, self._mesh, self._seed = steps, batches, mesh, seed
        self._run, self._checkpoints, self._stop = run, checkpoints, stop
        self._every, self._score = checkpoint_every, score

        def draw() -> jax.Array:
            keys = [training_key(one) for one in (seed if isinstance(seed, tuple) else (seed,))]
            return jnp.stack(keys) if isinstance(seed, tuple) else keys[0]

        self._key = jax.jit(draw, out_shardings=steps.states or replicated(mesh))()
        self._agree = Agreement(mesh, stop)

    def train(self, state: TrainState, at: Position, epochs: int) -> tuple[TrainState, Position]:
        """Train from ``at`` to the epoch's end, or to the step at which a signal was noticed."""
        batches = len(self._batches)
        programs = self._steps.programs
        meter = _Meter(self._run, at, batches, epochs, self._checkpoints, self._score, programs)
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
            meter.show()

        def prepare(batch: Batch) -> None:
            look_back()  # tracing takes a while
            self._steps.prepare_train(batch)

        with meter:
            order = self._batches.epoch(self._seed, at.epoch, start=at.batch)
            for batch in on_device(order, self._steps.train_rows or self._mesh, prepare):
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

    def end_if_told(self) -> None:
        """End the run, saved, if a signal has reached any of its processes."""
        if any_told(self._stop):
            self._checkpoints.wait()
            meet()
            raise Interrupted(self._stop.signal or signal.SIGTERM, self._run.path)

    def measure(
        self, state: TrainState, at: Position, evaluations: Mapping[str, Source]
    ) -> dict[str, Figure]:
        """The record of the epoch that ends at ``at``."""
        record = _record(at, int(state.step), len(self._batches), self._score)
        for name, batches in evaluations.items():
            sums = evaluate(self._steps, state.params, batches, self._mesh, name)
            record |= means(name, sums, self._score, f"after epoch {at.epoch + 1}")
        return record


class _Meter:
    """Takes in the sums of an epoch's finished steps: checks, adds up, shows, logs."""

    def __init__(
        self,
        run: RunFolder,
        at: Position,
        batches: int,
        epochs: int,
        checkpoints: Checkpoints,
        score: str,
        programs: Callable[[], Programs],
    ) -> None:
        self._score = score
        self.total, self.since = at.sums, at.since
        self._run, self._epoch, self._checkpoints = run, at.epoch + 1, checkpoints
        self._steps, self._shown = at.batch, (at.batch, np.sum(at.sums.tokens))
        self._bar = StepBar(f"epoch {self._epoch}/{epochs}", batches, programs, initial=at.batch)

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
        if not np.isfinite(sums.loss).any():
            self._checkpoints.wait()
            newest = self._checkpoints.latest()
            kept = (
                "no checkpoint was written yet"
                if newest is None
                else f"the checkpoint of step {newest} is kept"
            )
            raise NonFiniteLossError(
                f"loss or gradient is {_first(sums.loss)} at step {step} of epoch {self._epoch}; "
                f"{kept}. Lower --learning-rate, or set --clip-norm 1"
            )
        self.total, self.since = _add(self.total, sums), _add(self.since, sums)
        self._steps += 1
        if step % LOG_EVERY == 0 or last:
            self._log(step)

    def show(self) -> None:
        """Let the bar have what was taken in since the last time."""
        steps, tokens = self._steps - self._shown[0], np.sum(self.total.tokens) - self._shown[1]
        if not steps:
            self._bar.advance(0)
            return
        loss = np.nanmean(self.total.loss / self.total.rows)
        score = np.nanmean(self.total.correct / self.total.rows)
        name = _SHORT.get(self._score, self._score)
        self._bar.advance(steps, tokens, f"loss {loss:.3f} {name} {score:.3f}")
        self._shown = self._steps, np.sum(self.total.tokens)

    def _log(self, step: int) -> None:
        found = means("", self.since, self._score, f"at step {step}")
        self._run.log({"kind": "step", "step": step, "epoch": self._epoch, **found})
        self.since = Sums()


_SHORT = {"accuracy": "acc", "absolute_error": "err"}


def _record(at: Position, step: int, batches: int, score: str) -> dict[str, Figure]:
    assert at.batch == batches, "an epoch is recorded once it is complete"
    return {
        "kind": "epoch",
        "epoch": at.epoch + 1,
        "step": step,
        **means("train", at.sums, score, f"in epoch {at.epoch + 1}"),
        "seconds": at.seconds,
    }


def means(name: str, sums: Sums, score: str, when: str) -> dict[str, Figure]:
    """Mean loss and score by their names, lists of them for replicas.

    Raises:
        NonFiniteLossError: no loss is finite.
    """
    if not np.isfinite(sums.loss).any():
        raise NonFiniteLossError(
            f"{name} loss is {_first(sums.loss)} {when}; "
            "lower --learning-rate, or set --clip-norm 1"
        )
    prefix = f"{name}_" if name else ""
    loss, found = sums.loss / sums.rows, sums.correct / sums.rows
    return {f"{prefix}loss": _figures(loss), f"{prefix}{score}": _figures(found + 0 * loss)}


def _figures(value: float | np.ndarray) -> float | list[float | None]:
    """As JSON has it: of replicas a list, None for what is not finite."""
    if np.ndim(value) == 0:
        return float(value)
    return [float(a) if math.isfinite(a) else None for a in np.ravel(value)]


def _first(loss: float | np.ndarray) -> float:
    return float(np.ravel(loss)[0])


def _on_host(sums: Sums) -> Sums:
    return Sums(
        *(float(a) if np.ndim(a) == 0 else np.array(a, float) for a in jax.device_get(sums))
    )


def _add(total: Sums, more: Sums) -> Sums:
    return Sums(*(a + b for a, b in zip(total, more, strict=True)))
