"""Looking inside: contributions add up, gates are those of the cell, and texts stay texts."""

import dataclasses
import html.parser
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstmjax import (
    GRU,
    LSTM,
    Carry,
    CoupledLSTM,
    LayerNormLSTM,
    PeepholeLSTM,
    ProjectedLSTM,
    load_run,
)
from lstmjax.cells import Cell
from lstmjax.commands import inspect as command
from lstmjax.errors import UserError
from lstmjax.inspection import (
    START_WORD,
    as_html,
    draw,
    gate_activations,
    in_color,
    in_words,
    look,
)
from lstmjax.models import Classifier
from tests.tolerances import assert_close

pytestmark = pytest.mark.sampled(2)

TEXT = "The dinner was superb but the carriage was not elegant"
HOSTILE = "good <script>alert(1)</script> \x1b[31m\x00 $\\frac{a}{ </span>&lt; \ud800 \u202e"


@pytest.fixture(scope="module")
def model(trained_run):
    return load_run(trained_run)


@pytest.fixture(scope="module")
def found(model):
    with jax.numpy_dtype_promotion("standard"):
        return look(model, TEXT)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def logit(share):
    return float(np.log(share / (1 - share)))


def test_contributions_add_up_to_the_logit(model, found):
    """The whole is the logit of the text less that of the same number of padding ids."""
    assert found.words == [START_WORD, *TEXT.lower().split()]
    probability = float(model.predict(TEXT)[0])
    assert found.shares[1] == pytest.approx(probability, rel=1e-5)
    steps = np.zeros((1, len(found.words)), np.int32)
    padding = float(model.module(jnp.asarray(steps))[0])
    whole = logit(probability) - padding
    assert abs(found.contributions.sum() + found.gap - whole) < 1e-4
    assert abs(found.gap) < 0.01 * np.abs(found.contributions).sum()  # maxima have kinks
    assert np.abs(found.contributions).max() > 0.05


def test_a_words_contribution_is_what_changing_it_does(model, found):
    """For a model that is linear in its words exactly so; here the strongest word shows it."""
    best = int(np.argmax(np.abs(found.contributions)))
    ids = model.encode(TEXT)
    without = ids.copy()
    without[best] = 0
    change = [logit(float(model.predict_ids([row])[0])) for row in (ids, without)]
    assert np.sign(change[0] - change[1]) == np.sign(found.contributions[best])


def test_gates_are_those_of_the_cell(model, found):
    """The cell of the run, written again in NumPy step by step."""
    assert [*found.panels] == ["σ(f)", "tanh(g)", "σ(o)", "c (state)", "h (output)"]
    params = jax.tree.map(np.asarray, model.module.recurrent.layers[0].arrays())
    table = np.asarray(model.module.embedding.embedding[...])
    h = c = np.zeros(6)
    for t, n in enumerate(model.encode(TEXT)):
        pre = table[n] @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"]
        f, g, o = np.split(pre, 3)
        f, g, o = sigmoid(f), np.tanh(g), sigmoid(o)
        c = f * c + 0.25 * (1 - f) * g
        h = o * np.tanh(c)
        for name, value in zip(found.panels, (f, g, o, c, h), strict=True):
            assert_close(found.panels[name][t], value, reduction=200, dtype="float32", what=name)


class Odd(Cell):
    gates = ("a", "b")

    def step(self, pre, state, params):
        return jnp.maximum(pre.a, 0) * jnp.exp(pre.b), state


NAMES = {
    "LSTM": (LSTM(4), ["σ(i)", "σ(f)", "tanh(g)", "σ(o)"]),
    "GRU": (GRU(4), ["σ(r)", "σ(z)", "tanh(n)"]),
    "peepholes": (PeepholeLSTM(4), ["σ(i)", "σ(f)", "tanh(g)", "σ(o)"]),
    "coupled": (CoupledLSTM(4), ["σ(i)", "tanh(g)", "σ(o)"]),
    "layer norm": (LayerNormLSTM(4), [f"{g} (pre-activation)" for g in "ifgo"]),
    "odd": (Odd(4), ["a (pre-activation)", "exp(b)"]),
    "another transition": (ProjectedLSTM(4), []),
}


@pytest.mark.parametrize("name", NAMES)
def test_gates_are_found_in_any_step(name):
    cell, names = NAMES[name]
    params = cell.init(jax.random.key(0), input_size=3)
    x = jax.random.normal(jax.random.key(1), (5, 3))
    before = jax.tree.map(lambda a: a + 0.1, cell.initial_carry(5))
    activations = gate_activations(cell, params, x, before)
    assert [*activations] == names
    assert all(a.shape == (5, 4) for a in activations.values())


def test_gru_gates_are_right():
    cell = GRU(4)
    params = jax.tree.map(lambda a: a + 0.1, cell.init(jax.random.key(0), 3))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    h = jax.random.normal(jax.random.key(2), (5, 4))
    found = gate_activations(cell, params, x, Carry(h, cell.State()))
    p = {name: np.asarray(a) for name, a in params.items()}
    from_x = np.split(np.asarray(x) @ p["kernel"] + p["bias"][None], 3, axis=-1)
    from_h = np.split(np.asarray(h) @ p["recurrent_kernel"] + p["recurrent_bias"][None], 3, axis=-1)
    r, z = sigmoid(from_x[0] + from_h[0]), sigmoid(from_x[1] + from_h[1])
    for name, value in (("σ(r)", r), ("σ(z)", z), ("tanh(n)", np.tanh(from_x[2] + r * from_h[2]))):
        assert_close(found[name], value, reduction=8, dtype="float32", what=name)


def other(model, padding="bucketed", outputs=1, **sizes):
    """A model of another form, not trained."""
    classifier = dataclasses.replace(model.config.classifier, **sizes)
    names = tuple("abc"[:outputs]) if outputs > 1 else ("negative", "positive")
    config = dataclasses.replace(
        model.config, classifier=classifier, padding=padding, num_outputs=outputs, classes=names
    )
    module = Classifier(LSTM(6), classifier, num_outputs=outputs, rngs=nnx.Rngs(3))
    return dataclasses.replace(model, config=config, module=module)


@pytest.mark.slow
def test_directions_layers_front_end_and_classes(model):
    both = other(model, num_layers=2, bidirectional=True, pooling=("last",), outputs=3)
    ahead, back = (look(both, TEXT, layer=1, backward=b, points=4) for b in (False, True))
    assert (ahead.layer, back.layer) == ("layer 1, forward", "layer 1, backward")
    assert ahead.shares.sum() == pytest.approx(1)
    assert ahead.target == int(np.argmax(ahead.shares))
    # What the cell makes of its carry before is its carry after, in either direction.
    for part in (ahead, back):
        p = part.panels
        h = p["σ(o)"] * np.tanh(p["c (state)"])
        assert_close(p["h (output)"], h, reduction=200, dtype="float32")
        c = p["σ(i)"] * p["tanh(g)"]
        order = slice(None) if part is ahead else slice(None, None, -1)
        steps = p["σ(f)"][order], c[order], p["c (state)"][order]
        before = np.zeros(6)
        for f, new, after in zip(*steps, strict=True):
            assert_close(f * before + new, after, reduction=200, dtype="float32")
            before = after
    for layer, backward in ((2, False), (-3, False)):
        with pytest.raises(UserError, match="no layer"):
            look(both, TEXT, layer=layer, backward=backward)
    with pytest.raises(UserError, match="leave out --backward"):
        look(model, TEXT, backward=True)


@pytest.mark.parametrize("padding", ["bucketed", "front"])
def test_a_front_end_makes_two_words_one_step(model, padding):
    found = look(other(model, padding, conv_filters=3, conv_pool=2), TEXT, points=4)
    assert (len(found.words), found.window) == (11, 2)
    assert len(found.contributions) == 11
    assert {len(a) for a in found.panels.values()} == {6}
    assert draw(found, "a").startswith(b"\x89PNG")


class Page(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.titles = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("text", [HOSTILE, "", "a" * 3000, b"\xff\xfe \x80 good"])
def test_texts_stay_texts(model, text):
    found = look(model, text, points=2)
    title = f"{found.verdict} <b>&"
    picture = draw(found, title)
    width, height = struct.unpack(">II", picture[16:24])
    assert 300 < width < 3000
    assert 300 < height < 3000
    page = Page(as_html(found, title, picture))
    assert set(page.tags) == {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "span", "img"),
    }
    assert len(page.titles) == len(found.words)
    terminal = in_color(found) + in_words(found)
    assert not re.search(r"\x1b(?!\[0m|\[30m|\[48;2;\d+;\d+;\d+m)|[\x00-\x08\u202e]", terminal)
    assert "\u202e" not in "".join(page.text)


def test_names_of_classes_stay_texts(found):
    r"""Those of a user's file: half a character, a formula, what moves a cursor."""
    found = found._replace(classes=("$\\foo$ \ud800", "\x1b[2J\u202e<b>"))
    picture = draw(found, found.verdict)
    page = as_html(found, found.verdict, picture)
    assert page.encode()
    assert "<b>" not in page
    assert (found.verdict + page.replace("\n", "")).isprintable()


def test_the_command(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        command.main(command.Config(trained_run, text=TEXT))
    out = capsys.readouterr().out
    assert re.match(r"(positive|negative) \d+\.\d%\n", out)
    assert "\x1b" not in out  # no terminal
    page = (tmp_path / "look" / "look.html").read_text()
    assert "Mine, layer 0 · trained on built-in DEMO corpus (not IMDB)" in page
    assert (tmp_path / "look" / "look.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="which model, and what text"):
        command.main(command.Config(trained_run))
    with pytest.raises(UserError, match="cannot write"):
        command.main(command.Config(trained_run, text="a", to=tmp_path / "look" / "look.png"))


def test_colours_are_for_terminals(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert command.colored("auto")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not command.colored("auto")
    assert command.colored("always")
    assert not command.colored("never")


def test_no_program_here_takes_the_place_of_pythons_own():
    """``python experiments/x.py`` puts that folder first on the path."""
    import pathlib
    import sys

    names = {p.stem for p in (pathlib.Path(__file__).parents[1] / "experiments").iterdir()}
    assert not names & set(sys.stdlib_module_names)
