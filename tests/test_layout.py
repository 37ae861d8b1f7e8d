"""The shape of the project: who imports whom, and what the wheel holds."""

import ast
import graphlib
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import d2llm

ROOT = Path(__file__).parents[1]
SATELLITES = ("connectors", "export", "serve", "train")
PUT_TOGETHER = "serve/cli.py"
"""The one file that imports another satellite: it opens the collection that the service is for."""
FOLDERS = {"d2llm": "d2llm", **{f"d2llm/{name}": name for name in SATELLITES}}  # in the wheel: on disk


def imports(file: Path) -> Iterator[tuple[int, str, int]]:
    """Yield (line, module, level) of each import, those inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            yield from ((node.lineno, prefix + alias.name, node.level) for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_the_core_never_imports_a_satellite() -> None:
    wrong = [
        f"{file.name}:{line} imports {module}"
        for file in (ROOT / "d2llm").glob("*.py")
        for line, module, level in imports(file)
        if any(within(module, f"d2llm.{name}") or (level and within(module, name)) for name in SATELLITES)
    ]
    assert not wrong


def test_satellites_import_the_core_absolutely_themselves_relatively_and_never_one_another() -> None:
    wrong, core, own = [], 0, 0
    for name in SATELLITES:
        for file in (ROOT / name).glob("*.py"):
            for line, module, level in imports(file):
                allowed = within(module, "d2llm.connectors") and f"{name}/{file.name}" == PUT_TOGETHER
                satellite = any(within(module, other) or within(module, f"d2llm.{other}") for other in SATELLITES)
                satellite = satellite and not allowed
                if level > 1 or (satellite and not level):
                    wrong.append(f"{name}/{file.name}:{line} imports {'.' * level}{module}")
                core += not level and within(module, "d2llm")
                own += level == 1
    assert not wrong
    assert core and own, "the walk found no imports at all"


def test_the_runtime_imports_no_torch() -> None:
    """Students and small query encoders are torch's, for train and export; no other core module may need them."""
    torchs = ("student", "heads", "backbone", "embedder", "features", "fitting", "iem", "pretrained", "saved",
              "small_encoder", "small_encoder_config")  # fmt: skip
    heavy = ("torch", "transformers", "peft", "safetensors", *(f"d2llm.{name}" for name in torchs))
    wrong = [
        f"{file.name}:{line} imports {module}"
        for file in (ROOT / "d2llm").glob("*.py")
        if file.stem not in torchs
        for line, module, _ in imports(file)
        if any(within(module, name) for name in heavy)
    ]
    assert not wrong


def test_no_file_or_class_is_too_long_to_be_read_at_once() -> None:
    sizes = {}
    for folder in FOLDERS.values():
        for file in (ROOT / folder).glob("*.py"):
            text = file.read_text(encoding="utf-8")
            sizes[str(file.relative_to(ROOT))] = (text.count("\n"), 450)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef):
                    sizes[f"{file.relative_to(ROOT)}: {node.name}"] = ((node.end_lineno or 0) - node.lineno + 1, 250)
    assert not {name: size for name, (size, most) in sizes.items() if size > most}


def test_modules_import_each_other_in_no_circle() -> None:
    """Imports within functions count too: a circle that is closed late is a circle."""
    modules = {
        ".".join([package.replace("/", "."), file.stem]): file
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).glob("*.py")
        if file.stem != "__init__"
    }
    graph = {}
    for name, file in modules.items():
        package = name.rpartition(".")[0]
        named = [f"{package}.{module}" if level else module for _, module, level in imports(file)]
        graph[name] = {other for other in modules if any(within(module, other) for module in named)}
    sorted_modules = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert len(sorted_modules) == len(modules) > 50


def test_satellites_are_flat() -> None:
    nested = [path for name in SATELLITES for path in (ROOT / name).glob("*/**/*.py")]
    assert not nested


def test_the_readme_names_every_module() -> None:
    _, _, listed = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What is where")
    missing = [
        path.name
        for folder in FOLDERS.values()
        for path in sorted((ROOT / folder).glob("*.py"))
        if not path.name.startswith("__") and not re.search(rf"\b{path.name}\b", listed)
    ]
    assert not missing


def test_the_package_list_matches_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert settings["package-dir"] == {package.replace("/", "."): folder for package, folder in FOLDERS.items()}
    assert sorted(settings["packages"]) == sorted(settings["package-dir"])


def test_what_the_package_offers_is_there_and_sorted() -> None:
    assert list(d2llm.__all__) == sorted(d2llm.__all__)
    assert all(hasattr(d2llm, name) for name in d2llm.__all__)
    for name in SATELLITES:
        satellite = importlib.import_module(f"d2llm.{name}")
        assert satellite.__all__ and all(hasattr(satellite, offered) for offered in satellite.__all__)


def test_the_wheel_holds_the_tree_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools")
    tree = tmp_path / "tree"
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.name}" for package, folder in FOLDERS.items() for path in (ROOT / folder).glob("*.py")
    }
    expected |= {f"d2llm/serve/page/{path.name}" for path in (ROOT / "serve" / "page").iterdir()}
    expected |= {f"d2llm/train/recipes/{path.name}" for path in (ROOT / "train" / "recipes").glob("*.toml")}
    assert found == expected | {"d2llm/py.typed"}
    entry_points = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt"))
    assert b"d2llm-export = d2llm.cli:export_main" in zipfile.ZipFile(wheel).read(entry_points)


@pytest.mark.parametrize(
    "file", [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")], ids=lambda file: file.name
)
def test_every_benchmark_and_example_can_start(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])
    spec = importlib.util.spec_from_file_location(f"started_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    commands = [value for value in vars(module).values() if isinstance(value, click.Command)]
    for command in commands:
        assert CliRunner().invoke(command, ["--help"]).exit_code == 0
    assert commands or file.parent.name == "examples"
