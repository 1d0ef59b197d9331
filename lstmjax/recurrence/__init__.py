"""The recurrence over time: one contract (`unroll`), one file an engine."""

from lstmjax.recurrence.unroll import ENGINES, choose_engine, length_mask, unroll

__all__ = ["ENGINES", "choose_engine", "length_mask", "unroll"]
