"""What the stand-in Hub remembers: users, repositories, commits, large objects. All in memory."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime

ZERO = "0" * 40


class HubError(Exception):
    """An answer that is no success: ``status``, the Hub's ``X-Error-Code`` and a message."""

    def __init__(self, status: int, message: str, code: str = "", **extra):
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


@dataclass(frozen=True)
class File:
    """A version of a file; ``lfs`` is the sha256 of a large one."""

    data: bytes
    lfs: str | None = None

    @property
    def oid(self) -> str:
        """Git's name of the blob; of the pointer file for a large one."""
        data = self.data if self.lfs is None else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.lfs}\nsize {len(self.data)}\n".encode()

    @property
    def etag(self) -> str:
        return self.lfs or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict[str, File]
    parent: str
    title: str
    message: str
    author: str
    date: str


@dataclass
class Repository:
    kind: str
    id: str
    private: bool
    gated: bool = False
    allowed: set[str] = field(default_factory=set)  # who may read it although it is gated
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or hash."""
        name = revision.removeprefix("refs/heads/")
        oid = self.branches.get(name) or self.tags.get(name) or self.pulls.get(revision) or name
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def commit(self, branch: str, files: dict[str, File], title: str, message: str, author: str, pull: bool) -> Commit:
        parent = self.resolve(branch).oid if self.commits else ZERO
        listing = "\n".join(f"{path} {file.etag}" for path, file in sorted(files.items()))
        text = f"{parent}\n{title}\n{message}\n{author}\n{len(self.commits)}\n{listing}"
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), files, parent, title, message, author, date)
        self.commits[made.oid] = made
        if pull:
            self.pulls[f"refs/pr/{len(self.pulls) + 1}"] = made.oid
        elif branch in self.pulls:
            self.pulls[branch] = made.oid
        else:
            self.branches[branch] = made.oid
        return made


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"  # of the token: write | read
    organisations: tuple[str, ...] = ()


class Hub:
    """Everything, behind one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}  # by token
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files, committed or not
        self.log: list[dict] = []
        self.cuts: dict[str, int] = {}  # large file to how many of its next uploads break off in the middle
        self.quirks: list[str] = []  # see tests: "bare", "all lfs", "all regular", "small headers", "other words"
        self.races: list[str] = []  # repositories that somebody else commits to just before the next commit

    def user(self, authorization: str | None) -> User | None:
        if not authorization:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def create(self, kind: str, name: str, private: bool, user: User | None) -> Repository:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner, _, short = name.rpartition("/")
        owner = owner or user.name
        if user.role != "write" or owner not in (user.name, *user.organisations):
            raise HubError(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        key = (kind, f"{owner}/{short}")
        if key in self.repositories:
            raise HubError(409, "You already created this model repo", url=key[1])
        made = self.repositories[key] = Repository(kind, key[1], private)
        made.commit("main", {}, "initial commit", "", owner, pull=False)
        return made

    def find(self, kind: str, name: str, user: User | None, write: bool = False, content: bool = False) -> Repository:
        """The repository, if ``user`` may see it (read its ``content``, ``write`` to it)."""
        found = self.repositories.get((kind, name))
        mine = found is not None and user is not None and found.owner in (user.name, *user.organisations)
        if found is None or (found.private and not mine):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and (not mine or user is None or user.role != "write"):
            if user is None:
                raise HubError(401, "Invalid username or password.")
            raise HubError(403, "Forbidden: pass a token with write access to this repository.")
        if content and found.gated and not mine and (user is None or user.name not in found.allowed):
            raise HubError(403 if user else 401, f"Access to model {name} is restricted.", "GatedRepo")
        return found
