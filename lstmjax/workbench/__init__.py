"""The workbench: training on any task, many seeds in one program, comparisons with a verdict."""

from lstmjax.workbench.config import Config, Replica, config_of
from lstmjax.workbench.run import Row, train

__all__ = ["Config", "Replica", "Row", "config_of", "train"]
