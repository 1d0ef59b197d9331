"""A function of rows as a program: what a user wrote is traced once, and all engines run that.

`trace` calls a function with the shapes that it was promised, ``(B, ...)``, and keeps its
operations. `Program` runs them again with the rows as the last axis of every array, or as the
first, and with any number of them: feature-major for CPUs, blocks of rows for kernels. The
function itself is never called with another shape, so what it reads from one, ``h.shape[-1]`` or
``h.size``, is the same on every engine.

That every row is computed from itself alone is found on the way: an operation that brings rows
together is `MixedRows`, one without a rule here `NoRule`.
"""

from lstmjax.traced.operations import (
    INLINED,
    MixedRows,
    NoRule,
    Size,
    bind_as_traced,
    callee,
    is_literal,
    live,
    needed,
    vary_alike,
)
from lstmjax.traced.program import Program, trace
from lstmjax.traced.rules import unknown
from lstmjax.traced.runner import AsTraced, Runner, Value

__all__ = [
    "INLINED",
    "AsTraced",
    "MixedRows",
    "NoRule",
    "Program",
    "Runner",
    "Size",
    "Value",
    "bind_as_traced",
    "callee",
    "is_literal",
    "live",
    "needed",
    "trace",
    "unknown",
    "vary_alike",
]
