"""Which parts of the LSTM matter? The ablations of "LSTM: A Search Space Odyssey".

    lstmjax odyssey
    lstmjax odyssey --tasks "adding(length=200)" --seeds 20

Greff et al. 2017 (arXiv:1503.04069) take one part of the vanilla LSTM away, or change it: no input
gate (NIG), forget gate (NFG), output gate (NOG), input activation (NIAF), output activation (NOAF),
peepholes (NP); input and forget gate coupled (CIFG); full gate recurrence (FGR). Each is compared
here with the vanilla LSTM, which has peepholes, on four tasks with ten seeds.

This is ``lstmjax compare`` with other defaults, so it goes on where it was, and more seeds or
tasks only add to what is there. docs/odyssey.md has the result and what the paper found.
"""

import pathlib

from lstmjax import stopping
from lstmjax.training.command import run_command
from lstmjax.workbench.compare import Comparing, compare

ODYSSEY = Comparing(
    cells=("PeepholeLSTM", "NIG", "NFG", "NOG", "NIAF", "NOAF", "NP", "CIFG", "FGR"),
    tasks=(
        "adding(length=40,updates=50)",
        "selective-copy(length=20,copied=4,updates=50)",
        "digits",
        "characters(size=100000)",
    ),
    seeds=10,
    learning_rates=(3e-3, 1e-2, 3e-2, 1e-1),
    hidden_size=32,
    batch_size=32,
    epochs=10,
    at_once=10,
    dir=pathlib.Path("runs/odyssey"),
)


def main(config: Comparing) -> None:
    """Run the experiment."""
    stopping.advise("go on: the same command again")
    compare(config)


def run() -> None:
    """Parse the command line and run `main`."""
    run_command({"default": ODYSSEY}, main, __doc__)
