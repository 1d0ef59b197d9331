"""How a training step's time falls with the number of devices: arithmetic, nothing measured.

    python -m benchmarks.scale

Each device takes rows / N of the batch. The time loop is sequential: a time step, forward and
backward, takes no less than its latency, however few rows there are. The gradient is summed once a
step by a ring: every device sends 2 (N-1)/N of its bytes, in 2 (N-1) messages.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """What is assumed of an accelerator, from its maker's public figures.

    Attributes:
        flops: of bfloat16 products in a second, at the share that small products reach.
        latency: seconds of a time step, forward and backward, with hardly any rows.
        bandwidth: bytes a second to its neighbours.
        message: seconds that a message takes at least.
    """

    flops: float
    latency: float
    bandwidth: float
    message: float


@dataclasses.dataclass(frozen=True)
class Model:
    """A layer of LSTM and all parameters that are summed with it."""

    features: int
    hidden: int
    steps: int
    parameters: int


# 197e12 bfloat16 operations a second, 1,600 Gbit/s between chips: v5e; 40 % of the first is
# assumed, as are the latencies.
V5E = Device(0.4 * 197e12, 3e-6, 200e9, 1e-6)
DEFAULT = Model(features=128, hidden=100, steps=222, parameters=1_396_505)


def loop_seconds(model: Model, device: Device, rows: float) -> float:
    """Time loop of one device with so many rows, forward and backward."""
    operations = 3 * 2 * rows * (model.features + model.hidden) * 4 * model.hidden
    return model.steps * max(device.latency, operations / device.flops)


def sum_seconds(model: Model, device: Device, devices: int) -> float:
    """The sum of the gradient over the devices, in float32."""
    sent = 2 * (devices - 1) / devices * 4 * model.parameters
    return sent / device.bandwidth + 2 * (devices - 1) * device.message


def rows_to_fill(model: Model, device: Device) -> float:
    """Rows below which a device's time loop takes its latency, not its operations."""
    one = loop_seconds(model, dataclasses.replace(device, latency=0.0), 1.0) / model.steps
    return device.latency / one


def rows_to_scale(model: Model, device: Device, devices: int, efficiency: float = 0.9) -> float:
    """Rows of a batch from which N devices do ``efficiency`` of N times the work of one."""
    filled = rows_to_fill(model, device)
    loop = loop_seconds(model, device, filled)
    wanted = sum_seconds(model, device, devices) * efficiency / (1 - efficiency)
    return devices * filled * max(1.0, wanted / loop)


def main() -> None:
    """Print the tables of docs/scale.md."""
    print(f"rows that fill a device: {rows_to_fill(DEFAULT, V5E):.0f}\n")
    print("| devices | loop, 64 rows each | sum of the gradient | batch for 90 % |")
    print("|---|---|---|---|")
    for n in (1, 2, 4, 8, 16, 64, 256, 1024):
        loop, total = loop_seconds(DEFAULT, V5E, 64), sum_seconds(DEFAULT, V5E, n)
        rows = rows_to_scale(DEFAULT, V5E, n)
        print(f"| {n:,} | {1e3 * loop:.2f} ms | {1e3 * total:.2f} ms | {rows:,.0f} rows |")


if __name__ == "__main__":
    main()
