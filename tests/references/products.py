"""LSTMs with further products."""

from tests.numpy_reference import lstm_step, peephole_lstm_step
from tests.references.functions import Array, Params, Step, sigmoid


def projected(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Sak et al. 2014, equations 7 to 13, without the projection that does not recur."""
    m, state, _ = peephole_lstm_step(params, x, h, state)
    return m @ params["step"]["projection"], state, {}


def multiplicative(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Krause et al. 2016, equations 17 to 22."""
    own = params["step"]
    m = (x @ own["input_factor"]) * (h @ own["hidden_factor"])
    return lstm_step(params, x, m, state)


def mogrifier(params: Params, x: Array, h: Array, state: tuple) -> Step:
    """Melis et al. 2020, equations 1 and 2, for three rounds."""
    own = params["step"]
    x = 2 * sigmoid(h @ own["q1"]) * x
    h = 2 * sigmoid(x @ own["r2"]) * h
    x = 2 * sigmoid(h @ own["q3"]) * x
    return lstm_step(params, x, h, state)
