"""The products of the CPU engine: right to rounding, and at home in their own memory."""

import ctypes
import dataclasses
import math
import mmap
import zlib

import numpy as np
import pytest

pytest.importorskip("llvmlite")

import llvmlite.ir as ir

from lstmjax.recurrence.cpu.builder import I64, PTR, VOID, Builder
from lstmjax.recurrence.cpu.machine import Machine, compile_module, load_object
from lstmjax.recurrence.cpu.products import DEPTH, Products, Strides

ROWS, TERMS = 200, 2000  # at most
SIZES = [(1, 1), (1, DEPTH + 1), (2, 0), (0, 3), (64, 132), (ROWS, 5), (3, TERMS)]

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def machines():
    """This machine, and it with the shortest vectors and another tile."""
    host = Machine.host()
    return {"host": host, "short": dataclasses.replace(host, bits=128, rows=3, vectors=3)}


def guarded(count, dtype):
    """So many numbers, NaN, and none before or behind them may be touched."""
    page = mmap.PAGESIZE
    size = count * np.dtype(dtype).itemsize
    room = mmap.mmap(-1, -(-size // page) * page + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for edge in (start, start + len(room) - page):
        assert libc.mprotect(edge, page, 0) == 0
    array = np.frombuffer(room, dtype, count, len(room) - page - size)
    array[:] = np.nan
    return array


def matrix(numbers, rows, columns, row, column):
    """A view of numbers with these strides."""
    strides = (row * numbers.itemsize, column * numbers.itemsize)
    return np.lib.stride_tricks.as_strided(numbers, (rows, columns), strides)


def extent(rows, columns, row, column):
    """Numbers from the first to the last one of a matrix with these strides."""
    return (rows - 1) * row + (columns - 1) * column + 1 if rows and columns else 0


def compiled(machine, dtype, vectors, strides):
    """``product(left, weights, out, pitch, rows, depth)``, for new and for old sums."""
    module = ir.Module()
    products = Products(module, machine, dtype)
    for name in ("new", "old"):
        f = ir.Function(module, ir.FunctionType(VOID, [PTR] * 3 + [I64] * 3), name)
        e = Builder(machine, dtype, f)
        products.panel(e, *f.args, vectors, strides, adding=name == "old")
        e.b.ret_void()
    addresses = load_object(compile_module(module, machine), ["new", "old"])
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
    return {name: kind(address) for name, address in addresses.items()}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["host", "short"])
def test_products(kind, dtype, transposed):
    machine = machines()[kind]
    random = np.random.default_rng(zlib.crc32(f"{kind} {dtype} {transposed}".encode()))
    row, step = (1, ROWS + 7) if transposed else (TERMS + 9, 1)
    for vectors in range(1, machine.vectors + 1):
        width = vectors * machine.lanes(dtype)
        gap = int(random.integers(0, 2)) * 3
        functions = compiled(machine, dtype, vectors, Strides(row, step, width + gap))
        some = zip(random.integers(1, ROWS, 6), random.integers(1, 600, 6), strict=True)
        for rows, depth in [*SIZES, *((int(r), int(d)) for r, d in some)]:
            pitch = width + int(random.integers(0, 20))
            left = guarded(extent(rows, depth, row, step), dtype)
            weights = guarded(extent(depth, width, width + gap, 1), dtype)
            matrix(left, rows, depth, row, step)[:] = random.normal(size=(rows, depth))
            matrix(weights, depth, width, width + gap, 1)[:] = random.normal(size=(depth, width))
            for name, function in functions.items():
                memory = guarded(pitch + extent(rows, width, pitch, 1), dtype)
                out = memory[pitch:]
                inside = matrix(out, rows, width, pitch, 1)
                if name == "old":
                    inside[:] = random.normal(size=(rows, width))
                before = inside.copy() if name == "old" else np.zeros((rows, width), dtype)
                function(left.ctypes.data, weights.ctypes.data, out.ctypes.data, pitch, rows, depth)
                check(
                    matrix(left, rows, depth, row, step),
                    matrix(weights, depth, width, width + gap, 1),
                    before,
                    inside,
                )
                inside[:] = np.nan
                assert np.isnan(memory).all()


def check(left, weights, before, after):
    """Exact up to a rounding, of half an eps, for each term of a part of the sum and each part.

    The other half is for machines that multiply and add in two, and for the reference.
    """
    parts = max(1, math.ceil(left.shape[1] / DEPTH))
    roundings = math.ceil(left.shape[1] / parts) + parts + 1
    exact = np.float64 if after.dtype == np.float32 else np.longdouble
    left, weights, old = left.astype(exact), weights.astype(exact), before.astype(exact)
    most = roundings * np.finfo(after.dtype).eps * (abs(left) @ abs(weights) + abs(old))
    assert (abs(after - (old + left @ weights)) <= most).all()


@pytest.mark.parametrize("kind", ["host", "short"])
def test_products_of_packed_blocks(kind):
    """Each block of rows of the left side by itself, the terms of the sum one after the other."""
    machine, depth = machines()[kind], DEPTH + 3
    random = np.random.default_rng(zlib.crc32(kind.encode()))
    for vectors in range(1, machine.vectors + 1):
        most, width = machine.tile_rows(vectors), vectors * machine.lanes("float32")
        room = most + 1
        function = compiled(machine, "float32", vectors, Strides(1, room, width, depth * room))
        for rows in (1, most, most + 1, 5 * most + 2):
            left = random.normal(size=(rows, depth)).astype(np.float32)
            weights = random.normal(size=(depth, width)).astype(np.float32)
            blocks = math.ceil(rows / most)
            packed = guarded(blocks * depth * room, "float32")
            for block, place in enumerate(packed.reshape(blocks, depth, room)):
                some = left[rows * block // blocks : rows * (block + 1) // blocks].T
                place[:, : some.shape[1]] = some
            out = guarded(rows * width, "float32").reshape(rows, width)
            places = [a.ctypes.data for a in (packed, weights, out)]
            function["new"](*places, width, rows, depth)
            check(left, weights, np.zeros_like(out), out)


def test_terms_add_up_before_they_meet_what_is_there():
    machine, eps = Machine.host(), np.finfo(np.float32).eps
    width = machine.lanes("float32")
    add = compiled(machine, "float32", 1, Strides(DEPTH, 1, width))["old"]
    left, out = np.ones(DEPTH, np.float32), np.ones(width, np.float32)
    weights = np.full((DEPTH, width), eps / 8, np.float32)
    add(left.ctypes.data, weights.ctypes.data, out.ctypes.data, width, 1, DEPTH)
    assert (out == 1 + DEPTH * eps / 8).all()


def test_one_function_for_each_form():
    module, machine = ir.Module(), Machine.host()
    products = Products(module, machine, "float32")
    f = ir.Function(module, ir.FunctionType(VOID, [PTR] * 3), "several")
    e = Builder(machine, "float32", f)
    for strides in (Strides(144, 1, 16), Strides(1, 144, 16), Strides(144, 1, 16)):
        for adding in (False, True):
            products.panel(e, *f.args, 16, 2, 144, 1, strides, adding)
    e.b.ret_void()
    assert sum(g.name.startswith("panel") for g in module.functions) == 2
    compile_module(module, machine)
