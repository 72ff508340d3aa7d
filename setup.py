"""The packages. Everything else is in pyproject.toml.

Two folders of the repository are subpackages: `export/` is `ssod_edge.export` and `bench/` is
`ssod_edge.bench`. Nothing but `ssod_edge` becomes a top-level name.
"""

from setuptools import find_packages, setup

FOLDERS = {"ssod_edge.export": "export", "ssod_edge.bench": "bench"}

packages = find_packages(include=["ssod_edge", "ssod_edge.*"])
for name, folder in FOLDERS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=FOLDERS)
