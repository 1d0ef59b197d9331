"""Will my cell run on that device, and how? Compiled by the real compiler, without the device."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lstmjax.errors import UserError, extra
from lstmjax.precision import Precision

if TYPE_CHECKING:
    from lstmjax.aot.tpu import Compiled
    from lstmjax.cells import Cell
else:
    Compiled = Cell = object  # JAX is imported when it is needed


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile a cell for a device that need not be there, and say what came of it."""

    cell: str = "LSTM"
    """Name of a cell of the library, or file.py:MyCell."""
    hidden: int = 100
    """Units H."""
    features: int = 32
    """Features D of an input."""
    batch: int = 64
    """Rows B, of all devices together."""
    steps: int = 500
    """Time steps T."""
    precision: Precision = "float32"
    """Of the products."""
    target: Literal["v4", "v5e", "v5p", "v6e", "tpu7x", "hopper"] = "v5e"
    """A generation of TPU, or an NVIDIA GPU of the Hopper generation."""
    devices: Literal[1, 4] = 1
    """Chips that share the rows (TPU)."""
    train_step: bool = False
    """Compile the whole training step of a classifier around the cell, too."""
    free_layouts: bool = False
    """Let the compiler say how the cell's arguments and results lie in memory (TPU)."""
    masked: bool = False
    """The cell with a mask and resets."""
    json: pathlib.Path | None = None
    """Write the figures to this file as well."""


def main() -> None:
    """Parse the command line, compile, print; a `UserError` is one line and exit status 2."""
    try:
        with extra("aot"):
            import tyro

        config = tyro.cli(Config, description=__doc__)
        raise SystemExit(_on_hopper(config) if config.target == "hopper" else _on_tpu(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _cell(config: Config) -> Cell:
    from lstmjax.cells import load_cell

    for name in ("hidden", "features", "batch", "steps"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(config, name)}")
    if config.json is not None and not config.json.parent.is_dir():
        raise UserError(f"no folder {config.json.parent} for --json; make it first")
    return load_cell(config.cell, config.hidden)


def _on_tpu(config: Config) -> int:
    from lstmjax.aot import tpu

    if tpu.dump_folder() is None:  # libtpu reads its settings when it starts: start anew with them
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "lstmjax.aot", *sys.argv[1:]]
            variables = os.environ | tpu.environment(folder)
            return subprocess.run(command, env=variables, check=False).returncode
    cell = _cell(config)
    shape = tpu.Shape(config.steps, config.batch, config.features, config.precision)
    assert config.target != "hopper"
    found = tpu.compile_cell(
        cell,
        shape,
        config.target,
        config.devices,
        config.train_step,
        config.free_layouts,
        config.masked,
    )
    _report(config, cell, [result._asdict() for result in found])
    _print_tpu(found)
    return 0


def _print_tpu(found: Sequence[Compiled]) -> None:
    """A line a program and engine; then the kernels' figures as shares of the plain scan's."""
    from lstmjax.recurrence.layout import MIB

    def mib(size: int | None) -> str:
        return "" if size is None else f"{size / MIB:.1f}"

    print("MiB of arguments and results, of temporaries in memory and in VMEM, of a kernel's VMEM")
    columns = ("compile s", "in + out", "temporaries", "in VMEM", "kernel", "bundles/step")
    rows: list[tuple[str, ...]] = [("program", "engine", *columns)]
    for r in found:
        bundles = f"{r.bundles:,.0f}" if r.bundles else ""
        sizes = (mib(size) for size in (r.interface, r.temporaries, r.in_vmem, r.vmem))
        rows.append((r.program, r.engine, f"{r.seconds:.1f}", *sizes, bundles))
    half = len(found) // 2
    for kernel, plain in zip(found[:half], found[half:], strict=True):
        memory = _share(_total(kernel), _total(plain))
        bundles = _share(kernel.bundles, plain.bundles)
        rows.append((kernel.program, "ratio", "", "", memory, "both together", "", bundles))
    _print_table(rows)


def _total(compiled: Compiled) -> int:
    return compiled.temporaries + (compiled.in_vmem or 0)


def _share(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.2f}" if part is not None and whole else ""


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        texts = [a.ljust(w) for a, w in zip(row[:2], wide[:2], strict=True)]
        numbers = [a.rjust(w) for a, w in zip(row[2:], wide[2:], strict=True)]
        print("  ".join(texts + numbers).rstrip())


def _on_hopper(config: Config) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # look for no device
    cell = _cell(config)
    if config.devices > 1:
        raise UserError("--devices is for TPUs; leave it out for hopper")
    if config.free_layouts:
        raise UserError("--free-layouts is for TPUs; leave it out for hopper")
    from lstmjax.aot import gpu

    shape = gpu.Shape(config.steps, config.batch, config.features, config.precision)
    found = [row._asdict() for row in gpu.cell_rows(cell, **shape._asdict(), flags=config.masked)]
    if config.train_step:
        compiled = gpu.compile_train_step(cell, shape)
        step = {"seconds": compiled.seconds, "temporaries": compiled.temporaries}
        found.append(dict.fromkeys(found[0], "") | {"name": "train step"} | step)
    _report(config, cell, found)
    texts = [[f"{v:,.1f}" if isinstance(v, float) else str(v) for v in f.values()] for f in found]
    _print_table([list(found[0]), *texts])
    return 0


def _report(config: Config, cell: Cell, results: Sequence[Mapping[str, object]]) -> None:
    import jax

    print(
        f"{cell} on {config.target} x {config.devices}: {config.steps} steps, {config.batch} rows, "
        f"{config.features} features, {config.precision}; jax {jax.__version__}"
    )
    if config.json is not None:
        asked = dataclasses.asdict(config) | {"json": str(config.json)}
        text = json.dumps({"jax": jax.__version__, "config": asked, "results": results}, indent=1)
        config.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
