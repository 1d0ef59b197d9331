"""A trained model as programs for CPU, GPU and TPU, which run without this library.

    lstmjax export --run runs/x --to exported

docs/trained_models.md shows how they are called. An export of a few megabytes takes seconds.
"""

import dataclasses
import pathlib
from typing import Literal

from lstmjax.errors import UserError
from lstmjax.export import save_exported
from lstmjax.trained import load_run
from lstmjax.training.command import run_command


@dataclasses.dataclass(frozen=True)
class Config:
    """What to export, and where to."""

    run: pathlib.Path | None = None
    """Folder of a run; a cell.py in it is run."""
    to: pathlib.Path | None = None
    """Folder to write to."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Devices that the programs are for."""


def main(config: Config) -> None:
    """Export, and say what there is now."""
    if config.run is None or config.to is None:
        raise UserError("what, and where to? --run runs/<name> --to folder")
    if not config.platforms:
        raise UserError("--platforms needs at least one of cpu, cuda, tpu")
    signature = save_exported(load_run(config.run), config.to, config.platforms)
    for name, shapes in signature["shapes"].items():
        size = (config.to / f"{name}.jax").stat().st_size
        print(f"{config.to / name}.jax  {size:>12,} bytes  {shapes}")
    if signature["stream"] is not True:
        print(f"not word by word: {signature['stream']}")
    print(f"for {', '.join(config.platforms)}; see signature.json")


def run() -> None:
    """Parse the command line and run `main`."""
    run_command({"default": Config()}, main, description=__doc__)
