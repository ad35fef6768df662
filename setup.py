"""Builds the compiled kernels. Everything else is in pyproject.toml.

Environment:
    EFFNET_KERNELS_SKIP_CUDA_BUILD=1  build the CPU kernels only
    FORCE_CUDA=1                      fail where the CUDA kernels cannot be built, instead of
                                      leaving them out
    TORCH_CUDA_ARCH_LIST              GPU architectures, "8.0;9.0a;10.0" unless set
    MAX_JOBS                          parallel compile jobs (ninja's default: all cores)
"""

from __future__ import annotations

import os
import shutil
from glob import glob

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# libtorch's stable ABI as of 2.11: one binary serves every later torch and every Python.
DEFINES = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
# -g0: Python's own flags ask for debugging symbols, which take longer than the code.
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", "-lineinfo"]
# Named so that a source distribution carries them.
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def missing_compiler() -> str | None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


def missing_cuda() -> str | None:
    if flag("EFFNET_KERNELS_SKIP_CUDA_BUILD"):
        return "EFFNET_KERNELS_SKIP_CUDA_BUILD is set"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA to link with"
    if CUDA_HOME is None:
        return "there is no nvcc (set CUDA_HOME)"
    return None


def extensions() -> list[object]:
    reason = missing_compiler()
    if reason is not None:
        print(f"effnet_kernels: no compiled kernels: {reason}")
        return []
    built: list[object] = [
        CppExtension(
            "effnet_kernels._cpu",
            sorted(["csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]),
            include_dirs=[os.path.abspath("csrc")],
            depends=HEADERS,
            define_macros=DEFINES,
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    ]
    reason = missing_cuda()
    if reason is not None:
        if flag("FORCE_CUDA"):
            raise RuntimeError(f"FORCE_CUDA is set, but {reason}")
        print(f"effnet_kernels: no CUDA kernels: {reason}")
        return built
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0")
    built.append(
        CUDAExtension(
            "effnet_kernels._cuda",
            sorted(glob("csrc/cuda/*.cu")),
            include_dirs=[os.path.abspath("csrc")],
            depends=HEADERS,
            # USE_CUDA declares the stable ABI's current-stream call.
            define_macros=[*DEFINES, ("USE_CUDA", None)],
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    )
    return built


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
