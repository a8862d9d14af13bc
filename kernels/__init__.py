"""Triton kernels and the torch operators around them. Imports nothing of fastflower, and Triton only where it is used."""
