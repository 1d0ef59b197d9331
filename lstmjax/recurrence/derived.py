"""The derived engine: a gradient made for recurrences, from nothing but the cell's step.

Time is cut into chunks. The forward pass keeps the carry after every step (or at the start of every
chunk only) and nothing else. The backward pass goes through the chunks from the end: it walks back
through the steps of a chunk, recomputing pre-activations, with only what is truly sequential (the
vector-Jacobian product of ``step``, one product with the recurrent kernel), and adds up the weight
gradient in one large product.

As nothing differentiates the loops, their bounds may depend on the data: chunks at either end in
which every row is masked are not run, at no cost in compiled shapes.

Inside, arrays are feature-major, ``(features, B)``: the blocks of the gates are then contiguous and
every product has the rows of the batch along the vector registers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from lstmjax.cells.base import Carry, Cell, Params, Parts
from lstmjax.precision import Precision, make_matmul
from lstmjax.recurrence.derivatives import or_zeros, with_derivative
from lstmjax.recurrence.engine import Engine, Inputs, Workload, overridden, platform, vary_alike
from lstmjax.recurrence.gpu.cells import forward_program
from lstmjax.recurrence.scan import Scan


@dataclasses.dataclass(frozen=True)
class Derived(Engine):
    """Exact first derivatives, faster and in less memory than differentiating a scan.

    Second and higher reverse-mode derivatives come from the plain scan. Forward mode
    (`jax.jvp`, `jax.hessian`) is refused by JAX, as for every `jax.custom_vjp`: ask for
    ``engine="scan"`` there.

    Attributes:
        chunk: steps a chunk; by default what keeps a chunk's pre-activations in the cache.
        save: what the forward pass keeps: the carry after all ``"steps"``, or only at the starts
            of ``"chunks"``. The latter runs every chunk forward once more on the way back and
            needs memory for ``T / chunk + chunk`` carries; its chunk is √T by default.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> from lstmjax.recurrence import unroll
        >>> cell = LSTM(4)
        >>> params = cell.init(jax.random.key(0), input_size=3)
        >>> hs, final = unroll(cell, params, jnp.ones((2, 90, 3)), engine=Derived(chunk=30))
        >>> hs.shape
        (2, 90, 4)
    """

    chunk: int | None = None
    save: Literal["steps", "chunks"] = "steps"

    name: ClassVar[str] = "derived"

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.save not in ("steps", "chunks"):
            raise ValueError(f'save must be "steps" or "chunks", got {self.save!r}')

    def refusal(self, cell: Cell, work: Workload) -> str | None:
        """It needs the parts of a step apart: a cell with a transition of its own has none."""
        return overridden(cell)

    def __call__(
        self,
        cell: Cell,
        params: Params,
        xs: Float[Array, "T B D"],
        initial: Carry,
        mask: Bool[Array, "T B"] | None,
        resets: Bool[Array, "T B"] | None,
        reverse: bool,
        precision: Precision,
    ) -> tuple[Float[Array, "T B H"], Carry]:
        """Run ``cell`` over time."""
        steps, batch = xs.shape[:2]
        size = self._chunk_size(steps, batch * len(cell.gates) * cell.hidden_size * xs.itemsize)
        padding = -steps % size
        if padding and mask is None:
            mask = jnp.ones((steps, batch), bool)

        def prepare(a: Array) -> Array:
            a = a[::-1] if reverse else a
            return jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))) if padding else a

        plan = _Plan(cell, size, self.save, precision)
        run = with_derivative(
            functools.partial(_run_chunks, plan),
            functools.partial(_run_chunks_back, plan),
            Scan().function(cell, False, precision),
        )
        flags = (None if a is None else prepare(a) for a in (mask, resets))
        hs, final = run((params, prepare(xs), initial, *flags))
        hs = hs[:steps]
        return hs[::-1] if reverse else hs, final

    def _chunk_size(self, steps: int, bytes_a_step: int) -> int:
        """The chunk asked for; else a divisor of ``steps`` near the one wanted, if there is one."""
        if self.chunk is not None:
            return min(self.chunk, steps)
        if self.save == "chunks":
            wanted = round(steps**0.5)
        else:
            budget = 2**20 if platform() == "cpu" else 2**25
            wanted = max(8, min(128, budget // bytes_a_step))
        if wanted >= steps:
            return steps
        near = [k for k in range(wanted // 2 + 1, 2 * wanted) if steps % k == 0]
        return min(near, key=lambda k: abs(k - wanted), default=wanted)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is fixed when a recurrence is traced; T is a multiple of the chunk."""

    cell: Cell
    chunk: int
    save: Literal["steps", "chunks"]
    precision: Precision


# --- The two passes ------------------------------------------------------------------------------


def _run_chunks(plan: _Plan, inputs: Inputs) -> tuple[tuple[Array, Carry], Carry]:
    """All steps forward: ``(hs (T, B, H), final)`` and what `_run_chunks_back` needs.

    That is the carry before every step and after the last, ``(T + 1, H, B)``, or that before
    every chunk and after the last, ``(T / chunk + 1, H, B)``.
    """
    _, xs, initial, mask, resets = inputs
    steps, size, every_step = xs.shape[0], plan.chunk, plan.save == "steps"
    first, last = _active_chunks(plan, steps, mask, resets)
    scale = size if every_step else 1  # places in `saved` a chunk
    rnn = _Recurrence(plan, inputs)

    def run_chunk(k: Array, loop: tuple[Carry, tuple[Carry, Array]]) -> Any:
        def keep(kept: tuple[Carry, Array], new: Carry, i: Array) -> tuple[Carry, Array]:
            (saved, hs), t = kept, k * size + i
            return (_write(saved, new, t + 1), hs) if every_step else (saved, _write(hs, new.h, t))

        carry, (saved, hs) = rnn.walk(k, size, *loop, keep)
        return carry, (saved if every_step else _write(saved, carry, k + 1), hs)

    carry = _transposed(initial)
    saved = _write(_room(steps // size * scale + 1, carry), carry, first * scale)
    start = (carry, (saved, _room(0 if every_step else steps, carry.h)))
    carry, (saved, hs) = lax.fori_loop(first, last, run_chunk, start)
    hs = (saved.h[1:] if every_step else hs).swapaxes(1, 2)
    if mask is not None:
        hs = jnp.where(mask[..., None], hs, 0)
    return (hs, _transposed(carry)), saved


def _run_chunks_back(
    plan: _Plan, inputs: Inputs, saved: Carry, d_outputs: tuple[Array | None, Carry], wanted: Any
) -> tuple[Params, Array, Carry, None, None]:
    """All steps backward: the gradients of parameters, ``xs`` and the initial carry."""
    _, xs, initial, mask, resets = inputs
    d_hs, d_final = d_outputs
    size = plan.chunk
    first, last = _active_chunks(plan, xs.shape[0], mask, resets)
    rnn = _Recurrence(plan, inputs)

    def run_chunk(j: Array, loop: tuple[Carry, Params, Array, Any]) -> Any:
        d_carry, d_params, d_xs, room = loop
        k = first + last - 1 - j
        before, at = saved, k * size
        if plan.save == "chunks":
            before, at = rnn.carries_before(k, _at(saved, k)), 0
        d_carry, shares, d_x, room = rnn.walk_back(k, d_carry, before, at, d_hs, room)
        d_params = jax.tree.map(jnp.add, d_params, shares)
        return d_carry, d_params, _write(d_xs, d_x, k) if wanted[1] else d_xs, room

    (_, batch, features), count = xs.shape, xs.shape[0] // size
    # Feature-major to the end: turned in the loop, it would become a slower product.
    d_xs = _zeros((count, features, size * batch), xs)
    d_carry = _transposed(or_zeros(d_final, initial))
    start = (d_carry, rnn.no_gradient(), d_xs, rnn.products.empty_pres(size, batch))
    d_carry, d_params, d_xs, _ = lax.fori_loop(first, last, run_chunk, start)
    d_xs = d_xs.reshape(count, features, size, batch).transpose(0, 2, 3, 1).reshape(xs.shape)
    return rnn.turned(d_params), d_xs, _transposed(d_carry), None, None


def _active_chunks(
    plan: _Plan, steps: int, mask: Array | None, resets: Array | None
) -> tuple[Any, Any]:
    """The first chunk with anything to do, and the one after the last."""
    count = steps // plan.chunk
    if mask is None:
        return 0, count
    active = mask if resets is None else mask | resets
    active = active.reshape(count, -1).any(1)
    first = jnp.argmax(active)
    last = count - jnp.argmax(active[::-1])
    return first, jnp.where(active.any(), last, first)


# No place is negative where it counts (a mapped loop that has ended may go on below zero, and what
# it computes is thrown away): told so, JAX leaves out the arithmetic that would wrap them.


def _at(tree: Any, place: Any) -> Any:
    def at(a: Array) -> Array:
        return lax.dynamic_index_in_dim(a, place, keepdims=False, allow_negative_indices=False)

    return jax.tree.map(at, tree)


def _chunk(a: Array, first: Any, size: int) -> Array:
    return lax.dynamic_slice_in_dim(a, first, size, allow_negative_indices=False)


def _write(target: Any, part: Any, place: Any, axis: int = 0) -> Any:
    def write(a: Array, b: Array) -> Array:
        b = b.astype(a.dtype)
        return lax.dynamic_update_index_in_dim(a, b, place, axis, allow_negative_indices=False)

    return jax.tree.map(write, target, part)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of the type of another array."""
    return vary_alike(jnp.zeros(shape, like.dtype), like)


def _room(places: int, one: Any) -> Any:
    """Zeros for so many of what is in the tree."""
    return jax.tree.map(lambda a: _zeros((places, *a.shape), a), one)


def _transposed(carry: Carry) -> Carry:
    """``(B, H)`` to ``(H, B)`` and back."""
    return jax.tree.map(jnp.transpose, carry)


class _Recurrence:
    """A cell's recurrence, chunk by chunk, there and back; carries are ``(H, B)``."""

    def __init__(self, plan: _Plan, inputs: Inputs) -> None:
        params, self.xs, _, self.mask, self.resets = inputs
        batch, dtype = self.xs.shape[1], self.xs.dtype
        self.cell, self.size = plan.cell, plan.chunk
        self.products = _Products(plan, params, dtype)
        self.start = vary_alike(_transposed(plan.cell.initial_carry(batch, dtype)), params)
        self.units = {name: value[:, None] for name, value in params.get("units", {}).items()}
        self.step = _feature_major_step(plan.cell, batch, dtype)

    def pre(self, t: Array, h: Array) -> Any:
        """Pre-activations of step ``t``: a list of G blocks ``(H, B)``, or two, in `Parts`."""
        pre = self.products.pre(_at(self.xs, t).T, h)
        return _map_pre(lambda a: jnp.split(a, len(self.cell.gates)), pre)

    def begun(self, t: Array, carry: Carry) -> Carry:
        """The carry that step ``t`` starts from, given that of the step before."""
        return carry if self.resets is None else _where(_at(self.resets, t), self.start, carry)

    def walk(
        self,
        k: Array,
        steps: int,
        carry: Carry,
        kept: Any,
        keep: Callable[[Any, Carry, Array], Any],
    ) -> tuple[Carry, Any]:
        """Run so many steps of chunk ``k``, and ``keep(kept, new carry, i)`` after the i-th."""

        def step(i: Array, loop: tuple[Carry, Any]) -> tuple[Carry, Any]:
            t = k * self.size + i
            carry = self.begun(t, loop[0])
            new = self.step(self.pre(t, carry.h), carry, self.units)
            if self.mask is not None:
                new = _where(_at(self.mask, t), new, carry)
            return new, keep(loop[1], new, i)

        return lax.fori_loop(0, steps, step, (carry, kept))

    def carries_before(self, k: Array, carry: Carry) -> Carry:
        """The carries before all steps of a chunk, from the first of them."""
        kept = _write(_room(self.size, carry), carry, 0)
        steps = self.size - 1
        return self.walk(k, steps, carry, kept, lambda a, new, i: _write(a, new, i + 1))[1]

    def no_gradient(self) -> Params:
        """Zeros to add the gradients of `walk_back` to."""
        return {**self.products.no_gradient(), "units": jax.tree.map(jnp.zeros_like, self.units)}

    def turned(self, sums: Params) -> Params:
        """Sums of those gradients, shaped like the parameters."""
        units = {name: d[:, 0] for name, d in sums["units"].items()}
        return {**self.products.turned(sums), **({"units": units} if units else {})}

    def walk_back(
        self, k: Array, d_carry: Carry, before: Carry, at: Any, d_hs: Array | None, d_pres: Any
    ) -> tuple[Carry, Params, Array, Any]:
        """Run chunk ``k`` backward, the carries before its steps being those from ``at`` on.

        Gives the gradients of the carry, of the parameters and of the input, and the room
        ``d_pres``, whose contents do not matter.
        """

        def step(j: Array, loop: tuple[Carry, Any, Any, Params]) -> Any:
            d_carry, d_pres, row, d_units = loop
            i = self.size - 1 - j
            t = k * self.size + i
            carry = self.begun(t, _at(before, at + i))
            d_new, d_past = d_carry, None
            if d_hs is not None:
                d_new = d_new._replace(h=d_new.h + _at(d_hs, t).T)
            if self.mask is not None:
                valid, zeros = _at(self.mask, t), jax.tree.map(jnp.zeros_like, d_carry)
                d_new, d_past = _where(valid, d_new, zeros), _where(valid, zeros, d_carry)
            _, pull_back = jax.vjp(self.step, self.pre(t, carry.h), carry, self.units)
            d_pre, d_old, d_unit = pull_back(d_new)
            row = self.products.in_one(row, d_pre)
            d_pre = _map_pre(self.products._cast, row)
            d_old = d_old._replace(h=d_old.h + self.products.recur_back(d_pre))
            if d_past is not None:
                d_old = jax.tree.map(jnp.add, d_old, d_past)
            if self.resets is not None:
                zeros = jax.tree.map(jnp.zeros_like, d_old)
                d_old = _where(_at(self.resets, t), zeros, d_old)
            d_pres = _write(d_pres, d_pre, i, axis=1)
            return d_old, d_pres, row, jax.tree.map(jnp.add, d_units, d_unit)

        row = jax.tree.map(lambda a: a[:, 0], d_pres)
        loop = (d_carry, d_pres, row, jax.tree.map(jnp.zeros_like, self.units))
        d_carry, d_pres, _, d_units = lax.fori_loop(0, self.size, step, loop)
        x, h = _chunk(self.xs, k * self.size, self.size), _chunk(before.h, at, self.size)
        if self.resets is not None:
            reset = _chunk(self.resets, k * self.size, self.size)
            h = jnp.where(reset[:, None], self.start.h, h)
        shares, d_x = self.products.gradients(d_pres, x, h)
        return d_carry, {**shares, "units": d_units}, d_x, d_pres


class _Products:
    """The matrix products of a cell, feature-major: ``pre = Wᵀ x + Rᵀ h + b`` and its gradient.

    A cell that adds the two parts of its pre-activations gets them from one product with the
    kernels stacked.
    """

    def __init__(self, plan: _Plan, params: Params, dtype: Any) -> None:
        self.cell, self.params = plan.cell, params
        self.matmul = make_matmul(plan.precision, dtype)
        self.operand_dtype = jnp.bfloat16 if plan.precision == "bfloat16" else dtype
        self.dtype = dtype
        kernel, recurrent = params["kernel"], params["recurrent_kernel"]
        gates, heads, block = len(plan.cell.gates), plan.cell.heads, recurrent.shape[0]
        self.shape = (gates, heads, block)
        by_head = recurrent.reshape(block, gates, heads, block)
        self.recurrent = self._cast(by_head.transpose(2, 1, 3, 0).reshape(heads, -1, block))
        self.back = self._cast(by_head.transpose(2, 0, 1, 3).reshape(heads, block, -1))
        self.kernel = self._cast(kernel.T)
        self.stacked = heads == 1 and not plan.cell.parts_apart
        if self.stacked:
            self.both = self._cast(jnp.concatenate([kernel, recurrent]).T)

    def _cast(self, a: Array) -> Array:
        return a.astype(self.operand_dtype)

    def in_one(self, room: Any, blocks: Any) -> Any:
        """The blocks of the gates written one after the other into ``room``, ``(G H, B)``.

        The same as their concatenation; but XLA:CPU fuses that with the arithmetic of all blocks
        into one loop that it does not vectorise.
        """
        if isinstance(room, Parts):
            return Parts(*map(self.in_one, room, blocks))
        for number, block in enumerate(blocks):
            start = number * block.shape[0]
            room = lax.dynamic_update_slice_in_dim(room, block, start, 0)
        return room

    def pre(self, x: Float[Array, "D B"], h: Float[Array, "H B"]) -> Any:
        """Pre-activations ``(G H, B)``, or their two parts."""
        bias = self.params["bias"][:, None]
        if self.stacked:
            return self.matmul(self.both, jnp.concatenate([x, h])) + bias
        from_x = self.matmul(self.kernel, x) + bias
        gates, heads, block = self.shape
        from_h = self.matmul(self.recurrent, h.reshape(heads, block, -1))
        from_h = from_h.reshape(heads, gates, block, -1).swapaxes(0, 1).reshape(from_x.shape)
        if self.cell.parts_apart:
            return Parts(from_x, from_h + self.params["recurrent_bias"][:, None])
        return from_x + from_h

    def recur_back(self, d_pre: Any) -> Float[Array, "H B"]:
        """The gradient of h from that of the pre-activations."""
        d_pre = _parts(d_pre).h
        gates, heads, block = self.shape
        if heads == 1:
            return self.matmul(self.back[0], d_pre)
        d_pre = d_pre.reshape(gates, heads, block, -1).swapaxes(0, 1)
        return self.matmul(self.back, d_pre.reshape(heads, gates * block, -1)).reshape(
            heads * block, -1
        )

    def empty_pres(self, size: int, batch: int) -> Any:
        """Room for the gradients of a chunk's pre-activations.

        Never narrower than they are: XLA:CPU would copy all of it to write a part.
        """
        room = _zeros((self.kernel.shape[0], size, batch), self.params["bias"])
        return Parts(room, room) if self.cell.parts_apart else room

    def no_gradient(self) -> Params:
        """Zeros to add the shares of `gradients` to."""
        names = ["both"] if self.stacked else ["kernel", "recurrent"]
        bias = self.params["bias"]
        sums = {name: _zeros(getattr(self, name).shape, bias) for name in names}
        sums["bias"] = jnp.zeros_like(bias)
        if self.cell.parts_apart:
            sums["recurrent_bias"] = jnp.zeros_like(bias)
        return sums

    def gradients(
        self, d_pres: Any, x: Float[Array, "K B D"], h: Float[Array, "K H B"]
    ) -> tuple[Params, Float[Array, "D KB"]]:
        """The chunk's share of the parameters' gradients, turned as here, and that of its input."""
        d_x, d_h = (a.reshape(a.shape[0], -1) for a in _parts(d_pres))
        x_rows = x.reshape(-1, x.shape[-1])
        h_rows = h.swapaxes(1, 2).reshape(-1, h.shape[1])
        shares = {"bias": d_x.sum(1, dtype=self.dtype)}
        if self.stacked:
            shares["both"] = self.matmul(d_x, jnp.concatenate([x_rows, h_rows], 1))
        else:
            gates, heads, block = self.shape
            d_heads = d_h.reshape(gates, heads, block, -1).swapaxes(0, 1)
            d_heads = d_heads.reshape(heads, gates * block, -1)
            h_heads = h_rows.reshape(-1, heads, block).swapaxes(0, 1)
            shares["kernel"] = self.matmul(d_x, x_rows)
            shares["recurrent"] = self.matmul(d_heads, h_heads)
        if self.cell.parts_apart:
            shares["recurrent_bias"] = d_h.sum(1, dtype=self.dtype)
        return shares, self.matmul(self._cast(self.params["kernel"]), d_x)

    def turned(self, sums: Params) -> Params:
        """Sums of `gradients`, shaped like the parameters."""
        # Else XLA would turn the operands instead, and XLA:CPU has no such product in bfloat16.
        sums = lax.optimization_barrier(sums)
        turned: Params = {name: a for name, a in sums.items() if name.endswith("bias")}
        features = self.params["kernel"].shape[0]
        if self.stacked:
            both = sums["both"].T
            return {"kernel": both[:features], "recurrent_kernel": both[features:], **turned}
        gates, heads, block = self.shape
        recurrent = sums["recurrent"].reshape(heads, gates, block, block).transpose(3, 1, 0, 2)
        turned["kernel"] = sums["kernel"].T
        turned["recurrent_kernel"] = recurrent.reshape(block, -1)
        return turned


def _parts(pre: Any) -> Parts:
    return pre if isinstance(pre, Parts) else Parts(pre, pre)


def _where(rows: Bool[Array, " B"], yes: Carry, no: Carry) -> Carry:
    """`select_rows` for feature-major arrays."""
    return jax.tree.map(lambda a, b: jnp.where(rows, a, b), yes, no)


def _feature_major_step(
    cell: Cell, batch: int, dtype: Any
) -> Callable[[Any, Carry, Params], Carry]:
    """``cell.step`` for lists of pre-activations, carries ``(H, B)`` and units ``(H, 1)``.

    A step that is element-wise, operation by operation, runs as that of a cell of one unit, mapped
    over the units. Any other one, whatever the cell declares, sees transposed arrays instead.
    """

    def by_unit(pre: Any, carry: Carry, units: Params) -> Carry:
        def step(pre: Any, carry: Carry, units: Params) -> Carry:
            return cell.apply_step(pre, carry, {"units": units})

        pre = _map_pre(lambda a: cell.named([b[..., None] for b in a]), pre)
        new = jax.vmap(step)(pre, jax.tree.map(lambda a: a[..., None], carry), units)
        return jax.tree.map(lambda a: jnp.squeeze(a, -1), new)  # raises where it is wider than 1

    def by_row(pre: Any, carry: Carry, units: Params) -> Carry:
        pre = _map_pre(lambda a: cell.named([b.T for b in a]), pre)
        params = {"units": {name: value[:, 0] for name, value in units.items()}}
        return _transposed(cell.apply_step(pre, _transposed(carry), params))

    if not cell.elementwise:
        return by_row
    block = [jax.ShapeDtypeStruct((cell.hidden_size, batch), dtype)] * len(cell.gates)
    carry = jax.eval_shape(lambda: _transposed(cell.initial_carry(batch, dtype)))
    unit = jax.ShapeDtypeStruct((cell.hidden_size, 1), dtype)
    pre = Parts(block, block) if cell.parts_apart else block
    try:
        new = jax.eval_shape(by_unit, pre, carry, dict.fromkeys(cell.unit_params, unit))
        mixing = forward_program(cell).refusal()  # a mean over one unit has the right shape, too
    except (TypeError, ValueError):
        return by_row
    return by_unit if new == carry and mixing is None else by_row


def _map_pre(function: Callable[[Any], Any], pre: Any) -> Any:
    return Parts(*map(function, pre)) if isinstance(pre, Parts) else function(pre)
