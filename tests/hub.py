"""A Hugging Face Hub for the tests, of models and data sets: its cache on disk as huggingface_hub lays it out, and a
small server of its API."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

MAIN = "1" * 40
NEXT = "abcdef0123456789abcdef0123456789abcdef01"


def use_cache(patch: pytest.MonkeyPatch, cache: Path, *, offline: bool) -> Path:
    """Makes huggingface_hub of this process take `cache` for its own."""
    cache.mkdir(parents=True, exist_ok=True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return cache


def put_in_cache(cache: Path, repo: str, commit: str, files: Path, *refs: str, kind: str = "model") -> Path:
    """One snapshot of a repository, and the branches and tags that are at it; returns its folder."""
    folder = cache / f"{kind}s--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    shutil.copytree(files, snapshot, dirs_exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    for ref in refs:
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@dataclass
class Hub:
    """A server. `repositories`: id -> (revision -> commit, folder with the files), of a data set `datasets/` and its id;
    `asked` are the paths of all requests, with the range of bytes that was asked for."""

    url: str = ""
    repositories: dict[str, tuple[dict[str, str], Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """Names of the files that were asked for whole."""
        return {name for one in self.asked if (name := one.partition(" GET ")[2])}


@contextmanager
def serving(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub that huggingface_hub of this process talks to instead of the real one, with an empty cache."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    use_cache(patch, cache, offline=False)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()


_REPOSITORY = r"(?:datasets/)?[^/]+/[^/]+"


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            info = re.fullmatch(rf"/api/(?:models/)?({_REPOSITORY})(?:/(revision|tree|paths-info)/([^/]+))?", path)
            file = re.fullmatch(rf"/({_REPOSITORY})/resolve/([^/]+)/(.+)", path)
            inside = re.fullmatch(rf"/api/({_REPOSITORY})/tree/[^/]+/.+", path)  # repositories here have no folders
            if inside is not None and inside[1] in hub.repositories:
                return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            match = info or file
            repo = match[1] if match else ""
            if repo in hub.gated and file is None and info is not None and info[2] != "tree":
                return self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if repo not in hub.repositories:
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            refs, folder = hub.repositories[repo]
            revision = (info[3] if info else file[2] if file else None) or "main"
            commit = revision if revision in refs.values() else refs.get(revision)
            if commit is None:
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if info is not None and info[2] in (None, "revision"):
                hub.asked.append(path)
                files = [{"rfilename": one.name} for one in sorted(folder.iterdir())] if "datasets/" in repo else []
                about = {"id": repo.removeprefix("datasets/"), "sha": commit, "siblings": files}
                return self._answer(200, json.dumps(about).encode())
            if info is not None:
                return self._answer(200, json.dumps([_entry(one) for one in sorted(folder.iterdir())]).encode())
            assert file is not None
            return self._file(folder / file[3], commit)

        def do_POST(self) -> None:
            """Of paths that are asked about, those that exist; data sets have folders that others have too, and none here."""
            asked = self.rfile.read(int(self.headers["content-length"])).decode()
            match = re.fullmatch(rf"/api/({_REPOSITORY})/paths-info/[^/]+", self.path)
            if match is None or match[1] not in hub.repositories:
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            entries = [_entry(one) for one in hub.repositories[match[1]][1].iterdir() if f'"{one.name}"' in asked]
            return self._answer(200, json.dumps(entries).encode())

        def _file(self, path: Path, commit: str) -> None:
            if not path.is_file():
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
            wanted = self.headers.get("range")
            hub.asked.append(f"{path.name} {wanted}" if wanted else f" {self.command} {path.name}")
            if wanted is None:
                return self._answer(200, content, headers)
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()  # type: ignore[union-attr]
            part = content[int(first) : int(last) + 1 if last else None]
            return self._answer(206, part, headers | {"Content-Range": f"bytes {first}-*/{len(content)}"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _entry(path: Path) -> dict[str, object]:
    return {
        "type": "file",
        "path": path.name,
        "size": path.stat().st_size,
        "oid": hashlib.sha1(path.name.encode()).hexdigest(),
    }
