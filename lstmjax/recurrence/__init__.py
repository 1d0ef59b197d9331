"""The recurrence over time: one contract (`unroll`), one file an engine."""

from lstmjax.recurrence.associative import Associative
from lstmjax.recurrence.choice import ENGINES, choose_engine
from lstmjax.recurrence.cpu.engine import CPU
from lstmjax.recurrence.derived.engine import Derived
from lstmjax.recurrence.engine import Engine, How, Inputs, Workload
from lstmjax.recurrence.gpu.engine import PallasGPU
from lstmjax.recurrence.noise import Keys, Noises
from lstmjax.recurrence.scan import Scan
from lstmjax.recurrence.tpu.engine import PallasTPU
from lstmjax.recurrence.unroll import length_mask, unroll

__all__ = [
    "CPU",
    "ENGINES",
    "Associative",
    "Derived",
    "Engine",
    "How",
    "Inputs",
    "Keys",
    "Noises",
    "PallasGPU",
    "PallasTPU",
    "Scan",
    "Workload",
    "choose_engine",
    "length_mask",
    "unroll",
]
