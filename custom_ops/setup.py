"""Compiles the operators: `pip install ./custom_ops` in the project's root."""

import sys
import sysconfig
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
# pip compiles in an environment of its own. The library has to fit the PyTorch that will load it,
# so that one is used, and pip does not download a second one.
sys.path.append(sysconfig.get_path("purelib"))

from get_patches import toolchain
from torch.utils import cpp_extension

Extension = cpp_extension.CUDAExtension if toolchain.with_cuda() else cpp_extension.CppExtension

setup(
    include_package_data=False,
    packages=["aliked_custom_ops"],
    package_dir={"aliked_custom_ops": "get_patches"},
    ext_modules=[
        Extension(
            "aliked_custom_ops._library",
            [str(path.relative_to(Path(__file__).parent)) for path in toolchain.sources()],
            extra_compile_args={"cxx": toolchain.FLAGS, "nvcc": toolchain.CUDA_FLAGS},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
