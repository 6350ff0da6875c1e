"""A stand-in for the Hugging Face Hub: its HTTP interface, as far as uploading and fetching a model need it."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

OWNER_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_ofme", "hf_readonly", "hf_ofyou"
USERS = {OWNER_TOKEN: "me", READ_TOKEN: "me", OTHER_TOKEN: "you"}
LARGE_BYTES = 4096
"""Files of this size go to the store for large files first, and are named in the commit."""


@dataclass
class Repository:
    """Attributes:
    private: whether only its owner may read it.
    commits: files by name, of each commit.
    """

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"


class Answer(Exception):
    def __init__(self, status: int, message: str = "", code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """A hub that runs in threads of this process.

    Attributes:
        repositories: by "owner/name".
        asked: "METHOD /path" of all requests.
        broken: a pattern of those requests whose connection breaks in the middle.
        refused: a pattern of requests, the status that they get, and the Hub's code for it.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken, self.refused = "^$", ("^$", 500, "")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, name):
        """Files of the newest commit."""
        return self.repositories[name].commits[-1]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or each answer waits for an acknowledgement

    def log_message(self, format, *args):
        pass

    def _handle(self):
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.hub.asked.append(request)
        length = int(self.headers.get("Content-Length") or 0)
        breaks = re.search(self.hub.broken, request) is not None
        body = self.rfile.read(length // 2 if breaks else length)
        if breaks and self.command != "GET":
            self._hang_up()
            return
        try:
            pattern, status, code = self.hub.refused
            if re.search(pattern, request):
                raise Answer(status, "not today", code)
            self._send(*self._answer(path, body), breaks=breaks)
        except Answer as answer:
            headers = {"X-Error-Code": answer.code} if answer.code else {}
            self._send(json.dumps({"error": answer.message}).encode(), headers, answer.status)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, body, headers=None, status=200, *, breaks=False):
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if breaks else body)
        if breaks:
            self.wfile.flush()
            self._hang_up()

    def _answer(self, path, body):
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(**json.loads(body))
        if found := re.fullmatch(r"/large/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.hub.large[found[1]] = body
            return self._json({})
        if found := re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(/.*)?", path):
            return self._of_repository(found[1], found[2] or "", body)
        raise Answer(404)

    @staticmethod
    def _json(value):
        return json.dumps(value).encode(), {}

    def _user(self):
        """The name of who asks; None without a token."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Answer(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _check_writes(self, owner):
        if self._user() is None:
            raise Answer(401, "Invalid username or password.")
        if self._user() != owner or READ_TOKEN in self.headers["Authorization"]:
            raise Answer(403, f"You don't have the rights to create a model under the namespace {owner}")

    def _create(self, name, organization, visibility="public", **_):
        self._check_writes(organization)
        repository = f"{organization}/{name}"
        if repository in self.hub.repositories:
            raise Answer(409, "You already created this model repo")
        self.hub.repositories[repository] = Repository(private=visibility == "private")
        return self._json({"url": f"{self.hub.address}/{repository}"})

    def _of_repository(self, name, rest, body):
        repository, owner = self.hub.repositories.get(name), name.partition("/")[0]
        user = self._user()
        if repository is None or (repository.private and user != owner):
            raise Answer(401 if user is None else 404, "Repository not found", "RepoNotFound")
        files = repository.commits[-1]
        if re.fullmatch(r"(/revision/\w+)?", rest):
            return self._json(
                {
                    "id": name,
                    "sha": repository.head,
                    "private": repository.private,
                    "siblings": [{"rfilename": file} for file in files],
                }
            )
        if rest.startswith("/tree/"):
            return self._json([_entry(file, content) for file, content in files.items()])
        if found := re.fullmatch(r"/resolve/\w+/(.+)", rest):
            if found[1] not in files:
                raise Answer(404, "Entry not found", "EntryNotFound")
            content = files[found[1]]
            return content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.head}
        self._check_writes(owner)
        if rest.startswith("/preupload/"):
            asked = [(file["path"], file["size"]) for file in json.loads(body)["files"]]
            modes = [(path, "lfs" if size >= LARGE_BYTES else "regular") for path, size in asked]
            return self._json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
        if rest == "/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            links = [
                each | {"actions": {"upload": {"href": f"{self.hub.address}/large/{each['oid']}"}}} for each in wanted
            ]
            return self._json({"transfer": "basic", "objects": links})
        assert rest.startswith("/commit/")
        return self._commit(name, repository, [json.loads(line) for line in body.splitlines()])

    def _commit(self, name, repository, lines):
        files = dict(repository.commits[-1])
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header" and value.get("parentCommit", repository.head) != repository.head:
                raise Answer(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        repository.commits.append(files)
        return self._json(
            {"commitUrl": f"{self.hub.address}/{name}/commit/{repository.head}", "commitOid": repository.head}
        )


def _entry(name, content):
    digest = hashlib.sha256(content).hexdigest()
    entry = {"type": "file", "path": name, "size": len(content), "oid": digest[:40]}
    large = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}}
    return entry | large if len(content) >= LARGE_BYTES else entry
