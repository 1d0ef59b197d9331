"""Cells: the contract in `base.py`, one file a cell, and how a user's own file is loaded."""

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.cells.contract import check_contract
from lstmjax.cells.gru import GRU
from lstmjax.cells.loading import load_cell, source_digest
from lstmjax.cells.lstm import LSTM
from lstmjax.cells.noise import Noise, dropped, kept
from lstmjax.cells.peephole import PeepholeLSTM

__all__ = [
    "GRU",
    "LSTM",
    "Carry",
    "Cell",
    "Noise",
    "Params",
    "PeepholeLSTM",
    "check_contract",
    "dropped",
    "kept",
    "load_cell",
    "source_digest",
]
