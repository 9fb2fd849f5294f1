"""Lists the packages, and the extension that installations without a C compiler do without.

The packages are those of tokenvit_jax, and configs/, which a wheel has inside tokenvit_jax. All
other metadata is in pyproject.toml, which cannot rename a folder.
"""

from setuptools import Extension, find_packages, setup

setup(
    packages=[*find_packages(include=["tokenvit_jax*"]), "tokenvit_jax.configs"],
    package_dir={"tokenvit_jax.configs": "configs"},
    ext_modules=[
        Extension(
            "tokenvit_jax.data._jpeg_regions",
            ["tokenvit_jax/data/_jpeg_regions.c"],
            extra_compile_args=["-O3"],
            py_limited_api=True,  # one build for all versions of Python from 3.11 on
            optional=True,
        )
    ],
)
