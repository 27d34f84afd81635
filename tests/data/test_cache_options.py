"""Where commands keep the shards of a URL: --cache and --cache-gb, and the environment."""

import os

import pytest

from http_store import serve
from selfvil import cli
from selfvil.build import cache_of
from selfvil.data.remote.cache import FOLDER_VARIABLE, GIGABYTES_VARIABLE, LIMIT, Cache
from selfvil.errors import UserError
from selfvil.recipe import DataSection
from small_exports import make_run


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """A command sets the variables of its process, which is also that of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    for name in (FOLDER_VARIABLE, GIGABYTES_VARIABLE):
        monkeypatch.setenv(name, "")


@pytest.fixture
def served(digit_shards, tmp_path):
    """Shards without indexes beside them: a command downloads them whole."""
    (tmp_path / "shards").mkdir()
    for path in digit_shards.iterdir():
        if path.suffix in (".tar", ".txt"):
            (tmp_path / "shards" / path.name).write_bytes(path.read_bytes())
    with serve(tmp_path / "shards") as server:
        yield server


def run(*words):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return ended.value.code or 0


@pytest.mark.parametrize("command", ["index", "inspect", "pack", "embed", "eval"])
def test_commands_use_the_cache_that_they_are_given(served, tmp_path, command, capsys):
    one, two = (f"{served.url}/digits-{number:06d}.tar" for number in range(2))
    if command in ("embed", "eval"):
        make_run(tmp_path / "run")
    words = {
        "index": [one],
        "inspect": [one, "--against", two, "--workers", "1"],
        "pack": [one, tmp_path / "packed", "--workers", "1"],
        "embed": [one, "--model", tmp_path / "run", "--out", tmp_path / "e.npy", "--workers", "0"],
        "eval": ["knn", tmp_path / "run", "--train", one, "--test", two, "--workers", "0", "k=3"],
    }[command]
    assert run(command, *words, "--cache", tmp_path / "here", "--cache-gb", "0.5") == 0, capsys.readouterr().err
    expected = 2 if command in ("inspect", "eval") else 1
    assert len(list((tmp_path / "here").glob("*.tar"))) == expected
    assert not (tmp_path / "user" / "selfvil" / "remote").exists()


def test_the_size_is_a_limit(served, tmp_path, capsys):
    url = f"{served.url}/digits-{{000000..000001}}.tar"
    largest = max(path.stat().st_size for path in served.folder.glob("*.tar"))
    assert run("index", url, "--cache", tmp_path / "here", "--cache-gb", f"{1.1 * largest / 1e9:.9f}") == 0
    assert len(list((tmp_path / "here").glob("*.tar"))) == 1, capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf"])
def test_a_size_that_is_no_number(text, capsys, monkeypatch):
    assert run("index", "https://localhost/a.tar", "--cache-gb", text) == 2
    assert f"--cache-gb is '{text}'; expected the size of the cache in GB" in capsys.readouterr().err
    if text:
        monkeypatch.setenv(GIGABYTES_VARIABLE, text)
        with pytest.raises(UserError, match=f"{GIGABYTES_VARIABLE} is '{text}'"):
            Cache()


def test_the_environment_holds_where_a_recipe_states_nothing(tmp_path, monkeypatch):
    train = {"train": "https://localhost/a.tar"}
    assert cache_of(DataSection(**train)).limit == LIMIT
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "here"))
    monkeypatch.setenv(GIGABYTES_VARIABLE, "200")
    cache = cache_of(DataSection(**train))
    assert (cache.folder, cache.limit) == (tmp_path / "here", 200 * 10**9)
    cache = cache_of(DataSection(**train, cache=str(tmp_path / "recipe"), cache_gb=2))
    assert (cache.folder, cache.limit) == (tmp_path / "recipe", 2 * 10**9)
    monkeypatch.setenv(FOLDER_VARIABLE, "~/shards")
    assert str(Cache().folder) == os.path.expanduser("~/shards")


def test_help_names_the_options_and_the_variables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("index", "inspect", "pack", "embed", "eval"):
        assert run(command, "--help") == 0
        printed = capsys.readouterr().out
        for word in ("--cache ", "--cache-gb", FOLDER_VARIABLE, GIGABYTES_VARIABLE):
            assert word in printed, (command, word)
