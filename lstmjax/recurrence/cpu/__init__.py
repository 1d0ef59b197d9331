"""A whole recurrence as one CPU function, compiled by LLVM from a cell's step."""
