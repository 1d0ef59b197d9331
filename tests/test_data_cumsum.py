import jax
import numpy as np
import pytest

from lstmjax.data import sample_cumsum


@pytest.mark.parametrize("steps", [1, 4, 10, 37])
def test_labels_by_a_loop(steps):
    x, y = sample_cumsum(jax.random.key(steps), batch=50, steps=steps)
    assert (x.shape, x.dtype) == ((50, steps, 1), np.float32)
    assert (y.shape, y.dtype) == ((50, steps), np.int32)
    for numbers, labels in zip(np.asarray(x)[:, :, 0], np.asarray(y), strict=True):
        total, expected = 0.0, []
        for number in numbers:
            total += float(number)
            expected.append(int(total >= steps / 4))
        assert labels.tolist() == expected


def test_reaching_the_limit_counts(monkeypatch):
    numbers = np.array([[0.5, 0.5, 0.25, 0.0]], np.float32)
    monkeypatch.setattr(jax.random, "uniform", lambda *_: jax.numpy.asarray(numbers))
    assert sample_cumsum(jax.random.key(0), batch=1, steps=4)[1].tolist() == [[0, 1, 1, 1]]


def test_uniform_and_a_function_of_the_key():
    x, _ = sample_cumsum(jax.random.key(1), batch=2000)
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert abs(float(x.mean()) - 0.5) < 0.01
    again, _ = jax.jit(sample_cumsum, static_argnames="batch")(jax.random.key(1), batch=2000)
    np.testing.assert_array_equal(x, again)
    other, _ = sample_cumsum(jax.random.key(2), batch=2000)
    assert not np.array_equal(x, other)


def test_old_style_keys_work_too():
    assert sample_cumsum(jax.random.PRNGKey(0), batch=3)[0].shape == (3, 10, 1)
