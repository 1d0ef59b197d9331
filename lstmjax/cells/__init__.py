"""Cells: the contract in `base.py`, one file a cell, and how a user's own file is loaded."""

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.cells.gru import GRU
from lstmjax.cells.loading import check_contract, load_cell, source_digest
from lstmjax.cells.lstm import LSTM
from lstmjax.cells.peephole import PeepholeLSTM

__all__ = [
    "GRU",
    "LSTM",
    "Carry",
    "Cell",
    "Params",
    "PeepholeLSTM",
    "check_contract",
    "load_cell",
    "source_digest",
]
