"""The one thing pyproject.toml cannot say: `kernels/` at the top of a checkout installs as
`treespec.kernels`.

Metadata, dependencies and tools are configured in pyproject.toml.
"""

from setuptools import setup

setup(
    packages=["treespec", "treespec.bench", "treespec.sources", "treespec.kernels"],
    package_dir={"treespec.kernels": "kernels"},
    package_data={"treespec": ["py.typed", "data/**/*"]},
)
