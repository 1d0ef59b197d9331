"""What things print as, in a terminal and in a notebook: a line that informs."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lstmjax
from lstmjax import (
    GRU,
    LSTM,
    Bidirectional,
    Classifier,
    ClassifierConfig,
    Recurrent,
    Stack,
    Tagger,
    statistics,
    tasks,
    training,
)
from lstmjax.check.report import Report, Result
from lstmjax.data import Batches, SideBySide, Vocabulary, load_demo
from lstmjax.layers import ConvPool
from lstmjax.models import SequenceConfig, SequenceModel, summary
from lstmjax.recurrence.choice import ENGINES
from lstmjax.shown import Table

RNGS = nnx.Rngs(0)
MODULES = [
    (Recurrent(LSTM(8), 3, rngs=RNGS), "Recurrent(LSTM(8), 3)"),
    (
        Recurrent(GRU(8), 3, reverse=True, engine="scan", param_dtype="bfloat16", rngs=RNGS),
        "Recurrent(GRU(8), 3, reverse=True, engine='scan', param_dtype='bfloat16')",
    ),
    (Bidirectional(LSTM(8), 3, rngs=RNGS), "Bidirectional(LSTM(8), 3)"),
    (
        Bidirectional((LSTM(8), GRU(8)), 3, merge="sum", precision="bfloat16", rngs=RNGS),
        "Bidirectional((LSTM(8), GRU(8)), 3, merge='sum', precision='bfloat16')",
    ),
    (Stack(LSTM(8), 3, rngs=RNGS), "Stack(LSTM(8), 3)"),
    (
        Stack(GRU(8), 3, num_layers=2, bidirectional=True, return_carry=False, rngs=RNGS),
        "Stack(GRU(8), 3, num_layers=2, bidirectional=True, return_carry=False)",
    ),
    (
        Stack([LSTM(8), GRU(8)], 3, residual=True, layer_norm="pre", rngs=RNGS),
        "Stack([LSTM(8), GRU(8)], 3, residual=True, layer_norm='pre')",
    ),
    (ConvPool(3, 4, width=5, rngs=RNGS), "ConvPool(3, 4, width=5)"),
    (
        Classifier(LSTM(8), ClassifierConfig(top_words=9, hidden_size=8), rngs=RNGS),
        "Classifier(LSTM(8), ClassifierConfig(top_words=9, hidden_size=8)): 1,609 parameters",
    ),
    (
        Tagger(LSTM(8), 3, num_outputs=2, rngs=RNGS),
        "Tagger(LSTM(8), 3, num_outputs=2): 402 parameters",
    ),
    (
        SequenceModel(LSTM(8), SequenceConfig(hidden_size=8), tokens=5, rngs=RNGS),
        "SequenceModel(LSTM(8), SequenceConfig(hidden_size=8), tokens=5): 1,481 parameters",
    ),
    (
        SequenceModel(LSTM(8), SequenceConfig(hidden_size=8), features=2, rngs=RNGS),
        "SequenceModel(LSTM(8), SequenceConfig(hidden_size=8), features=2): 361 parameters",
    ),
]


@pytest.mark.parametrize(("module", "text"), MODULES)
def test_a_module_prints_as_the_call_that_makes_it(module, text):
    assert repr(module) == text
    call = text.partition(": ")[0][:-1] + ", rngs=nnx.Rngs(0))"
    again = eval(call, {**vars(lstmjax), **globals()})
    assert jax.tree.map(jnp.shape, nnx.state(again)) == jax.tree.map(jnp.shape, nnx.state(module))


def test_a_module_that_is_not_whole_prints_nonetheless():
    assert "Bidirectional object at" in repr(object.__new__(Bidirectional))


def test_every_cell_prints_as_the_call_that_makes_it():
    cells = [getattr(lstmjax, name) for name in lstmjax.__all__]
    cells = [c for c in cells if isinstance(c, type) and issubclass(c, lstmjax.Cell)]
    assert len(cells) > 20
    for kind in cells:
        assert repr(kind(8)) == f"{kind.__name__}(8)"
    assert repr(LSTM(8, use_bias=False, activation=jnp.sin)) == (
        "LSTM(8, use_bias=False, activation=sin)"
    )
    assert repr(lstmjax.ZoneoutLSTM(8).noise["c"]) == "Noise(kept(0.5), 0.5)"


def test_every_engine_and_task_prints_as_a_call():
    values = [*ENGINES.values(), *(kind() for kind in tasks.TASKS.values())]
    for value in values:
        names = {**vars(tasks), **vars(lstmjax), "PosixPath": pathlib.PosixPath}
        assert eval(repr(value), names) == value


def test_sources_of_batches_print_what_they_hold():
    batches = Batches(load_demo("test"), 64, boundaries=(64, 128, 500))
    told = "Batches(16 an epoch, of 64 x 64, 64 x 128, 64 x 500)"
    assert repr(batches) == told
    assert repr(SideBySide(batches)) == f"SideBySide({told})"
    fresh = tasks.Adding(length=6).train(4)
    assert repr(fresh) == f"Fresh({tasks.Adding(length=6)}, 4, count=100, split='train')"
    assert repr(Vocabulary(("a", "film"))) == "Vocabulary(2 words: 'a', 'film')"
    assert repr(Vocabulary(tuple("abcdefg"))).endswith("(7 words: 'a', 'b', 'c', 'd', 'e', ...)")


def test_a_run_folder_prints_how_far_it_has_come(tmp_path):
    path = tmp_path / "run"
    assert repr(training.RunFolder(path)) == f"RunFolder({path})"
    with training.RunFolder.create(path, {"epochs": 3}) as run:
        assert repr(run) == f"RunFolder({path}: no epoch has ended)"
        record = {"kind": "epoch", "epoch": 2, "step": 8, "test_loss": 0.3}
        run.log({**record, "test_accuracy": 0.88125})
        assert repr(run) == f"RunFolder({path}: epoch 2 of 3, test_accuracy 0.8812)"
        assert run._repr_html_() == repr(run)
        run.log({**record, "epoch": 3, "test_accuracy": [0.5, None, 0.7]})
        assert repr(run) == f"RunFolder({path}: epoch 3 of 3, test_accuracy 0.6)"
        (path / "curves.png").write_bytes(b"picture")
        assert run._repr_html_() == (f'{run!r}<br><img src="data:image/png;base64,cGljdHVyZQ==">')


def test_a_table_is_text_and_a_notebooks_table():
    table = summary(Tagger(LSTM(4), 3, rngs=RNGS), jnp.ones((1, 5, 3)))
    assert isinstance(table, str)
    assert isinstance(table, Table)
    assert repr(table) == str(table)
    rows = table._repr_html_()
    assert rows.startswith("<table><tr><th>layer</th><th>output shape</th><th>parameters</th></tr>")
    assert rows.endswith("<tr><td>total</td><td></td><td>133</td></tr></table>")


def test_a_report_of_checks_prints_its_verdict_and_shows_all():
    ok = Result("contract", "ok", "it is < kept")
    report = Report("LSTM(8)", " (lstm.py:3)", (ok,), {"speed": "1.0 times"}, 2.0)
    assert repr(report) == "Report(LSTM(8): all 1 checks passed (2 s))"
    shown = report._repr_html_()
    assert "<th>check</th><th>found</th></tr>" in shown  # no causes, no remedies
    assert "<td>it is &lt; kept</td>" in shown
    assert "<td>speed</td><td>1.0 times</td>" in shown
    bad = Result("gradient", "failed", "it is none", "stop_gradient", "leave it out")
    report = dataclasses.replace(report, results=(ok, bad))
    assert repr(report) == "Report(LSTM(8): 1 check failed: gradient (2 s))"
    assert "<td>stop_gradient</td><td>leave it out</td>" in report._repr_html_()


def test_a_comparison_prints_its_sentence():
    lstm = {seed: seed / 8 for seed in range(8)}
    results = {"LSTM": lstm, "<Mine>": {seed: a + 1 for seed, a in lstm.items()}}
    (found,) = statistics.compare(results)
    assert repr(found) == f"Comparison({found})"
    assert found._repr_html_().startswith("&lt;Mine&gt; is better than LSTM by 1.00")
