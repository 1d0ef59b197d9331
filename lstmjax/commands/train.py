"""Train a cell on a task: adding, copying, state tracking, recall, digits, characters, texts.

    lstmjax train --task adding --length 200
    lstmjax train --task parity --cell my_cell.py:MyCell --seeds 8
    lstmjax train --task s5 --seeds 4 --learning-rates 1e-3 3e-3 1e-2
    lstmjax train --task text --file reviews.csv --label-column stars
    lstmjax train --task sequences --file mine.npz

Every epoch is evaluated on validation data, the end on test data, once. With ``--seeds`` the
replicas are trained side by side in one program; each is as its single run, and has a run folder of
its own. docs/workbench.md has the tasks.
"""

from lstmjax.training.command import run_command
from lstmjax.workbench import Config, config_of, train


def main(config: Config) -> None:
    """Run the experiment."""
    train(config)


def run() -> None:
    """Parse the command line and run `main`."""
    run_command(config_of, main, __doc__, chooser="task", default="adding")
