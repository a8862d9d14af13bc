"""Fused batch normalization, residual addition and ReLU: Triton kernels and the torch operators around them.

Use `fastflower.kernels.batch_norm.bn_relu`. Nothing here imports Triton before a kernel runs.
"""
