"""A hub on this machine: it answers as huggingface.co does, to those who read and to those who write, or as others do.

Reading: `/REPO/resolve/REVISION/FILE` with ETag and X-Repo-Commit, ranges, errors by X-Error-Code, `paths-info`.
Writing: a repository made, `preupload`, Git LFS (batch, PUT, verify), a commit of lines of JSON.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub


class Hub:
    """`repositories[name][revision]` is {path: bytes}. `refuse` gives (status, error code) for a repository;
    `cut` a number of bytes after which a file's connection drops. `plain`: a server that states no error codes;
    `headless`: no commits either; `hashless`: it does not answer for them; `silent`: it knows no `paths-info`;
    `rangeless`: it sends files whole.
    `moved`: which revision a branch is now; `during(method, path)` runs in each answer. `sent` counts bytes by file.

    Who writes has to send `token`, if it is set; `spaces` are the namespaces in which they may (None: all);
    `fail[what]` is a status for a step of writing, by its name in the address. Files of `large` bytes and more, and
    `.safetensors`, go through LFS. `commits` are the lines of each.
    """

    def __init__(self):
        self.repositories, self.refuse, self.cut, self.asked, self.sent = {}, {}, {}, [], {}
        self.plain = self.headless = self.hashless = self.silent = self.rangeless = False
        self.moved, self.during = {}, lambda method, path: None
        self.token, self.spaces, self.fail, self.large = None, None, {}, 1000
        self.private, self.stored, self.verified, self.commits = set(), {}, set(), []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def do_POST(self):
                hub.take(self, self.rfile.read(int(self.headers["Content-Length"] or 0)))

            def do_PUT(self):
                hub.take(self, self.rfile.read(int(self.headers["Content-Length"] or 0)))

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    # ---- reading

    def answer(self, request, body):
        self.asked.append((request.command, request.path))
        if request.path.startswith("/api/") and "/tree/" in request.path:
            return self.reply(request, *self.listing(request.path))
        status, code, content, commit = self.find(request.path)
        asked = request.headers.get("Range") if status == 200 and body and not self.rangeless else None
        whole = len(content)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            status, content = 206 if whole else 416, content[int(first) : int(last or whole - 1) + 1]
        request.send_response(status)
        if asked:
            request.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{whole}")
        if code and not self.plain:
            request.send_header("X-Error-Code", code)
        if commit and not self.headless:
            request.send_header("X-Repo-Commit", commit)
            request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        self.during(request.command, request.path)
        if body:
            name = request.path.rpartition("/")[2]
            content = content[: self.cut.get(name)]
            self.sent[name] = self.sent.get(name, 0) + len(content)
            request.wfile.write(content)

    def find(self, path):
        """(status, error code, content, commit)"""
        path = urlsplit(path).path
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if name not in self.repositories:
                return 404, "RepoNotFound", b"", ""
            commit = self.look(name, unquote(revision) or "main")[0] if self.repositories[name] else None
            said = {"id": name, "private": name in self.private, "sha": commit}
            return 200, "", json.dumps(said).encode(), ""
        name, _, rest = path[1:].partition("/resolve/")
        revision, _, file = map(unquote, rest.partition("/"))
        if name in self.refuse:
            return *self.refuse[name], b"", ""
        if name not in self.repositories:
            return 404, "RepoNotFound", b"", ""
        commit, files = self.look(name, revision)
        if files is None or (self.hashless and revision == commit):
            return 404, "RevisionNotFound", b"", ""
        if file not in files:
            return 404, "EntryNotFound", b"", commit
        return 200, "", files[file], commit

    def look(self, name, revision):
        """(commit, files) of a branch or commit, or (None, None)"""
        commits = {commit_of(name, r): files for r, files in self.repositories[name].items()}
        moved = self.moved.get((name, revision), self.moved.get(revision, revision))
        commit = revision if revision in commits else commit_of(name, moved)
        return (commit, commits[commit]) if commit in commits else (None, None)

    def listing(self, path):
        """(status, JSON, error code) of all files of a revision"""
        name, _, revision = urlsplit(path).path.removeprefix("/api/models/").partition("/tree/")
        if name not in self.repositories:
            return 404, {}, "RepoNotFound"
        files = self.look(name, unquote(revision))[1]
        if files is None:
            return 404, {}, "RevisionNotFound"
        return 200, [described(path, content) for path, content in files.items()], ""

    # ---- writing, and questions that are posted

    def take(self, request, body):
        self.asked.append((request.command, request.path))
        self.during(request.command, request.path)
        path = urlsplit(request.path).path
        for what, status in self.fail.items():
            if what in path:
                wrong = f"no {what} today"
                return self.reply(request, status, {"error": wrong, "errors": [{"message": wrong}]})
        if "/paths-info/" in path:
            return self.reply(request, *self.paths_info(path, parse_qs(body.decode())))
        if path.startswith("/lfs/"):  # as from a store elsewhere: it is the address that allows it
            return self.reply(request, 200, self.keep(path, body))
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self.reply(request, 401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.reply(request, *self.create(json.loads(body)))
        if path == "/api/validate-yaml":
            return self.reply(request, 200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.reply(request, 200, self.batch(json.loads(body)))
        if path == "/verify":
            return self.reply(request, 200, self.verify(json.loads(body)))
        name, _, rest = path.removeprefix("/api/models/").partition(
            "/preupload/" if "/preupload/" in path else "/commit/"
        )
        revision = unquote(rest)
        if name.partition("/")[0] not in (self.spaces or [name.partition("/")[0]]):
            return self.reply(request, 403, {"error": "You do not have the rights for that."})
        if self.look(name, revision)[1] is None:
            return self.reply(request, 404, {}, "RevisionNotFound")
        if "/preupload/" in path:
            return self.reply(request, 200, self.preupload(name, revision, json.loads(body)))
        return self.reply(request, 200, self.commit(name, revision, list(map(json.loads, body.splitlines()))))

    def reply(self, request, status, value, code=""):
        content = json.dumps(value).encode()
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def paths_info(self, path, asked):
        name, _, revision = path.removeprefix("/api/models/").partition("/paths-info/")
        files = self.look(name, unquote(revision))[1] if name in self.repositories else None
        if files is None or self.silent or self.plain or name in self.refuse:
            return 404, {"error": "no such address"}
        return 200, [described(path, files[path]) for path in asked["paths"] if path in files]

    def create(self, asked):
        owner = asked["organization"] or "me"
        name = f"{owner}/{asked['name']}"
        if self.spaces is not None and owner not in self.spaces:
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
        if name in self.repositories:
            return 409, {"url": f"{self.url}/{name}", "error": "You already created this model repo"}
        self.repositories[name] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
        self.private |= {name} if asked.get("visibility") == "private" or asked.get("private") else set()
        return 200, {"url": f"{self.url}/{name}"}

    def preupload(self, name, revision, asked):
        there = self.look(name, revision)[1]
        mode = lambda one: "lfs" if one["size"] >= self.large or one["path"].endswith(".safetensors") else "regular"
        oid = lambda path: oid_of(path, there[path], self.large) if path in there else None
        return {
            "files": [
                {"path": one["path"], "uploadMode": mode(one), "shouldIgnore": False, "oid": oid(one["path"])}
                for one in asked["files"]
            ]
        }

    def batch(self, asked):
        actions = lambda oid: {"upload": {"href": f"{self.url}/lfs/{oid}"}, "verify": {"href": f"{self.url}/verify"}}
        return {
            "transfer": "basic",
            "objects": [
                one | ({} if one["oid"] in self.stored else {"actions": actions(one["oid"])})
                for one in asked["objects"]
            ],
        }

    def keep(self, path, body):
        assert path == f"/lfs/{hashlib.sha256(body).hexdigest()}"
        self.stored[path.removeprefix("/lfs/")] = body
        return {}

    def verify(self, asked):
        assert len(self.stored[asked["oid"]]) == asked["size"]
        self.verified.add(asked["oid"])
        return {}

    def commit(self, name, revision, lines):
        files = dict(self.look(name, revision)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits.append(lines)
        self.moved[name, revision] = f"{revision}+{len(self.commits)}"
        self.repositories[name][f"{revision}+{len(self.commits)}"] = files
        oid = self.look(name, revision)[0]
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}", "hookOutput": ""}


def described(path, content):
    return {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content, len(content) + 1)}


def oid_of(path, content, large):
    """What Git, or Git LFS, calls a content."""
    if len(content) >= large or path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(name, revision):
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def files(directory, at=""):
    return {at + p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@contextlib.contextmanager
def running(cache, monkeypatch):
    """A hub, and a huggingface_hub that knows it and this cache (it reads its environment when it is imported)."""
    server, constants = Hub(), huggingface_hub.constants
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield server
    huggingface_hub.utils.close_session()
    server.stop()
