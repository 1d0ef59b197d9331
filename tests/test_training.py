"""Training: devices, the compiled step, interruption and resumption, non-finite losses, reports."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstmjax import cores as cores_of
from lstmjax import memory, stopping, training
from lstmjax.cells import LSTM, dropped, load_cell
from lstmjax.data import Batch, Batches, Dataset, Vocabulary
from lstmjax.errors import UserError
from lstmjax.layers import fold_keys, row_keys
from lstmjax.models import Classifier, ClassifierConfig
from lstmjax.recurrence import length_mask
from lstmjax.recurrence.engine import platform as platform_traced_for
from lstmjax.training import compilation, devices, step
from lstmjax.training.checkpoint import Checkpoints, Damaged
from lstmjax.training.devices import replicated
from lstmjax.training.loop import on_device
from lstmjax.training.nans import line_of_nan
from lstmjax.training.step import IN_FLIGHT, Steps, Sums, TrainState


@pytest.fixture(autouse=True)
def _optax_mixes_integers_and_floats():
    with jax.numpy_dtype_promotion("standard"):
        yield


CONFIG = ClassifierConfig(
    top_words=30, embedding_size=4, hidden_size=5, dropout_before=0.2, dropout_after=0.3
)


def dataset(rows=50, seed=0):
    """Random ids; the label says whether the first is larger than the last."""
    random = np.random.default_rng(seed)
    sequences = [
        random.integers(4, 30, size=random.integers(2, 12), dtype=np.int32) for _ in range(rows)
    ]
    labels = np.array([int(ids[0] > ids[-1]) for ids in sequences], np.int32)
    return Dataset(sequences, labels, Vocabulary(("word",)))


def batches(rows=50, seed=0):
    return Batches(dataset(rows, seed), 8, boundaries=(6, 12))


@functools.cache
def compiled_steps(devices):
    model = Classifier(LSTM(5), CONFIG, rngs=nnx.Rngs(0))
    optimizer = training.make_optimizer(training.OptimizerConfig(learning_rate=1e-2), 100)
    steps = training.make_steps(model, optimizer, make_mesh(devices))
    return steps


def make_steps(mesh):
    """Functions compiled once for all tests."""
    return compiled_steps(mesh.size)


def make_mesh(devices):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("batch",))


class Noisy(LSTM):
    """Noise by row and step, and half of R dropped, the same for the whole batch."""

    noise = {"keep": dropped(0.5)}

    def prepare(self, params, key=None):
        if key is None:
            return params
        kernel = params["recurrent_kernel"]
        kept = jax.random.bernoulli(key, 0.5, kernel.shape)
        return params | {"recurrent_kernel": jnp.where(kept, 2 * kernel, 0)}

    def step(self, pre, state, params, noise):
        h, new = super().step(pre, state, params)
        return h * noise.keep, new


@functools.cache
def noisy_steps(devices):
    config = dataclasses.replace(CONFIG, dropout_before=0.0, dropout_after=0.0)
    model = Classifier(Noisy(5), config, engine="scan", rngs=nnx.Rngs(0))
    optimizer = training.make_optimizer(training.OptimizerConfig(learning_rate=1e-2), 100)
    return training.make_steps(model, optimizer, make_mesh(devices))


def losses(devices, make_steps=make_steps):
    mesh = make_mesh(devices)
    functions = make_steps(mesh)
    state, found = functions.init(), []
    for batch in on_device(list(batches().epoch(0, 0))[:6] * 2, mesh):
        state, sums = functions.train(state, batch, jax.random.key(3))
        found.append(float(sums.loss / sums.rows))
    return found


EVERYWHERE = dataclasses.replace(
    CONFIG, dropout_words=0.3, conv_filters=3, pooling=("max", "mean", "last"), bidirectional=True
)


@pytest.mark.parametrize(
    ("cell", "config"),
    [(LSTM(5), CONFIG), (LSTM(5), EVERYWHERE), (Noisy(5), CONFIG)],
    ids=["before and after", "everywhere", "in the cell"],
)
def test_what_is_drawn_and_learned_does_not_depend_on_padding(cell, config):
    model = Classifier(cell, config, engine="scan", rngs=nnx.Rngs(0))
    optimizer = training.make_optimizer(training.OptimizerConfig(learning_rate=1e-2), 100)
    functions = training.make_steps(model, optimizer, make_mesh(1))
    several, found = batches(), []
    one = several.in_one_shape()
    assert (one.shapes, one.fingerprint) == (((8, 12),), several.fingerprint)
    for source in (several, one):
        state = functions.init()
        for batch in source.epoch(0, 0):
            state, sums = functions.train(state, batch, jax.random.key(3))
            found.append(float(sums.loss / sums.rows))
    half = len(found) // 2
    np.testing.assert_allclose(found[half:], found[:half], rtol=2e-6)
    params = functions.init().params
    evaluated = [functions.evaluate(params, next(rows.in_order())) for rows in (several, one)]
    np.testing.assert_allclose(*(float(sums.loss) for sums in evaluated), rtol=2e-6)


def test_on_an_accelerator_all_batches_have_one_shape(monkeypatch):
    several, mesh = batches(), make_mesh(1)
    assert training.padded_for(mesh, several) is several
    monkeypatch.setattr(devices, "on_cpu", lambda mesh: False)
    one = training.padded_for(mesh, several)
    assert one.shapes == ((8, 12),)
    rows = [[batch.lengths.tolist() for batch in source.epoch(0, 1)] for source in (several, one)]
    assert rows[0] == rows[1]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_loss_curve_does_not_depend_on_the_number_of_devices(devices):
    one, many = losses(1), losses(devices)
    assert max(one) > 1.02 * min(one)
    # Sums of at most 8 rows in another order: a few units in the last place of float32 a step.
    np.testing.assert_allclose(many, one, rtol=2e-6)


def test_a_cells_noise_does_not_depend_on_the_number_of_devices():
    def steps(mesh):
        return noisy_steps(mesh.size)

    one, many = losses(1, steps), losses(4, steps)
    np.testing.assert_allclose(many, one, rtol=2e-6)
    functions, batch = noisy_steps(1), next(batches().epoch(0, 0))
    still, found = float(functions.evaluate(functions.init().params, batch).loss), []
    for key in (0, 1, 0):
        _, sums = functions.train(functions.init(), batch, jax.random.key(key))
        found.append(float(sums.loss))
    assert found[0] == found[2] != found[1]
    assert still not in found
    assert float(functions.evaluate(functions.init().params, batch).loss) == still


def test_training_draws_what_the_model_draws_from_the_same_keys():
    functions, batch = noisy_steps(1), next(batches().epoch(0, 0))
    _, sums = functions.train(functions.init(), batch, jax.random.key(3))
    model = Classifier(
        Noisy(5),
        dataclasses.replace(CONFIG, dropout_before=0.0, dropout_after=0.0),
        rngs=nnx.Rngs(0),
    )
    mask = length_mask(jnp.asarray(batch.lengths), batch.ids.shape[1])
    key = jax.random.fold_in(jax.random.key(3), 0)
    logits = np.asarray(model(jnp.asarray(batch.ids), mask, key), np.float64)
    wanted = (np.log1p(np.exp(logits)) - logits * batch.labels) @ batch.weights
    np.testing.assert_allclose(float(sums.loss), wanted, rtol=2e-6)
    alone = model(jnp.asarray(batch.ids), mask, row_keys(key, 8))  # none for the whole batch
    assert not np.allclose(alone, logits)


def test_several_classes_are_learned():
    rows = dataset(40)
    labels = np.array([ids[0] % 3 for ids in rows.sequences], np.int32)
    three = Batches(rows._replace(labels=labels), 8, boundaries=(12,), num_classes=3)
    model = Classifier(LSTM(5), CONFIG, num_outputs=3, engine="scan", rngs=nnx.Rngs(0))
    optimizer = training.make_optimizer(training.OptimizerConfig(), 100)
    functions = training.make_steps(model, optimizer, make_mesh(2))
    batch = next(three.epoch(0, 0))
    sums = functions.evaluate(functions.init().params, batch)
    mask = length_mask(jnp.asarray(batch.lengths), 12)
    logits = np.asarray(model(jnp.asarray(batch.ids), mask), np.float64)
    each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(8), batch.labels]
    np.testing.assert_allclose(float(sums.loss), each.sum(), rtol=2e-6)
    assert float(sums.correct) == (logits.argmax(axis=1) == batch.labels).sum()
    state, found = functions.init(), []
    for _ in range(2):
        state, sums = functions.train(state, batch, jax.random.key(0))
        found.append(float(sums.loss))
    assert all(map(math.isfinite, found))


def test_mesh_takes_devices_that_divide_the_rows():
    assert training.make_mesh("cpu", rows=64).size == 8
    assert training.make_mesh("cpu", rows=12).size == 6
    assert training.make_mesh("cpu", rows=1).size == 1


V1 = "9:name=systemd:/\n4:cpu,cpuacct:{}\n"
QUOTAS = {
    "version 2": ("0::/", {"cpu.max": "200000 100000"}, 2),
    "part of a core": ("0::/", {"cpu.max": "50000 100000"}, 0.5),
    "no limit": ("0::/", {"cpu.max": "max 100000"}, math.inf),
    "of an enclosing group": (
        "0::/a/b",
        {"a/cpu.max": "150000 100000", "a/b/cpu.max": "400000 100000"},
        1.5,
    ),
    "of another group": ("0::/a", {"b/cpu.max": "100000 100000"}, math.inf),
    "version 1": (
        V1.format("/"),
        {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"},
        3,
    ),
    "version 1 without a limit": (
        V1.format("/"),
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "version 1, named from outside the container": (
        V1.format("/docker/123"),
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "50000"},
        4,
    ),
    "outside the container's view": ("0::/../other", {"cpu.max": "100000 100000"}, 1),
    "unreadable": ("0::/", {"cpu.max": "much"}, math.inf),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_cpu_quota(name, tmp_path):
    groups, files, cores = QUOTAS[name]
    files = {f"sys/fs/cgroup/{path}": text for path, text in files.items()}
    for path, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    assert cores_of.cpu_quota(tmp_path) == cores


def test_cpu_quota_where_there_are_no_control_groups(tmp_path):
    assert cores_of.cpu_quota(tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "cores"), [(2, 2), (1.5, 2), (0.5, 1), (64, 5), (math.inf, 5)])
def test_the_smaller_of_affinity_and_quota_counts(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)), raising=False)
    monkeypatch.setattr(cores_of, "cpu_quota", lambda: quota)
    assert cores_of.usable_cores() == cores


PAGES_ANEW = """
import resource
import numpy as np
from lstmjax.memory import keep_freed_memory
if not keep_freed_memory():
    raise SystemExit("no glibc")

def fill():
    for turn in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [np.empty({size}, np.uint8) for _ in range(2)]
        for a in arrays:
            a.fill(1)
        del a, arrays
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

{how}
"""
IN_A_THREAD = "import threading; t = threading.Thread(target=fill); t.start(); t.join()"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(("how", "size"), [("fill()", 2**26), (IN_A_THREAD, 40 * 2**20)])
def test_freed_memory_is_kept(how, size):
    """Also that of a thread, whose heaps have 64 MB."""
    command = [sys.executable, "-c", PAGES_ANEW.format(how=how, size=size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    first, second = map(int, done.stdout.split())
    assert second < first / 10


def test_freed_memory_without_glibc(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()


def test_simple_kernels_leave_the_users_flags(monkeypatch):
    ours = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    theirs = "--xla_backend_extra_options=xla_cpu_small_call"
    for before, after in (("", ours), ("--other=1", f"--other=1 {ours}"), (theirs, theirs)):
        monkeypatch.setenv("XLA_FLAGS", before)
        training.simple_kernels()
        assert os.environ["XLA_FLAGS"] == after


def test_quick_compilation_leaves_a_level_that_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--other=1")
    assert training.quick_compilation(make_mesh(1)) == {"xla_backend_optimization_level": "1"}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert training.quick_compilation(make_mesh(1)) == {}


def test_engines_are_chosen_for_the_devices_of_the_mesh(monkeypatch):
    assert jax.config.jax_default_device is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    try:
        mesh = training.make_mesh("cpu", rows=2)
        assert jax.config.jax_default_device == mesh.devices.flat[0]
        assert platform_traced_for() == "cpu"
    finally:
        jax.config.update("jax_default_device", None)


def test_a_missing_accelerator_is_named_with_its_remedy():
    with pytest.raises(UserError, match=r"no tpu here; this JAX finds: cpu\..*lstmjax\[tpu\]"):
        training.make_mesh("tpu")


def test_filler_rows_count_for_nothing():
    mesh = make_mesh(1)
    batch = next(batches().epoch(0, 0))
    half = batch._replace(weights=(np.arange(8) < 4).astype(np.float32))
    junk = half._replace(
        ids=np.where(np.arange(8)[:, None] < 4, half.ids, 7).astype(np.int32),
        labels=np.where(np.arange(8) < 4, half.labels, 1 - half.labels).astype(np.int32),
    )
    assert not np.array_equal(half.ids, junk.ids)
    results = []
    for b in (half, junk):
        functions = make_steps(mesh)
        state, sums = functions.train(functions.init(), b, jax.random.key(0))
        results.append((jax.device_get(state.params), float(sums.loss), float(sums.rows)))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert results[0][2] == 4


def test_the_state_is_donated():
    functions = make_steps(make_mesh(2))
    state = functions.init()
    functions.train(state, next(batches().epoch(0, 0)), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(functions.init().params))


def test_every_step_drops_something_else():
    functions = make_steps(make_mesh(1))
    batch, found = next(batches().epoch(0, 0)), []
    for number in (0, 1, 0):
        state = functions.init()._replace(step=jnp.int32(number))
        found.append(float(functions.train(state, batch, jax.random.key(3))[1].loss))
    assert found[0] == found[2] != found[1]


def test_devices_exchange_sums_once_a_step_not_once_a_time_step(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # no options of our own
    functions = compiled_steps.__wrapped__(2)
    batch = next(batches().epoch(0, 0))
    train = jax.jit(inspect.unwrap(functions.train), donate_argnums=0)
    program = train.lower(functions.init(), batch, jax.random.key(0)).compile().as_text()
    computations = dict(
        re.findall(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\{\n(.*?)^\}", program, re.M | re.S)
    )

    def with_all_it_calls(name):
        text = computations[name]
        called = set(re.findall(r"(?:calls|to_apply|body|condition)=(%[\w.-]+)", text))
        return text + "".join(with_all_it_calls(other) for other in called)

    loops = [with_all_it_calls(name) for name in re.findall(r"body=(%[\w.-]+)", program)]
    assert len(loops) >= 2  # forward and backward
    assert "all-reduce" in program
    assert not any("all-reduce" in loop for loop in loops)


def test_a_gradient_that_is_not_finite_is_told_by_the_loss():
    class Poisoned(LSTM):
        def step(self, pre, state, params):
            h, state = super().step(pre, state, params)
            return h + jnp.sqrt(0 * h), state  # value 0, derivative infinite

    model = Classifier(Poisoned(5), CONFIG, rngs=nnx.Rngs(0))
    optimizer = training.make_optimizer(training.OptimizerConfig(), 10)
    functions = training.make_steps(model, optimizer, make_mesh(1))
    batch = next(batches().epoch(0, 0))
    assert math.isfinite(float(functions.evaluate(functions.init().params, batch).loss))
    _, sums = functions.train(functions.init(), batch, jax.random.key(0))
    assert math.isnan(float(sums.loss))


def test_no_two_streams_of_random_numbers_share_a_key():
    seed = 3
    rngs = nnx.Rngs(seed)
    drawn = [jax.random.key_data(rngs.params()) for _ in range(10)]
    train = training.training_key(seed)
    rows = row_keys(jax.random.fold_in(train, 0), 16)
    streams = [*drawn, *jax.random.key_data(jax.random.split(train, 16))]
    every = step._step_keys(train, jnp.int32(0), 16)
    np.testing.assert_array_equal(jax.random.key_data(every.rows), jax.random.key_data(rows))
    for rows, shared in (every, *fold_keys(every, 4)):
        streams += [*jax.random.key_data(rows), jax.random.key_data(shared)]
    distinct = {tuple(np.asarray(key).tolist()) for key in streams}
    assert len(distinct) == len(streams)


def test_gradient_clipping_bounds_the_update():
    state = {"w": jnp.array([3.0, -4.0])}
    config = training.OptimizerConfig(clip_norm=1.0)
    clipped = training.make_optimizer(config, 10)
    plain = training.make_optimizer(training.OptimizerConfig(), 10)
    big, unit = {"w": jnp.array([30.0, -40.0])}, {"w": jnp.array([0.6, -0.8])}
    got, _ = clipped.update(big, clipped.init(state), state)
    want, _ = plain.update(unit, plain.init(state), state)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)


def test_one_cycle_ends_near_zero():
    config = training.OptimizerConfig(learning_rate=1.0, schedule="one-cycle")
    optimizer = training.make_optimizer(config, 40)
    params = {"w": jnp.array([1.0])}
    state, sizes = optimizer.init(params), []
    for _ in range(40):
        updates, state = optimizer.update({"w": jnp.array([1.0])}, state, params)
        sizes.append(-float(updates["w"][0]))
    assert np.argmax(sizes) == 10
    np.testing.assert_allclose(max(sizes), 1.0, rtol=1e-5)
    assert sizes[-1] < 0.01


# -- the loop -------------------------------------------------------------------------------------


def new_run(path, config={"seed": 0}):  # noqa: B006
    """A run's folder, not locked."""
    run = training.RunFolder.create(path, config)
    run.close()
    return run


def fit(path, steps=None, resume=False, epochs=3, rows=30, **options):
    mesh = make_mesh(2)
    with training.RunFolder(path) if resume else new_run(path) as run:
        return training.fit(
            steps or make_steps(mesh),
            batches(),
            {"test": batches(rows, seed=1)},
            run,
            mesh,
            epochs=epochs,
            seed=0,
            resume=resume,
            **options,
        )


def at_step(steps, number, action):
    """``steps`` whose training step number ``number`` (from 1) goes through ``action``."""
    count = iter(range(1, 10_000))

    def train(state, batch, key):
        state, sums = steps.train(state, batch, key)
        return action(state, sums) if next(count) == number else (state, sums)

    return steps._replace(train=train)


def test_a_run_compiles_each_shape_once(tmp_path):
    steps = compiled_steps.__wrapped__(2)  # as in a new process
    with training.counting_compilations() as made:
        fit(tmp_path / "run", steps)
    shapes = len(batches().shapes)
    assert made.programs["jit(local_gradient)"] == shapes
    assert made.programs["jit(local_evaluation)"] == shapes
    assert made.programs["jit(update)"] == made.programs["jit(_step_keys)"] == 1
    assert "jit(slice)" not in made.programs  # nor does a checkpoint compile anything
    assert made.kept == 0


def test_the_loop_prepares_what_it_will_train_and_evaluate_on(tmp_path):
    steps, prepared = make_steps(make_mesh(2)), {"train": set(), "evaluate": set()}
    recording = {
        f"prepare_{kind}": lambda batch, shapes=shapes: shapes.add(batch.ids.shape)
        for kind, shapes in prepared.items()
    }
    fit(tmp_path / "run", steps._replace(**recording), epochs=1)
    assert prepared["train"] == prepared["evaluate"] == set(batches().shapes)


def test_nothing_is_moved_to_the_devices_by_a_step_itself(tmp_path):
    steps = make_steps(make_mesh(2))

    def guarded(function):
        def call(*arguments):
            with jax.transfer_guard("disallow"):
                return function(*arguments)

        return call

    guarded_steps = steps._replace(train=guarded(steps.train), evaluate=guarded(steps.evaluate))
    fit(tmp_path / "run", guarded_steps, epochs=1)


def test_every_epoch_takes_its_batches_in_its_own_order(tmp_path):
    steps, taken = make_steps(make_mesh(2)), []

    def train(state, batch, key):
        taken.append(jax.device_get(batch))
        return steps.train(state, batch, key)

    fit(tmp_path / "run", steps._replace(train=train), epochs=2)
    wanted = [batch for epoch in range(2) for batch in batches().epoch(0, epoch)]
    assert len(taken) == len(wanted)
    jax.tree.map(np.testing.assert_array_equal, taken, wanted)


def held_back(function, last, late, guard):
    """``function``, whose call k ends only after call min(k + IN_FLIGHT, ``last``) has begun.

    Whoever looks at what call k returned before that waits in vain: k is then put into ``late``.
    From the first call to the last one, implicit transfers raise: ``guard`` ends that.
    """
    begun, change = 0, threading.Condition()

    def wait(number):
        with change:
            enough = min(int(number) + IN_FLIGHT, last)
            if not (late or change.wait_for(lambda: begun >= enough, timeout=30)):
                late.append(int(number))
        return np.float32(0)

    @jax.jit
    def compute(number, *arguments):
        zero = jax.pure_callback(wait, jax.ShapeDtypeStruct((), np.float32), number)
        return jax.tree.map(lambda a: a + zero.astype(a.dtype), function(*arguments))

    def call(*arguments):
        nonlocal begun
        with change:
            begun += 1
            change.notify_all()
        if begun == 1:
            guard.enter_context(jax.transfer_guard("disallow"))
        results = compute(jax.device_put(np.int32(begun), replicated(make_mesh(2))), *arguments)
        if begun == last:
            guard.close()
        return results

    return call


def test_the_loop_does_not_wait_for_the_newest_steps(tmp_path):
    def sums(batch):
        return Sums(batch.weights.sum(), batch.labels.sum(), batch.weights.sum(), 1.0)

    def train(state, batch, key):
        return state._replace(step=state.step + 1), jax.tree.map(jnp.float32, sums(batch))

    def evaluate(params, batch):
        return jax.tree.map(jnp.float32, sums(batch))

    late = [], []
    state = TrainState({"w": jnp.zeros(3)}, (), jnp.int32(0))
    with contextlib.ExitStack() as guard:
        steps = Steps(
            lambda: jax.device_put(state, replicated(make_mesh(2))),
            held_back(train, 7, late[0], guard),
            held_back(evaluate, 7, late[1], guard),
            prepare_train=lambda batch: None,
            prepare_evaluate=lambda batch: None,
        )
        _, (record,) = fit(tmp_path / "run", steps, epochs=1, rows=50)
    assert late == ([], [])
    assert (record["step"], record["train_loss"]) == (7, 1.0)


def test_only_so_many_steps_are_under_way(monkeypatch):
    functions, awaited, sums = compiled_steps.__wrapped__(1), [], []
    monkeypatch.setattr(step.jax, "block_until_ready", lambda result: awaited.append(result))
    state = functions.init()
    for batch in itertools.islice(batches().epoch(0, 0), IN_FLIGHT + 2):
        assert len(awaited) == max(0, len(sums) - IN_FLIGHT)
        state, found = functions.train(state, batch, jax.random.key(0))
        sums.append(found)
    assert awaited[0] is sums[0].tokens
    assert awaited[1] is sums[1].tokens


def of_two_shapes(mesh):
    """A batch of each shape, on the devices."""
    shapes = {batch.ids.shape: batch for batch in batches().epoch(0, 0)}
    assert len(shapes) == 2
    return [jax.device_put(batch, training.sharded(mesh)) for batch in shapes.values()]


def test_a_prepared_shape_is_not_compiled_by_the_call():
    mesh = make_mesh(2)
    functions, key = compiled_steps.__wrapped__(2), jax.random.key(3)
    first, second = of_two_shapes(mesh)
    with training.counting_compilations() as before:
        functions.prepare_train(first)  # nothing is known of the other arguments yet
        functions.prepare_evaluate(first)
    assert not before.programs
    state, _ = functions.train(functions.init(), first, key)
    functions.evaluate(state.params, first)
    with training.counting_compilations() as made:
        for batch in (second, second, first):
            functions.prepare_train(batch)
            functions.prepare_evaluate(batch)
        state, sums = functions.train(state, second, key)
        evaluated = functions.evaluate(state.params, second)
    assert made.programs == {"jit(local_gradient)": 1, "jit(local_evaluation)": 1}
    plain = make_steps(mesh)
    expected, _ = plain.train(plain.init(), first, key)
    expected = plain.train(expected, second, key)
    expected = (*expected, plain.evaluate(expected[0].params, second))
    jax.tree.map(np.testing.assert_array_equal, (state, sums, evaluated), expected)


class Slow:
    """A function of (params, batch), its compilation ended by ``go``."""

    def __init__(self):
        self.go, self.lowered, self.error = threading.Event(), [], None

    def __call__(self, params, batch):
        return params

    def lower(self, params, batch):
        self.lowered.append(batch.ids.shape)
        return self

    def compile(self):
        assert self.go.wait(30)
        if self.error:
            raise self.error


def of_length(steps):
    return Batch(jnp.zeros((2, steps), jnp.int32), *(jnp.zeros(2) for _ in range(3)))


def test_no_more_is_compiled_ahead_than_there_are_cores(monkeypatch):
    monkeypatch.setattr(step, "usable_cores", lambda: 2)
    slow = Slow()
    calls = step._Calls(slow, slow.lower)
    slow.go.set()
    calls(jnp.ones(3), of_length(1))
    slow.go.clear()
    for steps in (1, 2, 3, 4):
        calls.prepare(of_length(steps))
    assert slow.lowered == [(2, 1), (2, 2), (2, 3)]
    slow.go.set()
    calls(jnp.ones(3), of_length(2))
    calls(jnp.ones(3), of_length(3))
    calls.prepare(of_length(4))
    assert slow.lowered == [(2, 1), (2, 2), (2, 3), (2, 4)]


def test_a_compilation_that_fails_is_told_by_the_call():
    slow = Slow()
    slow.go.set()
    calls = step._Calls(slow, slow.lower)
    calls(jnp.ones(3), of_length(1))
    slow.error = ValueError("no room")
    calls.prepare(of_length(2))
    with pytest.raises(ValueError, match="no room"):
        calls(jnp.ones(3), of_length(2))


def test_fit_learns_and_reports(tmp_path):
    state, history = fit(tmp_path / "run", epochs=4)
    assert int(state.step) == 4 * len(batches())
    assert [r["epoch"] for r in history] == [1, 2, 3, 4]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert all(0 <= r["test_accuracy"] <= 1 and r["seconds"] > 0 for r in history)
    records = training.RunFolder(tmp_path / "run").records()
    assert [r for r in records if r["kind"] == "epoch"] == history
    # Every tenth of 28 steps, and each epoch's last.
    assert [r["step"] for r in records if r["kind"] == "step"] == [7, 10, 14, 20, 21, 28]


@pytest.mark.parametrize(
    ("number", "sign"),  # 7 batches an epoch
    [(1, signal.SIGINT), (5, signal.SIGTERM), (7, signal.SIGINT), (10, signal.SIGTERM)],
)
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, number, sign):
    def interrupt(state, sums):
        signal.raise_signal(sign)
        return state, sums

    whole, history = fit(tmp_path / "whole")
    with pytest.raises(training.Interrupted) as stop:
        fit(tmp_path / "run", at_step(make_steps(make_mesh(2)), number, interrupt))
    assert stop.value.signal == sign
    resumed, again = fit(tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))
    for record, want in zip(again, history, strict=True):
        assert {**record, "seconds": 0} == {**want, "seconds": 0}


def test_a_signal_during_evaluation_loses_nothing(tmp_path):
    steps = make_steps(make_mesh(2))

    def evaluate(params, batch):
        signal.raise_signal(signal.SIGTERM)
        return steps.evaluate(params, batch)

    whole, history = fit(tmp_path / "whole")
    with pytest.raises(training.Interrupted):
        fit(tmp_path / "run", steps._replace(evaluate=evaluate))
    resumed, again = fit(tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))
    assert [r["test_loss"] for r in again] == [r["test_loss"] for r in history]


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(tmp_path / "run", epochs=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("number", "kept"), [(3, "no checkpoint"), (9, "the checkpoint of step 7 is kept")]
)
def test_a_non_finite_loss_names_step_and_epoch(tmp_path, number, kept):
    def spoil(state, sums):
        return state, sums._replace(loss=jnp.float32(math.nan))

    steps = at_step(make_steps(make_mesh(2)), number, spoil)
    epoch = 1 + number // 7
    message = rf"loss or gradient is nan at step {number} of epoch {epoch}; {kept}.*--learning-rate"
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", steps)
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ([] if number == 3 else [7])


def cut_in_half(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


CELL_WITH_NAN = """
import jax.numpy as jnp

from lstmjax import LSTM


class Mine(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        some = jnp.maximum(h, 0)
        return {}, state
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("jnp.sqrt(h - 2)", "mine.py:11: return jnp.sqrt"),
        ("jnp.where(some > 0, jnp.sqrt(some), 0)", "the derivative of .*mine.py:11: return jnp.wh"),
        ("some", "None"),
    ],
)
def test_the_line_of_a_nan_is_found_forward_and_backward(tmp_path, line, said):
    file = tmp_path / "mine.py"
    file.write_text(CELL_WITH_NAN.format(line))
    assert re.search(said, str(line_of_nan(load_cell(f"{file}:Mine", 3))))


def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_that_is_said(tmp_path, capsys):
    whole, _ = fit(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    cut_in_half(checkpoints / "21")
    capsys.readouterr()
    again, history = fit(tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(whole))
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert re.search(r"checkpoints/21 is damaged: .*\n", capsys.readouterr().err)
    assert {p.name for p in checkpoints.iterdir()} == {"14", "21", "damaged-21"}


def test_without_a_sound_checkpoint_nothing_is_overwritten(tmp_path):
    fit(tmp_path / "run")
    for number in (14, 21):
        cut_in_half(tmp_path / "run" / "checkpoints" / str(number))
    with pytest.raises(UserError, match=r"no checkpoint in .* is sound"):
        fit(tmp_path / "run", resume=True)
    left = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"damaged-14", "damaged-21"}
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* is sound"):  # asked again, too
        fit(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


INSTEAD = {
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: os.symlink("nowhere", path),
    "a link to itself": lambda path: os.symlink(path.name, path),
}


@pytest.mark.parametrize("what", INSTEAD)
def test_what_is_no_file_in_a_checkpoint_is_damage(tmp_path, what):
    """Neither waited for nor taken for a disk that fails; at any of its files."""
    whole, _ = fit(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (tmp_path / "kept").mkdir()
    os.rename(checkpoints / "21", tmp_path / "kept" / "21")
    kept = (tmp_path / "kept").rglob("*")
    files = [path.relative_to(tmp_path / "kept") for path in kept if path.is_file()]
    assert len(files) > 3
    reader = Checkpoints(checkpoints)
    like = jax.tree.map(jnp.copy, whole)
    for file in files:
        shutil.copytree(tmp_path / "kept" / "21", checkpoints / "21")
        (checkpoints / file).unlink()
        INSTEAD[what](checkpoints / file)
        with pytest.raises(Damaged):
            reader._read(21, like)
        shutil.rmtree(checkpoints / "21")
    reader.close()


def test_what_stands_in_a_checkpoints_way_is_moved_out_of_it(tmp_path, capsys):
    """Files where folders are to be, and a folder that is called almost like a checkpoint."""
    whole, _ = fit(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    cut_in_half(checkpoints / "21")
    (checkpoints / ".21.tmp").touch()
    (checkpoints / "damaged-21").touch()
    (checkpoints / "0021").mkdir()
    again, _ = fit(tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(whole))
    assert {p.name for p in checkpoints.iterdir()} == {"0021", "14", "21", "damaged-21"}


def test_a_run_without_any_checkpoint_says_that_it_begins_anew(tmp_path, capsys):
    whole, _ = fit(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    capsys.readouterr()
    again, _ = fit(tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(whole))
    assert re.search(r"no checkpoint in .*: the run begins anew", capsys.readouterr().err)


@pytest.mark.parametrize(("pooling", "padding"), [(("last",), "right"), (("mean", "max"), "left")])
def test_evaluation_sees_every_row_once_and_no_padding(pooling, padding):
    rows, labels, _ = dataset(90, seed=1)
    few = [row for row, ids in enumerate(rows) if len(ids) in (2, 5, 11)]
    rows, labels = [rows[row] for row in few], labels[few]
    mesh = make_mesh(2)
    model = Classifier(LSTM(5), dataclasses.replace(CONFIG, pooling=pooling), rngs=nnx.Rngs(0))
    optimizer = training.make_optimizer(training.OptimizerConfig(), 1)
    steps = training.make_steps(model, optimizer, mesh, padding=padding)
    few = Dataset(rows, labels, Vocabulary(("word",)))
    data = Batches(few, 8, boundaries=(6, 12), padding=padding)
    assert len(data) * 8 > len(rows)  # there are filler rows
    sums = training.evaluate(steps, steps.init().params, data, mesh)
    alone = jax.jit(lambda ids: model(ids)[0])
    logits = np.array([alone(ids[None]) for ids in rows])
    assert sums.rows == len(rows)
    assert sums.tokens == sum(map(len, rows))
    assert 0 < sums.correct < len(rows)
    assert sums.correct == np.sum((logits > 0) == (labels == 1))
    want = np.logaddexp(0, np.where(labels == 1, -logits, logits)).sum()
    np.testing.assert_allclose(sums.loss, want, rtol=1e-5)


# -- compiled programs ----------------------------------------------------------------------------


def test_a_folder_that_cannot_hold_programs_is_named_and_not_used(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path / "file"))
    assert compilation._folder() is None
    line = capsys.readouterr().err
    assert re.fullmatch(r"compiled programs are not kept: .*file/programs'\n", line)
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path / "new"))
    assert compilation._folder() == tmp_path / "new" / "programs"
    assert (tmp_path / "new" / "programs").stat().st_mode & 0o777 == 0o700


def test_of_too_many_programs_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "MAX_BYTES", 25)
    for age, (name, size) in enumerate([("a", 10), ("empty", 0), ("c/d", 10), ("b", 10), ("e", 5)]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
        os.utime(path, (age, age))
    compilation._make_ready(tmp_path)
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["b", "d", "e", "sums.json"]


def test_a_program_that_has_changed_since_it_was_seen_is_deleted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"program")
    compilation._make_ready(tmp_path)
    (tmp_path / "a").write_bytes(b"progrbm")
    (tmp_path / "c").write_bytes(b"new")
    compilation._make_ready(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "sums.json"]
    (tmp_path / "sums.json").write_bytes(b"nonsense")
    compilation._make_ready(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "sums.json"]


# -- the run folder -------------------------------------------------------------------------------


def test_run_folder_refuses_to_overwrite(tmp_path):
    new_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"is not empty.*--run-dir"):
        new_run(tmp_path / "run")


def test_run_folder_names_what_differs_on_resume(tmp_path):
    before = {"seed": 0, "data": {"batch_size": 8, "max_length": 5}}
    new_run(tmp_path / "run", before)
    now = {"seed": 0, "data": {"batch_size": 16, "max_length": 5}}
    with pytest.raises(UserError, match=r"batch-size: 8 there, 16 here") as error:
        training.RunFolder.reopen(tmp_path / "run", now)
    assert "max-length" not in str(error.value)
    training.RunFolder.reopen(tmp_path / "run", before).close()
    with pytest.raises(UserError, match="nothing to resume"):
        training.RunFolder.reopen(tmp_path / "other", before)


def test_a_torn_last_line_of_the_metrics_is_passed_over(tmp_path):
    run = new_run(tmp_path / "run")
    run.log({"kind": "step", "step": 1, "epoch": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert run.records() == [{"kind": "step", "step": 1, "epoch": 1}]


DAMAGED_LINES = {
    "nonsense": b"nonsense",
    "zeros": bytes(60),
    "other letters": b'{"kind": "step", "step": 2, "epoch": 1, "loss": "\xff"}',
    "null": b"null",
    "null inside": b'{"kind": "step", "step": 2, "epoch": 1, "loss": null}',
    "not a number": b'{"kind": "step", "step": 2, "epoch": 1, "loss": NaN}',
    "too large": b'{"kind": "step", "step": 2, "epoch": 1, "loss": 1e999}',
    "far too large": b'{"kind": "step", "step": 2, "epoch": 1, "loss": 1' + b"0" * 400 + b"}",
    "nested": b"[" * 100_000,
    "a list": b"[1]",
    "no step": b'{"kind": "step", "step": "2", "epoch": 1}',
}


@pytest.mark.parametrize("name", DAMAGED_LINES)
def test_a_damaged_line_of_the_metrics_is_passed_over(tmp_path, name):
    run = new_run(tmp_path / "run")
    lines = [b'{"kind": "step", "step": 1, "epoch": 1}', DAMAGED_LINES[name]]
    (run.path / "metrics.jsonl").write_bytes(b"\n".join([*lines, lines[0]]) + b"\n")
    assert run.records() == 2 * [{"kind": "step", "step": 1, "epoch": 1}]


def damage_metrics(path, how):
    lines = path.read_bytes().splitlines(keepends=True)
    assert b'"epoch": 1, "step": 7, "train' in lines[1]
    if how == "missing":
        del lines[1:3]
    elif how == "doubled":
        lines[1:1] = lines[:3]
    elif how == "zeros":
        lines[-1] = bytes(len(lines[-1]))
    elif how == "cut":
        lines[-1] = lines[-1][:20]
    elif how == "gone":
        return path.unlink()
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("how", "lost"), [("missing", 1), ("doubled", 0), ("zeros", 0), ("cut", 0), ("gone", 5)]
)
def test_damaged_metrics_cost_points_of_the_curve_and_nothing_else(tmp_path, how, lost, capsys):
    _, history = fit(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    damage_metrics(metrics, how)
    capsys.readouterr()
    _, again = fit(tmp_path / "run", resume=True)
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in history]
    told = re.findall(r"metrics.jsonl lacks (\d) of its lines", capsys.readouterr().err)
    assert told == ([str(lost)] if lost else [])
    kept = set(metrics.read_text().splitlines())
    assert len(set(whole.splitlines()) - kept) == lost
    if not lost:
        assert metrics.read_text() == whole


def test_run_folder_states_versions(tmp_path):
    run = new_run(tmp_path / "run")
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_are_put_on_device_ahead_of_use(ahead):
    taken = []

    def source():
        for batch in batches().epoch(0, 0):
            taken.append(batch)
            yield batch

    for number, _ in enumerate(on_device(source(), make_mesh(2), ahead=ahead)):
        # The first is not kept waiting for others.
        assert len(taken) == (min(number + ahead, len(batches())) if number else 1)


def test_what_waits_is_prepared_whenever_a_batch_has_been_used():
    seen, given = [], list(batches().epoch(0, 0))[:4]

    def prepare(batch):
        seen.append([*map(np.array_equal, itertools.repeat(batch.ids), ids)].index(True))

    ids = [batch.ids for batch in given]
    for number, _ in enumerate(on_device(given, make_mesh(2), prepare, ahead=2)):
        assert seen == [[], [1, 2], [2, 3], [3]][number]
        seen.clear()
    assert seen == []


@contextlib.contextmanager
def interrupted_by_exception():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may have been ignored
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_twice(state, sums):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    return state, sums


def test_two_signals_at_once_are_one(tmp_path):
    whole, _ = fit(tmp_path / "whole")
    with interrupted_by_exception(), pytest.raises(training.Interrupted) as stop:
        fit(tmp_path / "run", at_step(make_steps(make_mesh(2)), 3, interrupt_twice))
    assert stop.value.signal == signal.SIGINT
    resumed, _ = fit(tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))


def test_a_later_signal_acts_as_it_would_have(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "TOGETHER", -1.0)

    def interrupt_twice(state, sums):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return state, sums

    with interrupted_by_exception(), pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", at_step(make_steps(make_mesh(2)), 3, interrupt_twice))


def test_batches_put_on_device_keep_order_and_sharding():
    mesh = make_mesh(4)
    given = [
        Batch(*(np.full(8, n, dtype) for dtype in (np.int32, np.int32, np.int32, np.float32)))
        for n in range(5)
    ]
    placed = list(on_device(given, mesh, ahead=2))
    assert [int(batch.labels[0]) for batch in placed] == [0, 1, 2, 3, 4]
    assert len(placed[0].labels.sharding.device_set) == 4
