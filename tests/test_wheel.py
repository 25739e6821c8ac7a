"""What is installed without -e is what was written: every module, the types' mark, the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
OURS = "sharding", "functional_ep"


def sources(root: Path) -> set[str]:
    found = [path for name in OURS for path in (root / name).rglob("*")]
    return {str(p.relative_to(root)) for p in found if p.suffix == ".py" or p.name == "py.typed"}


def wheel(root: Path, into: Path) -> zipfile.ZipFile:
    """Built of a copy, which setuptools may write into."""
    copy = into / "copy"
    for name in OURS:
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    subprocess.run([sys.executable, "-c", BUILD, into], cwd=copy, check=True, capture_output=True)
    (built,) = into.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    pytest.importorskip("setuptools", "77")  # the first to know the licence by its name
    with wheel(ROOT, tmp_path_factory.mktemp("wheel")) as built:
        return set(built.namelist())


def test_a_wheel_holds_every_source_file_and_no_other(names: set[str]) -> None:
    written = sources(ROOT)
    assert len(written) > 100
    assert {name for name in names if ".dist-info/" not in name} == written


def test_a_wheel_brings_the_licence_and_the_command(names: set[str]) -> None:
    about = {name.split(".dist-info/")[1] for name in names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= about
