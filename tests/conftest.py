"""Strict JAX for every test: what would slip through in use raises here."""

import collections
import os
import pathlib
import re
import signal

import jax
import jaxtyping
import pytest

# What began in the background ignores these, and its programs inherit that.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Optimising is most of what compiling takes. Where rounding is compared, it is on: `OPTIMIZED`.
# XLA's simple kernels (`lstmjax.training.simple_kernels`; the library must not be imported here,
# before jaxtyping) halve the rest. `.ci/run` has some tests run with those of users as well.
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
if os.environ.get("LSTMJAX_TEST_KERNELS") != "users":
    flags.append("--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
os.environ["XLA_FLAGS"] = " ".join(flags).strip()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)  # nothing from another run, or for one
jax.devices()  # starts JAX, so that no test can change the number of devices for the others
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def with_shapes():
    """The modules whose functions say of which shapes arrays are, by name.

    There shapes and types are checked at every call; types alone are mypy's matter: most calls are
    small ones inside the library, and to check all was a fifth of the time.
    """
    root = pathlib.Path(__file__).parent.parent
    shape = re.compile(r"\b(Bool|Float|Int|Key|Num|Shaped|UInt)\d*\[")
    for path in sorted((root / "lstmjax").rglob("*.py")):
        if shape.search(path.read_text(encoding="utf-8")):
            yield ".".join(path.relative_to(root).with_suffix("").parts)


if os.environ.get("LSTMJAX_TEST_TYPES") != "0":
    jaxtyping.install_import_hook([*with_shapes()], "typechecks.outermost")


def pytest_collection_modifyitems(config, items):
    """Mark as slow what `sampled` leaves out; with ``LSTMJAX_TEST_CASES``, all but so many. With
    ``LSTMJAX_TEST_SLOW_CASES``, of what it leaves out no more than so many of a test run at all."""
    cases = collections.defaultdict(list)
    first = int(os.environ.get("LSTMJAX_TEST_CASES", 0))
    most = int(os.environ.get("LSTMJAX_TEST_SLOW_CASES", len(items)))
    dropped = []
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for several in cases.values():
        sampled = several[0].get_closest_marker("sampled")
        kept = spread(several, sampled.args[0]) if sampled else several
        kept = several[:first] if first else kept
        left = [item for item in several if item not in kept]
        for item in left:
            item.add_marker(pytest.mark.slow)
        if sampled:
            slow = spread(left, most)
            dropped += [item for item in left if item not in slow]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def spread(items, number):
    """So many of them, from all over."""
    number = min(number, len(items))
    return [items[round((n + 0.5) * len(items) / number - 0.5)] for n in range(number)]


@pytest.fixture(scope="module", autouse=True)
def forgets_what_was_compiled():
    """What a file has compiled no other one runs: it would stay, gigabytes of it."""
    yield
    jax.clear_caches()


@pytest.fixture
def no_type_checks():
    """As for users, who run without jaxtyping's checks: the library's own errors must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def as_for_users(monkeypatch, tmp_path):
    """Optax mixes integers and floats; runs and caches stay in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run of a user's cell on the demo corpus, for reading only: copy what is to be changed."""
    from tests.trained_run import CELL_FILE, LEARNS, train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "mine.py").write_text(CELL_FILE)
    return train(
        folder / "run",
        cell=f"{folder / 'mine.py'}:Mine(leak=0.25)",
        epochs=5,
        model=LEARNS,
        max_length=50,
        batch_size=200,
        learning_rate=2e-2,
    )
