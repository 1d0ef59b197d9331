"""What kernels and loops work with: references to memory, and places in it."""

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jax import Array

Index: TypeAlias = Array | int
"""A place in time or in memory: traced, or where `jax.disable_jit` runs loops in Python an int."""


@runtime_checkable
class _At(Protocol):
    """``ref.at``, which is indexed to make a reference to a part."""

    def __getitem__(self, index: object, /) -> "Ref": ...


@runtime_checkable
class Ref(Protocol):
    """A reference to memory inside a Pallas kernel, or to a part of it; JAX has no type for both.

    TPU and GPU kernels read (``ref[i]``), write (``ref[i] = x``) and take parts (``ref.at[i]``).
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it refers to."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Likewise."""
        ...

    @property
    def at(self) -> _At:
        """Indexed, a reference to a part."""
        ...

    def __getitem__(self, index: object, /) -> Array: ...

    def __setitem__(self, index: object, value: Array, /) -> None: ...

    def transpose(self, axes: tuple[int, ...], /) -> "Ref":
        """The same memory with its axes in another order."""
        ...


if TYPE_CHECKING:
    MosaicRef: TypeAlias = Any
else:
    MosaicRef = Ref
    """A `Ref` that is handed to Mosaic GPU's functions: these are declared for classes of JAX' own
    that are not public, or abstract values that a kernel never sees."""
