"""An element-wise program, emitted operation by operation on vectors.

`Vectors` runs a traced program whose every array is a vector: one of a row's units, or of whatever
else the caller gives. Numbers that are known now are computed now.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import llvmlite.ir as ir
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from lstmjax.recurrence.cpu.builder import Builder
from lstmjax.recurrence.cpu.functions import Functions, Wholes
from lstmjax.traced import (
    INLINED,
    AnyArray,
    Atom,
    Program,
    aval_of,
    callee,
    interpret,
    needed,
)

Value: TypeAlias = ir.Value | np.ndarray
"""A vector, or the number that all its elements would be."""

REAL_TYPES = dict.fromkeys(("float16", "bfloat16", "float32"), "float32") | {"float64": "float64"}
"""Types of real numbers, and those that they are computed in."""

SHORT = {"float16": (5, 10), "bfloat16": (8, 7)}
"""Bits of exponents and of digits of what is rounded after every operation."""

WHOLE_TYPES = {"bool": 1} | {f"{u}int{n}": n for u in ("", "u") for n in (8, 16, 32, 64)}
"""Types of whole numbers, with their bits."""


def refusal(program: Program) -> str | None:
    """What keeps a program from being emitted, by the name of the operation; None if nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> from lstmjax.traced import trace
        >>> refusal(trace(lambda x: jnp.cumsum(x, axis=1), jnp.ones((2, 3))))
        'it uses cumsum'
    """
    closed = program.closed
    reason = None if program.sums else program.elementwise()
    return reason or next(_refusals(closed.jaxpr, closed.consts, program.sums), None)


def _refusals(jaxpr: Jaxpr, consts: Iterable[AnyArray], sums: bool) -> Iterator[str]:
    for const in consts:
        if np.size(const) != 1:
            yield f"it holds a constant of shape {np.shape(const)}"
    for atom in (*jaxpr.constvars, *jaxpr.invars):
        if _type(atom) not in REAL_TYPES | WHOLE_TYPES:
            yield f"it uses {_type(atom)}"
    for eqn in needed(jaxpr):
        name = eqn.primitive.name
        if name in INLINED:
            yield from _refusals(*callee(eqn), sums)
        elif not (sums and name == "reduce_sum") and (reason := equation_refusal(eqn)):
            yield reason


def equation_refusal(eqn: JaxprEqn) -> str | None:
    """What keeps `Vectors.equation` from emitting one operation."""
    name = eqn.primitive.name
    if name not in {*SAME, *RULES, *REAL, *WHOLE}:
        return f"it uses {name}"
    types = [_type(atom) for atom in (*eqn.invars, *eqn.outvars)]
    odd = [t for t in types if t not in REAL_TYPES | WHOLE_TYPES]
    if name == "bitcast_convert_type":  # the bits of a short number are not there
        odd += set(types) & set(SHORT)
    if name not in {*SAME, *RULES} and name not in (REAL if types[0] in REAL_TYPES else WHOLE):
        odd.append(types[0])
    return f"it uses {name} of {odd[0]}" if odd else None


class Vectors:
    """Emits programs, or operations one by one, where a `Builder` is.

    Attributes:
        reals: what computes with real numbers, by their type.
        wholes: with whole numbers, likewise.
    """

    def __init__(self, builder: Builder) -> None:
        self.e, self.b = builder, builder.b
        self.reals = {t: Functions(builder, used) for t, used in REAL_TYPES.items()}
        self.wholes = {t: Wholes(builder, n, t[0] == "i") for t, n in WHOLE_TYPES.items()}

    def run(self, program: Program, args: Sequence[ir.Value]) -> list[ir.Value]:
        """The results, of the builder's type, of a program of flat arguments of that type.

        Sums over rows or units, in a derivative, are left to the caller.
        """
        jaxpr, own = program.closed.jaxpr, self.e.dtype
        ins = [
            self.converted(x, own, _type(var)) for x, var in zip(args, jaxpr.invars, strict=True)
        ]
        outs = self.evaluate(jaxpr, program.consts, ins)
        return [
            self.converted(self.full(out, _type(var)), _type(var), own)
            for out, var in zip(outs, jaxpr.outvars, strict=True)
        ]

    def evaluate(
        self, jaxpr: Jaxpr, consts: Iterable[object], args: Iterable[Value]
    ) -> list[Value]:
        """The outputs of a jaxpr."""
        return interpret(jaxpr, consts, args, self.equation)

    def equation(self, eqn: JaxprEqn, ins: Sequence[Value]) -> Value:
        """The result of one element-wise operation, not of a call."""
        name, types = eqn.primitive.name, [_type(atom) for atom in eqn.invars]
        if name in SAME:
            return ins[0]
        if all(isinstance(x, np.ndarray) for x in ins):
            return _fold(eqn, ins)
        if name in RULES:
            return RULES[name](self, eqn, ins)
        args = [self.full(x, t) for x, t in zip(ins, types, strict=True)]
        params = {k: v for k, v in eqn.params.items() if k in PARAMETERS}
        if types[0] in WHOLE_TYPES:
            return WHOLE[name](self.wholes[types[0]], *args, **params)
        return self.rounded(REAL[name](self.reals[types[0]], *args, **params), types[0])

    def full(self, x: Value, dtype: str) -> ir.Value:
        """As a vector."""
        if not isinstance(x, np.ndarray):
            return x
        if dtype in REAL_TYPES:
            return self.reals[dtype].c(float(x))
        return self.wholes[dtype].n(int(x))

    def rounded(self, x: ir.Value, dtype: str) -> ir.Value:
        """A computed number as one of its type."""
        if dtype not in SHORT or x.type != self.reals[dtype].kind:
            return x
        return self.reals[dtype].reduce_precision(x, *SHORT[dtype], gradual=True)

    def converted(self, x: ir.Value, old: str, new: str) -> ir.Value:
        """From one type to another."""
        b = self.b
        if old == new:
            return x
        if new == "bool":
            return self.compare("!=", x, self.full(np.zeros(()), old), old)
        if new in WHOLE_TYPES:
            kind, signed = self.wholes[new].kind, self.wholes[new].signed
            if old in REAL_TYPES:
                return self._saturated(x, kind, signed)
            if WHOLE_TYPES[new] <= WHOLE_TYPES[old]:
                return b.trunc(x, kind)
            return (b.sext if self.wholes[old].signed else b.zext)(x, kind)
        kind = self.reals[new].kind
        if old in WHOLE_TYPES:
            x = (b.sitofp if self.wholes[old].signed else b.uitofp)(x, kind)
        elif REAL_TYPES[old] != REAL_TYPES[new]:
            x = (b.fptrunc if REAL_TYPES[new] == "float32" else b.fpext)(x, kind)
        return self.rounded(x, new)

    def _saturated(self, x: ir.Value, kind: ir.VectorType, signed: bool) -> ir.Value:
        """To the nearest whole number towards zero that there is; 0 of NaN."""
        real = "f64" if isinstance(x.type.element, ir.DoubleType) else "f32"
        name = f"llvm.fpto{'s' if signed else 'u'}i.sat"
        name = f"{name}.v{kind.count}i{kind.element.width}.v{kind.count}{real}"
        known = self.e.module.globals.get(name)
        function = known or ir.Function(self.e.module, ir.FunctionType(kind, [x.type]), name)
        return self.b.call(function, [x])

    def compare(self, sign: str, x: ir.Value, y: ir.Value, dtype: str) -> ir.Value:
        """``x < y``, or another comparison: not of NaN, which differs from everything."""
        if dtype in WHOLE_TYPES:
            return self.wholes[dtype].compare(sign, x, y)
        return (self.b.fcmp_unordered if sign == "!=" else self.b.fcmp_ordered)(sign, x, y)


def _type(atom: Atom) -> str:
    return str(aval_of(atom).dtype)


def _number(value: object) -> np.ndarray:
    return np.asarray(value).reshape(())


def _fold(eqn: JaxprEqn, ins: Sequence[Value]) -> np.ndarray:
    """An operation on numbers only, done now."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        arrays = [jnp.asarray(x, aval_of(v).dtype) for x, v in zip(ins, eqn.invars, strict=True)]
        params = {"accuracy": None} if "accuracy" in eqn.params else {}
        return _number(eqn.primitive.bind(*arrays, **{**eqn.params, **params}))


# --- Rules ---------------------------------------------------------------------------------------

_SAME = "broadcast_in_dim reshape squeeze expand_dims reduce_sum copy copy_p pvary stop_gradient"
SAME = frozenset(_SAME.split())
"""A vector has the shape of whatever it stands for: what changes shapes changes nothing."""

PARAMETERS = frozenset(["y", "rounding_method", "exponent_bits", "mantissa_bits"])
"""Parameters of operations that say what is computed."""

_BOTH = "abs sign neg add sub mul div rem max min clamp square integer_pow"
_REAL = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil cos cosh erf erfc exp exp2 expm1 floor "
    "is_finite log log1p log2 logistic one_minus_square polynomial pow reduce_precision round "
    "rsqrt sin sinh sqrt tan tanh"
)

REAL: Mapping[str, Callable[..., ir.Value]] = {
    "add_any": Functions.add,
    **{name: getattr(Functions, name) for name in f"{_BOTH} {_REAL}".split()},
}
"""Operations on real numbers."""

_WHOLE = "population_count shift_left shift_right_arithmetic shift_right_logical"

WHOLE: Mapping[str, Callable[..., ir.Value]] = {
    "add_any": Wholes.add,
    "and": Wholes.both,
    "or": Wholes.either,
    "xor": Wholes.differ,
    "not": Wholes.invert,
    **{name: getattr(Wholes, name) for name in f"{_BOTH} {_WHOLE}".split()},
}
"""Operations on whole numbers."""


def _compare(sign: str) -> "Rule":
    def rule(vectors: Vectors, eqn: JaxprEqn, ins: Sequence[Value]) -> Value:
        dtype = _type(eqn.invars[0])
        x, y = (vectors.full(a, dtype) for a in ins)
        return vectors.compare(sign, x, y, dtype)

    return rule


def _select(vectors: Vectors, eqn: JaxprEqn, ins: Sequence[Value]) -> Value:
    which, dtype = ins[0], _type(eqn.invars[0])
    if isinstance(which, np.ndarray):
        return ins[1 + min(max(int(which), 0), len(ins) - 2)]
    out, *others = (vectors.full(x, _type(eqn.outvars[0])) for x in ins[1:])
    for k, case in enumerate(others, 1):
        here = which
        if dtype != "bool":
            here = vectors.compare(">=", which, vectors.full(np.asarray(k), dtype), dtype)
        out = vectors.b.select(here, case, out)
    return out


def _convert(vectors: Vectors, eqn: JaxprEqn, ins: Sequence[Value]) -> Value:
    return vectors.converted(ins[0], _type(eqn.invars[0]), _type(eqn.outvars[0]))


def _bitcast(vectors: Vectors, eqn: JaxprEqn, ins: Sequence[Value]) -> Value:
    new = _type(eqn.outvars[0])
    kind = (vectors.reals if new in REAL_TYPES else vectors.wholes)[new].kind
    return vectors.b.bitcast(ins[0], kind)


def _pow(vectors: Vectors, eqn: JaxprEqn, ins: Sequence[Value]) -> Value:
    (x, y), (dtype, other) = ins, map(_type, eqn.invars)
    functions, x = vectors.reals[dtype], vectors.full(x, dtype)
    known = float(y) if isinstance(y, np.ndarray) else np.nan
    if known in (0.5, -0.5):
        out = functions.sqrt(x) if known > 0 else functions.rsqrt(x)
    elif abs(known) < 16 and known == int(known):
        out = functions.integer_pow(x, int(known))
    else:
        out = functions.pow(x, vectors.converted(vectors.full(y, other), other, dtype))
    return vectors.rounded(out, dtype)


Rule: TypeAlias = Callable[[Vectors, JaxprEqn, Sequence[Value]], Value]

RULES: Mapping[str, Rule] = {
    "eq": _compare("=="),
    "ne": _compare("!="),
    "lt": _compare("<"),
    "le": _compare("<="),
    "gt": _compare(">"),
    "ge": _compare(">="),
    "select_n": _select,
    "convert_element_type": _convert,
    "bitcast_convert_type": _bitcast,
    "pow": _pow,
}
"""Operations that depend on more than what the first argument is."""
