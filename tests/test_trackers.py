"""What is drawn of a run, and what other viewers get of it."""

import itertools
import struct
import sys
import types

import matplotlib.figure
import pytest

from lstmjax import training
from lstmjax.errors import UserError
from lstmjax.training import draw_curves
from lstmjax.training.trackers import Trackers, check_viewers
from tests.trained_run import train

STEPS = [
    {"kind": "step", "step": n, "epoch": 1, "loss": 1 / n, "accuracy": 0.5 + n / 100}
    for n in (10, 20, 30)
]
EPOCHS = [
    {
        "kind": "epoch",
        "epoch": n,
        "step": 30 * n,
        "train_loss": 0.4,
        "train_accuracy": 0.8,
        "validation_loss": 0.5,
        "validation_accuracy": 0.75,
        "seconds": 2.0,
    }
    for n in (1, 2)
]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The axes of a drawing: label -> points of each line, left and right."""

    def call(steps, epochs=(), title="a"):
        figures = []
        save = matplotlib.figure.Figure.savefig
        with monkeypatch.context() as patch:
            patch.setattr(
                matplotlib.figure.Figure,
                "savefig",
                lambda figure, *args, **more: (figures.append(figure), save(figure, *args, **more)),
            )
            draw_curves(tmp_path / "c.png", title, steps, epochs)
        assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
        return figures[0]

    return call


def lines(axes):
    return {
        line.get_label(): [*zip(*(a.tolist() for a in line.get_data()), strict=True)]
        for line in axes.lines
    }


def test_losses_left_accuracies_right_over_the_same_steps(drawn):
    figure = drawn(STEPS, EPOCHS)
    left, right = figure.axes
    assert lines(left) == {
        "training": [(10, 0.1), (20, 0.05), (30, 1 / 30)],
        "validation": [(30, 0.5), (60, 0.5)],
    }
    assert lines(right)["validation"] == [(30, 75), (60, 75)]
    assert lines(right)["training"][0] == (10, pytest.approx(60))
    assert left.get_xlim() == right.get_xlim()
    assert left.get_xlim()[0] == 0
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss", "accuracy (%)")
    colors = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes]
    assert colors[0] == colors[1]


def test_one_epoch_and_one_step_can_be_seen(drawn):
    left, right = drawn(STEPS[:1], EPOCHS[:1]).axes
    for axes in (left, right):
        assert [line.get_marker() for line in axes.lines] == [".", "o"]
        assert axes.get_legend() is not None


def test_other_metrics_and_none(drawn):
    steps = [{"kind": "step", "step": 1, "epoch": 1, "loss": 2.0, "bits": 3.0}]
    left, right = drawn(steps).axes
    assert lines(right) == {"training": [(1, 3.0)]}
    assert right.get_ylabel() == "bits"
    left, right = drawn([{"kind": "step", "step": 1, "epoch": 1, "loss": 2.0}]).axes
    assert left.get_visible()
    assert not right.get_visible()
    drawn([], title="$x\x1b[31m \\frac{")


def test_titles_have_names_not_paths(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(training.RunFolder, "draw_curves", lambda run, title: titles.append(title))
    file = tmp_path / "deep" / "mine.py"
    file.parent.mkdir()
    file.write_text("from lstmjax import LSTM\nclass Mine(LSTM):\n    leak: float = 0.5\n")
    train(tmp_path / "r", cell=f"{file}:Mine(leak=0.25)", epochs=1)
    (title,) = titles
    assert title.startswith("Mine(leak=0.25) · recipe notebook")


# -- viewers --------------------------------------------------------------------------------------


def events(folder):
    """``(step, name, value)`` of every event file, by TensorBoard's own format."""
    from tensorboardX.proto import event_pb2

    found, restarts = [], []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            found += [(event.step, v.tag, round(v.simple_value, 4)) for v in event.summary.value]
            if event.HasField("session_log"):
                restarts.append(event.step)
    return found, restarts


def test_tensorboard_has_what_the_metrics_have(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    with training.RunFolder.create(tmp_path / "r", {"seed": 0}) as run:
        run.show_in(("tensorboard",))
        for record in (*STEPS, EPOCHS[0]):
            run.log(record)
    found, restarts = events(tmp_path / "r" / "tensorboard")
    assert (10, "step/loss", 0.1) in found
    assert (30, "validation/accuracy", 0.75) in found
    assert (30, "epoch/seconds", 2.0) in found
    assert len(found) == 2 * 3 + 5
    assert restarts == []
    with training.RunFolder.reopen(tmp_path / "r", {"seed": 0}) as run:
        run.show_in(("tensorboard",))
        run.rewind(20, [], [10, 20])
        run.log(STEPS[2])
    again, restarts = events(tmp_path / "r" / "tensorboard")
    assert len(again) == len(found) + 2
    assert restarts == [21]


class Fake(types.ModuleType):
    """wandb as far as it is used."""

    def __init__(self, fails_at=None):
        super().__init__("wandb")
        self.logged, self.started, self.fails_at = [], [], fails_at
        self.__spec__ = types.SimpleNamespace(name="wandb")

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        if step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.logged.append((step, values))

    def finish(self):
        self.started.append("finished")


def test_wandb_is_offline_and_gets_the_same(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with training.RunFolder.create(tmp_path / "r", {"seed": 7}) as run:
        run.show_in(("wandb",))
        assert not fake.started  # nothing until there is a number
        for record in STEPS:
            run.log(record)
    begun, end = fake.started
    assert (begun["mode"], begun["name"], begun["config"]) == ("offline", "r", {"seed": 7})
    assert begun["dir"] == str(tmp_path / "r")
    assert [step for step, _ in fake.logged] == [10, 20, 30]
    assert set(fake.logged[0][1]) == {"step/loss", "step/accuracy"}
    assert end == "finished"


def test_a_viewer_that_fails_costs_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Fake(fails_at=20))
    with training.RunFolder.create(tmp_path / "r", {"seed": 7}) as run:
        run.show_in(("wandb",))
        for record in STEPS:
            run.log(record)
        assert run.records() == STEPS
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "nothing more for wandb: No space left on device; metrics.jsonl has it all",
    ]


def test_a_viewer_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log wandb needs wandb: pip install 'lstmjax\[wandb\]'"):
        check_viewers(["wandb"])
    check_viewers([])
    with pytest.raises(UserError, match="--log tensorboard needs tensorboardX"):
        train(tmp_path / "r", log=("tensorboard",))
    assert not (tmp_path / "r").exists()


def test_the_flag_reaches_the_viewer(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    folder = train(tmp_path / "r", epochs=1, log=("tensorboard",))
    found, _ = events(folder / "tensorboard")
    names = {name for _, name, _ in found}
    assert {"step/loss", "test/loss", "test/accuracy", "train/loss"} <= names
    train(folder, epochs=1, resume=True)  # without it: nothing is missed
    pairs = itertools.pairwise(step for step, *_ in found)
    assert all(a <= b for a, b in pairs)


def test_nothing_is_opened_that_nobody_asked_for(tmp_path):
    trackers = Trackers(tmp_path, (), {})
    trackers.log(STEPS[0])
    trackers.close()
    assert list(tmp_path.iterdir()) == []
