"""The rules of the house: layout, packaging, and the trap in the name `ssl/`."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def tracked() -> list[str]:
    files = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [file for file in files if (REPOSITORY / file).exists()]


def test_source_root_is_no_package():
    assert not (REPOSITORY / "ssl" / "__init__.py").exists(), "it would shadow the standard library's ssl"
    assert {path.name for path in (REPOSITORY / "ssl").iterdir() if not path.name.endswith(".egg-info")} == {"selfvil"}


def test_standard_ssl_wins_from_the_repository_root():
    code = "import ssl, urllib.request; print(ssl.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).parent == Path(sysconfig.get_path("stdlib"))


@pytest.mark.parametrize("folder", ["launch", "eval", "benchmarks"])
def test_scripts_shadow_nothing(folder):
    """A script puts its own folder first on the path, so its neighbours must not be named like a module."""
    for path in (REPOSITORY / folder).iterdir():
        name = path.stem
        if path.suffix not in ("", ".py") or name.startswith("__"):
            continue
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is None:  # another test put this folder on the path: a namespace package
            spec = None if path.is_dir() and str(path) in spec.submodule_search_locations else spec
        origin = Path(spec.origin).resolve() if spec and spec.origin and Path(spec.origin).exists() else None
        ours = origin is not None and REPOSITORY in origin.parents and ".venv" not in str(origin)
        assert spec is None or ours, f"{path.relative_to(REPOSITORY)} shadows the module {name}"
        assert name not in sys.stdlib_module_names


def test_top_level_is_the_owners():
    allowed = {
        "ssl", "recipes", "launch", "eval", "tests", "benchmarks", "docs", ".ci", "pyproject.toml", "README.md",
        "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", ".pre-commit-config.yaml", ".gitignore",
        ".importlinter", "mkdocs.yml",
    }  # fmt: skip
    assert {file.split("/")[0] for file in tracked()} <= allowed


def test_every_package_folder_is_declared():
    folders = {path.parent for path in (REPOSITORY / "ssl" / "selfvil").rglob("*.py")}
    names = {".".join(folder.relative_to(REPOSITORY / "ssl").parts) for folder in folders}
    assert names | {"selfvil.recipes"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_files_read_top_to_bottom():
    long = {
        file: lines
        for file in tracked()
        if file.endswith(".py") and (lines := len((REPOSITORY / file).read_text().splitlines())) > 500
    }
    assert not long, f"over 500 lines: {long}"


def test_nothing_unpickles_or_evaluates():
    """Nothing loaded from a checkpoint, shard or recipe may run code."""
    forbidden = re.compile(
        r"\bpickle\b|torch\.load\(|yaml\.load\(|\beval\(|\bexec\(|allow_pickle=True|joblib|os\.system"
    )
    for path in (REPOSITORY / "ssl").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("#")[0]
            if forbidden.search(code) and ".eval()" not in code and '"""' not in code:
                pytest.fail(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}")


def test_importing_selfvil_is_light():
    """`import selfvil` loads no package that timm does not load, for users who only need the backbone."""

    def loaded(module: str) -> set[str]:
        code = f"import json, sys, {module}; print(json.dumps([name for name in sys.modules if '.' not in name]))"
        return set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))

    heavy = {"accelerate", "lightly", "webdataset", "deepspeed", "sklearn", "tensorboard", "triton", "pydantic"}
    assert not heavy & (loaded("selfvil") - loaded("timm"))


def test_recipe_imports_only_pydantic_yaml_and_the_standard_library():
    source = (REPOSITORY / "ssl" / "selfvil" / "recipe.py").read_text()
    imports = set(re.findall(r"^(?:from|import) ([a-zA-Z_]+)", source, re.MULTILINE))
    assert imports <= sys.stdlib_module_names | {"pydantic", "yaml", "selfvil"}


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports, at its top, inside a function, or by a table of names.

    A table of names is any string that is the full dotted name of a module, such as "selfvil.objectives.mae", which
    importlib is given later. Imports under `if TYPE_CHECKING` never run and are left out.
    """
    files = {}
    for path in root.rglob("*.py"):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = path

    def imported(node: ast.AST) -> set[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return set().union(*(imported(each) for each in node.orelse))
        found: set[str] = set()
        if isinstance(node, ast.Import):
            found = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found = {name if name in files else node.module or "" for name in inner.values()}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = {node.value} - {root.name}
        return found.union(*(imported(child) for child in ast.iter_child_nodes(node)))

    return {name: (imported(ast.parse(path.read_text())) & files.keys()) - {name} for name, path in files.items()}


def test_modules_import_each_other_in_no_cycle():
    """Imports in functions included: a recipe imports the objectives, which import settings and not recipes."""
    graph = import_graph(REPOSITORY / "ssl" / "selfvil")
    assert "selfvil.objectives" in graph["selfvil.recipe"], "an import inside a function"
    assert "selfvil.objectives.mae" in graph["selfvil.objectives"], "an import by a table of names"
    assert "selfvil.settings" in graph["selfvil.objectives.mae"]
    assert "selfvil.models" in graph["selfvil"]
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' <- '.join(error.args[1])}")


def test_every_import_of_the_package_is_of_a_module_that_exists():
    """Imports inside functions too, which fail only when they run; mypy ignores modules that are missing."""
    missing = []
    for path in (REPOSITORY / "ssl" / "selfvil").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "selfvil":
                file = REPOSITORY / "ssl" / node.module.replace(".", "/")
                if not (file.with_suffix(".py").exists() or (file / "__init__.py").exists()):
                    missing.append(f"{path.name} imports {node.module}")
    assert not missing


def test_every_package_that_is_imported_is_declared():
    """One that only comes with another one is missing as soon as that one changes."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    requirements = [*PROJECT["project"]["dependencies"], *(each for extra in extras for each in extra)]
    declared = {normalised(re.match(r"[\w.-]+", each)[0]) for each in requirements}
    declared |= {"triton", "selfvil"}  # Triton comes with torch where torch uses it
    owners, missing = packages_distributions(), set()
    for path in (REPOSITORY / "ssl" / "selfvil").rglob("*.py"):
        for name in {each.split(".")[0] for each in imported(path)} - sys.stdlib_module_names:
            if not {normalised(owner) for owner in owners.get(name, [name])} & declared:
                missing.add(f"{path.name} imports {name}")
    assert not missing


def normalised(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, also within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def test_the_import_graph_finds_a_cycle(tmp_path):
    """A cycle through a function and a table is found; one only for type checkers is not reported."""
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text('TABLE = {"b": "house.b"}\n')
    (package / "a.py").write_text("def f():\n    from house import TABLE\n")
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.c\n")
    (package / "c.py").write_text("import house.b\n")
    graph = import_graph(package)
    assert graph == {"house": {"house.b"}, "house.a": {"house"}, "house.b": set(), "house.c": {"house.b"}}
    tuple(TopologicalSorter(graph).static_order())
    (package / "b.py").write_text("def f():\n    import house.a\n")
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(import_graph(package)).static_order())


def test_readme_names_the_two_commands():
    readme = (REPOSITORY / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


def test_no_path_of_a_machine_is_committed():
    pattern = re.compile(r"/(?:work|farm|root|home/\w+)/|/tmp/\w")
    for file in tracked():
        path = REPOSITORY / file
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".json", "") and path.name != "test_house.py":
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                assert not pattern.search(line), f"{file}:{number}: {line.strip()}"
