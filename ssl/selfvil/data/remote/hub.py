"""Files behind hf://: data sets and other repositories of the Hugging Face hub, through huggingface_hub.

The library's file system lists the whole folder of a file before each look at it, and reads 5 MB more than it is asked
for. Here a file is one HEAD request, and a part of it one GET request with a range. The file system only finds the
repository and the revision in a URL, and lists folders.
"""

from typing import Any
from urllib.parse import quote

from selfvil.data.remote.access import Temporary
from selfvil.data.remote.buckets import BucketStore
from selfvil.data.remote.urls import Url

_TIMEOUT = 60.0  # seconds without an answer


class HubStore(BucketStore):
    def __init__(self) -> None:
        super().__init__("hf")

    def _info(self, url: Url) -> dict[str, Any]:
        files = self._files(url)
        from huggingface_hub import get_hf_file_metadata

        try:
            found = get_hf_file_metadata(self._address(url), token=files.token, timeout=_TIMEOUT)
        except Exception as error:
            # Only a name that looks like one of a folder costs a request more: sidecars are often missing.
            if getattr(getattr(error, "response", None), "status_code", 0) == 404 and "." not in url.name:
                return files.info(url.text)
            raise
        return {"size": found.size, "ETag": found.etag}

    def _part(self, url: Url, first: int, last: int) -> bytes:
        files = self._files(url)
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        # identity: a range of a compressed file would be other bytes.
        headers = {"Range": f"bytes={first}-{last - 1}", "Accept-Encoding": "identity"}
        response = http_backoff(
            "GET", self._address(url), headers={**build_hf_headers(token=files.token), **headers}, timeout=_TIMEOUT,
            max_retries=0,
        )  # fmt: skip
        hf_raise_for_status(response)
        ranged = str(response.headers.get("Content-Range", ""))
        if response.status_code == 206 and not ranged.startswith(f"bytes {first}-"):
            raise Temporary(f"it sent {ranged or 'an unknown range'}, not bytes {first}-{last - 1}")
        return response.content[first:last] if response.status_code == 200 else response.content

    def _address(self, url: Url) -> str:
        """Of a file, which the server redirects to its storage."""
        from huggingface_hub import hf_hub_url

        files = self._files(url)
        found = files.resolve_path(url.text)
        if hasattr(found, "bucket_id"):
            return f"{files.endpoint}/buckets/{found.bucket_id}/resolve/{quote(found.path)}"
        return hf_hub_url(
            found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision,
            endpoint=files.endpoint,
        )  # fmt: skip
