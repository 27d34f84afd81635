"""`selfvil push`: upload an export to the Hugging Face hub, in the layout that `timm.create_model("hf-hub:...")` loads.

The export is verified first. The files are sent as they are, except that the card gets the licence and names the
repository in its code; the manifest gets the new digest of the card. The token is that of the environment (HF_TOKEN) or
of the hub's own login, which `huggingface_hub` reads; this module never holds it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfvil.errors import UserError
from selfvil.manifest import MANIFEST, read_manifest, renew_entry
from selfvil.timm_folder import FOLDER
from selfvil.verification import CARD, verify
from selfvil.version import __version__
from selfvil.weights import CONFIG, WEIGHTS, is_export


@dataclass(frozen=True)
class Upload:
    """What a push sends: the repository, and the path of each file in it with the file or its bytes."""

    repo: str
    files: dict[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def prepare(folder: str | Path, repo: str, licence: str | None = None) -> Upload:
    """Verify an export and collect what a push of it sends. Touches no network.

    repo: "name" or "owner/name". licence: replaces that of the card. Files that the manifest does not list are not
    sent. Raises UserError if `folder` is no complete, undamaged export, or `repo` is no name of a repository.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    folder = Path(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(
            f"{repo!r} is no name of a repository on the Hugging Face hub; expected NAME or OWNER/NAME, of letters, "
            "digits, '-', '_' and '.', with at most 96 characters."
        ) from None
    if not folder.is_dir() or not is_export(folder):
        raise UserError(f"{folder} is no export; write one with `selfvil export RUN FOLDER`, then push that folder.")
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} holds no {WEIGHTS}, which timm loads from the hub: push an export of the run itself, "
            "`selfvil export RUN FOLDER --onnx ...`."
        )
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is an older export without {MANIFEST}: export the run again, then push that folder.")
    verify(folder)
    _, listed = read_manifest(folder, required=[CONFIG, WEIGHTS])
    if not (folder / CARD).is_file():
        raise UserError(f"{folder / CARD}, the model card, is missing: export the run again, or write one.")
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(listed)}
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        text = (folder / CARD).read_text(encoding="utf-8")
        (staged / CARD).write_text(card_for(text, repo, licence), encoding="utf-8")
        shutil.copy(folder / MANIFEST, staged / MANIFEST)
        renew_entry(staged, CARD)
        for name in (CARD, MANIFEST):
            files[name] = (staged / name).read_bytes()
    return Upload(repo, files)


def card_for(text: str, repo: str, licence: str | None) -> str:
    """The card with its code loading from `repo`, and with `licence` in its metadata and its last section."""
    text = text.replace(f"local-dir:{FOLDER}", f"hf-hub:{repo}")
    parts = text.split("```python\n")
    for number, part in enumerate(parts[1:], 1):
        if f'"{FOLDER}"' in part:
            download = part.replace(f'"{FOLDER}"', f'snapshot_download("{repo}")')
            parts[number] = f"from huggingface_hub import snapshot_download\n{download}"
    text = "```python\n".join(parts).replace(FOLDER, "FOLDER")
    if licence is None:
        return text
    _, metadata, body = text.split("---\n", 2) if text.startswith("---\n") else ("", "", text)
    kept = [line for line in metadata.splitlines() if not line.startswith("license:")]
    body = body.rsplit("## Licence\n", 1)[0].rstrip() + f"\n\n## Licence\n\n{licence}\n"
    return "\n".join(["---", *kept, f"license: {licence}", "---", ""]) + body


def send(upload: Upload, *, private: bool | None = None, api: Any = None, notify: Callable[[str], None] = print) -> str:
    """Create the repository if it does not exist, upload all files in one commit, and return its address.

    private: of a new repository; an existing one keeps its visibility. api: an `HfApi`, for tests. Raises UserError if
    there is no token or the hub refuses; nothing is uploaded then, or all files are.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if api is None:
        if get_token() is None:
            raise UserError("There is no token of the Hugging Face hub: set HF_TOKEN, or run `hf auth login`.")
        api = HfApi(library_name="selfvil", library_version=__version__)
    try:
        repo = api.create_repo(upload.repo, private=private, exist_ok=True).repo_id
        notify(f"uploading {len(upload.files)} files to {repo}")
        operations = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        commit = api.create_commit(repo, operations, commit_message=f"Export of selfvil {__version__}")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        meaning = {
            401: "the token is not valid",
            403: "the token may not write to it; create one with write access",
            404: "there is no such owner, or the token may not see it",
        }
        reason = meaning.get(status or 0, f"it answered {status}")
        raise UserError(f"The Hugging Face hub refused to take {upload.repo}: {reason}.") from None
    except (OSError, ValueError, RuntimeError) as error:  # network errors are among these
        raise UserError(
            f"{upload.repo} was not uploaded: {without_token(' '.join(str(error).split())[:300])}."
        ) from None
    except Exception as error:  # the hub's client raises its HTTP library's classes
        if not type(error).__module__.startswith(("http", "requests", "hf_xet")):
            raise
        raise UserError(f"{upload.repo} was not uploaded: {without_token(str(error)[:300])}.") from None
    return str(getattr(commit, "repo_url", None) or f"https://huggingface.co/{repo}")


def without_token(text: str) -> str:
    """`text` without the token, should an error message contain it."""
    from huggingface_hub import get_token

    for token in (get_token(), os.environ.get("HF_TOKEN")):
        if token:
            text = text.replace(token, "[token]")
    return text
