"""lstmjax: write the recurrence of a cell once, derive everything else from it.

`lstmjax.cells` is the place to start: the contract and the cells. `lstmjax.recurrence.unroll` runs
a cell over time; `lstmjax.layers` and `lstmjax.models` build on it with Flax (NNX).
"""
