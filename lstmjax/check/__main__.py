"""Does my cell do what I think it does? ``python -m lstmjax.check my_cell.py:MyCell``."""

import dataclasses
import json
import pathlib
import sys

from lstmjax.cells.loading import find_cell
from lstmjax.check import check_cell
from lstmjax.errors import UserError, extra


@dataclasses.dataclass(frozen=True)
class Config:
    """Try everything that a cell must satisfy, and say what failed, why, and what to do.

    A NumPy function `reference(params, x, h, state) -> (h, state)` in the cell's file, or a static
    method of the cell, is compared with it. Exit status: 0 all passed, 1 a check failed, 2 there is
    nothing to check.
    """

    cell: str
    """file.py:MyCell, or the name of a cell of the library."""
    hidden: int = 8
    """Units H."""
    skip: tuple[str, ...] = ()
    """Checks to leave out, by name: gradient, say, for a straight-through estimator."""
    speed: bool = True
    """Measure it beside the LSTM."""
    targets: tuple[str, ...] | None = None
    """Compile for these (v5e, hopper, ...); by default for those whose compiler is installed."""
    json: pathlib.Path | None = None
    """Write the report to this file as well."""


def main(prog: str = "python -m lstmjax.check") -> None:
    """Parse the command line, check, print; ``prog`` is what it is called in the help."""
    try:
        with extra("train"):
            import tyro

        config = tyro.cli(Config, prog=prog, config=(tyro.conf.PositionalRequiredArgs,))
        if config.hidden < 1:
            raise UserError(f"--hidden must be at least 1, got {config.hidden}")
        cell = find_cell(config.cell, config.hidden)
        module = sys.modules[type(cell).__module__]
        report = check_cell(
            cell,
            reference=getattr(type(cell), "reference", None) or vars(module).get("reference"),
            skip=config.skip,
            speed=config.speed,
            targets=config.targets,
            progress=sys.stderr.isatty(),
        )
        if config.json is not None:
            config.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(report)
    raise SystemExit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
