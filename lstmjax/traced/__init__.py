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
    AnyArray,
    Atom,
    MixedRows,
    NoRule,
    Size,
    aval_of,
    bind_as_traced,
    bind_to_derive,
    callee,
    interpret,
    is_literal,
    live,
    needed,
    shape_of,
    vary_alike,
)
from lstmjax.traced.program import Program, trace
from lstmjax.traced.rules import unknown
from lstmjax.traced.runner import AsTraced, Hook, Runner, Value

__all__ = [
    "INLINED",
    "AnyArray",
    "AsTraced",
    "Atom",
    "Hook",
    "MixedRows",
    "NoRule",
    "Program",
    "Runner",
    "Size",
    "Value",
    "aval_of",
    "bind_as_traced",
    "bind_to_derive",
    "callee",
    "interpret",
    "is_literal",
    "live",
    "needed",
    "shape_of",
    "trace",
    "unknown",
    "vary_alike",
]
