"""Train a cell on a task: adding, copying, state tracking, recall, digits, characters, texts.

    python experiments/train.py --task adding --length 200
    python experiments/train.py --task parity --cell my_cell.py:MyCell --seeds 8
    python experiments/train.py --task s5 --seeds 4 --learning-rates 1e-3 3e-3 1e-2
    python experiments/train.py --task text --file reviews.csv --label-column stars
    python experiments/train.py --task sequences --file mine.npz

Every epoch is evaluated on validation data, the end on test data, once. With ``--seeds`` the
replicas are trained side by side in one program; each is as its single run, and has a run folder of
its own. docs/workbench.md has the tasks.
"""

if __name__ == "__main__":  # first: importing takes seconds, and a signal is to end that, too
    from lstmjax.stopping import exit_on_signals

    exit_on_signals()

from lstmjax.training.command import run_command
from lstmjax.workbench import Config, config_of, train


def main(config: Config) -> None:
    """Run the experiment."""
    train(config)


if __name__ == "__main__":
    run_command(config_of, main, __doc__, chooser="task", default="adding")
