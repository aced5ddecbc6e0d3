"""What a check says about one node, and what the engine is meant for."""

from dataclasses import dataclass

from aliked.onnx_checks.graph import Node


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT 10.13 to 11.4 would refuse or misread, or might.

    An error is refused, gives other results without a word, or cannot be run by
    `aliked.backends.tensorrt`; a warning depends on what the file does not say.
    """

    severity: str  # "error" or "warning"
    node: str  # which node, subgraphs and functions before a slash; "(model)" for the file
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.node}: {self.reason}; {self.cure}"


@dataclass(frozen=True)
class Target:
    """What is known about the engine that the file is to become."""

    version_compatible: bool = False
    max_batch: int | None = None  # of the optimization profile, where the batch is dynamic


def error(node: Node, reason: str, cure: str) -> Finding:
    """A finding that stops a build."""
    return Finding("error", node.label, reason, cure)


def warning(node: Node, reason: str, cure: str) -> Finding:
    """A finding that the user should know of."""
    return Finding("warning", node.label, reason, cure)
