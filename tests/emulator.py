"""AArch64 where there is none: Unicorn runs the CPU engine's machine code in place of XLA.

What is emitted is linked as little as it needs (ELF for the Arm 64-bit Architecture, table of
static relocations), and called as XLA would call it, with one worker.
"""

import ctypes
import mmap
import struct

import jax
import jax.numpy as jnp
import numpy as np
import unicorn
from jax import lax
from unicorn import arm64_const as arm

from lstmjax.recurrence.cpu.machine import compile_text

PAGE, ROOM = mmap.PAGESIZE, 2**26
ALLOCATED, TABLE_OF_SYMBOLS, RELOCATIONS = 2, 2, 4
TYPES = {"bool": 1, "int32": 4, "int64": 5, "float32": 11, "float64": 12}
END = 0x1000
"""Where the function returns to: nothing is there."""

# mov x3, x0; more: cbz x2, done; strb w1, [x3], 1; sub x2, x2, 1; b more; done: ret
OUTSIDE = {"memset": (0xB4000082_AA0003E3, 0xD1000442_38001461, 0xD65F03C0_17FFFFFD)}
"""What the C library has, as machine code; what a second worker would call is not there."""


class Arena:
    """Memory that the emulated function sees, at the addresses it has here."""

    def __init__(self, size=ROOM):
        self.room = mmap.mmap(-1, size)
        self.begin = ctypes.addressof(ctypes.c_char.from_buffer(self.room))
        self.used = 0

    def take(self, size, align=64):
        """Where so many bytes are free."""
        at = -(-self.used // align) * align
        self.used = at + size
        assert self.used <= len(self.room), "the emulated function has no more memory"
        return at

    def put(self, data):
        """The address of a copy."""
        at = self.take(len(data))
        self.room[at : at + len(data)] = data
        return self.begin + at

    def words(self, *values):
        return self.put(struct.pack(f"<{len(values)}Q", *values))


def link(code, arena):
    """The addresses of the symbols of an object file, once it is in memory."""
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count = struct.unpack_from("<HH", code, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, table + size * k) for k in range(count)]
    places = {}
    for number, (_, _, flags, _, at, length, *_, align, _) in enumerate(sections):
        if flags & ALLOCATED:
            free = arena.take(length, max(align, 1))
            arena.room[free : free + length] = code[at : at + length]
            places[number] = arena.begin + free
    (symbols,) = (s for s in sections if s[1] == TABLE_OF_SYMBOLS)
    names, found, by_name = sections[symbols[6]][4], [], {}
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", code, at)
        called = code[names + name : code.index(b"\0", names + name)].decode()
        outside = not section and called in OUTSIDE
        found.append(arena.words(*OUTSIDE[called]) if outside else places.get(section, 0) + value)
        by_name[called] = found[-1]
    for _, kind, _, _, at, length, _, target, _, _ in sections:
        if kind == RELOCATIONS and target in places:
            for entry in range(at, at + length, 24):
                offset, info, addend = struct.unpack_from("<QQq", code, entry)
                where = places[target] + offset
                relocate(arena, where, info & 0xFFFFFFFF, found[info >> 32] + addend)
    return by_name


def relocate(arena, where, kind, value):
    """Put the address of what is asked for into an instruction."""
    at = where - arena.begin
    (word,) = struct.unpack_from("<I", arena.room, at)
    if kind == 275:  # ADR_PREL_PG_HI21
        pages = (value >> 12) - (where >> 12)
        word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind == 277:  # ADD_ABS_LO12_NC
        word |= (value & 0xFFF) << 10
    elif kind in LOADS:
        word |= (value & 0xFFF) >> LOADS[kind] << 10
    elif kind in (282, 283):  # JUMP26, CALL26
        word |= (value - where) >> 2 & 0x3FFFFFF
    elif kind in (260, 261):  # PREL64, PREL32: of tables for debuggers
        return
    else:
        raise NotImplementedError(f"relocation {kind}")
    struct.pack_into("<I", arena.room, at, word)


LOADS = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
"""LDST8_ABS_LO12_NC to LDST128_ABS_LO12_NC: by how much an offset is shifted."""


def call(kernel, arguments):
    """The results of a kernel, run by the emulator."""
    arena = Arena()
    text, memory = kernel.emitted()
    symbols = link(compile_text(text, kernel.machine), arena)
    dtype = kernel.job.dtype
    shapes = kernel.shapes([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments])
    results = [np.full(a.shape, np.nan, dtype).view(a.dtype) for a in shapes]
    results.append(np.full((1, memory), np.nan, dtype))
    given, found = ([arena.put(np.ascontiguousarray(a).tobytes()) for a in side]
                    for side in (arguments, results))  # fmt: skip

    def side(arrays, places):
        made = []
        for a, place in zip(arrays, places, strict=True):
            dims = arena.words(*a.shape, 0)
            made.append(arena.words(48, 0, TYPES[str(a.dtype)], place, a.ndim, dims))
        return 40, 0, len(made), 0, arena.words(*made, 0)

    frame = arena.words(136, 0, 0, 0, 0, *side(arguments, given), *side(results, found))
    run(arena, symbols["kernel"], frame)
    return [
        np.ndarray(a.shape, a.dtype, arena.room, place - arena.begin).copy()
        for a, place in zip(results[:-1], found[:-1], strict=True)
    ]


def run(arena, function, frame):
    """Call it; anything outside of its memory that it touches is an error."""
    uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    uc.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    uc.mem_map_ptr(arena.begin, len(arena.room), unicorn.UC_PROT_ALL, arena.begin)
    stack = arena.begin + arena.take(2**16) + 2**16 - 64
    uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20 | 3 << 16)  # vectors are there
    uc.reg_write(arm.UC_ARM64_REG_CP_REG, (1, 1, 3, 6, 2, 1 << 8))  # CPTR_EL3: scalable ones, too
    uc.reg_write(arm.UC_ARM64_REG_CP_REG, (1, 2, 3, 0, 0, 0))  # ZCR_EL1: and have 128 bits
    for register, value in ((arm.UC_ARM64_REG_SP, stack), (arm.UC_ARM64_REG_X0, frame),
                            (arm.UC_ARM64_REG_LR, END)):  # fmt: skip
        uc.reg_write(register, value)
    uc.emu_start(function, END)
    assert uc.reg_read(arm.UC_ARM64_REG_X0) == 0, "the function gave an error"


def lowered(*args, kernel):
    """In place of what calls the kernel through XLA.

    Callbacks run in a thread to which JAX has not said that numbers may have 64 bits: so they are
    handed over as words of 32.
    """
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
    results = kernel.shapes(arguments)

    def run_here(*words):
        given = [np.asarray(w).view(a.dtype) for w, a in zip(words, arguments, strict=True)]
        return [a if a.dtype == bool else a.view("uint32") for a in call(kernel, given)]

    words = jax.eval_shape(lambda: [as_words(jnp.zeros(a.shape, a.dtype)) for a in results])
    found = jax.pure_callback(run_here, words, *map(as_words, args))
    return [from_words(w, a) for w, a in zip(found, results, strict=True)]


def as_words(a):
    if a.dtype == bool:
        return a
    last = a.shape[-1] * a.dtype.itemsize // 4
    return lax.bitcast_convert_type(a, "uint32").reshape(*a.shape[:-1], last)


def from_words(words, a):
    if a.dtype == bool:
        return words
    several = (2,) if a.dtype.itemsize == 8 else ()
    return lax.bitcast_convert_type(words.reshape(*a.shape, *several), a.dtype)
