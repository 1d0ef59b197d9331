"""What an editor and mypy know of the package and of a user's own cell (`py.typed`)."""

import inspect
import os
import pathlib
import re
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax import Array

import lstmjax
from lstmjax.cells import LSTM, Cell
from lstmjax.errors import ContractError
from lstmjax.layers import Bidirectional, Recurrent, Stack, last_valid
from lstmjax.recurrence import ENGINES, unroll
from lstmjax.recurrence.choice import EngineName

ROOT = pathlib.Path(__file__).parent.parent

USERS = """
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax import unroll
from lstmjax.cells import Carry, Cell, Params
from lstmjax.cells.base import Named, NoState, Parts
from lstmjax.precision import Dot


class Gains(Protocol):
    gain: Array


class Mine(Cell):
    unit_params = {"gain": 1.0}
    leak: float = 0.5

    class Gates(NamedTuple):
        f: Array
        g: Array

    class State(NamedTuple):
        c: Array

    def step(self, pre: Gates, state: State, params: Gains) -> tuple[Array, State]:
        reveal_type(pre.f)  # Array
        reveal_type(state.c)  # Array
        reveal_type(params.gain)  # Array
        pre.q  # error: "Gates" has no attribute "q"
        state.d  # error: "State" has no attribute "d"
        params.gian  # error: "Gains" has no attribute "gian"
        c = sigmoid(pre.f) * state.c + pre.g
        self.State(c, c)  # error: Too many arguments for "State"
        return params.gain * jnp.tanh(c), self.State(c)

    def prepare(self, params: Params, key: Array | None = None) -> Params:
        reveal_type(params["step"]["g"])  # Array
        params["kernle"]  # error: TypedDict "Params" has no key "kernle"
        return {**params, "kernel": 2 * params["kernel"]}


class Whole(Cell):
    gates = ("f",)

    class State(NamedTuple):
        c: Array

    def transition(
        self, params: Params, x: Array, carry: Carry[State], dot: Dot, **more: Named
    ) -> Carry[State]:
        carry.state.d  # error: "State" has no attribute "d"
        h, state = super().transition(params, x, carry, dot, **more)
        reveal_type(carry.state.c)  # Array
        return Carry(h, state)


class Apart(Cell):
    parts_apart = True

    class Gates(NamedTuple):
        f: Array

    def step(self, pre: Parts[Gates], state: NoState, params: Named) -> tuple[Array, NoState]:
        pre.x.g  # error: "Gates" has no attribute "g"
        return pre.x.f + pre.h.f, state


class Short(Cell):
    gates = ("f",)
    bias_init = {"f": 1.0}

    class State(NamedTuple):
        c: Array

    def step(self, pre: Named, state: State, params: Named) -> tuple[Array, State]:
        reveal_type(pre.f)  # Array
        state.d  # error: "State" has no attribute "d"
        return pre.f, state


def over_time(x: Array, key: Array, flag: bool) -> None:
    cell = Mine(8)
    params = cell.init(key, 3)
    hs, final = unroll(cell, params, x)
    reveal_type(hs)  # Array
    reveal_type(final.h)  # Array
    hs, final, states = unroll(cell, params, x, return_states=True)
    a, b, c = unroll(cell, params, x)  # error: Need more than 2 values to unpack (3 expected)
    one_of_both = unroll(cell, params, x, return_states=flag)
    reveal_type(one_of_both[0])  # Array


Mine(8, leak=0.1)
Mine(8, leek=0.1)  # error: Unexpected keyword argument "leek" for "Mine"
"""


@pytest.mark.slow
def test_mypy_knows_the_names_of_a_users_cell(tmp_path, pytestconfig, monkeypatch):
    api = pytest.importorskip("mypy.api")
    (tmp_path / "my_cell.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    # Silent, as what is installed is: `MYPYPATH` alone would have all of the library reported.
    cache = pytestconfig.cache.mkdir("mypy")
    settings = ["--strict", "--follow-imports=silent", f"--cache-dir={cache}", "--config-file="]
    report, problems, _ = api.run([*settings, "my_cell.py"])
    assert not problems
    said = (
        r"^my_cell\.py:(\d+): (?:(error: .*?)(?:;.*)?  \[.*|note: Revealed type is \".*\.(\w+)\")$"
    )
    matches = re.findall(said, report, re.MULTILINE)
    found = {int(number): error or revealed for number, error, revealed in matches}
    lines = enumerate(USERS.splitlines(), 1)
    wanted = {number: line.split("  # ")[1] for number, line in lines if "  # " in line}
    assert found == wanted, report


class Declared(LSTM):
    class Gates(NamedTuple):
        i: Array
        f: Array
        g: Array
        o: Array

    def step(self, pre, state, params):
        assert isinstance(pre, self.Gates)
        return super().step(pre, state, params)


@pytest.mark.parametrize("engine", ["scan", "derived"])
def test_gates_by_a_type_are_those_by_their_names(engine):
    params = LSTM(3).init(jax.random.key(0), input_size=2)
    x = jax.random.normal(jax.random.key(1), (2, 4, 2))
    typed, named = (unroll(cell, params, x, engine=engine)[0] for cell in (Declared(3), LSTM(3)))
    np.testing.assert_array_equal(typed, named)


def test_gates_by_a_type_name_themselves_to_whoever_asks_for_another():
    class Wrong(Declared):
        def step(self, pre, state, params):
            return pre.q, state

    with pytest.raises(ContractError, match="no gate 'q'; there are: i, f, g, o"):
        unroll(Wrong(3), LSTM(3).init(jax.random.key(0), input_size=2), jnp.ones((1, 1, 2)))


def test_gates_of_a_subclass_replace_those_by_a_type():
    class Fewer(Declared):
        gates = ("a",)
        bias_init = {}

        def step(self, pre, state, params):
            return jnp.tanh(pre.a), state

    params = Fewer(3).init(jax.random.key(0), input_size=2)
    assert unroll(Fewer(3), params, jnp.ones((1, 1, 2)))[0].shape == (1, 1, 3)


def test_gates_by_a_type_and_others_by_name_are_refused():
    with pytest.raises(ContractError, match=r"Both.Gates must be a typing.NamedTuple, and stands"):

        class Both(Cell):
            gates = ("a",)

            class Gates(NamedTuple):
                f: Array

    with pytest.raises(ContractError, match=r"Plain.Gates must be a typing.NamedTuple"):

        class Plain(Cell):
            class Gates:
                f: Array


CALLABLE = [name for name in lstmjax.__all__ if callable(getattr(lstmjax, name))]


@pytest.mark.parametrize("name", CALLABLE)
def test_the_signature_of_every_public_name_is_complete(name):
    public = getattr(lstmjax, name)
    signature = inspect.signature(public)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, parameter
        # A model's inputs, of which there are as many as it takes, are all that has no names.
        assert parameter.name == "inputs" or parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ), parameter
    assert inspect.isclass(public) or signature.return_annotation is not signature.empty
    assert inspect.getdoc(public)


def test_the_signature_of_a_layer_names_what_it_hands_on():
    theirs = inspect.signature(Recurrent).parameters
    for layer in (Bidirectional, Stack):
        ours = inspect.signature(layer).parameters
        missing = {*theirs} - {*ours} - {"reverse"}
        assert not missing
        assert ours["precision"] == theirs["precision"]
    assert "reverse" in inspect.signature(Stack).parameters
    assert "reverse" not in inspect.signature(Bidirectional).parameters
    made = Stack(LSTM(3), 2, rngs=nnx.Rngs(0))
    assert [*inspect.signature(made).parameters][:3] == ["x", "initial", "lengths"]


@pytest.mark.skipif(os.environ.get("LSTMJAX_TEST_TYPES") == "0", reason="they are not checked")
def test_shapes_are_checked_under_test():
    with pytest.raises(jaxtyping.TypeCheckError, match="last_valid"):
        last_valid(jnp.ones((2, 3, 4)), mask=jnp.ones((2, 3)))


def test_it_is_marked_as_typed():
    assert (ROOT / "lstmjax" / "py.typed").exists()


def test_flags_know_every_engine():
    assert get_args(EngineName) == tuple(ENGINES)
