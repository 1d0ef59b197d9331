"""All checks, in the order in which a person wants to read them: causes before consequences."""

from lstmjax.check import behaviour, gradients, structure
from lstmjax.check.subject import Check

CHECKS: tuple[Check, ...] = (
    Check("contract", structure.contract, ()),
    Check("pure", structure.pure, ("contract",)),
    Check("dtype", structure.dtype, ("contract", "pure")),
    Check("init", structure.init, ("contract",)),
    Check("finite", behaviour.finite, ("contract", "pure")),
    Check("used", structure.used),
    Check("state", structure.state),
    Check("rows", behaviour.rows),
    Check("carried", behaviour.carried),
    Check("masks", behaviour.masks),
    Check("resets", behaviour.resets),
    Check("directions", behaviour.directions),
    Check("gradient", gradients.gradient, ("contract", "pure", "dtype", "finite")),
    Check("engines", gradients.engines),
    Check("float32", gradients.float32),
    Check("extremes", behaviour.extremes),
    Check("long", behaviour.long),
    Check("vmap", gradients.mapped),
    Check("compiled", structure.compiled, ("contract", "pure")),
    Check("reference", behaviour.reference),
)
"""One after the other, each with those that must not have failed before it."""
