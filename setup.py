"""Build driver: hands csrc/ to CMake and puts the compiled module where setuptools wants it.

Imports neither torch nor spt_fast, so that `pip install .` works under build isolation and with any torch.
Switches, from the environment: SPT_FAST_CUDA=auto|on|off, SPT_FAST_CUDA_ARCHS="80;90" and CMAKE_ARGS; see
docs/install.md.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """An extension module whose sources and flags are CMake's business."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure and build one CMakeExtension in setuptools' temporary folder."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        # Isolated builds leave the paths of deleted tools in CMake's cache: start afresh, name them all.
        configure = [
            tool("cmake", cmake.CMAKE_BIN_DIR),
            "--fresh",
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', ninja.BIN_DIR)}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPT_FAST_MODULE_FILE={target.name}",
            f"-DSPT_FAST_CUDA={os.environ.get('SPT_FAST_CUDA', 'auto')}",
            f"-DSPT_FAST_CUDA_ARCHS={os.environ.get('SPT_FAST_CUDA_ARCHS', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        build = [configure[0], "--build", str(build_dir)]
        if self.parallel:
            build += ["--parallel", str(self.parallel)]
        subprocess.run(build, check=True)


def tool(name: str, folder: str) -> str:
    """Path of a build tool: the one of its Python package, else (Linux distributions) the one in PATH."""
    path = shutil.which(name, path=folder) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} was found neither in {folder} nor in PATH")
    return path


setup(ext_modules=[CMakeExtension("spt_fast._kmeans")], cmdclass={"build_ext": CMakeBuild})
