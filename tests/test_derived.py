"""What the derived engine does beyond running every cell, which `test_every_cell.py` compares."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lstmjax.cells import GRU, LSTM, Carry, Cell, PeepholeLSTM
from lstmjax.cells.contract import shapes_of
from lstmjax.recurrence import CPU, Derived, Scan, Workload, choose_engine, unroll
from lstmjax.traced import trace
from tests.tolerances import assert_close, recurrence_terms

pytestmark = pytest.mark.sampled(2)

B, T, D, H = 4, 10, 3, 6
WORK = Workload("cpu", "float32", "float32", steps=T, batch=B, features=D)


# --- Cells that are not in the library -----------------------------------------------------------


class Heads(Cell):
    """Block-diagonal recurrence, and state arrays that are not called c."""

    gates = ("a", "b")
    heads: int = 3

    class State(NamedTuple):
        n: jax.Array
        m: jax.Array

    def step(self, pre, state, params):
        n = 0.5 * state.n + jnp.tanh(pre.a)
        m = jax.nn.sigmoid(pre.b) * state.m + n
        return jnp.tanh(m - n), self.State(n, m)


class HeadsApart(Heads):
    """The same with the two parts of its pre-activations apart, and h_{t-1}."""

    parts_apart = True
    uses_h = True

    def step(self, pre, state, params, h):
        n = 0.5 * state.n + jnp.tanh(pre.x.a + h * pre.h.a)
        m = jax.nn.sigmoid(pre.x.b + pre.h.b) * state.m + n
        return jnp.tanh(m - n), self.State(n, m)


class Normalised(Cell):
    """Layer normalisation: mixes the units of a row."""

    gates = ("a",)
    elementwise = False
    unit_params = {"gain": 1.5}

    def step(self, pre, state, params):
        centred = pre.a - pre.a.mean(-1, keepdims=True)
        scale = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 0.1)
        return jnp.tanh(params.gain * centred / scale), state


class Clocked(Cell):
    """Element-wise, but with a constant as wide as the cell."""

    gates = ("a",)
    uses_h = True

    def step(self, pre, state, params, h):
        pace = jnp.linspace(0.1, 0.9, self.hidden_size, dtype=h.dtype)[None]
        return pace * jnp.tanh(pre.a) + (1 - pace) * h, state


class Restarting(LSTM):
    """Starts, and starts anew, from a carry other than zeros."""

    def initial_carry(self, batch_size, dtype=jnp.float32):
        ones = jnp.ones((batch_size, self.hidden_size), dtype)
        return Carry(0.5 * ones, self.State(-0.25 * ones))


class TwoProducts(LSTM):
    """A transition of its own."""

    def transition(self, params, x, carry, dot):
        carry = carry._replace(h=jnp.tanh(dot(carry.h, params["recurrent_kernel"]))[:, :H])
        return super().transition(params, x, carry, dot)


class Undeclared(LSTM):
    """Mixes the units of a row, and does not say so: as a cell of one unit it would be another."""

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h - h.mean(axis=-1, keepdims=True), state


class Memory(Cell):
    """Carries a matrix a row."""

    gates = ("k", "v")

    class State(NamedTuple):
        m: jax.Array

    def initial_carry(self, batch_size, dtype=jnp.float32):
        h, _ = super().initial_carry(batch_size, dtype)
        return Carry(h, self.State(jnp.zeros((batch_size, *2 * (self.hidden_size,)), dtype)))

    def step(self, pre, state, params):
        m = 0.9 * state.m + pre.k[:, :, None] * pre.v[:, None, :]
        return jnp.tanh(jnp.einsum("bij,bj->bi", m, pre.k)), self.State(m)


CELLS = [
    *(Heads(H), HeadsApart(H), Normalised(H), Clocked(H), Restarting(H), Undeclared(H)),
    TwoProducts(H),
    Memory(B),  # as many units as rows: a mask along the wrong axis shows in no shape
]
every_cell = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: type(cell).__name__)


def make(cell, seed=0, dtype=jnp.float32):
    """Parameters (none of them zero), inputs, a mask and resets."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = cell.init(keys[0], D, dtype)
    leaves, structure = jax.tree.flatten(params)
    noise = jax.random.split(keys[1], len(leaves))
    leaves = [
        a + 0.1 * jax.random.normal(k, a.shape, dtype) for a, k in zip(leaves, noise, strict=True)
    ]
    x = jax.random.normal(keys[2], (B, T, D), dtype)
    mask = jnp.arange(T)[None] < jnp.array([T - 2, 3, 5, 0])[:, None]
    resets = jax.random.bernoulli(keys[3], 0.2, (B, T))
    return jax.tree.unflatten(structure, leaves), x, {"mask": mask, "resets": resets}


def loss(cell, engine, **options):
    """A scalar that depends on every output and on the final carry."""

    def function(params, x):
        hs, final = unroll(cell, params, x, engine=engine, **options)
        weights = jnp.cos(jnp.arange(hs.size, dtype=hs.dtype)).reshape(hs.shape)
        return (weights * hs**2).sum() + sum((a**3).sum() for a in jax.tree.leaves(final))

    return function


def assert_same_gradients(cell, got, expected, batch=B, time=T):
    terms = recurrence_terms(batch, time, D, H, len(cell.gates), gradient=True)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=terms), got, expected)


@every_cell
@pytest.mark.parametrize("save", ["steps", "chunks"])
def test_gradients_are_those_of_the_scan(cell, save):
    params, x, options = make(cell)
    for reverse in (False, True):
        got, expected = (
            jax.jit(jax.value_and_grad(loss(cell, e, reverse=reverse, **options), (0, 1)))(
                params, x
            )
            for e in (Derived(chunk=4, save=save), Scan())
        )
        assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
        assert_same_gradients(cell, got, expected)


def test_a_matrix_memory_is_masked_by_rows():
    cell, lengths = Memory(3), [6, 2, 4]
    params, x = cell.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (3, 6, 3))
    _, final = unroll(cell, params, x, lengths=jnp.array(lengths))
    for row, length in enumerate(lengths):
        _, alone = unroll(cell, params, x[row : row + 1, :length])
        assert_close(final.state.m[row], alone.state.m[0], reduction=6 * 6)


@pytest.mark.parametrize("save", ["steps", "chunks"])
@pytest.mark.parametrize("chunk", [1, T, 3 * T])
def test_chunks_of_one_step_and_of_all(chunk, save):
    cell = PeepholeLSTM(H)
    params, x, options = make(cell)
    got, expected = (
        jax.jit(jax.value_and_grad(loss(cell, e, **options), (0, 1)))(params, x)
        for e in (Derived(chunk, save), Scan())
    )
    assert_same_gradients(cell, got, expected)


# --- Only what is asked for ----------------------------------------------------------------------


def test_gradients_of_the_parameters_alone():
    cell = LSTM(H)
    params, x, options = make(cell)
    got, expected = (jax.grad(loss(cell, e, **options))(params, x) for e in (Derived(4), Scan()))
    assert_same_gradients(cell, got, expected)


@pytest.mark.parametrize("engine", [Derived(), Derived(4, "chunks")], ids=["one chunk", "three"])
@pytest.mark.parametrize("cell", [LSTM(H), Heads(H), HeadsApart(H)], ids=repr)
def test_bfloat16_trains_within_one_program(cell, engine):
    """XLA:CPU has no bfloat16 product with its left side turned, and must not be led to one."""
    params, x = cell.init(jax.random.key(0), D), jax.random.normal(jax.random.key(1), (B, T, D))
    optimizer = optax.adam(1e-2)

    def loss(params):
        return (unroll(cell, params, x, engine=engine, precision="bfloat16")[0] ** 2).mean()

    def update(state, _):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params)
        changes, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, changes), moments), value

    with jax.numpy_dtype_promotion("standard"):  # Optax mixes integers and floats
        train = jax.jit(lambda p: jax.lax.scan(update, (p, optimizer.init(p)), length=20)[1])
        losses = train(params)
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_of_the_final_carry_alone():
    cell = GRU(H)
    params, x, options = make(cell)

    def gradients(engine):
        final = lambda *a: (unroll(cell, *a, engine=engine, **options)[1].h ** 2).sum()  # noqa: E731
        return jax.grad(final, (0, 1))(params, x)

    assert_same_gradients(cell, gradients(Derived(chunk=5)), gradients(Scan()))


# --- Higher derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["steps", "chunks"])
@pytest.mark.parametrize("cell", [LSTM(H), PeepholeLSTM(H)], ids=["LSTM", "PeepholeLSTM"])
def test_second_derivatives_are_those_of_the_scan(cell, save):
    with jax.enable_x64(True):
        params, x, options = make(cell, dtype=jnp.float64)

        def penalty(engine):
            def function(params, x):
                gradients = jax.grad(loss(cell, engine, **options), (0, 1))(params, x)
                return sum((g**2).sum() for g in jax.tree.leaves(gradients))

            return jax.jit(jax.value_and_grad(function, (0, 1)))(params, x)

        assert_same_gradients(cell, penalty(Derived(chunk=4, save=save)), penalty(Scan()))


@pytest.mark.parametrize("cell", [LSTM(H), TwoProducts(H)], ids=["LSTM", "TwoProducts"])
def test_forward_mode_is_that_of_the_scan(cell):
    with jax.enable_x64(True):
        params, x, options = make(cell, dtype=jnp.float64)

        def run(engine):
            one = loss(cell, engine, **options)
            tangents = jax.tree.map(jnp.cos, (params, x))
            pushed = jax.jvp(jax.jit(one), (params, x), tangents)
            products = jax.jvp(jax.grad(one, (0, 1)), (params, x), tangents)[1]
            hessian = jax.hessian(lambda b: one({**params, "bias": b}, x))(params["bias"])
            return pushed, products, hessian

        jax.tree.map(assert_close, run(Derived(chunk=4)), run(Scan()))


# --- Under the transformations of JAX ------------------------------------------------------------


@pytest.mark.parametrize("save", ["steps", "chunks"])
@pytest.mark.parametrize("check_vma", [False, True])
def test_under_shard_map(check_vma, save):
    """Rows over two devices, parameters on both."""
    engine = Derived(chunk=4, save=save)
    cell = PeepholeLSTM(H)
    params, x, options = make(cell)
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))

    def local(params, x, mask, resets):
        value, gradients = jax.value_and_grad(
            lambda p: (unroll(cell, p, x, mask=mask, resets=resets, engine=engine)[0] ** 2).sum()
        )(params)
        if check_vma:  # the transpose of spreading the parameters has summed the gradient already
            return jax.lax.psum(value, "rows"), gradients
        return jax.lax.psum((value, gradients), "rows")

    rows = P("rows")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), rows, rows, rows), out_specs=P(), check_vma=check_vma
    )
    got = jax.jit(run)(params, x, options["mask"], options["resets"])
    expected = jax.value_and_grad(
        lambda p: (unroll(cell, p, x, engine="scan", **options)[0] ** 2).sum()
    )(params)
    assert_same_gradients(cell, got, expected)


def test_under_jit_with_sharded_rows():
    cell = LSTM(H)
    params, x, options = make(cell)
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, P("rows")))
    gradients = jax.jit(jax.grad(loss(cell, Derived(chunk=4), **options), (0, 1)))
    expected = jax.grad(loss(cell, Scan(), **options), (0, 1))(params, x)
    assert_same_gradients(cell, gradients(params, spread), expected)


@pytest.mark.parametrize("save", ["steps", "chunks"])
@pytest.mark.parametrize(("chunk", "with_resets"), [(2, False), (4, True)])
def test_vmap_over_rows_of_their_own_lengths(chunk, with_resets, save):
    """The trip count differs from one mapped batch to the next."""
    cell = LSTM(H)
    params, x, options = make(cell)
    resets = options["resets"] if with_resets else None
    xs = jnp.stack([x, 2 * x, -x])
    lengths = jnp.array([[1, 2, 0, 2], [T, 1, 3, 4], [0, 0, 0, 0]])

    def gradients(engine):
        def one(x, lengths):
            both = jax.value_and_grad(loss(cell, engine, lengths=lengths, resets=resets), (0, 1))
            return both(params, x)

        return jax.jit(jax.vmap(one))(xs, lengths)

    assert_same_gradients(cell, gradients(Derived(chunk, save)), gradients(Scan()))


# --- Chunks that are not run ---------------------------------------------------------------------


def counted(cell_type):
    """A cell that counts, on the host, how often its step runs."""
    calls = []

    class Counted(cell_type):
        def step(self, pre, state, params):
            jax.debug.callback(lambda: calls.append(1))
            return super().step(pre, state, params)

    return Counted(H), calls


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("longest", "steps"), [(0, 0), (1, 2), (4, 4), (5, 6), (10, 10)])
def test_one_program_runs_the_chunks_that_have_something_to_do(longest, steps, padding):
    cell, calls = counted(LSTM)
    params, x, _ = make(cell)

    @jax.jit
    def run(lengths):
        return unroll(cell, params, x, lengths=lengths, padding=padding, engine=Derived(chunk=2))[0]

    run(jnp.array([T] * B))
    jax.effects_barrier()
    calls.clear()
    run(jnp.array([longest, 0, longest // 2, 0]))
    jax.effects_barrier()
    assert len(calls) in (steps, steps * H)  # once a step, or once a step for each unit
    assert run._cache_size() == 1


# --- Memory --------------------------------------------------------------------------------------


def memory(engine, steps):
    """Bytes of temporaries of a gradient with respect to the parameters."""
    cell = LSTM(32)
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 4))
    x = jax.ShapeDtypeStruct((8, steps, 4), "float32")

    def final(params, x):
        return (unroll(cell, params, x, engine=engine)[1].h ** 2).sum()

    compiled = jax.jit(jax.grad(final)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_memory_of_a_thousand_steps_serves_sixteen_thousand():
    plain = memory(Scan(recompute=False), 1_000)
    assert memory(Derived(save="chunks"), 16_384) < plain
    assert memory(Derived(), 1_000) < plain / 2


# --- Choice --------------------------------------------------------------------------------------


class Counting(LSTM):
    """Carries whole numbers, and a key."""

    class State(NamedTuple):
        c: jax.Array
        n: jax.Array
        key: jax.Array

    def initial_carry(self, batch_size, dtype=jnp.float32):
        h, (c,) = LSTM(self.hidden_size).initial_carry(batch_size, dtype)
        keys = jax.random.split(jax.random.key(0), batch_size)
        return Carry(h, self.State(c, jnp.zeros((batch_size, 1), jnp.int32), keys))

    def step(self, pre, state, params):
        h, c = LSTM.step(LSTM(self.hidden_size), pre, LSTM.State(state.c), params)
        draw = jax.vmap(lambda key: jax.random.uniform(key, (self.hidden_size,)))
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(state.key)
        h = h * draw(keys) + state.n.astype(h.dtype) / 10
        return h, self.State(c.c, state.n + 1, keys)


def test_it_is_chosen_and_says_what_it_cannot_run():
    assert choose_engine(LSTM(H), WORK) == (CPU(), "the first choice")
    why = "no cpu: TwoProducts overrides transition"
    assert choose_engine(TwoProducts(H), WORK) == (Derived(), why)
    cell = Counting(H)
    work = WORK._replace(args=shapes_of(cell, B, D))
    chosen, reason = choose_engine(cell, work)
    assert chosen == Scan()
    assert reason.endswith("; no derived: Counting carries state.n, which is int32")
    with pytest.raises(ValueError, match=r"'derived' cannot run .*: Counting carries state"):
        choose_engine(cell, work, "derived")


def test_a_carry_that_is_no_number_runs_where_it_can():
    cell = Counting(H)
    params, x, options = make(cell)
    value = lambda params, x: (unroll(cell, params, x, **options)[0] ** 2).sum()  # noqa: E731
    with pytest.raises(ValueError, match="carries state"):
        unroll(cell, params, x, engine="derived")
    got = jax.grad(value, (0, 1))(params, x)
    assert all(np.all(np.isfinite(a)) and np.any(a) for a in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"chunk": 0}, "chunk must be at least 1, got 0"), ({"save": "all"}, "save must be .*'all'")],
)
@pytest.mark.usefixtures("no_type_checks")
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Derived(**settings)


@pytest.mark.parametrize("steps", [1, 7, 97, 500, 16_384])
@pytest.mark.parametrize("save", ["steps", "chunks"])
def test_the_chunk_chosen_divides_where_it_can(steps, save):
    size = Derived(save=save)._chunk_size(steps, 51_200)
    assert 1 <= size <= steps
    assert steps % size == 0 or steps in (7, 97)


class Peak(LSTM):
    """Looks at the largest or smallest of its row, twice; rows that begin anew have all alike."""

    step_inputs = {"dt": 1}
    smallest: bool = False

    def initial_carry(self, batch_size, dtype=jnp.float32):
        carry = super().initial_carry(batch_size, dtype)
        return carry._replace(state=self.State(carry.state.c + 0.2))

    def step(self, pre, state, params, *, inputs):
        a = inputs.dt * state.c
        for _ in range(2):
            a = a - 0.5 * (a.min if self.smallest else a.max)(-1, keepdims=True)
        h, state = super().step(pre, state, params)
        return h + jnp.tanh(a), state


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("save", ["steps", "chunks"])
def test_the_largest_of_a_row_has_its_gradient(smallest, save):
    """In plain JAX it is 0 / 0, or wrong, where XLA computes a row twice and rounds it in two ways:
    nothing equals its maximum then. Hence differences, in float64."""
    cell, rng = Peak(4, smallest=smallest), np.random.default_rng(0)
    with jax.enable_x64(True):
        params = cell.init(jax.random.key(0), 2, jnp.float64)
        x, dt = jnp.asarray(rng.normal(size=(3, 4, 2))), jnp.asarray(rng.normal(size=(3, 4)))
        resets = jnp.asarray(rng.random((3, 4)) < 0.4)

        @functools.partial(jax.jit, static_argnums=1)
        def value(dt, engine):
            options = {"inputs": {"dt": dt}, "resets": resets, "engine": engine}
            hs, final = unroll(cell, params, x, return_states=False, **options)
            return jnp.sum(jnp.sin(hs)) + jnp.sum(final.state.c**2)

        found = jax.jit(jax.grad(value), static_argnums=1)(dt, Derived(chunk=4, save=save))
        step = 1e-6 * jnp.eye(dt.size).reshape(dt.size, *dt.shape)
        there, back = (jax.vmap(value, (0, None))(dt[None] + s * step, Scan()) for s in (1, -1))
        differences = (there - back) / 2e-6
    np.testing.assert_allclose(found.ravel(), differences, rtol=1e-6, atol=1e-8)


TIED = {
    "largest of a row": lambda x, y: x.max(-1),
    "smallest of two axes": lambda x, y: x.min((1, 2)),
    "larger of two": jnp.maximum,
    "smaller of two": jnp.minimum,
    "of whole numbers": lambda x, y: x * jnp.maximum(jnp.round(y).astype(int), 1).astype(x.dtype),
}


@pytest.mark.parametrize("name", TIED)
def test_ties_share_a_gradient_as_in_jax(name):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.integers(0, 3, (3, 4, 2)), "float32") for _ in range(2))
    program = trace(TIED[name], x, y)

    def gradients(f):
        return jax.grad(lambda x, y: jnp.sum(jnp.sin(f(x, y))), (0, 1))(x, y)

    for got, wanted in zip(
        gradients(lambda *args: program.evaluate(args)), gradients(TIED[name]), strict=True
    ):
        assert_close(got, wanted)
