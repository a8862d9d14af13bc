"""Triton kernels and the torch operators around them; imports nothing of fastflower."""
