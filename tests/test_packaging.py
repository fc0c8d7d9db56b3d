"""What the wheel holds: every module and asset, the licences, and none of the build scripts and results."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import visearch

ROOT = Path(__file__).parents[1]
EXPECT_WHEEL = os.environ.get("VISEARCH_EXPECT_WHEEL") == "1"
SHIPPED_ASSETS = ("emoji-64", "geneval")
MAX_ASSETS_MB = 60


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, int]:
    """Files of the wheel and their sizes in bytes: the installed wheel where there is one, else one built here."""
    if EXPECT_WHEEL:
        files = importlib.metadata.files("visearch") or []
        return {str(file): file.size or 0 for file in files if "__pycache__" not in file.parts}
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "outputs", "runs", "results", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    for planted in ("build", "results"):
        (folder / "tree" / "assets" / planted).mkdir()
        (folder / "tree" / "assets" / planted / "planted.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "."]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder)], cwd=folder / "tree", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("visearch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


@pytest.mark.skipif(
    not EXPECT_WHEEL, reason="an editable install is being tested; set VISEARCH_EXPECT_WHEEL=1 for a wheel"
)
def test_the_installed_wheel_is_what_gets_tested():
    location = Path(visearch.__file__).resolve()
    assert "site-packages" in location.parts
    assert not location.is_relative_to(ROOT / "visearch")
    assert not Path.cwd().resolve().is_relative_to(ROOT)


def test_every_module_is_in_the_wheel(members):
    for folder in ("visearch", "pipelines", "rewards", "app", "assets"):
        prefix = folder if folder == "visearch" else f"visearch/{folder}"
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT / folder)
            if folder != "assets" or name.parts[0] not in ("build", "results"):
                assert f"{prefix}/{name.as_posix()}" in members


def test_types_and_assets_are_in_the_wheel(members):
    assert {"visearch/py.typed", "visearch/pipelines/support.json"} <= members.keys()
    for folder in SHIPPED_ASSETS:
        files = [path for path in (ROOT / "assets" / folder).rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert f"visearch/assets/{path.relative_to(ROOT / 'assets').as_posix()}" in members


def test_build_scripts_results_and_tests_stay_out(members):
    assert [name for name in members if name.startswith(("visearch/assets/build", "visearch/assets/results"))] == []
    tops = {name.split("/")[0] for name in members if not name.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"visearch"}


def test_licences_travel_with_what_they_cover(members):
    licences = {name.split("/licenses/")[1] for name in members if "/licenses/" in name}
    assert {"LICENSE", "assets/emoji-64/NOTICE", "assets/geneval/LICENSE"} <= licences


def test_assets_keep_to_their_quota(members):
    megabytes = sum(size for name, size in members.items() if name.startswith("visearch/assets/")) / 1e6
    assert 0 < megabytes <= MAX_ASSETS_MB


def test_versions_of_package_and_metadata_agree():
    assert importlib.metadata.version("visearch") == visearch.__version__


def test_the_changelog_covers_this_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]" or headings[0].startswith(f"## [{visearch.__version__}]")
