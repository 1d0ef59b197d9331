"""One Pallas Mosaic GPU kernel (Hopper) for a recurrence over all of time, forward or backward.

At each of T steps, with everything cut into tiles of 64 units by ``rows`` rows of the batch::

    product_g = W_g exchanged_g                       (tensor cores, W on chip for all of time)
    carry, exchanged, outputs = cell(product, inputs, flags, constants, carry)

A warpgroup (128 threads) owns one tile; at the next step it sees what all the others exchanged.
Tiles are transposed, ``(units, rows)``: W is then the wide operand of the tensor cores, which want
64 rows of it but only 8 columns of the other. Forward, h is exchanged and W_g is the recurrent
kernel of gate g; backward, the gradients of the pre-activations are, and W_g is its transpose. What
differs is `Recurrence.cell`, element-wise on tiles.

Warpgroups of one block hand tiles on through its shared memory; `GPUPlan.cluster` makes each
warpgroup a block of its own, in a cluster whose blocks write into each other's shared memory.
Either way a thread waits once a step, for the tiles of all the others, and by then everything that
they did in the step before is done: two slots in turn, for tiles and for outputs, need no more.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lstmjax.recurrence.gpu import exchange
from lstmjax.recurrence.gpu.plan import TILE, GPUPlan, Recurrence, Tiles, barriers, buffers
from lstmjax.recurrence.refs import Index, MosaicRef
from lstmjax.recurrence.split import split


class _Mesh(TypedDict, total=False):
    """What runs beside one another, as `plgpu.kernel` takes it."""

    cluster: tuple[int, ...]
    cluster_names: tuple[str, ...]
    num_threads: int
    thread_name: str


def recurrence_kernel(what: Recurrence, plan: GPUPlan) -> Callable[..., list[Array]]:
    """The kernel as a function of arrays.

    Returns:
        ``f(weights, *inputs, *flags, *constants, *carry, *exchanged)``, weights
        ``(groups, parts, G, units, units)`` in bfloat16 and all else in float32, ``exchanged
        (B, H)`` being what the first products multiply; it returns the outputs and the final carry.
    """
    tiles = what.units // TILE
    mesh: _Mesh
    if plan.cluster:
        mesh = {"cluster": (tiles,), "cluster_names": ("tile",)}
    else:
        mesh = {"num_threads": tiles, "thread_name": "tile"}
    hidden = what.groups * what.units
    per_step = [(what.steps, what.batch, n * hidden) for n in what.outputs]
    final = [(what.batch, hidden)] * what.carry
    kernel = plgpu.kernel(
        _Body(what, plan),
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*per_step, *final)],
        scratch_types=_scratch(what, plan),
        grid=(what.groups, what.batch // plan.rows),
        grid_names=("group", "block"),
        compiler_params=plgpu.CompilerParams(
            approx_math=plan.fast_math,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=plan.interpret,
        **mesh,
    )
    return lambda *operands: kernel(jnp.ones(1, jnp.int32), *operands)


def _scratch(what: Recurrence, plan: GPUPlan) -> dict[str, pl.MemoryRef | plgpu.Barrier]:
    """Shared memory in the order in which the tensor cores and the copy engine want it."""
    scratch: dict[str, pl.MemoryRef | plgpu.Barrier] = {}
    for name, (shape, width) in buffers(what, plan).items():
        tiling = plgpu.TilingTransform((8, 128 // width))
        scratch[name] = plgpu.SMEM(
            shape,
            jnp.int32 if name == "signals" else {2: jnp.bfloat16, 4: jnp.float32}[width],
            transforms=()
            if len(shape) < 4 or name == "flags"
            else (tiling, plgpu.SwizzleTransform(128)),
        )
    for name, (arrivals, number) in barriers(what, plan).items():
        scratch[name] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
    return scratch


# --- Tiles in memory and in registers ------------------------------------------------------------
#
# A bare interpreter has arrays but no layouts, and neither transposed references nor tensor cores.

_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED

_index = inspect.signature(plgpu.load).parameters.get("idx")
_INDEX: tuple[tuple[()], ...] = (
    ((),) if _index and _index.default is inspect.Parameter.empty else ()
)
"""JAX 0.10 wants an index in `plgpu.load`, 0.11 warns of one, 0.12 takes none."""


def _load(ref: MosaicRef, plan: GPUPlan, *, optimized: bool = True) -> Array:
    """``(rows, TILE)`` in memory to a tile in registers."""
    if plan.bare:
        return ref[...].T
    ref = ref.transpose((1, 0))
    return plgpu.load(ref, *_INDEX, layout=_TRANSPOSED, optimized=optimized)


def _load_flag(ref: MosaicRef, plan: GPUPlan) -> Array:
    """``(rows,)`` in memory to a tile that has the same number for all units."""
    if plan.bare:
        flag = ref[...]
    else:
        flag = plgpu.load(ref, *_INDEX, layout=_TRANSPOSED.reduce(0), optimized=False)
    return lax.broadcast_in_dim(flag, (TILE, plan.rows), (1,))


def _load_operand(ref: MosaicRef, plan: GPUPlan) -> Array:
    """``(TILE, TILE)`` in memory to the registers that a product reads its left operand from."""
    if plan.bare:
        return ref[...]
    return plgpu.load(ref, *_INDEX, layout=plgpu.Layout.WGMMA, optimized=False)


def _store(ref: MosaicRef, tile: Array, plan: GPUPlan) -> None:
    if plan.bare:
        ref[...] = tile.T
    else:
        ref.transpose((1, 0))[...] = _as_tile(tile, plan)


def _as_tile(x: Array, plan: GPUPlan) -> Array:
    """Settles the layout of what could have any: constants, and sums with accumulators."""
    return x if plan.bare else plgpu.layout_cast(x, _TRANSPOSED)


def _as_carried(tiles: Tiles, plan: GPUPlan) -> tuple[Array, ...]:
    """Tiles of one type. Inside `jax.shard_map` one from memory varies along the axes of the mesh,
    but nothing that is computed does; the factor vanishes when it is compiled."""
    return tuple(_as_tile(x, plan) * 1.0 for x in tiles)


def _remainder(i: Index, n: int) -> Index:
    return i % n if isinstance(i, int) else lax.rem(i, n)


def _divided(i: Index, n: int) -> tuple[Index, Index]:
    return divmod(i, n) if isinstance(i, int) else (lax.div(i, n), lax.rem(i, n))


# --- The kernel ----------------------------------------------------------------------------------


class _Body:
    """The body of the kernel: one call is one warpgroup, all of time."""

    def __init__(self, what: Recurrence, plan: GPUPlan) -> None:
        self.__name__ = what.name
        self.what, self.plan = what, plan
        self.tiles = what.units // TILE

    def __call__(self, *refs: MosaicRef, **scratch: MosaicRef) -> None:
        what, plan = self.what, self.plan
        self._unpack(refs, scratch)
        for i in range(min(plan.buffers - 1, what.steps)):
            self._fetch(i)
        resident = self._fetch_constants()
        carry, first = (
            [_load(self._mine(ref), plan, optimized=False) for ref in refs]
            for refs in (self.carry, self.first)
        )
        if plan.cluster:
            exchange.set_up(self.scratch["signals"])
        self._publish(0, first, [])

        def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            products, inputs, flags = self._products(i, resident, lambda: self._inputs(i))
            new, exchanged, outputs = what.cell(
                products, inputs, flags, self._constants(), list(carry)
            )
            self._publish(i + 1, exchanged, outputs)
            return _as_carried(new, plan)

        carry = list(lax.fori_loop(0, what.steps, step, _as_carried(carry, plan)))
        if what.finish is not None:
            products, _, _ = self._products(what.steps, resident, lambda: ([], []))
            carry = what.finish(products, carry)
        else:  # no block may end while others still write into its memory
            self._wait_for_exchanged(what.steps)
        self._write(what.steps - 1)
        for ref, tile in zip(self.final, carry, strict=True):
            _store(self._mine(ref), tile, plan)
        plgpu.wait_smem_to_gmem(0)

    def _unpack(self, refs: tuple[MosaicRef, ...], scratch: dict[str, MosaicRef]) -> None:
        what, (self.one, self.weights, *rest) = self.what, refs

        def take(n: int) -> list[MosaicRef]:
            taken, rest[:] = rest[:n], rest[n:]
            return taken

        self.input_refs, self.flag_refs = take(len(what.inputs)), take(what.flags)
        self.constant_refs, self.carry = take(what.constants), take(what.carry)
        self.first = take(1 if what.shared else what.gates)
        self.output_refs, self.final = take(len(what.outputs)), take(what.carry)
        self.scratch, self.tile = scratch, lax.axis_index("tile")
        self.owner = jnp.int32(0) if self.plan.cluster else self.tile
        self.group = lax.axis_index("group") if what.groups > 1 else 0
        self.rows = pl.ds(lax.axis_index("block") * self.plan.rows, self.plan.rows)

    def _columns(self, block: Index) -> slice | pl.Slice:
        """This tile's units in the given block of H columns."""
        of_group = block * self.what.groups + self.group
        return pl.ds(of_group * self.what.units + self.tile * TILE, TILE)

    def _mine(self, ref: MosaicRef) -> MosaicRef:
        return ref.at[self.rows, self._columns(0)]

    def _time(self, i: Index) -> Index:
        return self.what.steps - 1 - i if self.what.downward else i

    def _each(self, times: int, do: Callable[[Index], None]) -> None:
        """A loop that stays one: unrolled, its addresses alone would take up all the registers.

        Hence a bound that the compiler does not know.
        """
        if self.plan.bare or times < 2:
            for k in range(times):
                do(k)
            return

        def body(k: Array, _: tuple[()]) -> tuple[()]:
            do(k)
            return ()

        lax.fori_loop(0, times * self.one[0], body, ())

    # Inputs, flags and constants

    def _fetch(self, i: Index) -> None:
        """Start the copy of everything that step ``i`` needs into its buffer."""
        slot, t = _remainder(i, self.plan.buffers), self._time(i)
        here = self._inputs_here(slot)
        inputs = self.scratch["inputs"].at[slot, self.owner]
        blocks = _blocks(self.input_refs, self.what.inputs)
        for k, (ref, block) in enumerate(blocks):
            source = ref.at[t, self.rows, self._columns(block)]
            plgpu.copy_gmem_to_smem(source, inputs.at[k], here)
        for k, ref in enumerate(self.flag_refs):
            target = self.scratch["flags"].at[slot, self.owner, k]
            # Copied as a tensor, its place would have to be a multiple of 128 bytes.
            bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(ref.at[t, self.rows], target, here, oob_mode=bounds)

    def _inputs_here(self, slot: Index) -> MosaicRef:
        owners = 1 if self.plan.cluster else self.tiles
        return self.scratch["inputs_here"].at[slot * owners + self.owner]

    def _inputs(self, i: Array) -> tuple[Tiles, Tiles]:
        """The inputs and flags of step ``i``, once they are here; those of a later one set off."""
        what, plan, slot = self.what, self.plan, _remainder(i, self.plan.buffers)
        pl.when(i > 0)(lambda: self._write(i - 1))
        later = i + plan.buffers - 1
        pl.when(later < what.steps)(lambda: self._fetch(later))
        plgpu.barrier_wait(self._inputs_here(slot))
        inputs = self.scratch["inputs"].at[slot, self.owner]
        tiles = [_load(inputs.at[k], plan) for k in range(sum(what.inputs))]
        flags = [self.scratch["flags"].at[slot, self.owner, k] for k in range(what.flags)]
        return tiles, [_load_flag(ref, plan) for ref in flags]

    def _fetch_constants(self) -> list[list[Array]]:
        """Wait for W and the constants; returns what of W is in registers, gate by gate."""
        what, plan = self.what, self.plan
        resident: list[list[Array]] = [[] for _ in range(what.gates)]
        barriers = self.scratch.get("constants_here")
        here: MosaicRef = None if barriers is None else barriers.at[self.owner]
        for k, ref in enumerate(self.constant_refs):
            target = self.scratch["constants"].at[self.owner, k]
            plgpu.copy_gmem_to_smem(self._mine(ref), target, here)
        everything = itertools.product(range(plan.parts), range(self.tiles), range(what.gates))
        for part, k, g in everything:
            mine, theirs = pl.ds(self.tile * TILE, TILE), pl.ds(k * TILE, TILE)
            source = self.weights.at[self.group, part, g, mine, theirs]
            if part == 0 and k < plan.resident:
                resident[g].append(_load_operand(source, plan))
            else:
                plgpu.copy_gmem_to_smem(source, self._weights(part, k, g), here)
        if here is not None:
            plgpu.barrier_wait(here)
        return resident

    def _weights(self, part: Index, k: Index, g: int) -> MosaicRef:
        """A tile of W in shared memory."""
        at = (part * self.tiles + k - self.plan.resident) * self.what.gates + g
        return self.scratch["weights"].at[self.owner, at]

    def _constants(self) -> Tiles:
        """Read anew at each step: registers are dearer than shared memory."""
        constants = range(self.what.constants)
        return [_load(self.scratch["constants"].at[self.owner, k], self.plan) for k in constants]

    # Products and what they multiply

    def _exchanged(self, slot: Index, k: Index, g: int, part: Index) -> MosaicRef:
        """What tile ``k`` published for gate ``g``."""
        at = (0 if self.what.shared else g) * self.plan.parts + part
        return self.scratch["exchanged"].at[slot, k, at]

    def _products(
        self, i: Index, resident: list[list[Array]], meanwhile: Callable[[], tuple[Tiles, Tiles]]
    ) -> tuple[Tiles, Tiles, Tiles]:
        """W_g times what was published for step ``i``, and the results of ``meanwhile``."""
        what, plan, slot = self.what, self.plan, _remainder(i, 2)
        self._wait_for_exchanged(i)
        if plan.bare:
            totals = [jnp.zeros((TILE, plan.rows), jnp.float32)] * what.gates

            def add_to(g: int, left: MosaicRef | Array, right: MosaicRef) -> None:
                left = left if isinstance(left, Array) else left[...]
                product = jnp.dot(left, right[...].T, preferred_element_type=jnp.float32)
                totals[g] = totals[g] + product

            self._multiply(slot, resident, add_to)
            return totals, *meanwhile()

        def multiply(*sums: MosaicRef) -> tuple[Tiles, Tiles, Tiles]:
            def add_to(g: int, left: MosaicRef | Array, right: MosaicRef) -> None:
                plgpu.wgmma(sums[g], left, right.transpose((1, 0)))

            self._multiply(slot, resident, add_to)
            inputs, flags = meanwhile()
            return [_as_tile(a[...], plan) for a in sums], inputs, flags

        accumulator = plgpu.ACC((TILE, plan.rows), jnp.float32)
        return pl.run_scoped(multiply, *[accumulator] * what.gates)

    def _multiply(
        self,
        slot: Index,
        resident: list[list[Array]],
        add_to: Callable[[int, MosaicRef | Array, MosaicRef], None],
    ) -> None:
        """W_g times what was published, for each g: ``add_to(g, left, right)``, left right^T.

        Of float32 numbers in parts, products of two small parts are left out. What is small comes
        first: a tensor core cuts off what it adds below the last place of the sum so far.
        """
        plan, gates = self.plan, range(self.what.gates)

        def add(k: Index, right: Index, weights: Callable[[int], MosaicRef | Array]) -> None:
            for g in gates:
                add_to(g, weights(g), self._exchanged(slot, k, g, right))

        def large_part(rights: range) -> None:
            """The first part of W times some of the others' parts."""
            ours, others = plan.resident, self.tiles - plan.resident

            def from_memory(i: Index) -> None:
                right, k = _divided(i, others)
                add(k + ours, right + rights[0], lambda g: self._weights(0, k + ours, g))

            if rights:
                self._each(len(rights) * others, from_memory)
            for right in rights:  # no loop: it would write registers that are in use
                for k, tiles in enumerate(zip(*resident, strict=True)):
                    add(k, right, tiles.__getitem__)

        def small_parts(i: Index) -> None:  # the second times the second, both times the first
            pair, k = _divided(i, self.tiles)
            part, right = _divided(pair, 2)
            add(k, right, lambda g: self._weights(1 + part, k, g))

        self._each(plan.parts * (plan.parts - 1) // 2 * self.tiles, small_parts)
        large_part(range(1, plan.parts))
        large_part(range(1))

    # Between steps

    def _publish(self, i: Index, exchanged: Tiles, outputs: Tiles) -> None:
        """Hand tiles to all who multiply them in step ``i``, and those of the last to `_write`.

        Nobody waits here. What others may do once they have all tiles of the step, this thread has
        done its part for when it arrives: its own are written, and copies of outputs that it began
        have left their buffer.
        """
        plan, slot = self.plan, _remainder(i, 2)
        parts = [split(tile, plan.parts) for tile in exchanged]
        targets = [
            [self._exchanged(slot, self.tile, g, part) for part in range(plan.parts)]
            for g in range(len(exchanged))
        ]
        pairs = list(zip(itertools.chain(*parts), itertools.chain(*targets), strict=True))
        if plan.cluster:
            self._send(pairs, slot)
        else:
            for tile, target in pairs:
                _store(target, tile, plan)
        for k, tile in enumerate(outputs):
            _store(self._output(i - 1, k), tile, plan)
        _release(plan)
        if plan.cluster:
            size = self.tiles * len(pairs) * plan.rows * TILE * 2
            exchange.expect(self.scratch["signals"].at[slot], size)
        else:
            plgpu.barrier_arrive(self.scratch["exchanged_here"].at[slot])

    def _send(self, pairs: list[tuple[Array, MosaicRef]], slot: Index) -> None:
        """Write tiles into the shared memory of every block of the cluster."""
        signal = self.scratch["signals"].at[slot]
        tiles = [(_as_tile(tile, self.plan), at.transpose((1, 0))) for tile, at in pairs]

        def to(block: Index) -> None:
            for tile, target in tiles:
                exchange.send(tile, target, signal, block)

        self._each(self.tiles, to)

    def _wait_for_exchanged(self, i: Index) -> None:
        """For the tiles that are multiplied in step ``i``."""
        slot, phase = _divided(i, 2)[::-1]
        if self.plan.cluster:
            exchange.wait(self.scratch["signals"].at[slot], phase)
        else:
            plgpu.barrier_wait(self.scratch["exchanged_here"].at[slot])

    def _output(self, i: Index, k: int) -> MosaicRef:
        """Where tile ``k`` of the outputs of step ``i`` waits to be copied."""
        return self.scratch["outputs"].at[_remainder(i, 2), self.owner, k]

    def _write(self, i: Index) -> None:
        """Start the copy of the outputs of step ``i`` to where they belong.

        All have been published since, so that they are complete.
        """
        t = self._time(i)
        blocks = _blocks(self.output_refs, self.what.outputs)
        for k, (ref, block) in enumerate(blocks):
            target = ref.at[t, self.rows, self._columns(block)]
            plgpu.copy_smem_to_gmem(self._output(i, k), target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()


def _release(plan: GPUPlan) -> None:
    """What this thread wrote to shared memory is seen by all, and its copies have read theirs."""
    if plan.interpret is not None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
    else:
        exchange.wait_for_copies()
        exchange.fence()


def _blocks(refs: list[MosaicRef], counts: tuple[int, ...]) -> list[tuple[MosaicRef, int]]:
    """Each block of H columns of each array."""
    return [(ref, block) for ref, n in zip(refs, counts, strict=True) for block in range(n)]
