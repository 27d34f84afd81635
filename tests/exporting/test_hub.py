"""`selfvil push`: what is sent, what is refused, and that timm loads it from a hub; no network is used."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from http_store import QuietHandler, serve_requests
from selfvil.cli import main
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.exporting import hub
from selfvil.manifest import check_files, read_manifest
from selfvil.weights import load_export
from small_exports import make_run

TOKEN = "hf_" + "s3cret" * 5


class Api:
    """A stand-in for huggingface_hub.HfApi that stores what is sent in a folder."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder, self.error, self.calls = folder, error, []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        if self.error:
            raise self.error
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **options):
        self.calls.append(("create_commit", repo_id, options))
        for operation in operations:
            target = self.folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")


@pytest.fixture
def out(tmp_path):
    torch.manual_seed(0)
    make_run(tmp_path / "run")
    return export(tmp_path / "run", tmp_path / "out", formats=["published"], licence="mit")


def run_push(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["push", *map(str, words)])
    return stopped.value.code


def test_a_dry_run_prints_every_file_with_its_size_and_touches_no_network(out, capsys, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr(hub, "send", no_network)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run_push(out, "me/vil", "--dry-run", "--private") == 0
    printed = capsys.readouterr()
    for path in before:
        assert path.relative_to(out).as_posix() in printed.out
    assert f"{(out / 'model.safetensors').stat().st_size:,} bytes  model.safetensors" in printed.out
    assert "in 6 files, private, to me/vil" in printed.out
    assert "dry run: nothing was sent" in printed.out
    assert TOKEN not in printed.out + printed.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_is_sent_is_a_complete_export_with_the_licence_and_the_repository(out, tmp_path):
    (out / "notes.txt").write_text("not part of the export")
    api = Api(tmp_path / "hub")
    assert hub.send(hub.prepare(out, "me/vil", "apache-2.0"), private=True, api=api, notify=lambda _: None) == (
        "https://huggingface.co/me/vil"
    )
    assert api.calls[0] == ("create_repo", "me/vil", {"private": True, "exist_ok": True})
    _, files = read_manifest(api.folder)
    check_files(api.folder, files)
    assert not (api.folder / "notes.txt").exists()
    assert (api.folder / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    card = (api.folder / "README.md").read_text()
    assert card.count("license:") == 1
    assert "license: apache-2.0\n---\n" in card
    assert card.endswith("## Licence\n\napache-2.0\n")
    assert 'timm.create_model("hf-hub:me/vil", pretrained=True)' in card
    assert "PATH_OF_THIS_FOLDER" not in card
    load_export(api.folder)
    kept = hub.prepare(out, "me/vil").files["README.md"]
    assert b"license: mit\n" in kept


def test_timm_loads_what_was_pushed_from_a_hub(out, tmp_path):
    """A real download by timm and huggingface_hub, from a server on this machine that has the pushed files."""
    api = Api(tmp_path / "hub")
    hub.send(hub.prepare(out, "me/vil"), api=api, notify=lambda _: None)

    class Hub(QuietHandler):
        def do_GET(self):
            path = api.folder / self.path.partition("/resolve/main/")[2].partition("?")[0]
            found = self.path.startswith("/me/vil/resolve/main/") and path.is_file()
            content = path.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

    code = (
        "import selfvil, timm, torch\n"
        "model = timm.create_model('hf-hub:me/vil', pretrained=True).eval()\n"
        f"ours = selfvil.load_backbone({str(out)!r})\n"
        "images = torch.randn(2, 1, 8, 8)\n"
        "assert torch.equal(model(images), ours(images))\n"
        "assert list(timm.data.resolve_model_data_config(model)['mean']) == [0.3]\n"
    )
    with serve_requests(Hub) as url:
        environment = os.environ | {
            "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "repo", ["", "a/b/c", "me/vil lstm", "me/--x", "https://huggingface.co/me/vil", "me/vil.git", "../x", "x" * 97]
)
def test_names_that_are_no_repository_are_refused(out, capsys, repo):
    assert run_push(out, repo, "--dry-run") == 2
    assert "is no name of a repository on the Hugging Face hub; expected NAME or OWNER/NAME" in capsys.readouterr().err


def test_damaged_and_incomplete_folders_are_refused_before_anything_is_sent(out, tmp_path):
    make_run(tmp_path / "other")
    more = export(out, tmp_path / "more", formats=["published"])
    for folder, message in (
        (tmp_path / "nowhere", "is no export"),
        (tmp_path / "other", "is no export; write one with `selfvil export RUN FOLDER`"),
        (more, "holds no model.safetensors, which timm loads from the hub"),
    ):
        with pytest.raises(UserError, match=message):
            hub.prepare(folder, "me/vil")
    config = out / "config.json"
    text = config.read_text()
    config.write_text(text.replace("0.3", "0.4", 1))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        hub.prepare(out, "me/vil")
    config.write_text(text)
    (out / "README.md").write_text("my own card\n")  # may be edited
    assert b"my own card" in hub.prepare(out, "me/vil", "mit").files["README.md"]
    (out / "README.md").unlink()
    with pytest.raises(UserError, match="the model card, is missing"):
        hub.prepare(out, "me/vil")


def test_errors_of_the_hub_are_one_sentence_without_the_token(out, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    upload = hub.prepare(out, "me/vil")

    def answer(status):
        request = SimpleNamespace(headers={"authorization": f"Bearer {TOKEN}"})
        response = SimpleNamespace(headers={}, request=request, status_code=status)
        return HfHubHTTPError(f"refused {TOKEN}", response=response)

    class ConnectError(Exception):
        __module__ = "httpx2"  # the HTTP library of huggingface_hub, which a later version may replace

    for error, message in (
        (answer(401), "refused to take me/vil: the token is not valid"),
        (answer(403), "may not write to it"),
        (answer(500), "it answered 500"),
        (OSError(f"connection with {TOKEN} lost"), r"was not uploaded: connection with \[token\] lost"),
        (ConnectError(f"no route {TOKEN}"), r"was not uploaded: no route \[token\]"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            hub.send(upload, api=Api(tmp_path / "hub", error), notify=lambda _: None)
        assert TOKEN not in str(caught.value)
        assert caught.value.__suppress_context__
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="There is no token of the Hugging Face hub: set HF_TOKEN"):
        hub.send(upload)
    assert json.loads((out / "config.json").read_text())["architecture"] == "vil_nano_patch4_32"
