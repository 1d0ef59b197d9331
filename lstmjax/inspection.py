"""Looking inside a trained model: what its gates and states do over a text, and which word counts.

The contribution of a word is its integrated gradient (Sundararajan et al. 2017, arXiv:1703.01365):
the gradient of the logit with respect to the word's vector, averaged on the straight way from the
vector of padding to its own, times the difference of the two. All contributions sum up to the
difference between the logit of the text and that of as much padding, to the error of the average,
which is told.
"""

import base64
import functools
import html
import io
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.extend.core import JaxprEqn
from jaxtyping import Float, PyTree

from lstmjax import files
from lstmjax.cells.base import Carry, Cell, Params, arguments
from lstmjax.data.vocabulary import PAD, UNKNOWN
from lstmjax.errors import StorageError, UserError, drawable, extra, printable, reason
from lstmjax.layers import Bidirectional, Recurrent
from lstmjax.layers.base import Options
from lstmjax.layers.stack import stages
from lstmjax.precision import make_dot
from lstmjax.recurrence import length_mask
from lstmjax.traced import INLINED, AsTraced, Value, bind_as_traced, callee, trace
from lstmjax.trained import Text, TrainedModel, TrainedSequences, of_texts

__all__ = [
    "Look",
    "as_html",
    "draw",
    "gate_activations",
    "in_color",
    "in_words",
    "look",
    "write",
]

START_WORD = "<start>"
SHOWN_WORDS = 80
"""Longer texts are drawn without the words below the picture."""


class Look(NamedTuple):
    """What `look` finds.

    Attributes:
        words: of the text as the model sees it, the last ``max_length``, after `START_WORD`.
        known: whether the model knows the word.
        shares: probability of each class, ``(K,)``.
        classes: their names.
        target: number of the class whose logit the contributions are of; with one logit, 1.
        contributions: of each word, ``(T,)``.
        gap: what they miss of the difference between the logits of text and padding.
        panels: of one layer, name to numbers, ``(T / window, H)``: activations of the gates, then
            the states, then the output ``h``.
        layer: what the panels are of.
        window: words that the front end makes one step.
    """

    words: list[str]
    known: list[bool]
    shares: np.ndarray
    classes: tuple[str, ...]
    target: int
    contributions: np.ndarray
    gap: float
    panels: dict[str, np.ndarray]
    layer: str
    window: int

    @property
    def verdict(self) -> str:
        """The class that the model takes, and its probability."""
        best = int(np.argmax(self.shares))
        return f"{printable(self.classes[best])} {self.shares[best]:.1%}"


def look(
    model: TrainedModel | TrainedSequences,
    text: Text,
    *,
    layer: int = 0,
    backward: bool = False,
    points: int = 64,
) -> Look:
    """What a model makes of a text, word by word.

    Args:
        model: what `lstmjax.load_run` gave, of texts.
        text: any text.
        layer: number of the recurrent layer whose gates are shown; negative ones from the top.
        backward: the direction, of a bidirectional layer.
        points: at which the gradient is taken, by Gauss and Legendre.

    Raises:
        UserError: there is no such layer, or the model predicts numbers.
    """
    model = of_texts(model)
    number, name = _layer(model, layer, backward)
    if not model.config.classes:
        raise UserError(f"{model.path} predicts numbers; contributions are to the logit of a class")
    known = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    ids = model.encode(known)
    words = [START_WORD, *model.vocabulary.tokenizer(known)][-len(ids) :]
    row, mask, at = _padded(model, ids)
    x = model.module.embedding(row)
    *_, last = model.module._after_embedding(x, mask)
    logits = np.atleast_1d(np.asarray(last.output)[0])
    if len(logits) == 1:
        positive = 1 / (1 + np.exp(-float(logits[0])))
        shares, target = np.array([1 - positive, positive]), 1
    else:
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        target = int(shares.argmax())
    per_word, gap = _contributions(model, x, mask, 0 if len(logits) == 1 else target, points)
    front = model.module.front
    window = 1 if front is None else front.pool
    steps = slice(at.start // window, -(-at.stop // window))
    panels = _panels(*_inside(model, x, mask, number, backward), steps)
    return Look(
        words,
        [n != UNKNOWN for n in ids.tolist()],
        shares,
        model.config.classes,
        target,
        per_word[at],
        gap,
        panels,
        name,
        window,
    )


def _layer(model: TrainedModel, number: int, backward: bool) -> tuple[int, str]:
    """Number and name of a layer."""
    layers = list(model.module.recurrent.layers)
    if not -len(layers) <= number < len(layers):
        raise UserError(f"no layer {number}: the model has {len(layers)}, the first is 0")
    number %= len(layers)
    if isinstance(layers[number], Bidirectional):
        return number, f"layer {number}, {'backward' if backward else 'forward'}"
    if backward:
        raise UserError("the model reads forward alone: leave out --backward")
    return number, f"layer {number}"


def _padded(model: TrainedModel, ids: np.ndarray) -> tuple[Array, Array | None, slice]:
    """One row of ids, its mask, and where the words are in it."""
    ((_, row, lengths),) = model.batches([ids])
    mask = length_mask(lengths, row.shape[1]) if model.masked else None
    end = len(ids) if model.masked else row.shape[1]
    return jnp.asarray(row), mask, slice(end - len(ids), end)


class _Inside(NamedTuple):
    """A layer at work: its input ``(T, D)``, carries before each step, and after, ``(T, ...)``."""

    x: Array
    before: Carry
    after: Carry


def _inside(
    model: TrainedModel, x: Float[Array, "1 T E"], mask: Array | None, number: int, backward: bool
) -> tuple[Recurrent, _Inside]:
    """A layer, in one direction, and what happens in it."""
    module = model.module
    if module.front is not None:
        x, mask = module.front(x, mask)
    layer: Any = None
    for n, (below, found) in enumerate(
        stages(module.recurrent, x, None, None, Options(mask=mask, return_states=True))
    ):
        if n == number:
            layer, hs, states = below, found.outputs, found.states
            break
        x = found.outputs
    if isinstance(layer, Bidirectional):
        hs, states = jnp.split(hs, 2, axis=-1)[backward], states[backward]
        layer = layer.backward if backward else layer.forward
    assert isinstance(layer, Recurrent)
    after = jax.tree.map(lambda a: a[0], Carry(hs, states))
    first = layer.initial_carry(1)
    reverse = layer.reverse
    end = x.shape[1] if mask is None else int(mask[0].sum())  # masked steps are behind

    def shifted(begin: Array, rows: Array) -> Array:
        if reverse:
            return jnp.concatenate([rows[1:end], begin, rows[end:]])
        return jnp.concatenate([begin, rows[:-1]])

    return layer, _Inside(x[0], jax.tree.map(shifted, first, after), after)


def _panels(layer: Recurrent, inside: _Inside, steps: slice) -> dict[str, np.ndarray]:
    """Name to numbers, ``(steps, H)``: of gates, states and output."""
    x, before, after = jax.tree.map(lambda a: a[steps], inside)
    named = gate_activations(layer.cell, layer.arrays(), x, before)
    for name, state in zip(after.state._fields, after.state, strict=True):
        named[f"{name} (state)"] = np.asarray(state)
    named["h (output)"] = np.asarray(after.h)
    return {name: a.reshape(len(a), -1) for name, a in named.items()}


ACTIVATIONS = {"logistic": "σ", "tanh": "tanh", "exp": "exp", "erf": "erf"}
"""Operations by which a step makes a gate of its pre-activation."""


def gate_activations(
    cell: Cell, params: Params, x: Float[Array, "T D"], before: Carry
) -> dict[str, np.ndarray]:
    """What a step makes of each of its gates, found in its program: ``{"σ(f)": (T, H), ...}``.

    Time steps are rows here: no step needs another once all carries are known. For each gate it is
    the first of `ACTIVATIONS` whose argument has this gate in it, outside of other activations, and
    no other gate. A gate without one is shown as its pre-activation, so are those that a layer
    normalisation has mixed. A cell with a `transition` of its own may not have the pre-activations
    that its gates declare, so of it there is nothing.

    Args:
        cell: the recurrence.
        params: its parameters.
        x: inputs of the steps.
        before: the carry before each of them.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> params = LSTM(5).init(jax.random.key(0), input_size=3)
        >>> before = LSTM(5).initial_carry(2)
        >>> [*gate_activations(LSTM(5), params, jnp.ones((2, 3)), before)]
        ['σ(i)', 'σ(f)', 'tanh(g)', 'σ(o)']
    """
    if type(cell).transition is not Cell.transition:
        return {}
    params = cell.prepare(params)
    more = arguments(cell, x, {"x": x}, {})
    pre = cell.pre_activations(params, x, before.h, make_dot("float32"), **more)
    paths = jax.tree_util.tree_leaves_with_path(pre)

    def step(pre: PyTree, *others: PyTree) -> list[Array]:
        before, params, more = others
        return jax.tree.leaves(cell.apply_step(pre, before, params, **more))

    program = trace(step, *(given := (pre, before, params, more)))
    watcher = _Watcher(jax.tree.leaves(given), [path[-1].name for path, _ in paths])
    watcher.runner.evaluate(program.closed.jaxpr, program.consts, [*map(Value, watcher.kept)])
    named: dict[str, np.ndarray] = {}
    for gate in cell.gates:
        if found := watcher.found.get(frozenset([gate])):
            named[f"{ACTIVATIONS[found[0]]}({gate})"] = np.asarray(found[1])
        else:
            parts = [leaf for (path, leaf) in paths if path[-1].name == gate]
            named[f"{gate} (pre-activation)"] = np.asarray(sum(parts[1:], parts[0]))
    return named


class _Watcher:
    """Runs a step, and notes which gates every array comes from.

    Attributes:
        found: the first activation of each set of gates, by name, and what it made of them.
        kept: all arrays, so that no two have one id.
    """

    def __init__(self, leaves: Sequence[Array], gates: Sequence[str]) -> None:
        self.kept = [*leaves]
        self.found: dict[frozenset[str], tuple[str, Array]] = {}
        self.runner = AsTraced(self._evaluate)
        named = zip(leaves, gates, strict=False)  # of the arguments these are the first
        self._origin = {id(leaf): frozenset([gate]) for leaf, gate in named}

    def _evaluate(self, eqn: JaxprEqn, ins: list[Value]) -> list[Value]:
        name = str(eqn.primitive.name)
        if name in INLINED:
            return self.runner.evaluate(*callee(eqn), ins)
        gates = frozenset().union(*(self._origin.get(id(v.array), frozenset()) for v in ins))
        outs = bind_as_traced(eqn, [value.array for value in ins])
        self.kept.extend(outs)
        if name in ACTIVATIONS and gates:
            self.found.setdefault(gates, (name, outs[0]))
            gates = frozenset()
        self._origin.update((id(out), gates) for out in outs)
        return [Value(out) for out in outs]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(
    graphdef: nnx.GraphDef, output: int, params: PyTree, x: Array, mask: Array | None
) -> tuple[Array, Array]:
    """One logit of a row and its gradient; compiled once a model and length."""

    def logit(x: Array) -> Array:
        *_, last = nnx.merge(graphdef, params)._after_embedding(x, mask)
        return last.output.reshape(-1)[output]

    return jax.value_and_grad(logit)(x)


def _contributions(
    model: TrainedModel, x: Float[Array, "1 T E"], mask: Array | None, output: int, points: int
) -> tuple[np.ndarray, float]:
    """Integrated gradients of one logit, ``(T,)``, and what they miss of its difference."""
    graphdef, params = nnx.split(model.module, nnx.Param)
    padding = jnp.broadcast_to(model.module.embedding(jnp.array([[PAD]])), x.shape)
    at, weights = np.polynomial.legendre.leggauss(points)

    def gradient(x: Array) -> tuple[Array, Array]:
        return _gradient(graphdef, output, params, x, mask)

    def between(share: float) -> Array:
        return padding + jnp.asarray(share, x.dtype) * (x - padding)

    mean = sum(
        w / 2 * np.asarray(gradient(between((1 + a) / 2))[1], np.float64)
        for a, w in zip(at.tolist(), weights.tolist(), strict=True)
    )
    per_word = (mean * np.asarray(x - padding, np.float64)).sum(axis=-1)[0]
    ends = [float(gradient(between(share))[0]) for share in (0.0, 1.0)]
    return per_word, ends[1] - ends[0] - float(per_word.sum())


# --- Showing it ----------------------------------------------------------------------------------


def draw(found: Look, title: str) -> bytes:
    """The picture, as PNG: contributions above, then a row for each panel, words from left."""
    with extra("train"):
        import matplotlib.figure

    count, steps = len(found.panels), len(next(iter(found.panels.values())))
    few = len(found.words) <= SHOWN_WORDS
    figure = matplotlib.figure.Figure(
        figsize=(max(8, min(24, 0.22 * len(found.words) + 3)), 2.6 + 1.15 * count),
        layout="constrained",
    )
    rows = figure.subplots(count + 1, 1, gridspec_kw={"height_ratios": [2, *[1] * count]})
    filled = textwrap.fill(drawable(title), int(10 * figure.get_figwidth()))
    figure.suptitle(filled, parse_math=False)
    of = drawable(found.classes[found.target])
    colors = ["tab:green" if c > 0 else "tab:red" for c in found.contributions]
    rows[0].bar(np.arange(len(found.words)) + 0.5, found.contributions, 0.85, color=colors)
    rows[0].axhline(0, color="black", lw=0.6)
    rows[0].set(xlim=(0, len(found.words)))
    rows[0].set_ylabel(f"for {of}", parse_math=False)
    for axes, (name, values) in zip(rows[1:], found.panels.items(), strict=True):
        top = max(float(np.abs(values).max(initial=0)), 1e-6)
        bounded = name.startswith("σ")
        image = axes.imshow(
            values.T,
            aspect="auto",
            interpolation="nearest",
            cmap="viridis" if bounded else "RdBu_r",
            vmin=0 if bounded else -top,
            vmax=1 if bounded else top,
            extent=(0, steps * found.window, values.shape[1], 0),
        )
        axes.set(xlim=(0, len(found.words)), yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        figure.colorbar(image, ax=axes, pad=0.01, aspect=8)
    for axes in rows[:-1]:
        axes.tick_params(labelbottom=False)
    if few:
        rows[-1].set_xticks(np.arange(len(found.words)) + 0.5)
        labels = [_label(word) for word in found.words]
        rows[-1].set_xticklabels(labels, rotation=90, fontsize=8, parse_math=False)
    else:
        rows[-1].set_xlabel("word")
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()


def _label(word: str, longest: int = 18) -> str:
    text = drawable(word)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def in_color(found: Look) -> str:
    """The text for a terminal: green what speaks for the class, red what speaks against it."""
    top = max(float(np.abs(found.contributions).max(initial=0)), 1e-12)
    parts = []
    for word, value in zip(found.words, found.contributions.tolist(), strict=True):
        strength = abs(value) / top
        fade = round(255 - 155 * strength)
        red, green = (fade, 255) if value > 0 else (255, fade)
        parts.append(f"\x1b[48;2;{red};{green};{fade}m\x1b[30m{printable(word)}\x1b[0m")
    return " ".join(parts)


def in_words(found: Look, most: int = 10) -> str:
    """The words that count most, a line each, for where there are no colours."""
    order = np.argsort(-np.abs(found.contributions), kind="stable")[:most]
    return "\n".join(
        f"{found.contributions[n]:+9.4f}  {printable(found.words[n])}  (word {n})" for n in order
    )


def as_html(found: Look, title: str, picture: bytes) -> str:
    """A page of its own with text and picture; whatever is in the text, it is text there."""
    top = max(float(np.abs(found.contributions).max(initial=0)), 1e-12)
    words = []
    for word, known, value in zip(found.words, found.known, found.contributions, strict=True):
        color = "0,150,60" if value > 0 else "210,40,40"
        style = f"background:rgba({color},{abs(value) / top:.3f})"
        style += "" if known else ";text-decoration:underline dotted"
        told = f"{value:+.4f}" + ("" if known else ", not in the vocabulary")
        words.append(f'<span style="{style}" title="{told}">{_escaped(word)}</span>')
    shares = ", ".join(
        f"{_escaped(name)} {share:.2%}"
        for name, share in zip(found.classes, found.shares.tolist(), strict=True)
    )
    encoded = base64.b64encode(picture).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_escaped(title)}</title>
<style>body{{font:16px/1.9 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}}
span{{padding:.1em .2em;border-radius:.2em}}img{{max-width:100%}}</style></head><body>
<h1>{_escaped(found.verdict)}</h1>
<p>{_escaped(title)}: {shares}</p>
<p>{" ".join(words)}</p>
<p>Green speaks for {_escaped(found.classes[found.target])}, red against it (integrated gradients;
together {found.contributions.sum():+.4f}, {found.gap:+.1e} is missing). Dotted: a word that the
model does not know.</p>
<p><img alt="contributions, gates and states over the words, {_escaped(found.layer)}"
src="data:image/png;base64,{encoded}"></p>
</body></html>
"""


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def write(found: Look, folder: pathlib.Path, title: str) -> Sequence[pathlib.Path]:
    """Write ``look.html`` and ``look.png`` to a folder, which is made if it is missing.

    Raises:
        StorageError: they cannot be written.
    """
    picture = draw(found, title)
    content = {
        folder / "look.html": as_html(found, title, picture).encode(),
        folder / "look.png": picture,
    }
    try:
        files.make_folder(folder)
        for path, data in content.items():
            files.publish(path, data)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {reason(error)}") from error
    return [*content]
