"""The rules of the house: layout, packaging, and the trap in the name `ssl/`."""

import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
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
        origin = Path(spec.origin).resolve() if spec and spec.origin and Path(spec.origin).exists() else None
        ours = origin is not None and REPOSITORY in origin.parents and ".venv" not in str(origin)
        assert spec is None or ours, f"{path.relative_to(REPOSITORY)} shadows the module {name}"
        assert name not in sys.stdlib_module_names


def test_top_level_is_the_owners():
    allowed = {
        "ssl", "recipes", "launch", "eval", "tests", "benchmarks", "docs", ".ci", "pyproject.toml", "README.md",
        "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", ".pre-commit-config.yaml", ".gitignore",
        ".importlinter",
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
    """`import selfvil` is for those who only want the backbone: it loads no package that timm does not load."""

    def loaded(module: str) -> set[str]:
        code = f"import json, sys, {module}; print(json.dumps([name for name in sys.modules if '.' not in name]))"
        return set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))

    heavy = {"accelerate", "lightly", "webdataset", "deepspeed", "sklearn", "tensorboard", "triton", "pydantic"}
    assert not heavy & (loaded("selfvil") - loaded("timm"))


def test_recipe_imports_only_pydantic_yaml_and_the_standard_library():
    source = (REPOSITORY / "ssl" / "selfvil" / "recipe.py").read_text()
    imports = set(re.findall(r"^(?:from|import) ([a-zA-Z_]+)", source, re.MULTILINE))
    assert imports <= sys.stdlib_module_names | {"pydantic", "yaml", "selfvil"}


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
