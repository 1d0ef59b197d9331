"""Fused TPU kernels (Pallas, Mosaic), derived from a step."""
