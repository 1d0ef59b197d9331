"""Cells of papers in float64 NumPy, written from their equations: one line a cell in `PAPERS`.

`tests.numpy_reference` has the drivers, and three cells with backward passes derived by hand.
"""

from collections.abc import Callable
from typing import NamedTuple

from lstmjax import cells
from tests.numpy_reference import lstm_step
from tests.references import ablations, continuous, gated, independent, products, random, xlstm
from tests.references.functions import Step


class Paper(NamedTuple):
    """A cell as the tests run it.

    Attributes:
        cell: the library's.
        step: ``(params, x, h, state, **step inputs, **noise) -> (h, state, {})``; noise ``c`` is
            called ``d_c``.
        features: of x.
        positive: parameters and states that must be, by name.
    """

    cell: cells.Cell
    step: Callable[..., Step]
    features: int = 2
    positive: tuple[str, ...] = ()


PAPERS = {
    "SimpleRNN": Paper(cells.SimpleRNN(5), gated.simple_rnn),
    "CoupledLSTM": Paper(cells.CoupledLSTM(5), gated.coupled),
    "JANET": Paper(cells.JANET(5), gated.janet),
    "ResetFirstGRU": Paper(cells.ResetFirstGRU(5), gated.reset_first_gru),
    "MGU": Paper(cells.MGU(5), gated.mgu),
    "LayerNormLSTM": Paper(cells.LayerNormLSTM(5), gated.layer_norm_lstm),
    "NIG": Paper(cells.NIG(5), ablations.without("i")),
    "NFG": Paper(cells.NFG(5), ablations.without("f")),
    "NOG": Paper(cells.NOG(5), ablations.without("o")),
    "NIAF": Paper(cells.NIAF(5), ablations.without("input")),
    "NOAF": Paper(cells.NOAF(5), ablations.without("output")),
    "NP": Paper(cells.NP(5), lstm_step),
    "CIFG": Paper(cells.CIFG(5), ablations.without("cifg")),
    "FGR": Paper(cells.FGR(5), ablations.full_gate_recurrence),
    "ZoneoutLSTM": Paper(cells.ZoneoutLSTM(5, zoneout_h=0.3), random.zoneout),
    "RecurrentDropoutLSTM": Paper(cells.RecurrentDropoutLSTM(5), random.recurrent_dropout),
    "VariationalLSTM": Paper(cells.VariationalLSTM(5), random.variational),
    "WeightDropLSTM": Paper(cells.WeightDropLSTM(5), random.weight_drop),
    "ProjectedLSTM": Paper(cells.ProjectedLSTM(5, projection=3), products.projected),
    "MultiplicativeLSTM": Paper(cells.MultiplicativeLSTM(5), products.multiplicative),
    "MogrifierLSTM": Paper(cells.MogrifierLSTM(5, rounds=3), products.mogrifier),
    "ChronoLSTM": Paper(cells.ChronoLSTM(5), lstm_step),
    "IndRNN": Paper(cells.IndRNN(5), independent.indrnn),
    "SRU": Paper(cells.SRU(5), independent.sru, features=5),
    "QRNN f": Paper(cells.QRNN(5, pooling="f"), independent.qrnn("f")),
    "QRNN fo": Paper(cells.QRNN(5), independent.qrnn("fo")),
    "QRNN ifo": Paper(cells.QRNN(5, pooling="ifo"), independent.qrnn("ifo")),
    "MinGRU": Paper(cells.MinGRU(5), independent.min_gru),
    "MinLSTM": Paper(cells.MinLSTM(5), independent.min_lstm),
    "LRU": Paper(cells.LRU(5), independent.lru),
    "RGLRU": Paper(cells.RGLRU(5), independent.rg_lru, features=5),
    "SLSTM": Paper(cells.SLSTM(6, heads=2), xlstm.slstm, positive=("n",)),
    "MLSTM": Paper(cells.MLSTM(6, heads=2), xlstm.mlstm, positive=("n",)),
    "CfC": Paper(cells.CfC(5), continuous.cfc),
    "PhasedLSTM": Paper(cells.PhasedLSTM(5), continuous.phased, positive=("open",)),
    "AntisymmetricRNN": Paper(cells.AntisymmetricRNN(5), continuous.antisymmetric),
    "LMU": Paper(cells.LMU(5, order=4, window=5.0), continuous.lmu),
}
