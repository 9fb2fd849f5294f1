"""Lists the packages: those of tokenvit_jax, and configs/, which a wheel has inside tokenvit_jax.

All other metadata is in pyproject.toml, which cannot rename a folder.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tokenvit_jax*"]), "tokenvit_jax.configs"],
    package_dir={"tokenvit_jax.configs": "configs"},
)
