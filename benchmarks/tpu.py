"""The recurrence on a TPU: lstmjax' engines and Flax.

    python -m benchmarks.tpu --all      no network: what only a device can say, by
                                        `benchmarks.signoff`, then all of the below; called again,
                                        it goes on where it stopped; writes
                                        benchmarks/results/tpu/<device>-all.json
    python -m benchmarks.tpu --all --interpreted --output FILE    the same, small, without a TPU
    python -m benchmarks.tpu            prints a table, draws it and writes
                                        benchmarks/results/tpu/<device>.json
    python -m benchmarks.tpu --check    tiny shapes, with or without a TPU, writes nothing: only
                                        shows that every contender that is present runs

Every contender does what those of `benchmarks.gpu` do, is compared and timed likewise; float64 is
computed on the CPU beside the TPU. ``bound`` takes a product in float32 for six in bfloat16.
"""

import sys
from collections.abc import Iterator

from benchmarks.device import Bench, Contender, Shape, jax_contenders, kernel_contenders, main
from benchmarks.signoff import Item, checks, more_cases, training
from lstmjax.recurrence import PallasTPU

SHAPES = (
    Shape(500, 64, 100, 32),
    Shape(500, 64, 256, 256),
    Shape(500, 256, 512, 512),
)


def contenders() -> Iterator[Contender]:
    """All of them, the most telling first."""
    yield from kernel_contenders(PallasTPU())
    yield from jax_contenders("bfloat16")


def checked(interpreted: bool) -> dict[str, Item]:
    """Of the kernels, and training; interpreted, little of each."""
    from tests.test_kernels_tpu import CASES

    if interpreted:
        cases = {"LSTM": CASES["LSTM, three chunks"]}
        found = checks(PallasTPU(interpret=True), cases, 2)
        return found | training("auto", "--accelerator", "cpu", "--max-length", "16", fresh=True)
    found = checks(PallasTPU(), CASES | more_cases(512), 1000)
    return found | training("pallas_tpu", fresh=True)


# A TPU serves one process at a time, and the references are computed beside it.
BENCH = Bench(
    "tpu", contenders, checked, SHAPES, processes=1, seconds=1800.0, limit=300.0, exclusive=True
)

if __name__ == "__main__":
    sys.exit(main(BENCH, __doc__, sys.argv[1:]))
