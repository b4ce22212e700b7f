"""Build the one extension module: with OpenMP if the compiler has it, else serial, else not at all."""

import glob
import os
from concurrent.futures import ThreadPoolExecutor

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# By compiler type: (flags always, flags for OpenMP). No -march: instruction sets beyond the platform's
# baseline are chosen at run time, function by function (fastce/_native/rows_*.c). No -ffast-math.
# Scheduling puts instructions of several vectors between one another: 0.93 to 0.97 of the time, and
# 0.85 to 0.9 where the core's other thread is busy. clang schedules unasked.
_FLAGS = {
    "unix": (
        [
            "-O2",
            "-fschedule-insns",
            "-fsched-pressure",
            "-fopenmp-simd",
            "-fno-math-errno",
            "-fno-trapping-math",
        ],
        ["-fopenmp"],
    ),
    "msvc": (["/O2", "/fp:precise"], ["/openmp"]),
}


class BuildKernels(build_ext):
    """Compile with OpenMP, and without it where that fails; the C files side by side."""

    def build_extensions(self) -> None:
        """Build, with a thread for each source; it takes half the time on two cores."""
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_one([source], **options), sources))
            return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension; `optional` turns a failure of both attempts into a warning."""
        always, openmp = _FLAGS.get(self.compiler.compiler_type, ([], []))
        try:
            ext.extra_compile_args, ext.extra_link_args = always + openmp, list(openmp)
            super().build_extension(ext)
        except (CompileError, LinkError):
            self.announce("fastce: no OpenMP here; building serial kernels", level=3)
            ext.extra_compile_args, ext.extra_link_args = list(always), []
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "fastce._native.kernels",
            sources=["fastce/_native/kernels.pyx", *sorted(glob.glob("fastce/_native/rows*.c"))],
            depends=glob.glob("fastce/_native/*.inc") + ["fastce/_native/rows.h"],
            include_dirs=["fastce/_native", numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
            optional=True,  # without a compiler the other backends remain; `fastce doctor` says so
        )
    ],
)
