"""The two sides of a comparison: which runtimes, with which files and precisions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aliked.backends import Spec, create_extractor, get_backend
from aliked.backends.tensorrt import precision_of, read_manifest
from aliked.configs import PRECISIONS
from aliked.errors import InputError
from aliked.features import Extractor

ENGINES = (".trt", ".rtx")  # whose manifest says which backend runs them


@dataclass(frozen=True)
class Side:
    """One of the two runtimes."""

    role: str  # "reference" or "other"
    backend: str
    precision: str
    path: Path | None  # of the file it runs
    export: dict  # what the file says it was exported with; empty where it says nothing

    def label(self, extractor: Extractor) -> str:
        """Return the side in words: the runtime, where it runs, and the precision."""
        runtime, kind = extractor.name, extractor.device.partition(":")[0]
        if len(get_backend(self.backend).devices) > 1 and not runtime.endswith(kind):
            runtime += f"-{kind}"
        return f"{runtime} {self.precision}" + (f" ({self.path.name})" if self.path else "")


def choose_side(role: str, text: str | None, path: Path | None, usual: str) -> Side:
    """The side that the options --ROLE BACKEND[:PRECISION] and --ROLE_model_path FILE ask for.

    Without a backend it is the one that runs the file, or PyTorch where there is none. Without a
    precision it is the file's own, or the `usual` one. `InputError` where the options contradict
    each other or the file, or a file is missing.
    """
    if path and not path.is_file():
        raise InputError(
            f"{path} does not exist; give --{role}_model_path a file written by "
            "convert_pytorch_to_onnx.py or convert_onnx_to_trt.py"
        )
    backend, _, asked = (text or _runner(role, path)).partition(":")
    if asked not in ("", *PRECISIONS):
        names = ", ".join(PRECISIONS)
        raise InputError(f"unknown precision {asked!r} of --{role} {text}; give one of {names}")
    _check_file(role, backend, path)
    if path is None:
        return Side(role, backend, asked or usual, None, {})
    export, own = _read_file(backend, path)
    if not own and not asked:
        raise InputError(f"{path} does not say its precision; give it: --{role} {backend}:fp32")
    if own and asked and own != asked:
        raise InputError(
            f"{path} is {own} and --{role} {text} asks for {asked}; give the {asked} file, or "
            f"--{role} {backend}"
        )
    return Side(role, backend, own or asked, path, export)


def common_model(asked: str | None, sides: Sequence[Side]) -> str:
    """The model of both sides: what the files say, or else `asked`, or else the usual one.

    `InputError` where these differ.
    """
    names = {str(side.path): side.export["model"] for side in sides if "model" in side.export}
    if asked:
        names["--model"] = asked
    if len(set(names.values())) > 1:
        found = " and ".join(f"{where} is {name}" for where, name in names.items())
        raise InputError(f"{found}; compare two runtimes of the same model")
    return next(iter(names.values()), Spec.model)


def open_side(side: Side, spec: Spec) -> Extractor:
    """The extractor of a side; `spec` has what both sides have in common.

    `InputError` where it cannot run here, or its file selects keypoints in another way.
    """
    _check_selection(side, spec)
    spec = replace(spec, precision=side.precision, model_path=side.path)
    return create_extractor(side.backend, spec)


def _runner(role: str, path: Path | None) -> str:
    """The backend that runs a file without being named."""
    if path is None:
        return "pytorch"
    if path.suffix == ".onnx":
        return "onnxruntime"
    if path.suffix in ENGINES:
        return read_manifest(path)["library"]
    raise InputError(f"{path} may be of any backend; say which one runs it: --{role} BACKEND")


def _check_file(role: str, backend: str, path: Path | None) -> None:
    """A file exactly where the backend runs one."""
    row = get_backend(backend)
    if path and row.suffix is None:
        raise InputError(
            f"backend {backend} does not run {path}; leave --{role}_model_path or --{role} out"
        )
    # One that cannot run here says so when it is created.
    if row.suffix and path is None and row.unavailable() is None:
        raise InputError(
            f"backend {backend} runs a model file; give it with "
            f"--{role}_model_path FILE{row.suffix}"
        )


def _read_file(backend: str, path: Path) -> tuple[dict, str | None]:
    """What a file was exported with, and its precision; what it does not say is missing."""
    if backend.startswith("tensorrt"):
        manifest = read_manifest(path)
        return manifest["source"]["export"], precision_of(manifest)
    if backend.startswith("onnxruntime"):
        from aliked.export.engine import read_source

        source = read_source(path)
        return source.export, source.precision.lower()
    return {}, None


def _check_selection(side: Side, spec: Spec) -> None:
    """A file's threshold is part of it, so that the other side needs the same one."""
    export = side.export
    if "top_k" not in export:
        return
    missing = {"scores_th", "n_limit"} - export.keys()
    if missing:
        raise InputError(f"{side.path} does not say its {min(missing)}; export the model again")
    asked = spec.scores_th, spec.n_limit, spec.strict
    in_file = export["scores_th"], export["n_limit"], export.get("strict", False)
    by_threshold = export["top_k"] <= 0
    if by_threshold == (spec.top_k <= 0) and (in_file == asked or not by_threshold):
        return
    options = (
        f"--top_k 0 --scores_th {in_file[0]} --n_limit {in_file[1]}"
        if by_threshold
        else f"--top_k {export['top_k']}"
    )
    raise InputError(f"{side.path} selects keypoints in another way; pass {options}")
