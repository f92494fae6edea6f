"""A server that speaks as much of Google Cloud Storage's JSON API as gcsfs and TensorStore ask for; objects in memory.

`FakeGCS.environment` points both at it. Generations count all writes, so the order of writes can be read from them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)")
OBJECTS = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
WHEN = "2026-01-01T00:00:00.000Z"


class FakeGCS:
    """The server and its objects: "bucket/name" -> (generation, bytes)."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.lock = threading.Lock()
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self._generation = 0
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS_TOKEN": "anon",
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google by gRPC what kind of bucket this is
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeGCS]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    @contextlib.contextmanager
    def used_here(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeGCS]:
        """Run the server for this process, which has read its environment and may know another server already."""
        for name, value in (self.environment | {"XDG_CACHE_HOME": str(cache)}).items():
            monkeypatch.setenv(name, value)
        import fsspec.config
        import gcsfs  # reads the environment
        from etils.epath.backend import fsspec_backend

        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        gcsfs.GCSFileSystem.clear_instance_cache()
        fsspec_backend._get_filesystem.cache_clear()
        with self.running():
            yield self

    def names(self, prefix: str) -> list[str]:
        """Names of the objects below "bucket/folder/", without it."""
        with self.lock:
            return sorted(key.removeprefix(prefix) for key in self.objects if key.startswith(prefix))

    def write(self, key: str, content: bytes, query: dict[str, str]) -> dict[str, Any] | None:
        """Write an object whole; None where the generation that the request names is another one."""
        with self.lock:
            now = self.objects.get(key, (0, b""))[0]
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
                return None
            self._generation += 1
            self.objects[key] = self._generation, content
            return self.describe(key)

    def describe(self, key: str) -> dict[str, Any]:
        generation, content = self.objects[key]
        bucket, _, name = key.partition("/")
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {
            "kind": "storage#object", "id": f"{key}/{generation}", "name": name, "bucket": bucket,
            "generation": str(generation), "metageneration": "1", "size": str(len(content)), "md5Hash": digest,
            "etag": str(generation), "timeCreated": WHEN, "updated": WHEN, "storageClass": "STANDARD",
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    store: FakeGCS
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path, query = self._parsed()
        if match := OBJECT.fullmatch(path):
            self._get_object(f"{match[1]}/{unquote(match[2])}", query, is_media="alt" in query)
        elif match := OBJECTS.fullmatch(path):
            self._list(match[1], query)
        else:
            self._send(200, {"kind": "storage#bucket", "name": path.rpartition("/")[2]})

    def do_DELETE(self) -> None:
        path, query = self._parsed()
        match = OBJECT.fullmatch(path)
        if match is None:
            return self._send(499, None)  # of an upload: it is cancelled
        self._send(self._delete(f"{match[1]}/{unquote(match[2])}", query), None)

    def do_POST(self) -> None:
        path, query = self._parsed()
        if path.startswith("/resumable/"):
            return self.do_PUT()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match = UPLOAD.fullmatch(path)
        if path.startswith("/batch/"):
            self._batch(body)
        elif match is None:
            self._send(501, {"error": path})
        elif query["uploadType"] == "resumable":
            key = f"{match[1]}/{query.get('name') or json.loads(body)['name']}"
            with self.store.lock:
                upload = str(len(self.store.uploads))
                self.store.uploads[upload] = key, query, bytearray()
            self._send(200, {}, {"Location": f"{self.store.url}/resumable/{upload}"})
        elif query["uploadType"] == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
            assert boundary is not None
            _, described, content, _ = body.split(b"--" + boundary[1].encode())
            name = json.loads(described.split(b"\n\n", 1)[-1] if b"\r\n\r\n" not in described
                              else described.split(b"\r\n\r\n", 1)[1])["name"]  # fmt: skip
            separator = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
            content = content.split(separator, 1)[1]
            content = content[: -2 if content.endswith(b"\r\n") else -1]
            self._reply_written(self.store.write(f"{match[1]}/{name}", content, query))
        else:
            self._reply_written(self.store.write(f"{match[1]}/{query['name']}", body, query))

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key, query, content = self.store.uploads[self._parsed()[0].rpartition("/")[2]]
        content += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            self._send(308, None, {"Range": f"bytes=0-{len(content) - 1}"})
        else:
            self._reply_written(self.store.write(key, bytes(content), query))

    # ---- pieces

    def _parsed(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query, True).items()}

    def _get_object(self, key: str, query: dict[str, str], *, is_media: bool) -> None:
        with self.store.lock:
            found = self.store.objects.get(key)
            described = self.store.describe(key) if found else None
        if found is None:
            return self._send(404, {"error": {"code": 404, "message": f"No such object: {key}"}})
        generation, content = found
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._send(304, None)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._send(412, {"error": {"code": 412}})
        if not is_media:
            return self._send(200, described)
        headers = {"x-goog-generation": str(generation), "x-goog-hash": f"md5={described['md5Hash']}"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        self._send(200, content, headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, folders = [], set()
        with self.store.lock:
            for key in sorted(self.store.objects):
                name = key.removeprefix(f"{bucket}/")
                if name == key or not name.startswith(prefix):
                    continue
                if name < query.get("startOffset", "") or name >= query.get("endOffset", "\U0010ffff"):
                    continue
                rest = name.removeprefix(prefix)
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    items.append(self.store.describe(key))
        self._send(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def _delete(self, key: str, query: dict[str, str]) -> int:
        with self.store.lock:
            found = self.store.objects.get(key)
            if found is None:
                return 404
            if query.get("ifGenerationMatch", str(found[0])) != str(found[0]):
                return 412
            del self.store.objects[key]
            return 204

    def _batch(self, body: bytes) -> None:
        """Several deletions in one request; each reply is a part of the response."""
        parts = []
        for path in re.findall(rb"DELETE (\S+) HTTP", body):
            match = OBJECT.fullmatch(urlsplit(path.decode()).path)
            assert match is not None, path
            status = self._delete(f"{match[1]}/{unquote(match[2])}", {})
            parts.append(f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} x\r\n\r\n")
        content = "".join([*parts, "--batch--"]).encode()
        self._send(200, content, {"Content-Type": "multipart/mixed; boundary=batch"})

    def _reply_written(self, described: dict[str, Any] | None) -> None:
        if described is None:
            self._send(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        else:
            self._send(200, described)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has heard enough
            self.end_headers()
            self.wfile.write(body)
