"""ALIKED behind NVIDIA Triton Inference Server: a model repository, its model, and a client."""
