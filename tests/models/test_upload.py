"""Uploading: what is checked before the merge, and what arrives. The hub is a small server of ours.

It speaks the plain HTTP interface (Git commits, LFS). The hub's newer storage for large files (Xet) cannot be stood in
for.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from prismo.commands.merge import main
from prismo.merging.merge import merge
from prismo.merging.publish import merged_files
from prismo.policies.checkpoint import checkpoint_hash, open_checkpoint
from prismo.util.cli import BrokenOffError
from prismo.util.upload import check_upload, upload

NAME = "me/my-policy"


class Hub(http.server.ThreadingHTTPServer):
    """User `me`, member of `lab`, and one repository at most."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.role = "write"
        self.visibility: str | None = None  # of the repository; None = there is none
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.full = False
        self.large = (".safetensors", ".pt")  # suffixes of what it does not take into a commit

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_ours":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/whoami-v2":
            token = {"accessToken": {"role": self.server.role}}
            self.answer({"name": "me", "orgs": [{"name": "lab"}], "auth": token})
        elif self.path == f"/api/models/{NAME}" and self.server.visibility:
            self.answer({"id": NAME, "private": self.server.visibility == "private", "siblings": []})
        else:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.visibility = self.server.visibility or json.loads(body).get("visibility", "public")
            self.answer({"url": f"{self.server.address}/{NAME}", "id": NAME})
        elif self.path == "/api/validate-yaml":
            page = ModelCard(json.loads(body)["content"], ignore_metadata_errors=False)
            self.answer({"errors": [] if page.data.license else [{"message": "no license"}], "warnings": []})
        elif self.path == f"/api/models/{NAME}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [(name, "lfs" if name.endswith(self.server.large) else "regular") for name in names]
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes]})
        elif self.path == f"/{NAME}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            link = f"{self.server.address}/blob/"
            answers = [o | {"actions": {"upload": {"href": link + o["oid"]}}} for o in objects]
            self.answer({"objects": answers, "transfer": "basic"})
        elif self.path == f"/api/models/{NAME}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": f"what is {self.path}?"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[self.path.rpartition("/")[2]] = body
        self.answer({}, 507 if self.server.full else 200)

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        self.answer({"commitUrl": f"{self.server.address}/{NAME}/commit/1", "commitOid": "1" * 40})

    def answer(self, body: object, code: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub, which this process takes for the real one."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", "hf_ours")
        yield server
        server.shutdown()


@pytest.mark.parametrize("xet", [False, True])
def test_a_merged_checkpoint_arrives_as_it_is(
    xet: bool, hub: Hub, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if xet:  # the client's newer way; only what fits into commits
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
        hub.large = ()
    upload(NAME, merged, merged_files(merged), private=True)
    assert hub.visibility == "private"
    assert hub.files.keys() == {path.name for path in merged.iterdir()}
    for name, data in hub.files.items():
        (tmp_path / "back").mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(data)
    assert checkpoint_hash(open_checkpoint(tmp_path / "back")) == checkpoint_hash(open_checkpoint(merged))
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in hub.blobs.items())


def test_logs_and_trainer_state_stay_here(base: Path, checkpoint: Path, hub: Hub) -> None:
    """In place, where a "latest" checkpoint lies among everything else of its run."""
    for name in ("trainer_state/state.json", "wandb/secrets.json", "metrics.jsonl", ".lock", "step_10_align.png"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
    merge(base, checkpoint, progress=False, verify=False)
    upload(NAME, checkpoint, merged_files(checkpoint), private=False)
    assert hub.visibility == "public"
    assert {"lora_adapter/adapter_model.safetensors", "README.md", "merge.json"} <= hub.files.keys()
    assert not any("state" in n or "wandb" in n or "metrics" in n or "lock" in n or "png" in n for n in hub.files)


def test_what_is_refused_before_the_merge(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_upload(NAME, private=True)
    check_upload("lab/my-policy", private=True)
    hub.visibility = "private"
    check_upload(NAME, private=True)
    assert hub.visibility == "private"
    hub.visibility = "public"
    check_upload(NAME, private=False)
    with pytest.raises(ValueError, match="is there and public"):
        check_upload(NAME, private=True)
    with pytest.raises(ValueError, match=r"this token belongs to me, expected one of \['me', 'lab'\]"):
        check_upload("you/my-policy", private=True)
    for name in ("my-policy", "a/b/c", "me/my policy"):
        with pytest.raises(ValueError, match=f"--push_to_hub {name}: "):
            check_upload(name, private=True)
    hub.role = "read"
    with pytest.raises(ValueError, match="this one may only read"):
        check_upload(NAME, private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(ValueError, match="the hub refuses --push_to_hub me/my-policy"):
        check_upload(NAME, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="hf auth login"):
        check_upload(NAME, private=True)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="the hub cannot be asked"):
        check_upload(NAME, private=True)


def test_an_upload_that_breaks_off(hub: Hub, merged: Path) -> None:
    hub.full = True
    with pytest.raises(BrokenOffError, match=r"is complete, but its upload to me/my-policy failed .* --overwrite True"):
        upload(NAME, merged, merged_files(merged), private=True)
    assert not hub.files


def test_merging_uploads_only_when_asked_and_allowed(
    hub: Hub, base: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = tmp_path / "merged"
    flags = [
        "--base_checkpoint",
        str(base),
        "--lora_finetuned_checkpoint_dir",
        str(checkpoint),
        "--output",
        str(merged),
    ]
    assert main([*flags, "--push_to_hub", "you/my-policy"]) == 2
    assert "this token belongs to me" in caplog.text
    assert not merged.exists()
    assert main(flags) == 0
    assert hub.visibility is None
    assert main([*flags, "--overwrite", "--push_to_hub", NAME]) == 0
    assert hub.visibility == "private"
    assert f'pretrained_checkpoint="{NAME}"' in hub.files["README.md"].decode()
    hub.full, hub.files, hub.blobs = True, {}, {}
    assert main([*flags, "--overwrite", "--push_to_hub", NAME]) == 1
    assert "is complete, but its upload" in caplog.text
