"""ALIKED as a handful of fused GPU kernels in Triton; `pipeline.extract` runs them in order."""
