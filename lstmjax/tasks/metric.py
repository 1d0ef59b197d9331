"""The figure that models are judged by."""

import math
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """The figure that a task is judged by, made of what the loop measures.

    Attributes:
        name: what it is called.
        of: ``"score"``, or ``"loss"``, of which it is a multiple.
        scale: that multiple.
        higher_is_better: which way is up.
        percent: whether it is a share.
    """

    name: str
    of: Literal["score", "loss"] = "score"
    scale: float = 1.0
    higher_is_better: bool = True
    percent: bool = False

    def text(self, value: float) -> str:
        """The figure as it is printed.

        >>> ACCURACY.text(0.51234), BITS.text(1.23456)
        ('51.23 %', '1.2346')
        """
        return f"{value:.2%}".replace("%", " %") if self.percent else f"{value:.4f}"


ACCURACY = Metric("accuracy", percent=True)
BITS = Metric("bits per character", "loss", 1 / math.log(2), higher_is_better=False)
MEAN_SQUARED_ERROR = Metric("mean squared error", "loss", higher_is_better=False)
