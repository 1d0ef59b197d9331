"""Training: devices, the compiled step, the loop, checkpoints and the run folder."""

from lstmjax.training.compilation import Compilations, counting_compilations, keep_compiled
from lstmjax.training.devices import (
    Accelerator,
    accelerator_name,
    local_device,
    make_mesh,
    padded_for,
    quick_compilation,
    replicated,
    require_room,
    sharded,
    simple_kernels,
)
from lstmjax.training.loop import Interrupted, NonFiniteLossError, best_epoch, evaluate, fit
from lstmjax.training.nans import explained, line_of_nan
from lstmjax.training.processes import join
from lstmjax.training.repeat import compare, config_of
from lstmjax.training.report import (
    RunFolder,
    as_dict,
    draw_curves,
    prepare_drawing,
    run_name,
    surroundings,
    versions,
)
from lstmjax.training.step import (
    OptimizerConfig,
    draw_models,
    make_optimizer,
    make_steps,
    training_key,
    without_gradient,
)
from lstmjax.training.trackers import Viewer, check_viewers

__all__ = [
    "Accelerator",
    "Compilations",
    "Interrupted",
    "NonFiniteLossError",
    "OptimizerConfig",
    "RunFolder",
    "Viewer",
    "accelerator_name",
    "as_dict",
    "best_epoch",
    "check_viewers",
    "compare",
    "config_of",
    "counting_compilations",
    "draw_curves",
    "draw_models",
    "evaluate",
    "explained",
    "fit",
    "join",
    "keep_compiled",
    "line_of_nan",
    "local_device",
    "make_mesh",
    "make_optimizer",
    "make_steps",
    "padded_for",
    "prepare_drawing",
    "quick_compilation",
    "replicated",
    "require_room",
    "run_name",
    "sharded",
    "simple_kernels",
    "surroundings",
    "training_key",
    "versions",
    "without_gradient",
]
