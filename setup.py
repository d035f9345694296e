"""Packs finetuner: the library, its chat templates and the ready configs of configs/ (as `finetuner.configs`)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
EXTRAS = ("quant", "deepspeed", "flash", "liger", "fp8", "vision", "board", "trackers", "dev")


def requirements(name: str) -> list[str]:
    """The requirements of requirements/NAME.txt."""
    lines = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def version() -> str:
    """`__version__` of finetuner/__init__.py, read without importing it."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / "finetuner/__init__.py").read_text(encoding="utf-8"), re.M)
    assert found, "finetuner/__init__.py holds __version__"
    return found[1]


setup(
    name="finetuner",
    version=version(),
    description="Fine-tunes language models: one Python file describes a run, one command performs it",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["finetuner", "finetuner.*"]), "finetuner.configs"],
    package_dir={"finetuner.configs": "configs"},
    package_data={"finetuner.dialogue": ["templates/*.jinja"]},
    install_requires=requirements("runtime"),
    extras_require={name: requirements(name) for name in EXTRAS},
    entry_points={"console_scripts": ["finetuner = finetuner.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
