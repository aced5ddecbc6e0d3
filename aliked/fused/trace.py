"""Record the calls of a run, to check or time each operator on the data it really gets."""

from types import ModuleType
from typing import NamedTuple

import torch

from aliked.fused import reference
from aliked.fused.maxima import BINS


class Call(NamedTuple):
    """One call of an operator."""

    name: str
    arguments: tuple
    outputs: tuple[torch.Tensor, ...]


class Recorder:
    """Stands in for a module of operators and keeps every call in `calls`."""

    def __init__(self, ops: ModuleType):
        self.ops = ops
        self.calls: list[Call] = []

    def __getattr__(self, name: str):
        def call(*arguments):
            call = Call(name, copies(arguments), ())
            outputs = getattr(self.ops, name)(*arguments)
            self.calls.append(call._replace(outputs=as_tuple(outputs)))
            return outputs

        return call


def copies(arguments: tuple) -> tuple:
    """The arguments as they are now: an operator may change a tensor, as `select` does."""
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    """What an operator returned, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def sorted_keys(keys: torch.Tensor, counts: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of the first `counts` [B, 1] keys of each image, descending, then zeros."""
    real = torch.arange(keys.shape[1], device=keys.device) < counts
    return torch.where(real, keys, 0).sort(dim=1, descending=True).values[:, :k]


def run(call: Call, ops: ModuleType) -> tuple[torch.Tensor, ...]:
    """Results of an operator on a call's arguments, without what it may leave open.

    That is the order of keys, and keys beyond the k best.
    """
    arguments = copies(call.arguments)
    outputs = as_tuple(getattr(ops, call.name)(*arguments))
    if call.name == "find_maxima":
        (keys,), tally = outputs, arguments[1]
        return sorted_keys(keys, tally[:, BINS, None], keys.shape[1]), tally
    if call.name == "select":
        k, kept = arguments[3], arguments[1][:, BINS + 1 : BINS + 3]
        keys = sorted_keys(outputs[0], kept[:, :1], min(k, outputs[0].shape[1]))
        return keys, kept.clamp(max=k)
    return outputs


def differences(call: Call, ops: ModuleType) -> list[float]:
    """Largest difference of each output between `ops` and the twin on a recorded call's arguments.

    Relative to the largest magnitude of the output; infinite where integers differ at all.
    """
    pairs = zip(run(call, ops), run(call, reference), strict=True)
    return [relative(got, want) for got, want in pairs]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest |got - want| over the largest |want|."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    if not want.numel():
        return 0.0
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-6)
    return float(error) if error.isfinite() else float("inf")
