"""ALIKED as a handful of fused GPU kernels; `pipeline.extract` runs them in order.

They are CUDA C++ in half precision, and Triton in float32.
"""
