"""The cell contract: what a declaration does, what breaks it, and cells in a user's own file."""

import dataclasses
import inspect
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lstmjax.cells import GRU, LSTM, Carry, Cell, PeepholeLSTM, check_contract, load_cell
from lstmjax.errors import UserError
from lstmjax.recurrence import ENGINES, Scan, Workload, choose_engine, unroll


def init(cell, features=3, seed=0):
    return cell.init(jax.random.key(seed), features)


def test_a_cell_is_a_hashable_value():
    assert LSTM(5) == LSTM(5)
    assert hash(LSTM(5)) == hash(LSTM(5))
    assert LSTM(5) != LSTM(6)
    assert LSTM(5) != PeepholeLSTM(5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        LSTM(5).hidden_size = 6
    traced = jax.jit(lambda x, cell: x * cell.hidden_size, static_argnums=1)
    assert float(traced(1.0, LSTM(5))) == 5.0


def test_a_cell_may_be_decorated_as_a_dataclass():
    """Nobody needs to; who does, by habit, gets the same."""

    @dataclasses.dataclass(frozen=True)
    class Decorated(LSTM):
        leak: float = 0.1

    class Plain(LSTM):
        leak: float = 0.1

    assert repr(Decorated(5, leak=0.3)) == "Decorated(5, leak=0.3)"
    assert Decorated(5) == Decorated(5) != Decorated(5, leak=0.3)
    for cell in (Decorated(5), Plain(5)):
        for name in ("leak", "hidden_size", "no such"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(cell, name, 1)
            with pytest.raises(dataclasses.FrozenInstanceError):
                delattr(cell, name)


@pytest.mark.parametrize("cell", [LSTM(7), GRU(7), PeepholeLSTM(7)])
def test_initialisation(cell):
    """Keras' distributions, but each gate's recurrent kernel orthogonal on its own."""
    params = init(cell, features=400)
    gates = len(cell.gates)
    limit = np.sqrt(6 / (400 + gates * 7))
    kernel = np.asarray(params["kernel"])
    assert kernel.shape == (400, gates * 7)
    assert np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.03)
    for block in np.split(np.asarray(params["recurrent_kernel"]), gates, axis=1):
        np.testing.assert_allclose(block.T @ block, np.eye(7), atol=1e-5)
    bias = dict(zip(cell.gates, np.split(np.asarray(params["bias"]), gates), strict=True))
    for gate, value in bias.items():
        assert set(value.tolist()) == {1.0 if gate == "f" else 0.0}


def test_parameter_names_and_shapes_are_frozen():
    def shapes(cell):
        return jax.tree.map(jnp.shape, init(cell))

    lstm = {"bias": (20,), "kernel": (3, 20), "recurrent_kernel": (5, 20)}
    assert shapes(LSTM(5)) == lstm
    assert shapes(PeepholeLSTM(5)) == {**lstm, "units": {"p_f": (5,), "p_i": (5,), "p_o": (5,)}}
    assert shapes(GRU(5)) == {
        "bias": (15,),
        "kernel": (3, 15),
        "recurrent_bias": (15,),
        "recurrent_kernel": (5, 15),
    }


def test_bias_and_unit_initialisers_may_be_functions():
    class Chrono(PeepholeLSTM):
        bias_init = {
            "f": lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, 1, 9)),
            "o": -2.0,
        }
        unit_params = {**PeepholeLSTM.unit_params, "p_o": jax.nn.initializers.normal(1.0)}

    params = init(Chrono(50))
    _, f, _, o = np.split(np.asarray(params["bias"]), 4)
    assert 0 < f.min() < f.max() < np.log(9)
    assert set(o.tolist()) == {-2.0}
    assert params["units"]["p_o"].std() > 0.5
    assert not params["units"]["p_i"].any()


class HeadedLSTM(LSTM):
    heads: int = 2


def test_heads_are_a_block_diagonal_recurrent_kernel():
    cell = HeadedLSTM(6, heads=3)
    params = init(cell)
    assert params["recurrent_kernel"].shape == (2, 24)
    blocks = np.asarray(params["recurrent_kernel"]).reshape(2, 4, 3, 2)
    dense = np.zeros((6, 4, 6), np.float32)
    for head in range(3):
        rows = slice(2 * head, 2 * head + 2)
        dense[rows, :, rows] = blocks[:, :, head]
        for gate in range(4):
            block = blocks[:, gate, head]
            np.testing.assert_allclose(block.T @ block, np.eye(2), atol=1e-5)
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    got, _ = unroll(cell, params, x)
    want, _ = unroll(LSTM(6), {**params, "recurrent_kernel": jnp.asarray(dense.reshape(6, 24))}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "heads"), [(6, 4), (6, 0), (0, 1), (-2, 1)])
def test_sizes_that_cannot_be(size, heads):
    with pytest.raises(ValueError, match=str(heads if size == 6 else size)):
        HeadedLSTM(size, heads=heads)


class Projected(LSTM):
    """LSTM with a recurrent projection (Sak et al. 2014): two products a step."""

    projection: int = 2

    def init(self, key, input_size, dtype=jnp.float32):
        own, inner = jax.random.split(key)
        params = super().init(inner, input_size, dtype)
        shape = (self.projection, 4 * self.hidden_size)
        glorot = jax.nn.initializers.glorot_uniform()
        project = glorot(own, (self.hidden_size, self.projection), dtype)
        return {**params, "recurrent_kernel": glorot(own, shape, dtype), "project": project}

    def initial_carry(self, batch_size, dtype=jnp.float32):
        h, state = super().initial_carry(batch_size, dtype)
        return Carry(h[:, : self.projection], state)

    def transition(self, params, x, carry, dot):
        h, state = super().transition(params, x, carry, dot)
        return Carry(dot(h, params["project"]), state)


def test_a_cell_with_a_second_product_overrides_the_transition():
    cell = Projected(6)
    check_contract(cell)
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    lengths = jnp.array([5, 3])
    hs, final = unroll(cell, init(cell), x, lengths=lengths)
    assert hs.shape == (2, 5, 2)
    assert final.state.c.shape == (2, 6)
    np.testing.assert_array_equal(hs[1, 2], final.h[1])


# -- breaking the contract ------------------------------------------------------------------------


class WrongShape(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h[:, :1], state


class WrongState(LSTM):
    def step(self, pre, state, params):
        h, _ = super().step(pre, state, params)
        return h, h


class WrongDtype(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h.astype(jnp.bfloat16), state


class NoGates(Cell):
    def step(self, pre, state, params):
        return state, state


class NoStep(Cell):
    gates = ("a",)


class NoneForState(GRU):
    def step(self, pre, state, params, h):
        return super().step(pre, state, params, h)[0], None


class BatchElsewhere(LSTM):
    def initial_carry(self, batch_size, dtype=jnp.float32):
        h, _ = super().initial_carry(batch_size, dtype)
        return Carry(h, self.State(jnp.zeros((self.hidden_size, batch_size), dtype)))

    def step(self, pre, state, params):
        h, new = super().step(pre, self.State(state.c.T), params)
        return h, self.State(new.c.T)


class UnknownGate(LSTM):
    def step(self, pre, state, params):
        return pre.forget, state


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (WrongShape, r"must return \(h, state\) as .*\[2, 4\].*not.*\[2, 1\]"),
        (WrongState, "must return"),
        (WrongDtype, "bfloat16"),
        (NoGates, "declares no gates"),
        (NoStep, "has no step"),
        (UnknownGate, "forget"),
        (NoneForState, "structured as"),
        (BatchElsewhere, "batch .* as its first axis"),
    ],
)
def test_a_broken_contract_is_one_clear_line(cell, message):
    with pytest.raises(UserError, match=message) as error:
        check_contract(cell(4))
    assert cell.__name__ in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bias_for_a_gate_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match=r"Typo.bias_init names \['forget'\]"):

        class Typo(LSTM):
            bias_init = {"forget": 1.0}


# -- loading --------------------------------------------------------------------------------------


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


MY_CELL = """
    from typing import NamedTuple
    import jax.numpy as jnp
    from jax import Array
    from jax.nn import sigmoid
    from lstmjax.cells import Cell

    class MyCell(Cell):
        gates = ("f", "g", "o")
        bias_init = {"f": 1.0}
        squash: float = 1.0

        class State(NamedTuple):
            c: Array

        def step(self, pre, state, params):
            f = sigmoid(pre.f)
            c = f * state.c + (1 - f) * jnp.tanh(pre.g)
            return sigmoid(pre.o) * jnp.tanh(self.squash * c), self.State(c)
"""


def test_load_a_cell_from_a_users_file(tmp_path):
    file = write(tmp_path / "my_cell.py", MY_CELL)
    cell = load_cell(f"{file}:MyCell", 6)
    assert isinstance(cell, Cell)
    hs, _ = unroll(cell, init(cell), jnp.ones((2, 4, 3)))
    assert hs.shape == (2, 4, 6)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "PeepholeLSTM"])
def test_load_a_built_in_cell(name):
    assert type(load_cell(name, 4)).__name__ == name


def test_a_users_file_may_postpone_annotations_and_import_its_neighbours(tmp_path):
    write(tmp_path / "neighbour_of_my_cell.py", "SQUASH = 0.5")
    text = textwrap.dedent(MY_CELL).replace("squash: float = 1.0", "squash: float = SQUASH")
    head = "from __future__ import annotations\nfrom neighbour_of_my_cell import SQUASH\n"
    file = write(tmp_path / "my_cell.py", head + text)
    before = list(sys.path)
    assert load_cell(f"{file}:MyCell", 6).squash == 0.5
    assert sys.path == before


def test_neighbours_are_those_of_the_folder_and_of_now(tmp_path):
    text = textwrap.dedent(MY_CELL).replace("squash: float = 1.0", "squash: float = SQUASH")
    files = [tmp_path / folder / "my_cell.py" for folder in ("one", "two")]
    for n, file in enumerate(files):
        file.parent.mkdir()
        write(file, "from neighbour_that_changes import SQUASH\n" + text)
        write(file.with_name("neighbour_that_changes.py"), f"SQUASH = 0.{n}")
    one, two = (load_cell(f"{file}:MyCell", 6) for file in files)
    write(
        files[1].with_name("neighbour_that_changes.py"), "from neighbours_neighbour import SQUASH"
    )
    write(files[1].with_name("neighbours_neighbour.py"), "SQUASH = 0.6")
    assert load_cell(f"{files[1]}:MyCell", 6).squash == 0.6
    write(files[1].with_name("neighbours_neighbour.py"), "SQUASH = 0.7")
    again = load_cell(f"{files[1]}:MyCell", 6)
    assert [cell.squash for cell in (one, two, again)] == [0.0, 0.1, 0.7]
    assert [inspect.getsourcefile(type(cell)) for cell in (one, two)] == [str(f) for f in files]


def test_load_names_what_is_missing(tmp_path):
    file = write(tmp_path / "my_cell.py", MY_CELL)
    broken = write(tmp_path / "broken.py", "import nothing_of_that_name")
    notes = write(tmp_path / "notes.txt", "")
    needy = write(tmp_path / "needy.py", MY_CELL.replace("squash: float = 1.0", "squash: float"))
    leaving = write(tmp_path / "leaving.py", "import sys\nsys.exit()")
    picky = write(
        tmp_path / "picky.py",
        textwrap.dedent(MY_CELL) + "    def __post_init__(self):\n        assert False, 'no'\n",
    )
    cases = {
        f"{leaving}:MyCell": "does not run: SystemExit",
        f"{picky}:MyCell": "cannot be built from hidden_size=4 alone: AssertionError: no",
        f"{tmp_path}/none.py:MyCell": r"no cell file .*none\.py",
        f"{'long' * 99}.py:MyCell": r"no cell file 'longlong",
        "nu\0l.py:MyCell": r"no cell file 'nu",
        f"{file}:Other": r"no cell 'Other' in .*\(cells there: MyCell\)",
        "Lstm": r"no cell 'Lstm' in lstmjax\.cells \(cells there: .*GRU.*, PeepholeLSTM.*\)",
        f"{broken}:MyCell": "does not run: ModuleNotFoundError.*nothing_of_that_name",
        f"{notes}:MyCell": r"must end in \.py",
        f"{needy}:MyCell": "squash.*give its other fields defaults",
    }
    for spec, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            load_cell(spec, 4)
        assert "\n" not in str(error.value)


# -- the entry ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_type_checks")
def test_unroll_says_which_shape_does_not_fit():
    cell = LSTM(4)
    params, x = init(cell), jnp.ones((2, 5, 3))
    cases = [
        ({"lengths": jnp.array([1, 2, 3])}, r"lengths must have shape \(2,\), got \(3,\)"),
        (
            {"mask": jnp.ones((2, 4), bool)},
            r"mask must cover rows x steps, \(2, 5\) here; got \(2, 4\)",
        ),
        ({"padding": "middle", "lengths": jnp.array([1, 2])}, "middle"),
        ({"engine": "warp"}, "no engine 'warp'; there are: .*scan"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            unroll(cell, params, x, **options)
    with pytest.raises(ValueError, match=r"x is bfloat16, the cell's kernel float32.*precision="):
        unroll(cell, params, x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="x has 2 features, the cell's kernel takes 3"):
        unroll(cell, params, x[..., :2])


def test_the_engine_chosen_can_be_told():
    work = Workload("cpu", "float32", "float32", steps=5, batch=2, features=3)
    assert choose_engine(LSTM(4), work)[0] in ENGINES.values()
    assert choose_engine(LSTM(4), work, "scan") == (Scan(), "asked for")
    assert choose_engine(LSTM(4), work, Scan()) == (Scan(), "asked for")


def test_state_may_have_several_arrays():
    class Two(Cell):
        gates = ("a", "b")

        class State(NamedTuple):
            slow: Array
            fast: Array

        def step(self, pre, state, params):
            slow = 0.9 * state.slow + jnp.tanh(pre.a)
            fast = 0.1 * state.fast + jnp.tanh(pre.b)
            return slow * fast, self.State(slow, fast)

    cell = Two(4)
    check_contract(cell)
    _, final = unroll(cell, init(cell), jnp.ones((2, 5, 3)))
    assert not np.allclose(final.state.slow, final.state.fast)
