"""Engines of LightGlue, alone or from two images on, of fixed shapes."""

from pathlib import Path
from typing import Any

from aliked.backends import Spec
from aliked.backends.tensorrt import Buffers, Contract, Engine, manifest_for
from aliked.errors import InputError
from aliked.matching import TENSORS, Arrays, PairRuntime

LIGHTGLUE_BUILDER = "build_lightglue_file of aliked.export.build"


class EnginePairRuntime(PairRuntime):
    """An `Engine` of LightGlue: what `infer` returns is overwritten by the next call."""

    def __init__(self, name: str, graph: str, path: Path, device: str, **options: Any) -> None:
        """Load the engine at `path`; `options` are those of `Engine`."""
        contract = Contract(*TENSORS[graph], f"build it with {LIGHTGLUE_BUILDER}")
        self.name, self.engine = name, Engine(path, contract, device, **options)
        self.device, self.manifest = self.engine.device, self.engine.manifest

    def _prepared(self, inputs: Arrays) -> Arrays:
        """The inputs in the engine's types, their shapes prepared."""
        engine = self.engine
        engine.prepare({name: inputs[name].shape for name in engine.inputs})
        return {n: inputs[n].astype(engine.dtypes[n], copy=False) for n in engine.inputs}

    def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays in host memory to the outputs, copies included."""
        engine = self.engine
        with (
            engine.memory.active(),
            engine.running(self._prepared(inputs), engine.outputs) as found,
        ):
            pass  # nothing else can be done meanwhile
        return {n: rows.copy() for n, rows in zip(engine.outputs, found, strict=True)}

    def to_device(self, inputs: Arrays) -> Buffers:
        """The inputs in new buffers on the device."""
        with self.engine.memory.active():
            return self.engine.upload(self._prepared(inputs))

    def infer(self, batch: Buffers) -> Buffers:
        """The outputs by name; the next call overwrites them."""
        return self.engine.infer(batch)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.engine.synchronize()


def open_runtime(
    name: str,
    graph: str,
    spec: Spec,
    matcher_weights: Path | None,
    size: tuple[int, int],
    **options: Any,
) -> EnginePairRuntime:
    """The engine `spec.model_path`, which holds the weights; `options` are those of `Engine`."""
    manifest = manifest_for(spec, name, LIGHTGLUE_BUILDER)
    _check_export(spec, graph, manifest["source"]["export"])
    return EnginePairRuntime(
        name, graph, Path(spec.model_path), spec.device, manifest=manifest, **options
    )


def _check_export(spec: Spec, graph: str, export: dict) -> None:
    """`InputError` where the engine holds another graph or model, or takes another K."""
    for what, wanted in {"graph": graph, "model": spec.model, "top_k": spec.top_k}.items():
        has = export.get(what, wanted)
        if has != wanted:
            raise InputError(
                f"the {what} of {spec.model_path} is {has}, not {wanted}; ask for {has}, or export "
                "and build it again"
            )
