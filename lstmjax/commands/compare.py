"""Compare cells on tasks, with the same seeds and the same budget, and say what was shown.

    lstmjax compare --cells LSTM my_cell.py:MyCell GRU --tasks adding parity
    lstmjax compare --cells LSTM GRU --tasks "adding(length=400)" --seeds 12 \\
        --learning-rates 1e-3 3e-3 1e-2 --match parameters

Each cell gets on each task the learning rate that is best on validation data; all is reported on
test data. The first cell is compared with every other one, seed by seed: a difference counts as
shown if the sign-flip test and the interval say so (lstmjax/statistics.py).

Finished runs are never repeated: more seeds, cells or tasks only add to what is there. Killed, the
same command goes on; several processes may work in one --dir.
"""

from lstmjax import stopping
from lstmjax.training.command import run_command
from lstmjax.workbench.compare import Comparing, compare


def main(config: Comparing) -> None:
    """Run the experiment."""
    stopping.advise("go on: the same command again")
    compare(config)


def run() -> None:
    """Parse the command line and run `main`."""
    run_command({"default": Comparing()}, main, __doc__)
