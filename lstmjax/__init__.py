"""lstmjax: write the recurrence of a cell once, derive everything else from it.

`lstmjax.cells` is the place to start: the contract and the cells. `lstmjax.recurrence.unroll` runs
a cell over time; `lstmjax.layers` and `lstmjax.models` build on it with Flax (NNX). What programs
need most can be imported from here; each name is loaded when it is first used.

Example:
    >>> from lstmjax import LSTM, unroll
    >>> cell = LSTM(5)
    >>> hs, final = unroll(cell, cell.init(jax.random.key(0), input_size=3), jnp.ones((2, 4, 3)))
    >>> hs.shape
    (2, 4, 5)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lstmjax.cells import (
        CIFG,
        FGR,
        GRU,
        JANET,
        LMU,
        LRU,
        LSTM,
        MGU,
        MLSTM,
        NFG,
        NIAF,
        NIG,
        NOAF,
        NOG,
        NP,
        QRNN,
        RGLRU,
        SLSTM,
        SRU,
        AntisymmetricRNN,
        Carry,
        Cell,
        CfC,
        ChronoLSTM,
        CoupledLSTM,
        IndRNN,
        LayerNormLSTM,
        MinGRU,
        MinLSTM,
        MogrifierLSTM,
        MultiplicativeLSTM,
        Noise,
        PeepholeLSTM,
        PhasedLSTM,
        ProjectedLSTM,
        RecurrentDropoutLSTM,
        ResetFirstGRU,
        SimpleRNN,
        VariationalLSTM,
        WeightDropLSTM,
        ZoneoutLSTM,
        check_contract,
        chrono,
        dropped,
        kept,
        load_cell,
    )
    from lstmjax.check import check_cell
    from lstmjax.layers import (
        Bidirectional,
        ConvPool,
        Recurrent,
        Stack,
        dense,
        dropout,
        embedding,
        last_valid,
        pool,
    )
    from lstmjax.models import Classifier, ClassifierConfig, Tagger, count_parameters, summary
    from lstmjax.recurrence import (
        CPU,
        Associative,
        Derived,
        Keys,
        PallasGPU,
        PallasTPU,
        Scan,
        Workload,
        choose_engine,
    )
    from lstmjax.recurrence.noise import row_keys
    from lstmjax.recurrence.unroll import length_mask, unroll  # mypy: else it is the module
    from lstmjax.trained import (
        ModelConfig,
        SequenceModelConfig,
        TrainedModel,
        TrainedSequences,
        load_run,
    )

    __version__: str

__all__ = [
    "CIFG",
    "CPU",
    "FGR",
    "GRU",
    "JANET",
    "LMU",
    "LRU",
    "LSTM",
    "MGU",
    "MLSTM",
    "NFG",
    "NIAF",
    "NIG",
    "NOAF",
    "NOG",
    "NP",
    "QRNN",
    "RGLRU",
    "SLSTM",
    "SRU",
    "AntisymmetricRNN",
    "Associative",
    "Bidirectional",
    "Carry",
    "Cell",
    "CfC",
    "ChronoLSTM",
    "Classifier",
    "ClassifierConfig",
    "ConvPool",
    "CoupledLSTM",
    "Derived",
    "IndRNN",
    "Keys",
    "LayerNormLSTM",
    "MinGRU",
    "MinLSTM",
    "ModelConfig",
    "MogrifierLSTM",
    "MultiplicativeLSTM",
    "Noise",
    "PallasGPU",
    "PallasTPU",
    "PeepholeLSTM",
    "PhasedLSTM",
    "ProjectedLSTM",
    "Recurrent",
    "RecurrentDropoutLSTM",
    "ResetFirstGRU",
    "Scan",
    "SequenceModelConfig",
    "SimpleRNN",
    "Stack",
    "Tagger",
    "TrainedModel",
    "TrainedSequences",
    "VariationalLSTM",
    "WeightDropLSTM",
    "Workload",
    "ZoneoutLSTM",
    "__version__",
    "check_cell",
    "check_contract",
    "choose_engine",
    "chrono",
    "count_parameters",
    "dense",
    "dropout",
    "dropped",
    "embedding",
    "kept",
    "last_valid",
    "length_mask",
    "load_cell",
    "load_run",
    "pool",
    "row_keys",
    "summary",
    "unroll",
]

_MODULES = (
    "cells",
    "recurrence",
    "recurrence.noise",
    "layers",
    "models",
    "trained",
    "check",
)  # the lightest first


def __getattr__(name: str) -> object:
    """A name of `__all__`, from the first module that has it."""
    if name not in __all__:
        raise AttributeError(f"module 'lstmjax' has no attribute {name!r}")
    if name == "__version__":
        found: object = importlib.import_module("importlib.metadata").version("lstmjax")
    else:
        modules = (importlib.import_module(f"lstmjax.{module}") for module in _MODULES)
        places = (vars(module).get(name) for module in modules)
        found = next(a for a in places if a is not None and not isinstance(a, ModuleType))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
