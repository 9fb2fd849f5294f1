"""Lists the packages, and the extensions that installations without a C compiler do without.

The packages are those of tokenvit_jax, and configs/, which a wheel has inside tokenvit_jax. All
other metadata is in pyproject.toml, which cannot rename a folder.
"""

from setuptools import Extension, find_packages, setup

setup(
    packages=[*find_packages(include=["tokenvit_jax*"]), "tokenvit_jax.configs"],
    package_dir={"tokenvit_jax.configs": "configs"},
    ext_modules=[
        Extension(
            f"tokenvit_jax.data.{name}",
            [f"tokenvit_jax/data/{name}.c"],
            extra_compile_args=["-O3"],
            py_limited_api=True,  # one build for all versions of Python from 3.11 on
            optional=True,
        )
        for name in ("_jpeg_regions", "_pixel_ops")
    ],
)
