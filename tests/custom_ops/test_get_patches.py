"""The compiled `get_patches` against the plain form, and when which of the two is taken."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aliked import patches
from aliked.errors import InputError
from aliked.export.onnx_export import ExportOptions, export_onnx
from aliked.model import ALIKED, to_tensor
from aliked.patches import get_patches, plain_patches
from custom_ops.get_patches import toolchain
from tests.helpers import cuda_on_host
from tests.helpers.compiled_patches import (
    LAYOUTS,
    build,
    random_centres,
    random_maps,
    without_operator,
)
from tests.helpers.textures import texture

ROOT = Path(__file__).resolve().parents[2]
EXTREMES = [-(2**63), -(2**31), 2**31, 2**63 - 1]


@pytest.fixture(scope="session")
def operator(tmp_path_factory):
    return build(tmp_path_factory.mktemp("extensions"))


@pytest.fixture
def in_use(operator, monkeypatch):
    """Let the model take the compiled operator."""
    monkeypatch.setattr(patches, "compiled", lambda: operator)


@pytest.fixture
def choice(monkeypatch):
    """Let `patches.compiled` decide anew, by what a test sets up."""
    monkeypatch.delenv("ALIKED_CUSTOM_OPS", raising=False)
    patches.compiled.cache_clear()
    yield monkeypatch
    patches.compiled.cache_clear()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ALIKED("aliked-t16", top_k=60).eval().fold_batch_norm().requires_grad_(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_patches_are_those_of_the_plain_form(operator, size, layout):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8):
        maps = LAYOUTS[layout](random_maps(dtype))
        centres = random_centres(maps)
        found = operator.get_patches(maps, centres, size)
        assert torch.equal(found, plain_patches(maps, centres, size))
        assert found.is_contiguous()
        assert torch.equal(found, operator.get_patches(maps, centres.int(), size))
        assert torch.equal(found, operator.get_patches(maps, centres.mT.contiguous().mT, size))


def test_a_map_without_a_batch_gives_patches_without_a_batch(operator):
    maps = random_maps(torch.float32, shape=(3, 8, 8))
    centres = torch.tensor([[0, 0], [7, 3]])
    found = operator.get_patches(maps, centres, 3)
    assert torch.equal(found, plain_patches(maps[None], centres[None], 3)[0])


def test_windows_far_outside_are_zero(operator):
    """Such as those of a keypoint that is not a number, cast to an integer."""
    far = torch.cartesian_prod(*[torch.tensor([*EXTREMES, 2])] * 2)[:-1]  # the last is (2, 2)
    assert not operator.get_patches(torch.ones(1, 2, 5, 5), far[None], 3).any()


def test_a_pixel_that_is_not_finite_stays_inside_the_map(operator):
    maps = torch.full((1, 1, 4, 4), torch.inf)
    found = operator.get_patches(maps, torch.tensor([[[0, 0]]]), 3)[0, 0, 0]
    assert torch.equal(found.isinf(), torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 1]]).bool())


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 7), (2, 0, 4, 5, 7), (2, 3, 4, 5, 0)])
def test_no_maps_no_channels_and_no_centres_give_no_patches(operator, shape):
    batch, channels, height, width, count = shape
    maps = torch.rand(batch, channels, height, width)
    found = operator.get_patches(maps, torch.zeros(batch, count, 2, dtype=torch.int64), 3)
    assert found.shape == (batch, count, channels, 3, 3)


MAPS, CENTRES = torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((MAPS[0, 0], CENTRES, 3), r"maps must be \[B, C, H, W\]"),
        ((MAPS, CENTRES[0], 3), r"centres must be \[B, N, 2\]"),
        ((MAPS, CENTRES.repeat(1, 1, 2), 3), r"centres must be \[B, N, 2\]"),
        ((MAPS, CENTRES.repeat(2, 1, 1), 3), "1 maps, but centres for 2"),
        ((MAPS, CENTRES.float(), 3), "must be integers"),
        ((MAPS, CENTRES, 0), "at least 1"),
        ((MAPS, CENTRES, 2**40), "more than 2147483647 elements"),
        ((MAPS.to(torch.complex128), CENTRES, 3), "16 bytes per element"),
    ],
)
def test_unusable_arguments_are_refused_with_the_reason(operator, arguments, words):
    with pytest.raises(ValueError, match=words):
        operator.get_patches(*arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_that_of_the_plain_form(operator, layout):
    maps = LAYOUTS[layout](random_maps(torch.float64)).requires_grad_()
    centres = random_centres(maps)  # more windows than pixels: they overlap
    for size in (2, 3):
        found, expected = (
            torch.autograd.grad(form(maps, centres, size).square().sum(), maps)[0]
            for form in (operator.get_patches, plain_patches)
        )
        torch.testing.assert_close(found, expected)  # float64: sums in another order


def test_the_operator_keeps_the_contract_of_torch_library(operator):
    for layout in ("contiguous", "channels_last"):
        maps = LAYOUTS[layout](random_maps(torch.float32)).requires_grad_()
        arguments = (maps, random_centres(maps), 3)
        torch.library.opcheck(torch.ops.aliked.get_patches.default, arguments)


def test_compilers_and_exporters_see_the_operator(operator):
    def function(maps, centres):
        return operator.get_patches(maps * 2, centres, 3)

    maps = random_maps(torch.float32)
    centres = random_centres(maps)
    expected = function(maps, centres)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(maps, centres), expected)
    assert torch.equal(
        compiled(maps[..., 1:], centres[:, 1:]), function(maps[..., 1:], centres)[:, 1:]
    )

    class Module(torch.nn.Module):
        forward = staticmethod(function)

    exported = torch.export.export(Module(), (maps, centres))
    assert torch.equal(exported.module()(maps, centres), expected)
    assert any("aliked.get_patches" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_model_gives_the_same_with_either_form(operator, in_use, monkeypatch, precision):
    torch.manual_seed(0)
    model = ALIKED("aliked-t16", top_k=60).eval().fold_batch_norm().set_precision(precision)
    images, calls = to_tensor(torch.from_numpy(texture(45, 70)[None])), []
    compiled = operator.get_patches
    monkeypatch.setattr(operator, "get_patches", lambda *a: calls.append(1) or compiled(*a))
    with torch.inference_mode():
        found = model(images)
        assert calls  # so that it really was the other form
        calls.clear()
        with without_operator():
            expected = model(images)
    assert not calls
    assert all(torch.equal(*rows) for rows in zip(found, expected, strict=True))


def test_gradients_flow_through_the_model_with_either_form(operator, in_use):
    maps = random_maps(torch.float32, shape=(1, 64, 12, 12)).requires_grad_()
    torch.manual_seed(0)
    head = ALIKED("aliked-t16", top_k=5).desc_head
    keypoints = torch.tensor([[[0.4, 0.2], [5.0, 6.0], [11.0, 3.0]]])

    def gradient():
        return torch.autograd.grad(head.sample_offsets(maps, keypoints).square().sum(), maps)[0]

    found = gradient()
    with without_operator():
        expected = gradient()
    assert expected.any()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [{}, {"opset": 17, "deform_conv": "gather"}])
def test_an_onnx_file_has_standard_operators_only(in_use, model, changes, tmp_path):
    options = ExportOptions(height=32, width=32, **changes)
    proto = export_onnx(model, tmp_path / "model.onnx", options)
    assert {node.domain for node in proto.graph.node} == {""}


def test_a_compiled_model_needs_no_compiled_operator(in_use, model):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(model.detect, fullgraph=True, backend=backend)(torch.rand(1, 1, 32, 32))
    assert "gather" in seen  # of the plain form
    assert not any("aliked" in name for name in seen)


def test_without_the_operator_the_plain_form_is_taken(choice):
    choice.setattr(patches, "PACKAGE", "not_installed_anywhere")
    maps = random_maps(torch.float32)
    centres = random_centres(maps)
    assert patches.compiled() is None
    assert torch.equal(get_patches(maps, centres, 3), plain_patches(maps, centres, 3))
    assert "pip install ./custom_ops" in patches.form_in_use()


def test_a_device_that_it_was_not_compiled_for_gets_the_plain_form(operator, in_use, monkeypatch):
    monkeypatch.setattr(operator, "DEVICES", ("cuda",))
    monkeypatch.setattr(operator, "get_patches", None)  # calling it would fail
    maps = random_maps(torch.float32)
    centres = random_centres(maps)
    assert torch.equal(get_patches(maps, centres, 3), plain_patches(maps, centres, 3))


def test_an_installed_operator_is_taken_unless_it_is_switched_off(choice, tmp_path):
    (tmp_path / "stand_in.py").write_text("DEVICES = ('cpu',)\nget_patches = 'compiled'\n")
    choice.syspath_prepend(tmp_path)
    choice.setattr(patches, "PACKAGE", "stand_in")
    assert patches.compiled().get_patches == "compiled"
    assert patches.form_in_use() == "compiled for CPU (stand_in)"
    patches.compiled.cache_clear()
    choice.setenv("ALIKED_CUSTOM_OPS", "off")
    assert patches.compiled() is None
    assert patches.form_in_use() == "plain PyTorch, as ALIKED_CUSTOM_OPS is off"


def test_an_installed_operator_that_cannot_be_loaded_is_said(choice, tmp_path):
    (tmp_path / "broken.py").write_text("raise ImportError('undefined symbol: x')\n")
    choice.syspath_prepend(tmp_path)
    choice.setattr(patches, "PACKAGE", "broken")
    with pytest.raises(InputError, match=r"undefined symbol: x.*pip install --force-reinstall"):
        get_patches(torch.rand(1, 1, 4, 4), torch.zeros(1, 1, 2, dtype=torch.int64), 3)
    assert "undefined symbol: x" in patches.form_in_use()


def test_an_unknown_wish_names_the_known_ones(choice):
    choice.setenv("ALIKED_CUSTOM_OPS", "on")
    with pytest.raises(InputError, match="build or off"):
        patches.compiled()


def test_a_failing_compiler_is_said_with_the_command_that_shows_why(choice, tmp_path):
    choice.setattr(patches, "PACKAGE", "not_installed_anywhere")
    choice.setattr(toolchain, "build", toolchain.build.__wrapped__)  # past its cache
    choice.setenv("ALIKED_CUSTOM_OPS", "build")
    choice.setenv("CXX", "no-such-compiler")
    choice.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"python -m custom_ops.get_patches.toolchain says why"):
        patches.compiled()


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_pip_installs_the_operator_beside_the_fused_kernels(tmp_path):
    if not shutil.which(os.environ.get("CXX", "c++")) or not importlib.util.find_spec("pip"):
        pytest.skip("no C++ compiler or no pip")
    sources, installed = tmp_path / "custom_ops", tmp_path / "installed"
    shutil.copytree(ROOT / "custom_ops", sources)
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--target", str(installed)]
    # Without a toolkit: this is about the package, and compiling for GPUs takes longer.
    python("-m", "pip", "install", *options, str(sources), CUDA_HOME="", CUDA_VISIBLE_DEVICES="")
    code = (
        "import aliked_custom_ops, aliked.fused, torch\n"
        "from aliked import patches\n"
        "assert patches.compiled() is aliked_custom_ops\n"
        "maps, centres = torch.rand(1, 2, 5, 5), torch.tensor([[[0, 1]]])\n"
        "found = torch.ops.aliked.get_patches(maps, centres, 3)\n"
        "assert torch.equal(found, patches.plain_patches(maps, centres, 3))\n"
        "print(patches.form_in_use())\n"
    )
    printed = python("-c", code, PYTHONPATH=str(installed))
    assert printed.startswith("compiled for CPU")


KERNELS = "".join(
    f'extern "C" void copy_{size}_{bits}(const uint{bits}_t *maps, const int64_t *centres, '
    f"uint{bits}_t *patches, long channels, long height, long width, long image, long channel, "
    "long row, long column, long per_image, long windows, long size) {"
    "aliked::Geometry g{channels, height, width, image, channel, row, column, per_image, windows,"
    f" (int32_t)size}}; aliked::copy_windows<{size}>(g, maps, centres, patches); }}\n"
    for size in (0, 3, 5)
    for bits in (16, 32)
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The GPU kernel, its CUDA source compiled for the CPU."""
    header = ROOT / "custom_ops" / "get_patches" / "copy_windows.cuh"
    source = f'#include "{header}"\n{KERNELS}'
    return cuda_on_host.build(source, tmp_path_factory.mktemp("get_patches"))


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize(("size", "compiled_size"), [(2, 0), (3, 3), (5, 5)])
def test_the_gpu_kernel_run_on_the_cpu_gives_the_plain_patches(
    kernels, size, compiled_size, layout
):
    for bits, dtype in ((16, torch.float16), (32, torch.float32)):
        stored = random_maps(dtype).permute(layout).contiguous()
        maps = stored.permute([layout.index(axis) for axis in range(4)])
        centres = random_centres(maps, count=9)
        batch, channels, height, width = maps.shape
        found = torch.full((batch, 9, channels, size, size), torch.nan, dtype=dtype)
        arguments = [channels, height, width, *maps.stride(), 9, 9 * batch, size]
        for block in ((32, 4, 1), (64, 2, 1), (128, 1, 1)):
            found.fill_(torch.nan)
            cuda_on_host.launch(
                kernels,
                f"copy_{compiled_size}_{bits}",
                (2, 1, 1),  # fewer blocks than windows: they take turns
                block,
                [stored, centres, found, *arguments],
            )
            assert torch.equal(found, plain_patches(maps, centres, size))
