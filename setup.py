"""One wheel, py3-none-<platform>: nothing in it depends on the version of Python, and torch's is open from 2.11 up.

torch is no build requirement: its headers come from the environment that is being installed into. Without one, or
without a compiler, the wheel has no compiled kernels: the first import compiles those of the CPU, and ``quantlib build
--cuda`` those of CUDA (``quantlib/_build.py``).
``QUANTLIB_BUILD``: auto; 0 leaves them to the first import; 1 makes a build that fails an error.
"""

from __future__ import annotations

import logging
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

BUILD = runpy.run_path(str(Path(__file__).parent / "quantlib" / "_build.py"))


class Build(build_ext):
    """Hand every library to quantlib/_build.py."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # no ABI of Python's in the name

    def run(self) -> None:
        if not self.editable_mode:  # there the first import compiles, again whenever a source has changed
            for file in BUILD["FILES"].values():  # a build/ that is still there holds those of an earlier build
                Path(self.build_lib, "quantlib", file).unlink(missing_ok=True)
            super().run()

    def build_extensions(self) -> None:
        objects = Path(self.build_temp, "objects").absolute()
        for name, extension in zip(NAMES, self.extensions, strict=True):
            out = Path(self.get_ext_fullpath(extension.name)).absolute()
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                BUILD["Recipe"](name).build(out, objects)
            except BUILD["BuildError"] as error:
                if BUILD["mode"]() == "1":
                    raise
                later = "the first import" if name == "cpu" else "`quantlib build --cuda`"
                logging.warning("%s is not in this wheel, %s will try again: %s", out.name, later, error)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


NAMES = [] if BUILD["mode"]() == "0" else ["cpu", "cuda"] if BUILD["nvcc"]() else ["cpu"]

setup(
    packages=[*find_packages(include=["quantlib", "quantlib.*"]), "quantlib._csrc", "quantlib.benchmarks"],
    package_dir={"quantlib._csrc": "csrc", "quantlib.benchmarks": "benchmarks"},
    package_data={
        "quantlib": ["ops.def", "py.typed", "backends/triton/tuned/*", "evaluation/texts/*.txt"],
        "quantlib._csrc": ["*.h", "*.cpp", "*/*.h", "*/*.cpp", "*/*.cuh", "*/*.cu"],
    },
    exclude_package_data={"quantlib.benchmarks": ["**"]},
    ext_modules=[Extension(f"quantlib.{Path(BUILD['FILES'][name]).stem}", []) for name in NAMES],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
