"""Imports point one way: cli, app -> wrap, compare, geneval -> run -> search -> protocols.

Sources are parsed, not run, so that imports inside functions count too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folders of the repository and the package that each installs as.
PACKAGES = {
    "visearch": "visearch",
    "pipelines": "visearch.pipelines",
    "rewards": "visearch.rewards",
    "app": "visearch.app",
    "assets": "visearch.assets",
}
HEAVY = ("diffusers", "transformers", "torchvision", "gradio")
ARXIV_ID = re.compile(r"\b\d{4}\.\d{4,5}\b")

TOP = {"wrap", "job", "compare", "demo", "geneval", "support", "options", "pool", "record", "calibrate", "prompts"}
TOP |= {"catalogue"}
TOP |= {"parallel"}
TOP |= {"bench"}
TOP |= {"previews", "distill", "train_reward", "preview_report"}
ENTRY = {"cli", "app", "__main__", "visearch"}
WORLDS = {"pipelines", "rewards", "assets"}
LIBRARY = {"protocols", "allocation", "diversity", "selection", "statistics", "search", "core"}
# What a group may import beyond itself; None is anything. Modules that are not named here form the core: they serve
# the driver, so they may import each other and whatever lies below.
BELOW: dict[str, set[str] | None] = {
    "protocols": set(),
    "statistics": set(),
    "allocation": set(),
    "diversity": {"protocols"},
    "selection": {"protocols", "diversity"},
    "search": {"protocols", "allocation", "diversity", "selection"},
    "pipelines": {"protocols", "assets"},
    "rewards": {"protocols", "assets"},
    "assets": {"protocols"},
    "core": LIBRARY,
    "app": LIBRARY | TOP | {"assets"},
    **dict.fromkeys(TOP, LIBRARY | TOP | WORLDS),
    **dict.fromkeys(ENTRY - {"app"}),
}


@dataclass(frozen=True)
class Source:
    """One file: the module it installs as, and where it lies."""

    module: str
    path: Path


def sources(root: Path) -> list[Source]:
    """Every Python file that gets installed from ``root``."""
    found = []
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if folder == "assets" and parts[0] in ("build", "results"):
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append(Source(".".join((package, *parts)), path))
    return found


def group(module: str) -> str:
    """The layer of an installed module: "visearch.search.smc" -> "search", "visearch.budget" -> "core"."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "visearch"
    return name if name in BELOW else "core"


def imported(path: Path, modules: set[str]) -> Iterator[tuple[int, int, str]]:
    """(line, dots of a relative import, module) of every import statement, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, 0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                child = f"{base}.{alias.name}"
                yield node.lineno, node.level, child if child in modules else base


def violations(root: Path) -> list[str]:
    """Every import under ``root`` that breaks the direction, is relative, or works from the repository root alone."""
    files = sources(root)
    modules = {source.module for source in files}
    broken = []
    for source in files:
        own = group(source.module)
        allowed = BELOW[own]
        for line, dots, target in imported(source.path, modules):
            where = f"{source.path.relative_to(root)}:{line}"
            first = target.split(".")[0]
            if dots:
                broken.append(f"{where}: relative import; write visearch.… in full")
            elif first in PACKAGES and first != "visearch":
                broken.append(f"{where}: imports {target}; its installed name is visearch.{target}")
            elif first == "visearch" and allowed is not None and group(target) not in {own, *allowed}:
                broken.append(
                    f"{where}: {own} imports {target}; it may import {', '.join(sorted(allowed)) or 'nothing'}"
                )
    return broken


def test_imports_point_one_way():
    assert len(sources(ROOT)) > 10
    assert violations(ROOT) == []


def test_tests_and_build_scripts_import_installed_names():
    """From the repository root ``import rewards`` works by accident; from anywhere else it does not."""
    broken = []
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "assets" / "build").rglob("*.py")]:
        for line, dots, target in imported(path, set()):
            if dots or target.split(".")[0] in PACKAGES.keys() - {"visearch"}:
                broken.append(f"{path.relative_to(ROOT)}:{line}: {'.' * dots}{target}")
    assert broken == []


@pytest.mark.parametrize(
    ("file", "statement", "caught"),
    [
        ("visearch/protocols.py", "from visearch.run import run_search", True),
        ("visearch/search/smc.py", "from visearch.budget import Budget", True),
        ("visearch/search/smc.py", "from visearch import selection", False),
        ("visearch/search/smc.py", "from visearch import run", True),
        ("visearch/search/smc.py", "def f():\n    import visearch.pipelines", True),
        ("visearch/search/smc.py", "from visearch import Population", True),
        ("visearch/search/smc.py", "from . import zero_order", True),
        ("visearch/budget.py", "from visearch.pipelines import toy", True),
        ("visearch/budget.py", "from visearch.wrap import SearchPipeline", True),
        ("visearch/budget.py", "from visearch.protocols import Sampler", False),
        ("visearch/wrap.py", "from visearch.pipelines import diffusion", False),
        ("visearch/wrap.py", "import rewards", True),
        ("visearch/wrap.py", "from visearch.cli import main", True),
        ("visearch/cli.py", "import visearch.rewards.clip", False),
        ("pipelines/toy.py", "from visearch.selection import top_k", True),
        ("pipelines/toy.py", "from visearch.pipelines.flow import x0", False),
        ("pipelines/toy.py", "from visearch.rewards import clip", True),
        ("rewards/clip.py", "from visearch.assets import path", False),
        ("rewards/clip.py", "from visearch.geneval import judge", True),
        ("assets/scenes.py", "from visearch.pipelines import emoji", True),
        ("app/__init__.py", "from visearch import rewards", True),
        ("app/__init__.py", "from visearch import compare", False),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, statement, caught):
    names = [
        *(f"visearch/{name}.py" for name in ("__init__", "protocols", "selection", "run", "budget", "wrap", "cli")),
        *(f"visearch/{name}.py" for name in ("compare", "geneval", "search/__init__", "search/zero_order")),
        *(f"{name}/__init__.py" for name in ("pipelines", "rewards", "app", "assets")),
    ]
    for name in [*names, file]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import numpy\n")
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(statement + "\n")
    found = violations(tmp_path)
    assert len(found) == caught
    assert all(line.startswith(f"{file}:") for line in found)


def uncited(folder: Path) -> list[str]:
    """Search modules of which neither the module nor a class docstring holds an arXiv id."""
    missing = []
    for path in sorted(folder.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        nodes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        if not any(ARXIV_ID.search(ast.get_docstring(node) or "") for node in nodes):
            missing.append(path.name)
    return missing


def test_every_search_cites_its_paper():
    assert len(list((ROOT / "visearch" / "search").glob("*.py"))) > 1
    assert uncited(ROOT / "visearch" / "search") == []


def test_a_missing_citation_is_found(tmp_path):
    (tmp_path / "cited.py").write_text('"""Feynman-Kac steering, arXiv 2501.06848."""\n')
    (tmp_path / "in_class.py").write_text('"""No source."""\nclass A:\n    """Algorithm 1 of 2501.09732."""\n')
    (tmp_path / "plain.py").write_text('"""A better idea, 10.5 times faster."""  # 2501.06848\n')
    assert uncited(tmp_path) == ["plain.py"]


def loaded_by(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_visearch_loads_nothing_heavy():
    assert loaded_by("import visearch") == []


def test_a_heavy_import_is_found():
    fake = "import types; sys.modules['gradio'] = types.ModuleType('gradio')"
    assert loaded_by(fake) == ["gradio"]
