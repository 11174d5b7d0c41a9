"""A Hub on the loopback interface: repositories in memory, spoken to by the real client.

It knows what the tests need of the protocol: reading and creating repositories, LFS uploads,
commits, branches, pull requests, downloads through another host name as the real one's, private
and gated repositories, and faults that a test asks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.xet import stored_bytes, stored_files

__all__ = ["Fault", "LoopbackHub", "Repo"]

LFS = (".safetensors", ".bin")
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

Tree = dict[str, bytes]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits are trees of whole files; branches and pull requests name commits.

    `held` are the large contents that it has, by sha256; with `xet` they lie in the newer storage,
    and may be shared with other repositories.
    """

    name: str
    private: bool = False
    gated: bool = False
    xet: bool = False
    held: set[str] = field(default_factory=set)
    authors: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refs["main"] = self.add({".gitattributes": ATTRIBUTES}, "initial commit")

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def add(self, tree: Tree, title: str) -> str:
        contents = sorted((path, sha256(data)) for path, data in tree.items())
        oid = hashlib.sha1(repr((contents, len(self.commits))).encode()).hexdigest()
        self.commits[oid], self.titles[oid] = dict(tree), title
        self.held |= {digest for path, digest in contents if path.endswith(LFS)}
        return oid

    def put(self, files: Tree, revision: str = "main") -> str:
        """A commit made by somebody else."""
        old = self.commits[self.refs.get(revision, self.refs["main"])]
        self.refs[revision] = self.add({**old, **files}, "put")
        return self.refs[revision]

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Tree:
        """What is there, but for what the Hub adds of its own."""
        tree = self.commits[self.refs[revision]]
        return {path: data for path, data in tree.items() if path != ".gitattributes"}

    @property
    def pulls(self) -> list[str]:
        return [ref for ref in self.refs if ref.startswith("refs/pr/")]


@dataclass
class Fault:
    """What happens to the next `times` requests whose line, as `GET /cdn/...`, is matched.

    `status` is answered; without one the line is cut, after the work was done if `late`. `flip`
    changes a byte of the answer, `cut` ends it early though its length was announced, and `stall`
    keeps the request waiting until the Hub's `released` is set, and then cuts the line. `whole`
    answers as if no range had been asked for, `other` with the bytes beside it, `old` with another
    ETag, each of them as a proxy might. With `last` the line is cut for all that comes after, too.
    """

    match: str
    times: int = 1
    status: int = 0
    late: bool = False
    flip: bool = False
    cut: bool = False
    stall: bool = False
    whole: bool = False
    other: bool = False
    old: bool = False
    last: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether the request is heard, and the fault is in the answer."""
        return self.late or self.flip or self.cut or self.whole or self.other or self.old


class LoopbackHub:
    """Start it with `with`; `url` is the endpoint. `log` holds the lines of all requests.

    `moved` are the bytes that were sent for them, and `strangers` the lines of those to the host of
    the contents that came with a token.
    """

    def __init__(self) -> None:
        self.xet_store: Path | None = None  # where hf_xet puts files, if it may
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {"hf_canaryWRITE": ("alice", True), "hf_canaryREAD": ("alice", False)}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.moved: list[tuple[str, int]] = []
        self.strangers: list[str] = []
        self.lock = threading.RLock()
        self.released = threading.Event()
        self.is_down = False
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, name: str, files: Tree | None = None, **kinds: bool) -> Repo:
        repo = self.repos[name] = Repo(name, **kinds)
        if files:
            repo.put(files)
        return repo

    def requests(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]

    def nbytes(self, pattern: str) -> int:
        """Bytes that were sent in answer to these requests."""
        return sum(count for line, count in self.moved if re.search(pattern, line))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _AnsweredError(Exception):
    """The answer was sent already."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        # Split before unquoting: refs%2Fpr%2F1 is one segment.
        self.parts = [unquote(part) for part in url.path.split("/")[1:]]
        self.query = parse_qs(url.query, keep_blank_values=True)
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size) if size else self._chunks()
        line = f"{self.command} {url.path}"
        with self.hub.lock:
            self.hub.log.append(line)
            self.fault = next(
                (f for f in self.hub.faults if f.times and re.search(f.match, line)), None
            )
            if self.fault is not None:
                self.fault.times -= 1
            is_down, self.hub.is_down = self.hub.is_down, self.hub.is_down or self.is_last
        if self.fault is not None and self.fault.stall:
            self.hub.released.wait(60)
        try:
            if is_down:
                self._hang_up()
            elif self.fault is not None and self.fault.status:
                self.send(self.fault.status, {"error": f"injected, for {self.headers!s}"})
            elif self.fault is not None and not self.fault.is_answered:
                self._hang_up()
            else:
                with self.hub.lock:
                    self._route()
        except _AnsweredError:
            pass
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    @property
    def is_last(self) -> bool:
        return self.fault is not None and self.fault.last

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return b""
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def send(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        fault = self.fault
        if fault is not None and fault.late:
            self._hang_up()
            return
        kind = "application/json" if isinstance(body, dict | list) else "application/octet-stream"
        raw = json.dumps(body).encode() if isinstance(body, dict | list) else body
        if fault is not None and fault.flip and raw:
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
        self.send_response(status)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(raw)),
            **{key.replace("_", "-"): value for key, value in headers.items()},
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            sent = raw[: len(raw) // 2] if fault is not None and fault.cut else raw
            with self.hub.lock:
                self.hub.moved.append((f"{self.command} {self.path}", len(sent)))
            self.wfile.write(sent)
            if fault is not None and fault.cut:
                self._hang_up()

    def refuse(self, status: int, message: str, code: str = "") -> None:
        codes = {"X_Error_Code": code} if code else {}
        self.send(status, {"error": message}, X_Error_Message=message, **codes)
        raise _AnsweredError

    # ------------------------------------------------------------------------------ who may what

    def user(self) -> tuple[str, bool] | None:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent and sent not in self.hub.tokens:
            self.refuse(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(sent)

    def repo(self, name: str, *, write: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(name)
        missing = 401 if user is None else 404  # so that names do not leak
        if repo is None or (repo.private and (user is None or user[0] != repo.owner)):
            self.refuse(missing, "Repository not found", "RepoNotFound")
        assert repo is not None
        if write and user is None:
            self.refuse(401, "Unauthorized")
        elif write and user != (repo.owner, True) and "create_pr" not in self.query:
            self.refuse(403, "You don't have the rights")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        assert oid is not None
        return oid

    # -------------------------------------------------------------------------------- the routes

    def _route(self) -> None:
        parts = self.parts
        match parts:
            case ["api", "whoami-v2"]:
                user = self.user()
                role = {"accessToken": {"role": "write" if user and user[1] else "read"}}
                name = user[0] if user else ""
                self.send(200, {"type": "user", "name": name, "orgs": [], "auth": role})
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                self.send(200, {"errors": [], "warnings": []})
            case ["api", "models", owner, name, *rest]:
                self._model(f"{owner}/{name}", rest)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._batch(f"{owner}/{name.removesuffix('.git')}")
            case ["lfs", oid]:
                self.hub.objects[oid] = self.body
                self.hub.repos[self.query["repo"][0]].held.add(oid)
                self.send(200 if sha256(self.body) == oid else 400)
            case ["cdn", oid]:
                if "Authorization" in self.headers:
                    self.hub.strangers.append(f"{self.command} {self.path}")
                self._serve(self.hub.objects[oid], ETag=f'"{oid}"')
            case [owner, name, "resolve", revision, *path]:
                self._download(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.refuse(404, f"no route for {self.path}")

    def _create(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        owner = wanted.get("organization") or (user[0] if user else "")
        name = f"{owner}/{wanted['name']}"
        if user is None:
            self.refuse(401, "Invalid username or password.")
        if user != (owner, True):
            self.refuse(403, f"You don't have the rights in {owner}")
        if name in self.hub.repos:
            self.send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.create(name, private=bool(private))
        self.send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "x"})

    def _model(self, name: str, rest: list[str]) -> None:
        writing = ("preupload", "commit", "branch", "xet-write-token")
        write = bool(rest) and (rest[0] in writing or rest == ["auth-check", "write"])
        repo = self.repo(name, write=write)
        match rest:
            case [] | ["revision", _]:
                self._info(repo, rest[1] if rest else "main")
            case ["discussions"]:
                self._discussions(repo)
            case ["auth-check", *_]:
                self.send(200)
            case ["tree" | "paths-info", revision, *_]:
                tree = repo.commits[self.commit_of(repo, revision)]
                wanted = parse_qs(self.body.decode()).get("paths", sorted(tree))
                self.send(200, [self._entry(repo, p, tree[p]) for p in wanted if p in tree])
            case ["preupload", revision]:
                self._preupload(repo.commits[self.commit_of(repo, revision)])
            case ["branch", branch]:
                start = json.loads(self.body or b"{}").get("startingPoint", "main")
                repo.refs[branch] = self.commit_of(repo, start)
                self.send(200, {})
            case ["xet-write-token" | "xet-read-token", _] if self.hub.xet_store is not None:
                self._xet_token(f"local://{self.hub.xet_store}")
            case ["commit", revision]:
                self._commit(repo, revision)
            case ["lfs-files", "duplicate"]:
                self._duplicate(repo)
            case _:
                self.refuse(404, f"no route for {self.path}")

    def _discussions(self, repo: Repo) -> None:
        found = [
            {
                "title": repo.titles[repo.refs[ref]],
                "num": int(ref.split("/")[-1]),
                "author": {"name": repo.authors[ref]},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo.name, "type": "model"},
                "isPullRequest": True,
            }
            for ref in reversed(repo.pulls)
            if self.query.get("author", [repo.authors[ref]]) == [repo.authors[ref]]
        ]
        self.send(200, {"discussions": found, "count": len(found), "start": 0})

    def _info(self, repo: Repo, revision: str) -> None:
        oid = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        body = {"_id": "x", "id": repo.name, "sha": oid, "siblings": siblings, "tags": []}
        text = repo.commits[oid].get("README.md", b"").decode()
        found = re.search(r"^license: (\S+)$", text, re.MULTILINE)
        body["cardData"] = {"license": found[1]} if found else {}
        self.send(200, {**body, "private": repo.private, "gated": repo.gated})

    def _duplicate(self, repo: Repo) -> None:
        """Contents of this repository become another's as well, which takes the right to write."""
        asked, user, failed = json.loads(self.body), self.user(), []
        target = self.hub.repos[asked["target"]["name"]]
        if user != (target.owner, True):
            self.refuse(403, "You don't have the rights")
        for file in asked["files"]:
            if not repo.xet or file["sha256"] not in repo.held:
                failed.append({"sha256": file["sha256"], "error": "not found"})
            else:
                target.held.add(file["sha256"])
        self.send(200, {"failed": failed})

    @staticmethod
    def _entry(repo: Repo, path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            if repo.xet:
                entry["xetHash"] = sha256(data)
        return entry

    def _preupload(self, tree: Tree) -> None:
        found = []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], file["path"].endswith(LFS)
            data = tree.get(path)
            known = None if data is None else (sha256(data) if large else git_blob(data))
            mode = "lfs" if large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.send(200, {"files": found})

    def _batch(self, name: str) -> None:
        repo = self.repo(name)
        found = []
        for wanted in json.loads(self.body)["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in repo.held:
                href = f"{self.hub.url}/lfs/{wanted['oid']}?repo={name}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            found.append(answer)
        self.send(200, {"transfer": "basic", "objects": found})

    def _commit(self, repo: Repo, revision: str) -> None:
        header, *lines = (json.loads(line) for line in self.body.splitlines() if line.strip())
        parent = self.commit_of(repo, revision)
        pull = "create_pr" in self.query
        if header["value"].get("parentCommit", parent) != parent and not pull:
            self.refuse(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[parent])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    tree[value["path"]] = self._object(repo, value["oid"])
                case "deletedFile":
                    del tree[value["path"]]
        oid = repo.add(tree, header["value"]["summary"])
        ref = f"refs/pr/{len(repo.pulls) + 1}" if pull else revision
        repo.refs[ref] = oid
        user = self.user()
        repo.authors[ref] = user[0] if user else ""
        page = f"{self.hub.url}/{repo.name}"
        address = f"{page}/discussions/{len(repo.pulls)}" if pull else None
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}"}
        self.send(200, {**answer, "hookOutput": "", "pullRequestUrl": address})

    def _xet_token(self, store: str) -> None:
        end = int(time.time()) + 3600
        body = {"casUrl": store, "exp": end, "accessToken": "x"}
        headers = {"X_Xet_Cas_Url": store, "X_Xet_Access_Token": "x"}
        self.send(200, body, X_Xet_Token_Expiration=str(end), **headers)

    def _object(self, repo: Repo, oid: str) -> bytes:
        store = self.hub.xet_store
        if store is None and oid not in repo.held:
            self.refuse(400, "the repository has no such object")
        if oid not in self.hub.objects and store is not None:
            self.hub.objects[oid] = stored_bytes(store, oid, store / f"{oid}.out")
        return self.hub.objects[oid]

    def _xet_headers(self, name: str, oid: str, digest: str) -> dict[str, str]:
        store = self.hub.xet_store
        known = stored_files(store) if store is not None else {}
        if digest not in known:
            return {}
        route = f"{self.hub.url}/api/models/{name}/xet-read-token/{oid}"
        link = f'<{route}>; rel="xet-auth"'
        return {"X_Xet_Hash": known[digest][0], "X_Xet_Refresh_Route": route, "Link": link}

    # --------------------------------------------------------------------------------- downloads

    def _download(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        oid, user = self.commit_of(repo, revision), self.user()
        if repo.gated and (user is None or user[0] != repo.owner):
            self.refuse(401 if user is None else 403, "Access is restricted", "GatedRepo")
        data = repo.commits[oid].get(path)
        if data is None:
            self.refuse(404, "Entry not found", "EntryNotFound")
        assert data is not None
        if not path.endswith(LFS):
            self._serve(data, ETag=f'"{git_blob(data)}"', X_Repo_Commit=oid)
            return
        etag, digest = f'"{sha256(data)}"', sha256(data)
        self.hub.objects[digest] = data  # where the address in the answer leads
        self.send(
            302,
            **self._xet_headers(name, oid, digest),
            X_Repo_Commit=oid,
            X_Linked_Size=str(len(data)),
            X_Linked_Etag=etag,
            ETag=etag,
            Location=f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest}",
        )

    def _serve(self, data: bytes, **headers: str) -> None:
        fault = self.fault or Fault("")
        if fault.old:
            headers = {**headers, "ETag": '"another"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or fault.whole:
            self.send(200, data, **headers)
            return
        start = int(wanted[1]) + fault.other
        end = min(int(wanted[2] or len(data)) + fault.other, len(data) - 1)
        span = f"bytes {start}-{end}/{len(data)}"
        self.send(206, data[start : end + 1], Content_Range=span, **headers)
