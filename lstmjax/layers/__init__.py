"""Flax (NNX) layers. They hold parameters and nothing else: keys, masks and carries are arguments.

Shapes: ``B`` rows, ``T`` steps, ``D`` features, ``H`` units. Random bits are drawn row by row from
one key a row, so they do not depend on how a batch is spread over devices.
"""

from lstmjax.layers.base import Layer
from lstmjax.layers.bidirectional import Bidirectional
from lstmjax.layers.feedforward import ConvPool, dense, embedding
from lstmjax.layers.keys import dropout, fold_keys
from lstmjax.layers.pooling import last_valid, pool
from lstmjax.layers.recurrent import Recurrent
from lstmjax.layers.stack import Stack
from lstmjax.recurrence.noise import Keys, row_keys

__all__ = [
    "Bidirectional",
    "ConvPool",
    "Keys",
    "Layer",
    "Recurrent",
    "Stack",
    "dense",
    "dropout",
    "embedding",
    "fold_keys",
    "last_valid",
    "pool",
    "row_keys",
]
