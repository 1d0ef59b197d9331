"""Cells: the contract in `base.py`, one file a cell or family, and how a user's file is loaded."""

from lstmjax.cells.ablations import CIFG, FGR, NFG, NIAF, NIG, NOAF, NOG, NP
from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.cells.chrono import ChronoLSTM, chrono
from lstmjax.cells.continuous import LMU, AntisymmetricRNN, CfC, PhasedLSTM
from lstmjax.cells.contract import check_contract
from lstmjax.cells.coupled import JANET, CoupledLSTM
from lstmjax.cells.dropout import RecurrentDropoutLSTM, VariationalLSTM, WeightDropLSTM
from lstmjax.cells.gru import GRU, ResetFirstGRU
from lstmjax.cells.independent import QRNN, SRU, IndRNN
from lstmjax.cells.layer_norm import LayerNormLSTM
from lstmjax.cells.linear import LRU, RGLRU
from lstmjax.cells.loading import CellSpec, cell_source, load_cell, source_digest
from lstmjax.cells.lstm import LSTM
from lstmjax.cells.mgu import MGU
from lstmjax.cells.minimal import MinGRU, MinLSTM
from lstmjax.cells.multiplicative import MogrifierLSTM, MultiplicativeLSTM
from lstmjax.cells.noise import Noise, dropped, kept
from lstmjax.cells.peephole import PeepholeLSTM
from lstmjax.cells.projected import ProjectedLSTM
from lstmjax.cells.simple import SimpleRNN
from lstmjax.cells.xlstm import MLSTM, SLSTM
from lstmjax.cells.zoneout import ZoneoutLSTM

__all__ = [
    "CIFG",
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
    "Carry",
    "Cell",
    "CellSpec",
    "CfC",
    "ChronoLSTM",
    "CoupledLSTM",
    "IndRNN",
    "LayerNormLSTM",
    "MinGRU",
    "MinLSTM",
    "MogrifierLSTM",
    "MultiplicativeLSTM",
    "Noise",
    "Params",
    "PeepholeLSTM",
    "PhasedLSTM",
    "ProjectedLSTM",
    "RecurrentDropoutLSTM",
    "ResetFirstGRU",
    "SimpleRNN",
    "VariationalLSTM",
    "WeightDropLSTM",
    "ZoneoutLSTM",
    "cell_source",
    "check_contract",
    "chrono",
    "dropped",
    "kept",
    "load_cell",
    "source_digest",
]
