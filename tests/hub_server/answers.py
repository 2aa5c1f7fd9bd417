"""The Hub's API, one function a call: request in, answer out. ``__main__`` speaks HTTP around it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from storage import Commit, File, Hub, HubError, Repository, User

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx", ".msgpack", ".zip", ".gz", ".png", ".parquet")
LARGE_BYTES = 10 * 1024 * 1024


@dataclass
class Request:
    hub: Hub
    endpoint: str
    user: User | None
    query: dict[str, list[str]]
    body: bytes
    headers: Any

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    data: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Call = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Call]] = []
REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


def route(method: str, pattern: str) -> Callable[[Call], Call]:
    def add(call: Call) -> Call:
        ROUTES.append((method, re.compile(pattern), call))
        return call

    return add


def dispatch(method: str, path: str, request: Request) -> Answer:
    for verb, pattern, call in ROUTES:
        match = pattern.fullmatch(path)
        if verb == method and match:
            return call(request, **{name: unquote(value) for name, value in match.groupdict().items() if value})
    raise HubError(501, f"the stand-in has no answer to {method} {path}")


def entry(path: str, file: File) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
    return found | ({"lfs": large(file)} if file.lfs else {})


def large(file: File) -> dict[str, Any]:
    return {"oid": file.lfs, "sha256": file.lfs, "size": len(file.data), "pointerSize": len(file.pointer)}


def front_matter(commit: Commit) -> dict[str, Any]:
    text = commit.files["README.md"].data.decode() if "README.md" in commit.files else ""
    match = re.match(r"---\n(.*?)\n---", text, flags=re.S)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def describe(repo: Repository, commit: Commit) -> dict[str, Any]:
    data = front_matter(commit)
    siblings = [
        {"rfilename": path, "size": len(file.data), "blobId": file.oid} | ({"lfs": large(file)} if file.lfs else {})
        for path, file in sorted(commit.files.items())
    ]
    return {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.owner,
        "sha": commit.oid,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "lastModified": commit.date,
        "createdAt": commit.date,
        "downloads": 0,
        "likes": 0,
        "tags": data.get("tags", []),
        "cardData": data,
        "library_name": data.get("library_name"),
        "pipeline_tag": data.get("pipeline_tag"),
        "siblings": siblings,
    }


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Answer:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    name, orgs = request.user.name, [{"name": org} for org in request.user.organisations]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": request.user.role}}
    return Answer(
        {"type": "user", "name": name, "fullname": name, "email": f"{name}@example.org", "orgs": orgs, "auth": token}
    )


@route("GET", "/api/agent-harnesses")
def harnesses(request: Request) -> Answer:
    return Answer({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Answer:
    errors = []
    match = re.match(r"---\n(.*?)\n---", request.json()["content"], flags=re.S)
    try:
        data = yaml.safe_load(match[1]) if match else {}
        if not isinstance(data, dict):
            errors.append("metadata is no mapping")
        elif not isinstance(data.get("license", ""), str):
            errors.append('"license" must be a string')
    except yaml.YAMLError as error:
        errors.append(str(error))
    return Answer({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create(request: Request) -> Answer:
    asked = request.json()
    name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
    kind = asked.get("type") or "model"
    prefix = "" if kind == "model" else f"{kind}s/"
    private = asked.get("visibility", "public") == "private"
    try:
        made = request.hub.create(kind, name, private, request.user)
    except HubError as error:
        if error.status == 409:
            error.extra["url"] = f"{request.endpoint}/{prefix}{error.extra['url']}"
        raise
    return Answer({"url": f"{request.endpoint}/{prefix}{made.id}", "name": made.id, "id": made.id})


@route("DELETE", "/api/repos/delete")
def delete(request: Request) -> Answer:
    asked = request.json()
    name = f"{asked.get('organization') or (request.user.name if request.user else '')}/{asked['name']}"
    repo = request.hub.find(asked.get("type") or "model", name, request.user, write=True)
    del request.hub.repositories[repo.kind, repo.id]
    return Answer({})


@route("PUT", f"{REPO}/settings")
def settings(request: Request, kind: str, name: str) -> Answer:
    repo, asked = request.hub.find(kind, name, request.user, write=True), request.json()
    if "visibility" in asked:
        repo.private = asked["visibility"] == "private"
    if "gated" in asked:
        repo.gated = bool(asked["gated"])
    return Answer({"private": repo.private, "gated": repo.gated})


@route("GET", r"/api/(?P<kind>model|dataset|space)s")
def listing(request: Request, kind: str) -> Answer:
    author, search = (request.query.get(key, [""])[0] for key in ("author", "search"))
    found = []
    for other, name in sorted(request.hub.repositories):
        try:
            repo = request.hub.find(kind, name, request.user)
        except HubError:
            continue
        if other == kind and author in ("", repo.owner) and search in name:
            found.append(describe(repo, repo.resolve("main")))
    return Answer(found)


@route("GET", REPO)
@route("GET", f"{REPO}/revision/{REVISION}")
def info(request: Request, kind: str, name: str, revision: str = "main") -> Answer:
    repo = request.hub.find(kind, name, request.user)
    found = describe(repo, repo.resolve(revision))
    if "bare" in request.hub.quirks:
        bare = {key: found[key] for key in ("id", "sha", "private")}
        found = bare | {
            "siblings": [{"rfilename": row["rfilename"]} for row in found["siblings"]],
            "somethingNew": [{"a": 1}],
        }
    return Answer(found)


@route("GET", f"{REPO}/auth-check")
@route("GET", f"{REPO}/auth-check/(?P<how>write)")
def auth_check(request: Request, kind: str, name: str, how: str = "") -> Answer:
    request.hub.find(kind, name, request.user, write=how == "write", content=True)
    return Answer({})


@route("GET", f"{REPO}/tree/{REVISION}")
@route("GET", f"{REPO}/tree/{REVISION}/(?P<path>.+)")
def tree(request: Request, kind: str, name: str, revision: str, path: str = "") -> Answer:
    files = request.hub.find(kind, name, request.user, content=True).resolve(revision).files
    inside = f"{path}/" if path else ""
    found, folders = [], set()
    for file in sorted(files):
        rest = file.removeprefix(inside)
        if not file.startswith(inside):
            continue
        if request.query.get("recursive", ["false"])[0].lower() in ("true", "1") or "/" not in rest:
            found.append(entry(file, files[file]))
        else:
            folders.add(inside + rest.split("/")[0])
    if path and not found and not folders:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    return Answer(found + [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)])


@route("POST", f"{REPO}/paths-info/{REVISION}")
def paths_info(request: Request, kind: str, name: str, revision: str) -> Answer:
    files = request.hub.find(kind, name, request.user, content=True).resolve(revision).files
    try:
        wanted = request.json()["paths"]
    except json.JSONDecodeError:
        wanted = parse_qs(request.body.decode()).get("paths", [])
    return Answer([entry(path, files[path]) for path in wanted if path in files])


@route("GET", f"{REPO}/refs")
def refs(request: Request, kind: str, name: str) -> Answer:
    repo = request.hub.find(kind, name, request.user)

    def rows(made: dict[str, str], folder: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": folder + n.removeprefix(folder), "targetCommit": oid} for n, oid in made.items()]

    pulls = rows(repo.pulls, "refs/pr/") if "include_prs" in request.query else []
    heads, tags = rows(repo.branches, "refs/heads/"), rows(repo.tags, "refs/tags/")
    return Answer({"branches": heads, "tags": tags, "converts": [], "pullRequests": pulls, "somethingNew": None})


@route("GET", f"{REPO}/commits/{REVISION}")
def commits(request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = request.hub.find(kind, name, request.user)
    found, at = [], repo.resolve(revision).oid
    while at in repo.commits:
        commit = repo.commits[at]
        found.append(
            {
                "id": at,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
        )
        at = commit.parent
    return Answer(found)


@route("POST", f"{REPO}/branch/(?P<branch>.+)")
def create_branch(request: Request, kind: str, name: str, branch: str) -> Answer:
    repo = request.hub.find(kind, name, request.user, write=True)
    start = (request.json() if request.body else {}).get("startingPoint") or "main"
    if branch in repo.branches:
        raise HubError(409, f"Reference already exists: {branch}")
    repo.branches[branch] = repo.resolve(start).oid
    return Answer({})


@route("DELETE", f"{REPO}/branch/(?P<branch>.+)")
def delete_branch(request: Request, kind: str, name: str, branch: str) -> Answer:
    repo = request.hub.find(kind, name, request.user, write=True)
    if repo.branches.pop(branch, None) is None:
        raise HubError(404, f"no branch {branch}", "RevisionNotFound")
    return Answer({})


@route("POST", f"{REPO}/tag/{REVISION}")
def create_tag(request: Request, kind: str, name: str, revision: str) -> Answer:
    repo, tag = request.hub.find(kind, name, request.user, write=True), request.json()["tag"]
    if tag in repo.tags:
        raise HubError(409, f"Tag already exists: {tag}")
    repo.tags[tag] = repo.resolve(revision).oid
    return Answer({})


@route("DELETE", f"{REPO}/tag/(?P<tag>.+)")
def delete_tag(request: Request, kind: str, name: str, tag: str) -> Answer:
    repo = request.hub.find(kind, name, request.user, write=True)
    if repo.tags.pop(tag, None) is None:
        raise HubError(404, f"no tag {tag}", "RevisionNotFound")
    return Answer({})


@route("POST", f"{REPO}/preupload/{REVISION}")
def preupload(request: Request, kind: str, name: str, revision: str) -> Answer:
    pull = "create_pr" in request.query
    files = request.hub.find(kind, name, request.user, write=not pull).resolve(revision).files
    found = []
    for file in request.json()["files"]:
        is_large = file["path"].endswith(LARGE) or file["size"] > LARGE_BYTES
        oid = files[file["path"]].etag if file["path"] in files else None
        mode = "lfs" if is_large else "regular"
        mode = next((quirk for quirk in ("lfs", "regular") if f"all {quirk}" in request.hub.quirks), mode)
        found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer({"files": found})


@route("POST", r"/(?P<prefix>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
def lfs_batch(request: Request, name: str, prefix: str = "") -> Answer:
    kind = prefix.removesuffix("s/") or "model"
    request.hub.find(kind, name, request.user)
    if request.user is None or request.user.role != "write":
        raise HubError(403, "Forbidden: pass a token with write access to this repository.")
    found = []
    for asked in request.json()["objects"]:
        row = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in request.hub.objects:
            base = f"{request.endpoint}/_objects/{asked['oid']}"
            row["actions"] = {"upload": {"href": base, "header": {}}, "verify": {"href": f"{base}/verify"}}
            if "bare" in request.hub.quirks:
                row["actions"] = {"upload": {"href": base}}
        found.append(row)
    return Answer({"transfer": "basic", "objects": found})


@route("PUT", "/_objects/(?P<oid>[0-9a-f]{64})")
def lfs_put(request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "the bytes are not what their hash says")
    request.hub.objects[oid] = request.body
    return Answer({})


@route("POST", "/_objects/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(request: Request, oid: str) -> Answer:
    if len(request.hub.objects.get(oid, b"")) != request.json()["size"]:
        raise HubError(400, "the object is not there")
    return Answer({})


@route("POST", f"{REPO}/commit/{REVISION}")
def commit(request: Request, kind: str, name: str, revision: str) -> Answer:
    pull = "create_pr" in request.query
    repo = request.hub.find(kind, name, request.user, write=not pull)
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if revision not in repo.branches and revision not in repo.pulls:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    if name in request.hub.races:
        request.hub.races.remove(name)
        theirs = {**repo.resolve(revision).files, "theirs.txt": File(b"first\n")}
        repo.commit(revision, theirs, "somebody else's", "", "somebody", pull=False)
    files = dict(repo.resolve(revision).files)
    header: dict[str, Any] = {}
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        match item["key"]:
            case "header":
                header = value
            case "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            case "lfsFile":
                if value["oid"] not in request.hub.objects:
                    raise HubError(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = File(request.hub.objects[value["oid"]], value["oid"])
            case "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            case "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
    parent = header.get("parentCommit")
    if parent and not pull and not repo.resolve(revision).oid.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    made = repo.commit(
        revision, files, header.get("summary", ""), header.get("description", ""), request.user.name, pull
    )
    found = {"success": True, "commitOid": made.oid, "commitUrl": f"{request.endpoint}/{name}/commit/{made.oid}"}
    if pull:
        found["pullRequestUrl"] = f"{request.endpoint}/{name}/discussions/{len(repo.pulls)}"
    return Answer(found)


@route("GET", rf"/(?P<prefix>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)")
def resolve(request: Request, name: str, revision: str, path: str, prefix: str = "") -> Answer:
    made = request.hub.find(prefix.removesuffix("s/") or "model", name, request.user, content=True).resolve(revision)
    if path not in made.files:
        raise HubError(404, f"{path} does not exist", "EntryNotFound", headers={"X-Repo-Commit": made.oid})
    file = made.files[path]
    headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": made.oid, "Accept-Ranges": "bytes"}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.lfs}"', "X-Linked-Size": str(len(file.data))}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not wanted:
        return Answer(file.data, 200, headers)
    first, last = int(wanted[1]), int(wanted[2] or len(file.data) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
    return Answer(file.data[first : last + 1], 206, headers)


@route("GET", "/_control/log")
def control_log(request: Request) -> Answer:
    return Answer(request.hub.log)


@route("POST", "/_control")
def control(request: Request) -> Answer:
    """For tests: add ``users``, break uploads of a large file (``cuts``), let somebody else commit first (``races``), answer in other
    ways that the protocol allows (``quirks``), forget the ``log``."""
    asked, hub = request.json(), request.hub
    for token, user in asked.get("users", {}).items():
        hub.users[token] = User(user["name"], user.get("role", "write"), tuple(user.get("organisations", ())))
    for name, files in asked.get("plant", {}).items():  # files that no client would send: hostile names
        repo = hub.repositories["model", name]
        made = {path: File(base64.b64decode(data)) for path, data in files.items()}
        repo.commit("main", {**repo.resolve("main").files, **made}, "planted", "", "somebody", pull=False)
    hub.cuts |= asked.get("cuts", {})
    hub.races += asked.get("races", [])
    hub.quirks = asked.get("quirks", hub.quirks)
    if asked.get("forget"):
        hub.log.clear()
    return Answer({"objects": len(hub.objects)})
