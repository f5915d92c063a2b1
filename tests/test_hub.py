"""Hub ids: what counts as one, and when the local cache is enough. The hub itself is a small server of ours."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prismo.util.hub import is_hub_id, local_folder

pytestmark = pytest.mark.processes

COMMIT = "b" * 40
FILES = {"config.json": b'{"a": 1}', "model.safetensors": b"weights", "action_head.pt": b"head", "code.py": b"pass"}


class Hub(http.server.BaseHTTPRequestHandler):
    """Repository `owner/name` with `FILES`, as huggingface_hub asks for it."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/owner/name/resolve/") and name in FILES:
            headers = {"ETag": f'"{hashlib.sha1(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(FILES[name], headers)
        elif self.path.startswith("/api/models/owner/name/tree/"):
            entries = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in FILES.items()]
            self.answer(json.dumps(entries).encode())
        elif self.path.startswith("/api/models/owner/name/revision/"):
            self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        else:
            self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def answer(self, body: bytes, headers: dict[str, str] | None = None, code: int = 200) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    """A running hub; `asked` lists the paths of its requests."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


LOCAL_FOLDER = """
import sys
from prismo.util.hub import local_folder
lacking = lambda folder: None if (folder / "model.safetensors").is_file() else f"{folder} has no model.safetensors"
patterns = ["*.json", "*.safetensors", *sys.argv[1:]]
try:
    folder = local_folder("owner/name", patterns, missing=lacking, optional=["*.py"])
    print(*sorted(path.name for path in folder.iterdir()))
except FileNotFoundError as error:
    print(error)
"""


def ask(cache: Path, server: http.server.HTTPServer | None, *arguments: str) -> str:
    """`local_folder` in a process of its own, with a hub or without a network."""
    address = f"http://127.0.0.1:{server.server_port}" if server else "http://127.0.0.1:9"
    settings = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": str(int(server is None)), "HF_HUB_DISABLE_XET": "1"}
    environment = {"HF_ENDPOINT": address, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), **settings}
    command = [sys.executable, "-c", LOCAL_FOLDER, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100, cwd=cache)
    return done.stdout.strip()


def write_cache(cache: Path, *names: str, listed: bool) -> None:
    """A snapshot that holds only some files, with or without the hub's listing beside it."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in names:
        (snapshot / name).write_bytes(FILES[name])
    if listed:
        (repository / "trees").mkdir()
        files = {name: {"size": len(data), "blob_id": "0" * 40} for name, data in FILES.items()}
        listing = json.dumps({"format_version": 1, "files": files})
        (repository / "trees" / f"{COMMIT}.json").write_text(listing)


def test_a_partial_cache_is_completed(hub, tmp_path: Path) -> None:
    """Only config.json is there, as after reading the configuration with another library."""
    write_cache(tmp_path, "config.json", listed=False)
    offline = ask(tmp_path, None)
    assert "has no model.safetensors" in offline
    assert "run `hf download owner/name` where there is a network" in offline
    assert ask(tmp_path, hub) == "code.py config.json model.safetensors"
    hub.asked.clear()
    assert ask(tmp_path, hub) == "code.py config.json model.safetensors"
    assert not hub.asked  # now the cache holds the listing


def test_side_modules_that_were_never_fetched(hub, tmp_path: Path) -> None:
    """Weights alone, as for a base model: evaluating them without the action head would be another policy."""
    write_cache(tmp_path, "config.json", "model.safetensors", listed=True)
    assert ask(tmp_path, None) == "config.json model.safetensors"
    assert "could not be fetched" in ask(tmp_path, None, "*.pt")
    assert ask(tmp_path, hub, "*.pt") == "action_head.pt code.py config.json model.safetensors"


def test_code_is_not_needed_offline(tmp_path: Path) -> None:
    write_cache(tmp_path, "config.json", "model.safetensors", "action_head.pt", listed=True)
    assert ask(tmp_path, None, "*.pt") == "action_head.pt config.json model.safetensors"


def test_paths_are_no_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in a relative path must not ask the hub for somebody's repository of that name."""
    (tmp_path / "mine" / "openvla-7b+libero--100_chkpt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("openvla/openvla-7b", "IPEC-COMMUNITY/spatialvla-4b-224-pt"):
        assert is_hub_id(name)
    for name in ("runs/old", "ckpts/openvla-7b", "mine/old", "./a/b", "../a", "/a/b", "a/b/c", "a/", "a", "~/a"):
        assert not is_hub_id(name), name
        with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
            local_folder(name, ("*",), missing=lambda folder: None)
    with pytest.raises(FileNotFoundError, match=r"Did you mean mine/openvla-7b\+libero--100_chkpt\? It is not taken"):
        local_folder("mine/openvla-7b+libero--10_chkpt", ("*",), missing=lambda folder: None)
