"""Build the one extension module: with OpenMP if the compiler has it, else serial, else not at all."""

import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# By compiler type: (flags always, flags for OpenMP). No -march: instruction sets beyond the platform's
# baseline are chosen at run time, function by function (fastce/_native/rows.c). No -ffast-math.
_FLAGS = {
    "unix": (
        ["-O2", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
        ["-fopenmp"],
    ),
    "msvc": (["/O2", "/fp:precise"], ["/openmp"]),
}


class BuildKernels(build_ext):
    """Compile with OpenMP, and without it where that fails."""

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
            sources=["fastce/_native/kernels.pyx", "fastce/_native/rows.c"],
            depends=glob.glob("fastce/_native/*.inc") + ["fastce/_native/rows.h"],
            include_dirs=["fastce/_native", numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
            optional=True,  # without a compiler the other backends remain; `fastce doctor` says so
        )
    ],
)
