"""Fused Hopper kernels (Pallas, Mosaic GPU), derived from an element-wise step."""
