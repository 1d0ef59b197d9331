"""Programs that mix the units of a row, as the CPU's vectors."""

import ctypes
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

pytest.importorskip("llvmlite")

import llvmlite.ir as ir

from lstmjax import cells
from lstmjax.recurrence.cpu.builder import I32, I64, PTR, VOID, Builder
from lstmjax.recurrence.cpu.emit import Vectors
from lstmjax.recurrence.cpu.machine import Machine, compile_module, load_object
from lstmjax.recurrence.cpu.rows import Rows, refusal, row_jaxpr
from lstmjax.recurrence.engine import Workload
from lstmjax.recurrence.step import step_of
from lstmjax.traced import trace
from tests.random_steps import BY_ROW
from tests.tolerances import assert_close

BATCH = 3


# --- Compiling -----------------------------------------------------------------------------------


def emit(module, name, program, dtype, machine, dense):
    """``void f(in..., out..., memory, rows)``, and numbers of memory.

    Parameters are dense or in whole vectors, all else is in whole vectors row by row.
    """
    closed = row_jaxpr(program)
    count = len(closed.in_avals) + len(closed.out_avals)
    kind = ir.FunctionType(VOID, [PTR] * (count + 1) + [I64])
    function = ir.Function(module, kind, name)
    e = Builder(machine, dtype, function)
    *pointers, memory, batch = function.args
    out_rows = program.out_rows or (0,) * len(closed.out_avals)
    shared = [k for k, row in enumerate(program.rows) if row is None and dense]
    loose = [k for k, row in enumerate(out_rows) if row is None and dense]
    rows = Rows(e, Vectors(e), closed, shared, loose)
    ins, outs = pointers[: len(closed.in_avals)], pointers[len(closed.in_avals) :]
    with e.loop(batch) as r:

        def at(p, aval, row, first):
            whole = -(-aval.size // e.lanes) * e.lanes
            return e.at(p, first, e.mul(r, whole) if row is not None else 0)

        def read(p, aval, row):
            return lambda first, lanes: e.load_part(at(p, aval, row, first), lanes)

        def write(p, aval, row):
            def add(first, lanes, value):
                place = at(p, aval, row, first)
                if row is None:
                    value = e.b.fadd(e.load_part(place, lanes), value)
                if lanes > 1:
                    e.store_part(value, place, lanes)
                else:  # LLVM 20 fails on vectors of one number
                    e.store(e.b.extract_element(value, I32(0)), place)

            return add

        reads = [
            p if k in shared else read(p, aval, program.rows[k])
            for k, (p, aval) in enumerate(zip(ins, closed.in_avals, strict=True))
        ]
        writes = [write(*a) for a in zip(outs, closed.out_avals, out_rows, strict=True)]
        rows.emit(reads, writes, memory)
    e.b.ret_void()
    return rows.room


def compiled(programs, dtype, machine=None, dense=True):
    """Python functions of arrays: name -> (*arrays -> list of arrays)."""
    machine = machine or Machine.host()
    module = ir.Module()
    rooms = {n: emit(module, f"rows {n}", p, dtype, machine, dense) for n, p in programs.items()}
    addresses = load_object(compile_module(module, machine), [f"rows {n}" for n in programs])
    lanes = machine.lanes(dtype)

    def function(name):
        program, room = programs[name], rooms[name]
        return lambda *arrays: call(addresses[f"rows {name}"], program, room, dtype, lanes, arrays)

    return {name: function(name) for name in programs}


def padded(array, row, dtype, lanes):
    """Row by row in whole vectors, what is shared without anything behind it."""
    array = np.asarray(array, dtype)
    if row is None:
        return np.ascontiguousarray(array)
    lines = np.moveaxis(array, row, 0).reshape(array.shape[row], -1)
    return np.pad(lines, ((0, 0), (0, -lines.shape[1] % lanes)), constant_values=7)


def call(address, program, room, dtype, lanes, arrays):
    given = [padded(a, row, dtype, lanes) for a, row in zip(arrays, program.rows, strict=True)]
    avals = program.closed.out_avals
    out_rows = program.out_rows or (0,) * len(avals)
    found = [
        padded(np.zeros(a.shape), r, dtype, lanes) for a, r in zip(avals, out_rows, strict=True)
    ]
    memory = np.full(room + 16, np.nan, dtype)
    pointers = [a.ctypes.data for a in (*given, *found, memory)]
    kinds = [ctypes.c_void_p] * len(pointers) + [ctypes.c_int64]
    ctypes.CFUNCTYPE(None, *kinds)(address)(*pointers, BATCH)
    assert np.all(np.isnan(memory[room:]))
    outs = []
    for a, row, aval in zip(found, out_rows, avals, strict=True):
        if row is None:
            outs.append(a)
            continue
        rest = [n for axis, n in enumerate(aval.shape) if axis != row]
        lines = a[:, : int(np.prod(rest))].reshape(BATCH, *rest)
        outs.append(np.moveaxis(lines, 0, row))
    return outs


def checked(programs, dtype, reduction, machine=None, dense=True):
    """Compare with JAX, on numbers that are far from zero."""
    rng = np.random.default_rng(4)
    given = {
        name: [
            (rng.choice([-1, 1], a.shape) * rng.uniform(0.3, 1.3, a.shape)).astype(dtype)
            for a in program.closed.in_avals
        ]
        for name, program in programs.items()
    }
    with jax.enable_x64(True):

        def every(given):
            return {name: jax.tree.leaves(p(*given[name])) for name, p in programs.items()}

        def as_traced(p, arrays):
            return [jnp.asarray(x, a.dtype) for x, a in zip(arrays, p.closed.in_avals, strict=True)]

        own = {name: as_traced(p, given[name]) for name, p in programs.items()}
        expected = jax.jit(every)(own)
    made = compiled(programs, dtype, machine, dense)
    for name in programs:
        found = made[name](*given[name])
        for k, (one, right) in enumerate(zip(found, expected[name], strict=True)):
            assert_close(one, right, reduction=reduction, what=f"{name}, result {k}")


# --- Functions of rows ---------------------------------------------------------------------------


def forward(f, units, dtype, *params):
    """Of an array ``(B, H)`` and parameters."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((BATCH, units), *params)]
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        return trace(f, *shapes, rows=(0, *(-1 for _ in params)))


def backward(program):
    """Its derivative, as that of a step is traced."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.closed.in_avals]
    rows = tuple(-1 if row is None else row for row in program.rows)

    def back(ct, *args):
        return jax.vjp(lambda *a: program.evaluate(a), *args)[1](ct)

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        traced = trace(back, program.shapes(), *shapes, rows=(0, *rows))
    return traced.with_sums(program.rows)


def both(functions, units, dtype):
    """Programs and their derivatives, by name."""
    programs = {}
    for name, (f, *params) in functions.items():
        shapes = [[units if n == "H" else n for n in shape] for shape in params]
        programs[name] = forward(f, units, dtype, *shapes)
        programs[f"d {name}"] = backward(programs[name])
    return programs


def in_heads(f, heads):
    """A function of ``(B, heads, width)``."""
    return lambda a, *params: f(a.reshape(len(a), heads, -1), *params).reshape(a.shape)


def normalised(a):
    return a * lax.rsqrt((a * a).mean(-1, keepdims=True) + 0.1)


def each_head(a, m):
    return jnp.einsum("bni,nij->bnj", a, m)


def attention(a):
    weights = jax.nn.softmax(jnp.einsum("bni,bmi->bnm", a, jnp.tanh(a)), axis=-1)
    return jnp.einsum("bnm,bmi->bni", weights, a)


SIMPLE = {name: (f,) for name, f in BY_ROW.items() if name not in ("sort", "halves", "heads")}
SIMPLE |= {
    "layer norm": (lambda a, g: g * jax.nn.standardize(a, axis=-1, epsilon=0.1), (1, "H")),
    "log softmax": (lambda a: jax.nn.log_softmax(a, axis=-1),),
    "cumax": (lambda a: jnp.cumsum(jax.nn.softmax(a, axis=-1), axis=-1),),
    "maximum": (lambda a: a - a.max(-1, keepdims=True),),
    "largest": (lambda a: jnp.where(a == a.max(-1, keepdims=True), a, 2 * a),),
    "matrix": (lambda a, m: jnp.tanh(a @ m), ("H", "H")),
    "turned matrix": (lambda a, m: jnp.tanh(a) @ m.T, ("H", "H")),
    "narrow": (lambda a, m: jnp.tanh(a @ m) @ m.T, ("H", 3)),
    "wide": (lambda a, m: jax.nn.relu(a @ m) @ m.T, ("H", 20)),
    "below the diagonal": (lambda a: a @ jnp.tril(jnp.ones((a.shape[1],) * 2, a.dtype)),),
    "table": (lambda a, t: jnp.tanh(a[:, :, None] * t[None]).sum(-1), ("H", 3)),
    "tables": (lambda a, t: jnp.einsum("bh,hk,hk->bh", a, t, jnp.sin(t)), ("H", 10)),
    "rows of a table": (lambda a, t: (jnp.sin(a[:, None] * t[None]) * t[None]).sum(1), (3, "H")),
    "many rows": (lambda a, t: jnp.sin(a[:, None] * t[None]).sum(1), (20, "H")),
    "pieces": (lambda a, t: jnp.concatenate([a * p for p in jnp.split(t, 4)], 1)[:, ::4], (4, "H")),
    "shifted": (lambda a: jnp.pad(jnp.tanh(a), ((0, 0), (2, 0)))[:, : a.shape[1]] * a,),
    "one unit": (lambda a: a[:, :1] * a + a[:, -1:],),
}  # fmt: skip


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("units", "dtype"),
    [(1, "float64"), (24, "float64"), (100, "float32")],
)
def test_functions_of_rows_and_their_derivatives(units, dtype):
    checked(both(SIMPLE, units, dtype), dtype, 4 * units + 20)


def ended(a, n):
    """The last n, and the first ones of an array with gaps."""
    spaced = lax.pad(a, np.zeros((), a.dtype), ((0, 0, 0), (-1, 1, 1)))
    return jnp.concatenate([a[:, -n:], spaced[:, : a.shape[1] - n]], axis=1)


OF_100 = {
    "halves": (BY_ROW["halves"],),
    "heads": (BY_ROW["heads"],),
    "norm of each head": (in_heads(normalised, 5),),
    "norm of short heads": (in_heads(normalised, 25),),
    "softmax over heads": (in_heads(lambda a: jax.nn.softmax(a, axis=1), 20),),
    "matrix of each head": (in_heads(each_head, 5), (5, 20, 20)),
    "matrix of each short head": (in_heads(each_head, 25), (25, 4, 4)),
    "attention": (in_heads(attention, 10),),
    "over the middle": (lambda a: a * a.reshape(-1, 2, 25, 2).sum(2).reshape(-1, 4).repeat(25, 1),),
    "cumulative over heads": (in_heads(lambda a: jnp.cumsum(a, axis=1), 10),),
    "cumulative within heads": (in_heads(lambda a: jnp.cumsum(a[..., ::-1], axis=2), 5),),
    "largest of each head": (in_heads(lambda a: a / a.max(2, keepdims=True), 5),),
    "turned heads": (in_heads(lambda a: jnp.sin(a.swapaxes(1, 2)), 10),),
    "ended": (lambda a: ended(jnp.sin(a), 5),),
    "much": (lambda a, t: jnp.sin(a[:, :, None] * t[None])[:, ::-1].sum(-1), (100, 30)),
    "a matrix of one number": (lambda a, s: a @ jnp.broadcast_to(s, (100, 100)), (1, 1)),
}  # fmt: skip


def test_axes_of_a_row():
    checked(both(OF_100, 100, "float32"), "float32", 400)


def places(a):
    iota = lax.broadcasted_iota(np.int32, a.shape, 1)
    best, least = jnp.argmax(a, 1, keepdims=True), lax.argmin(a, 1, np.int32)[:, None]
    return jnp.where(iota == best.astype(np.int32), a, jnp.where(iota == least, -a, 0))


FORWARD = {
    "places": places,
    "place in a head": in_heads(lambda a: a * jnp.argmax(a, 2)[:, :, None].astype(a.dtype), 5),
    "product": lambda a: jnp.prod(a * 1.3, axis=1, keepdims=True) + a,
    "running products": lambda a: jnp.cumprod(a * 1.3, axis=1),
    "running extrema": lambda a: lax.cummax(a, 1) * lax.cummin(a, 1, reverse=True),
    "any": lambda a: jnp.where(jnp.any(a > 1.29, 1, keepdims=True), a, 2 * a),
    "all": lambda a: jnp.where(jnp.all(a > -1.3, 1, keepdims=True), a, 2 * a),
    "bits moved": lambda a: jnp.where(jnp.roll(a > 0, 3, axis=1), a, 1 - a),
    "whole": lambda a: (a * 10).astype("int32")[:, ::-1].astype(a.dtype),
    "smallest": lambda a: jnp.min((a * 10).astype("int8"), 1, keepdims=True).astype(a.dtype) * a,
    "counted": lambda a: a * (a > 0).sum(1, keepdims=True).astype(a.dtype),
    "short": lambda a: a.astype("bfloat16")[:, ::-1].astype(a.dtype),
    "mixed": lambda a: jnp.sum(a.astype("float64"), 1, keepdims=True).astype(a.dtype) * a,
    "taken": lambda a: a * jnp.sin(jnp.arange(100, dtype=a.dtype))[jnp.arange(100) // 2][None],
    "known": lambda a: a * jnp.cumsum(jnp.arange(100.0, dtype=a.dtype))[None],
    "all alike": lambda a: a + jnp.cumsum(jnp.full_like(a, 2) * a[:, :1], axis=1),
}  # fmt: skip


@pytest.mark.parametrize("machine", ["host", "short"])
def test_what_has_no_derivative(machine):
    host = Machine.host()
    chosen = host if machine == "host" else dataclasses.replace(host, bits=128)
    programs = {name: forward(f, 100, "float32") for name, f in FORWARD.items()}
    checked(programs, "float32", 400, chosen)


# --- Steps ---------------------------------------------------------------------------------------


class Ordered(cells.LSTM):
    """A gate that rises along the units, as in Shen et al. 2019, and one of shares of all."""

    def step(self, pre, state, params):
        f = jnp.cumsum(jax.nn.softmax(pre.f, axis=-1), axis=-1)
        c = f * state.c + jax.nn.softmax(pre.i, axis=-1) * jnp.tanh(pre.g)
        return jax.nn.sigmoid(pre.o) * jnp.tanh(c), self.State(c)


class Mixing(cells.LSTM):
    """A matrix, tables and a norm of each of four heads."""

    step_params = {"mix": (("H", "H"), 0.1), "table": (("H", 3), 1.0), "gain": (("H",), 1.0)}

    def step(self, pre, state, params):
        c = jax.nn.sigmoid(pre.f) * state.c + jax.nn.sigmoid(pre.i) * jnp.tanh(pre.g @ params.mix)
        shape = len(c), self.hidden_size // 4, 4
        seen = normalised(c.reshape(shape).swapaxes(1, 2)).reshape(c.shape) * params.gain[None]
        seen = jnp.tanh(seen[:, :, None] * params.table[None]).sum(-1)
        return jax.nn.sigmoid(pre.o) * seen, self.State(c)


def steps(*kinds):
    work = Workload("cpu", "float32", "highest", 1, BATCH, 8, training=True)
    found = {type(cell).__name__: step_of(cell, work) for cell in kinds}
    backward = {f"d {name}": step.backward for name, step in found.items()}
    return {name: step.forward for name, step in found.items()} | backward


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("units", "dense"), [(7, True), (16, False), (100, True)])
def test_steps_and_their_derivatives(units, dense):
    own = [Mixing(units)] if units % 4 == 0 else []
    programs = steps(cells.LayerNormLSTM(units), Ordered(units), *own)
    assert not any(map(refusal, programs.values()))
    checked(programs, "float32", 8 * units + 8, dense=dense)


def test_a_step_of_another_type_than_the_builder():
    programs = steps(cells.LayerNormLSTM(16))
    made, rng = compiled(programs, "float64"), np.random.default_rng(5)
    for name, program in programs.items():
        given = [rng.normal(size=a.shape).astype("float32") for a in program.closed.in_avals]
        expected = jax.tree.leaves(program(*map(jnp.asarray, given)))
        for one, right in zip(made[name](*given), expected, strict=True):
            assert_close(one, right, reduction=64, dtype="float32", what=name)


def test_what_is_element_wise_needs_no_memory():
    for name, program in steps(cells.PeepholeLSTM(100)).items():
        assert emit(ir.Module(), name, program, "float32", Machine.host(), True) == 0


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: jnp.sort(x, axis=1), "it uses sort"),
        (lambda x: lax.top_k(x, 2)[0], "it uses top_k"),
        (lambda x: lax.cumlogsumexp(x, 1), "it uses cumlogsumexp"),
        (lambda x: lax.lgamma(x) - x.sum(1, keepdims=True), "it uses lgamma"),
        (lambda x: lax.complex(x, x).real, "it uses complex"),
        (lambda x: x[:, ::-1].astype(jnp.float8_e4m3fn).astype(x.dtype), "float8_e4m3fn"),
        (lambda x: x[:, jnp.array([0, 0])], "it uses gather"),
        (lambda x: x.at[:, 0].set(0.0), "it uses scatter"),
        (lambda x: x - x.sum(0, keepdims=True), "reduce_sum over the rows"),
    ],
)
def test_what_cannot_be_emitted_is_named(f, reason):
    assert reason in refusal(forward(f, 3, "float32"))
