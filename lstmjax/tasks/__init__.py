"""Tasks: the contract in `base.py`, one file a task or family, and how a user's one is loaded."""

from lstmjax.tasks.adding import Adding
from lstmjax.tasks.base import Generated, Recipe, Sample, Task
from lstmjax.tasks.characters import Characters
from lstmjax.tasks.copying import CopyMemory, SelectiveCopy
from lstmjax.tasks.cumsum import Cumsum
from lstmjax.tasks.loading import TASKS, load_task
from lstmjax.tasks.metric import Metric
from lstmjax.tasks.recall import AssociativeRecall
from lstmjax.tasks.rows import Digits, Mnist1d, SequenceFile
from lstmjax.tasks.state_tracking import S5, Parity
from lstmjax.tasks.text import Demo, Imdb, TextFile

__all__ = [
    "S5",
    "TASKS",
    "Adding",
    "AssociativeRecall",
    "Characters",
    "CopyMemory",
    "Cumsum",
    "Demo",
    "Digits",
    "Generated",
    "Imdb",
    "Metric",
    "Mnist1d",
    "Parity",
    "Recipe",
    "Sample",
    "SelectiveCopy",
    "SequenceFile",
    "Task",
    "TextFile",
    "load_task",
]
