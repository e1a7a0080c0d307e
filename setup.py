"""The top-level folders install as one namespace, `seamwise.*`; every folder in them with Python files is a package."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = ("kernels", "passes", "compile", "model_defs", "runtime", "bench")

packages = ["seamwise"]
for folder in FOLDERS:
    packages.append(f"seamwise.{folder}")
    packages += [f"seamwise.{folder}.{inner}" for inner in find_packages(str(ROOT / folder))]

setup(packages=packages, package_dir={"seamwise": "seamwise"} | {f"seamwise.{folder}": folder for folder in FOLDERS})
