"""PyTorch, eager, with its own threads.

Denormal numbers are flushed to zero, as JAX and TensorFlow do unasked: a gradient that vanishes
over 500 steps makes PyTorch's default many times slower.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

from benchmarks import problems
from benchmarks.contenders import Job, training_job
from benchmarks.problems import Case

torch.set_flush_denormal(True)


def _set(lstm: nn.LSTM, weights: Mapping[str, np.ndarray]) -> None:
    """Our weights: the blocks are in PyTorch's order; its second bias is frozen at zero."""
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(torch.from_numpy(weights["kernel"].T.copy()))
        lstm.weight_hh_l0.copy_(torch.from_numpy(weights["recurrent_kernel"].T.copy()))
        lstm.bias_ih_l0.copy_(torch.from_numpy(weights["bias"]))
        lstm.bias_hh_l0.zero_().requires_grad_(False)


def recurrence(case: Case) -> Job:
    """``torch.nn.LSTM``, time-major as it comes."""
    params, x, d_hs = problems.recurrence(case)
    lstm, inputs = nn.LSTM(case["features"], case["hidden"]), torch.from_numpy(x)
    _set(lstm, params)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return lstm(inputs)[0]

    def both() -> torch.Tensor:
        lstm.zero_grad()
        inputs.grad = None
        hs = lstm(inputs.requires_grad_())[0]
        hs.backward(torch.from_numpy(d_hs))
        return hs

    def check() -> dict[str, np.ndarray]:
        last, d_x = both()[-1].detach().numpy(), inputs.grad
        gradients: Any = [lstm.weight_ih_l0.grad, lstm.weight_hh_l0.grad, lstm.bias_ih_l0.grad]
        found = {name: g.numpy().T for name, g in zip(params, gradients, strict=True)}
        return {"last": last, "d x": d_x[0].numpy() if d_x is not None else d_x, **found}

    if case["mode"] == "forward":
        return Job(forward, lambda: {"last": forward()[-1].numpy()})
    return Job(both, check)


class Model(nn.Module):
    """The notebook's model; with lengths, the padding behind is packed away."""

    def __init__(self, features: int = 32, hidden: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(problems.TOP_WORDS, features)
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``(B,)``."""
        x: Any = self.embedding(ids)
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(x)[1][0][0])[:, 0]


def _trainer(model: Model) -> Callable[..., float]:
    """``step(labels, *inputs) -> loss``: one update by Adam, its epsilon Keras'."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7)
    loss_of = nn.BCEWithLogitsLoss()

    def step(labels: torch.Tensor, *inputs: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_of(model(*inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def train_step(case: Case) -> Job:
    """A hand-written loop over batches of full length."""
    weights, ids, labels = problems.notebook(case)
    model = Model(case["features"], case["hidden"])
    _set(model.lstm, weights)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.from_numpy(weights["embedding"]))
        model.head.weight.copy_(torch.from_numpy(weights["head_kernel"].T.copy()))
        model.head.bias.zero_()
    step, size = _trainer(model), case["batch"]
    wanted, words = torch.from_numpy(labels).float().split(size), torch.from_numpy(ids).split(size)

    def run() -> float:
        return float(np.mean([step(*batch) for batch in zip(wanted, words, strict=True)]))

    return training_job(run)


def epoch(case: Case, packed: bool) -> Job:
    """Packed sequences, or reviews padded in front, from a shuffling `DataLoader`."""
    rows, labels = problems.imdb(case)
    step = _trainer(Model())

    def collate(picked: list[int]) -> tuple[torch.Tensor, ...]:
        sequences, wanted = [rows[k] for k in picked], torch.from_numpy(labels[picked]).float()
        if not packed:
            return wanted, torch.from_numpy(problems.front_padded(sequences, case["steps"]))
        lengths = torch.tensor([len(s) for s in sequences])
        return wanted, pad_sequence([*map(torch.from_numpy, sequences)], batch_first=True), lengths

    numbers: Any = range(len(rows))
    loader: Any = DataLoader(numbers, 64, shuffle=True, collate_fn=collate)
    waiting = iter(loader)

    def run() -> None:
        for _, batch in zip(range(case["share"]), waiting, strict=False):
            step(*batch)

    return Job(run, warm_up=lambda: step(*collate(list(range(64)))))
