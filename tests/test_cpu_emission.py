"""Element-wise programs as the CPU's vectors: functions to their last digits, steps, refusals."""

import ctypes
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

pytest.importorskip("llvmlite")

import llvmlite.binding as llvm
import llvmlite.ir as ir

from lstmjax import cells
from lstmjax.recurrence.cpu.builder import I64, PTR, VOID, Builder
from lstmjax.recurrence.cpu.emit import REAL, RULES, SAME, WHOLE, Vectors, refusal
from lstmjax.recurrence.cpu.machine import Machine, compile_module, load_object
from lstmjax.recurrence.engine import Workload
from lstmjax.recurrence.step import step_of
from lstmjax.traced import trace
from lstmjax.traced.operations import ELEMENTWISE
from tests.test_emit import FUNCTIONS, TILE
from tests.tolerances import assert_close

SHAPE = (2, 3)  # of the trace
DTYPES = ["float32", "float64"]
LONG = np.longdouble


# --- Compiling -----------------------------------------------------------------------------------


def machines():
    """This machine, it with the shortest vectors, and one of its kind that has the least."""
    host = Machine.host()
    short = dataclasses.replace(host, bits=128)
    return {"host": host, "short": short, "plain": dataclasses.replace(short, cpu="", features="")}


def module_of(programs, dtype, machine):
    """``void f(in..., out..., n)`` for every program, by name; n is in whole vectors."""
    module = ir.Module()
    for name, program in programs.items():
        assert refusal(program) is None, name
        ins, outs = len(program.closed.in_avals), len(program.closed.out_avals)
        kind = ir.FunctionType(VOID, [PTR] * (ins + outs) + [I64])
        function = ir.Function(module, kind, f"emitted {name}")
        e = Builder(machine, dtype, function)
        *pointers, n = function.args
        with e.loop(n, step=e.lanes) as k:
            found = Vectors(e).run(program, [e.load(e.at(p, k)) for p in pointers[:ins]])
            for out, p in zip(found, pointers[ins:], strict=True):
                e.store(out, e.at(p, k))
        e.b.ret_void()
    return module


def compiled(programs, dtype, machine=None):
    """Python functions of arrays: name -> (*arrays -> list of arrays)."""
    machine = machine or Machine.host()
    code = compile_module(module_of(programs, dtype, machine), machine)
    addresses = load_object(code, [f"emitted {name}" for name in programs])
    return {
        name: functools.partial(call, addresses[f"emitted {name}"], dtype, len(p.closed.out_avals))
        for name, p in programs.items()
    }


def call(address, dtype, outs, *arrays):
    size = arrays[0].size
    room = -(-size // 16) * 16
    given = [np.resize(np.asarray(a, dtype), room) for a in arrays]
    found = [np.full(room, 7, dtype) for _ in range(outs)]
    pointers = [a.ctypes.data for a in (*given, *found)]
    kinds = [ctypes.c_void_p] * len(pointers) + [ctypes.c_int64]
    ctypes.CFUNCTYPE(None, *kinds)(address)(*pointers, room)
    return [a[:size].reshape(arrays[0].shape) for a in found]


def traced(f, dtype="float32", arguments=1):
    with jax.enable_x64(dtype == "float64"):
        return trace(lambda *a: [f(*a)], *[jax.ShapeDtypeStruct(SHAPE, dtype)] * arguments)


# --- Functions, to their last digits -------------------------------------------------------------

# name: function, exact, ulps allowed in float32 and in float64. The bounds of what is made of
# others, and those of float64, leave room for what the points do not show.
EXACT = {
    "exp": (jnp.exp, np.exp, 1, 1.5),
    "exp2": (jnp.exp2, np.exp2, 1, 1.5),
    "expm1": (jnp.expm1, np.expm1, 2, 2.5),
    "logistic": (jax.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 2.5, 2.5),
    "tanh": (jnp.tanh, np.tanh, 3, 3.5),
    "sinh": (jnp.sinh, np.sinh, 4.5, 5),
    "cosh": (jnp.cosh, np.cosh, 3, 4.5),
    "log": (jnp.log, np.log, 1, 1),
    "log2": (jnp.log2, np.log2, 2, 2),
    "log1p": (jnp.log1p, np.log1p, 2, 2),
    "asinh": (jnp.arcsinh, np.arcsinh, 2, 2),
    "acosh": (jnp.arccosh, np.arccosh, 2, 2.5),
    "atanh": (jnp.arctanh, np.arctanh, 2, 2),
    "sin": (jnp.sin, np.sin, 2, 2),
    "cos": (jnp.cos, np.cos, 2, 2),
    "tan": (jnp.tan, np.tan, 4, 4),
    "asin": (jnp.arcsin, np.arcsin, 3.5, 3.5),
    "acos": (jnp.arccos, np.arccos, 3.5, 3.5),
    "atan": (jnp.arctan, np.arctan, 3, 3),
    "erf": (lax.erf, np.vectorize(math.erf), 1.5, 5),
    "erfc": (lax.erfc, np.vectorize(math.erfc), 5, 8),
    "cbrt": (jnp.cbrt, np.cbrt, 1, 1),
    "sqrt": (jnp.sqrt, np.sqrt, 0.5, 0.5),
    "rsqrt": (lax.rsqrt, lambda x: 1 / np.sqrt(x), 1.5, 1.5),
    "reciprocal": (lambda x: 1 / x, lambda x: 1 / x, 0.5, 0.5),
    "floor": (jnp.floor, np.floor, 0, 0),
    "ceil": (jnp.ceil, np.ceil, 0, 0),
    "round": (jnp.round, np.round, 0, 0),
    "away": (lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), None, 0, 0),
    "trunc": (jnp.trunc, np.trunc, 0, 0),
    "abs": (jnp.abs, np.abs, 0, 0),
    "sign": (jnp.sign, np.sign, 0, 0),
    "cube": (lambda x: x**3, lambda x: x**3, 1.5, 1.5),
    "minus five": (lambda x: x**-5, lambda x: x**-5, 5, 5),
}


def away(x):
    return np.copysign(np.floor(np.abs(x) + LONG(0.5)), x)


def points(dtype):
    """Over all magnitudes, densely where functions bend, and what is special."""
    rng, info = np.random.default_rng(0), np.finfo(dtype)
    far = 110 if dtype == "float32" else 760
    signs = rng.choice([-1, 1], 8000)
    sizes = [rng.uniform(info.minexp + 1, info.maxexp - 1e-6, 4000), rng.uniform(-30, 6, 4000)]
    uniform = [rng.uniform(-end, end, 4000) for end in (1, 20, far)]
    special = [0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, np.inf, -np.inf, np.nan, info.max, -info.max]
    more = [info.tiny, -info.tiny, info.eps, 1 + info.eps, 1 - info.eps, 1e6, 1.000001e6, 127.5]
    ends = np.log([info.max, info.tiny, info.tiny / 2, 2**0.5, 2**-0.5, 2.0]).astype(dtype)
    ends = np.concatenate([ends, [info.maxexp, info.minexp, 0.5, 2**0.5, 2**-0.5, 2.0]])
    for way in (np.inf, -np.inf):
        for _ in range(2):
            more.extend(ends := np.nextafter(ends.astype(dtype), np.dtype(dtype).type(way)))
    all_ = [*uniform, signs * 2.0 ** np.concatenate(sizes), special, more]
    return np.concatenate(all_).astype(dtype)


def ulps(found, exact, dtype):
    """Errors in units of the last digit; numbers below the smallest normal one may be 0."""
    info = np.finfo(dtype)
    nearest = exact.astype(dtype)
    size = np.maximum(np.abs(nearest), info.tiny)
    error = np.abs(found.astype(LONG) - exact) / np.spacing(np.minimum(size, info.max)).astype(LONG)
    same = np.where(np.isfinite(nearest), False, found == nearest)
    same |= np.isnan(found) & np.isnan(nearest)
    same |= (np.abs(exact) < info.tiny) & (np.abs(found) <= info.tiny)
    return np.where(same, 0, np.where(np.isnan(error), np.inf, error)).astype("float64")


@pytest.fixture(scope="module")
def functions():
    """By machine and type, all functions of one argument, compiled when they are asked for."""

    @functools.cache
    def build(machine, dtype):
        programs = {name: traced(f, dtype) for name, (f, *_) in EXACT.items()}
        return compiled(programs, dtype, machines()[machine])

    return build


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("machine", "dtype"),
    [("host", "float32"), ("host", "float64"), ("plain", "float32"), ("short", "float64")],
)
def test_functions_are_right_to_their_last_digits(functions, machine, dtype, name):
    _, exact, *bounds = EXACT[name]
    x = points(dtype)
    with np.errstate(all="ignore"):
        expected = (exact or away)(x.astype(LONG)).astype(LONG)
        (found,) = functions(machine, dtype)[name](x)
        error = ulps(found, expected, dtype)
    worst = int(np.argmax(error))
    allowed = bounds[DTYPES.index(dtype)] + (machine == "plain")  # without fused multiply-add
    assert error[worst] <= allowed, f"{name}({x[worst]}) = {found[worst]}, not {expected[worst]}"


def pairs(dtype):
    rng = np.random.default_rng(1)
    special = np.array([0, -0.0, 1, -1, 2, 3, -3, 0.5, 1e30, np.inf, -np.inf, np.nan])
    x, y = (a.ravel() for a in np.meshgrid(special, special))
    near = rng.normal(size=(2, 2000)) * 3
    return np.concatenate([x, near[0]]).astype(dtype), np.concatenate([y, near[1]]).astype(dtype)


def largest(x, y, extremum):
    return np.where(np.isnan(x) | np.isnan(y), np.nan, extremum(x, y))


PAIRS = {
    "pow": (jnp.power, np.power, 1.5),
    "atan2": (jnp.arctan2, np.arctan2, 3),
    "rem": (lax.rem, np.fmod, 0),
    "max": (jnp.maximum, lambda x, y: largest(x, y, np.fmax), 0),
    "min": (jnp.minimum, lambda x, y: largest(x, y, np.fmin), 0),
    "add": (jnp.add, np.add, 0.5),
    "div": (jnp.divide, np.divide, 0.5),
    **{
        name: (lambda x, y, f=f: f(x, y).astype(x.dtype), f, 0)
        for name, f in [
            ("eq", lambda x, y: x == y),
            ("ne", lambda x, y: x != y),
            ("lt", lambda x, y: x < y),
            ("le", lambda x, y: x <= y),
            ("gt", lambda x, y: x > y),
            ("ge", lambda x, y: x >= y),
        ]
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_two(dtype):
    made = compiled({name: traced(f, dtype, 2) for name, (f, *_) in PAIRS.items()}, dtype)
    x, y = pairs(dtype)
    for name, (_, exact, bound) in PAIRS.items():
        with np.errstate(all="ignore"):
            expected = np.asarray(exact(x.astype(LONG), y.astype(LONG)), LONG)
            (found,) = made[name](x, y)
            error = ulps(found, expected, dtype)
        worst = int(np.argmax(error))
        assert error[worst] <= bound, (name, x[worst], y[worst], found[worst], expected[worst])


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_all_sizes(dtype):
    rng, end = np.random.default_rng(2), np.log(np.finfo(dtype).max)
    x = np.exp(rng.uniform(-0.98 * end, end, 20000)).astype(dtype)
    y = (rng.uniform(-1.05, 1.05, 20000) * end / np.log(x)).astype(dtype)
    (found,) = compiled({"pow": traced(jnp.power, dtype, 2)}, dtype)["pow"](x, y)
    with np.errstate(all="ignore"):
        error = ulps(found, x.astype(LONG) ** y.astype(LONG), dtype)
    assert error.max() <= (1 if dtype == "float32" else 20)


# --- Whole numbers, bits and short numbers, exactly as JAX has them ------------------------------


def whole(f, dtype, *more):
    """Of the numbers rounded to whole ones of a type, and of others."""

    def rounded(x):
        found = f(x.astype(dtype), *(jnp.asarray(y, dtype) for y in more))
        return found.astype("float32")

    return rounded


def on_bits(f, dtype="uint32"):
    def on(x):
        bits = lax.bitcast_convert_type(x, jnp.dtype(dtype))
        return lax.bitcast_convert_type(f(bits).astype(dtype), jnp.float32)

    return on


def short(f, dtype):
    return lambda x: f(x.astype(dtype)).astype("float32")


BY_BITS = {
    "to int32": whole(lambda n: n, "int32"),
    "to int8": whole(lambda n: n, "int8"),
    "to uint8": whole(lambda n: n, "uint8"),
    "to uint32": whole(lambda n: n, "uint32"),
    "to int16 to uint32": whole(lambda n: n.astype("uint32"), "int16"),
    "to bool": lambda x: x.astype("bool").astype("float32"),
    "wraps": whole(lambda n: n * n + n - 3, "int8"),
    "abs": whole(abs, "int32"),
    "neg": whole(lambda n: -n, "int32"),
    "sign": whole(jnp.sign, "int32"),
    "div": whole(lax.div, "int32", 7),
    "div by zero": whole(lambda n: lax.div(n, n - n), "int32"),
    "div by minus one": whole(lambda n, m: lax.div(n, m + (n - n)), "int32", -1),
    "div unsigned": whole(lax.div, "uint32", 7),
    "rem": whole(lax.rem, "int32", -7),
    "rem by zero": whole(lambda n: lax.rem(n, n - n), "int32"),
    "rem unsigned": whole(lax.rem, "uint16", 7),
    "max": whole(jnp.maximum, "int32", 2),
    "max unsigned": whole(lambda n: jnp.minimum(~n, n), "uint32"),
    "clamp": whole(lambda n: jnp.clip(n, -2, 3), "int32"),
    "cube": whole(lambda n: n**3, "int32"),
    "to the 0": whole(lambda n: lax.integer_pow(n, 0), "int32"),
    "less": whole(lambda n: n < 2, "int32"),
    "less unsigned": whole(lambda n, m: ~n < m, "uint32", 2**31),
    "and, or": on_bits(lambda n: (n & np.uint32(0x7FFFFFFF)) | np.uint32(0x80000000)),
    "xor": on_bits(lambda n: n ^ np.uint32(0x00FF00FF)),
    "not": on_bits(lambda n: ~n ^ np.uint32(0xFFF00000)),
    "counts": whole(lambda n: lax.population_count(n * 77), "int32"),
    "left": whole(lambda n: lax.shift_left(n, n & 63), "int32"),
    "right": whole(lambda n: lax.shift_right_arithmetic(n * 99999, n & 63), "int32"),
    "right with zeros": whole(lambda n: lax.shift_right_logical(n, n & 63), "uint32"),
    "of three": lambda x: lax.select_n((x.astype("uint8") % 3).astype("int32"), x, -x, x * x),
    "of bools": lambda x: jnp.where((x > 0) ^ (x < 2), x, 1.0),
    "bools compared": lambda x: jnp.where((x > 0) <= (x < 2), x, 1.0),
    "fewer digits": lambda x: lax.reduce_precision(x, 8, 11),
    "fewer exponents": lambda x: lax.reduce_precision(x, 5, 10),
    "as many": lambda x: lax.reduce_precision(x, 8, 23),
    "bfloat16": short(lambda x: x, "bfloat16"),
    "float16": short(lambda x: x, "float16"),
    "in bfloat16": short(lambda x: x * x + x, "bfloat16"),
    "in float16": short(lambda x: jnp.where(abs(x) > 3, x * 0.3, x * x + x), "float16"),
    "bfloat16 with a number": short(lambda x: x * 1.1 - 3, "bfloat16"),
    "clip": lambda x: lax.clamp(np.float32(-1), x, np.float32(2)),
    "clip to the array": lambda x: lax.clamp(-abs(x), jnp.full_like(x, 0.1), abs(x)),
    "known": lambda x: jnp.where(jnp.float32(2.0) > 1, x, jnp.sqrt(jnp.float32(3.0))),
    "known bits": lambda x: x * lax.bitcast_convert_type(np.int32(1 << 30), jnp.float32),
}


def test_bits_are_those_of_jax():
    rng = np.random.default_rng(3)
    uniform = [rng.uniform(-end, end, 500) for end in (3, 300, 1e5, 4e9)]
    tiny = rng.normal(size=500) * 2.0 ** rng.integers(-26, 17, 500)
    special = [0, -0.0, 1, -1, 2.5, 65519, 65520, 2**31, -(2**31), 1e20, np.inf, -np.inf, np.nan]
    x = np.concatenate([*uniform, tiny, special]).astype("float32")
    made = compiled({name: traced(f) for name, f in BY_BITS.items()}, "float32")
    for name, f in BY_BITS.items():  # one by one: XLA skips roundings between operations
        np.testing.assert_array_equal(made[name](x)[0], f(jnp.asarray(x)), err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_may_be_mixed(dtype):
    other = DTYPES[dtype == "float32"]

    def f(x):
        whole = (x * 1000).astype("int64") << 2
        return jnp.exp(x.astype(other)).astype(dtype) + whole.astype(dtype)

    x = np.linspace(-3, 3, 200, dtype=dtype)
    with jax.enable_x64(True):
        program = trace(lambda x: [f(x)], jax.ShapeDtypeStruct(SHAPE, dtype))
        expected = f(jnp.asarray(x))
    (found,) = compiled({"mixed": program}, dtype)["mixed"](x)
    assert_close(found, expected, dtype="float32")


def test_a_program_of_another_type_than_the_builder():
    def f(x, y):
        return [x * y, x > y, x.astype("int32"), jnp.float32(2.5)]

    x, y = np.linspace(-3, 3, 40), np.linspace(2, -2, 40)
    program = trace(f, *[jax.ShapeDtypeStruct(SHAPE, "float32")] * 2)
    found = compiled({"f": program}, "float64")["f"](x, y)
    expected = [np.float32(x) * np.float32(y), x > y, np.trunc(x), np.full(40, 2.5)]
    for one, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, right)


# --- Functions and steps with their derivatives --------------------------------------------------

ONLY_FLOAT32 = {"power of x", "bits", "numbers only"}


def with_derivative(f):
    def both(x, ct):
        y, pull = jax.vjp(f, x)
        return [y, *pull(ct)]

    return both


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_and_their_derivatives(dtype):
    wanted = FUNCTIONS if dtype == "float32" else FUNCTIONS.keys() - ONLY_FLOAT32
    both = {name: with_derivative(FUNCTIONS[name][0]) for name in wanted}
    xs = {name: FUNCTIONS[name][1].astype(dtype) for name in wanted}
    ct = np.random.default_rng(0).normal(size=TILE).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        shapes = [jax.ShapeDtypeStruct(SHAPE, dtype)] * 2
        programs = {name: trace(f, *shapes) for name, f in both.items()}
        run = jax.jit(lambda xs, ct: {name: f(xs[name], ct) for name, f in both.items()})
        expected = run(xs, ct)
    made = compiled(programs, dtype)
    for name in wanted:
        pairs = zip(("value", "derivative"), made[name](xs[name], ct), expected[name], strict=True)
        for what, found, right in pairs:
            assert_close(found, right, reduction=4, what=f"{what} of {name}")


CELLS = [
    cells.LSTM(8),
    cells.GRU(8),
    cells.PeepholeLSTM(8),
    cells.CoupledLSTM(8),
    cells.SLSTM(8),
    cells.JANET(8),
    cells.ZoneoutLSTM(8),
]


def test_steps_and_their_derivatives():
    """Of one row: there the sums over rows, which are the caller's, are what they sum."""
    programs = {}
    for cell in CELLS:
        step = step_of(cell, Workload("cpu", "float32", "highest", 1, 1, 8, training=True))
        programs[f"{type(cell).__name__} forward"] = step.forward
        programs[f"{type(cell).__name__} backward"] = step.backward
    made, rng = compiled(programs, "float32"), np.random.default_rng(4)
    for name, program in programs.items():
        ins = [rng.normal(size=a.shape).astype("float32") for a in program.closed.in_avals]
        found = made[name](*ins)
        expected = jax.tree.leaves(program(*map(jnp.asarray, ins)))
        for k, (one, right) in enumerate(zip(found, expected, strict=True)):
            assert_close(one.ravel(), right.ravel(), reduction=4, what=f"{name}, result {k}")


@jax.custom_jvp
def steep(x):
    return jnp.where(x > 0, 1.0, 0.0)


@steep.defjvp
def _(primals, tangents):
    return steep(*primals), tangents[0] * jax.nn.sigmoid(primals[0])


def test_calls_in_calls():
    @jax.jit
    def inner(x, y):
        return jax.checkpoint(lambda a: jax.nn.relu(a) * steep(y))(x) + 1

    x, y = np.linspace(-2, 2, 64, dtype="float32"), np.linspace(3, -1, 64, dtype="float32")
    gradient = jax.grad(lambda x, y: jax.jit(inner)(jnp.sin(x), y).sum(), (0, 1))
    program = trace(gradient, *[jax.ShapeDtypeStruct(SHAPE, "float32")] * 2).with_sums((0, 0))
    found = compiled({"f": program}, "float32")["f"](x, y)
    for one, right in zip(found, gradient(x, y), strict=True):
        assert_close(one, right)


def optimized(module):
    """The text of a module as `compile_module` has it before it becomes machine code."""
    target = Machine.host().target()
    module.triple, module.data_layout = Machine.host().triple, str(target.target_data)
    parsed = llvm.parse_assembly(str(module))
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(parsed, passes)
    return str(parsed)


def test_what_is_computed_twice_is_emitted_once():
    both = with_derivative(lambda x: jnp.tanh(x) * jax.nn.sigmoid(x) + jnp.tanh(x))
    text = optimized(module_of({"f": traced(both, arguments=2)}, "float32", Machine.host()))
    assert text.count("fdiv") == 2  # of one tanh and one sigmoid


def test_known_numbers_are_computed_now():
    def f(x):
        return x + jnp.exp(jnp.sqrt(jnp.float32(2.0))) * jnp.float32(2.0) ** jnp.float32(0.3)

    def emitted(x):  # also while JAX traces something else
        texts.append(optimized(module_of({"f": program}, "float32", Machine.host())))
        return x

    program, texts = traced(f), []
    jax.jit(emitted)(jnp.zeros(3))
    assert "fmul" not in texts[0]
    assert texts[0].count("fadd") == 1


# --- What is refused -----------------------------------------------------------------------------

EXOTIC = (
    "bessel_i0e bessel_i1e digamma erf_inv igamma igamma_grad_a igammac lgamma nextafter "
    "polygamma regularized_incomplete_beta zeta"
)


def test_what_is_element_wise_is_emitted_but_for_special_functions():
    assert ELEMENTWISE - {*REAL, *WHOLE, *RULES, *SAME} == set(EXOTIC.split())


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: lax.digamma(x), "it uses digamma"),
        (lambda x: jax.jit(lax.lgamma)(x), "it uses lgamma"),
        (lambda x: lax.nextafter(x, x + 1), "it uses nextafter"),
        (lambda x: jnp.cumsum(x, axis=1), "it uses cumsum"),
        (lambda x: x - jnp.sum(x, axis=-1, keepdims=True), "it uses reduce_sum"),
        (lambda x: x * np.ones((1, 3), "float32"), "it holds a constant of shape (1, 3)"),
        (lambda x: lax.complex(x, x).real, "it uses complex"),
        (lambda x: x.astype(jnp.float8_e4m3fn).astype(x.dtype), "float8_e4m3fn"),
        (lambda x: x.astype("int4").astype(x.dtype), "it uses convert_element_type of int4"),
        (
            lambda x: lax.bitcast_convert_type(x.astype("bfloat16"), jnp.uint16).astype(x.dtype),
            "it uses bitcast_convert_type of bfloat16",
        ),
    ],
)
def test_what_cannot_be_emitted_is_named(f, reason):
    assert reason in refusal(traced(f))


def test_derivatives_are_refused_by_name():
    program = traced(with_derivative(lambda x: lax.lgamma(x)), arguments=2)
    assert refusal(program.with_sums((0, 0))) == "it uses lgamma"
