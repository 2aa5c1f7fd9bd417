"""Push a folder to the Hub in one commit: the push is planned and shown first, and private unless requested otherwise."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import HardAttentionError
from .card import CARD, RECORD
from .card_check import EDITED, check_card
from .contents import STALE, check_hard, list_files
from .secrets import is_secret, redact


@dataclass(frozen=True)
class Plan:
    """The plan or the result of a push; ``print(plan)`` shows it.

    Attributes:
        repo_id: name of the repository. form: ``full``, ``selectors`` or ``adapter``. exists: whether the repository exists.
        private: whether the repository is private. files: file names to sizes in bytes. left_out: names of the files left out.
        removed: stale weights in the repository, which are deleted.
        branch, tag, pull_request: destination of the files. parent: parent commit.
        card_problems: output of ``hf-hardattn card --check``. asked: whether the Hub answered; otherwise a dry run knows only the folder.
        commit: the new commit. url: address of the commit or pull request after the push.
    """

    repo_id: str
    form: str
    exists: bool
    private: bool
    files: dict[str, int]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    branch: str | None
    tag: str | None
    pull_request: bool
    parent: str | None
    card_problems: tuple[str, ...] = ()
    asked: bool = True
    commit: str | None = None
    url: str | None = None

    def __str__(self) -> str:
        where = "a pull request" if self.pull_request else f"branch {self.branch or 'main'}"
        who = "private" if self.private else "PUBLIC: everyone can see and download it"
        state = (
            "exists" if self.exists else "will be created" if self.asked else "unknown, because the Hub did not answer"
        )
        lines = [
            f"{self.repo_id}: {state}, {who}",
            f"{'soft' if self.form == 'soft' else self.form + ' hard'} model to {where}{f', tag {self.tag}' if self.tag else ''}:",
            *(f"  {size:>14,}  {name}" for name, size in self.files.items()),
            f"  {sum(self.files.values()):>14,}  bytes in {len(self.files)} files",
        ]
        lines += [f"  removed there (stale weights): {', '.join(self.removed)}"] if self.removed else []
        lines += [f"  left out here: {', '.join(self.left_out)}"] if self.left_out else []
        lines += [] if "README.md" in self.files else ["  no README.md: write the card with 'hf-hardattn card'"]
        lines += [f"  card: {problem}" for problem in self.card_problems]
        return "\n".join([*lines, f"pushed: {self.url}" if self.url else "nothing was sent"])


def push(
    folder: str | Path,
    repo_id: str,
    *,
    dry_run: bool = True,
    public: bool = False,
    branch: str | None = None,
    tag: str | None = None,
    pull_request: bool = False,
    message: str = "Upload hard model",
    exclude: tuple[str, ...] = (),
    lenient: bool = False,
    token: str | None = None,
) -> Plan:
    """Push a saved hard model; by default only report what a push would do.

    The upload is one commit: a failure leaves the repository unchanged, and a second call sends only the large files that are still
    missing. If somebody else pushed in between, nothing is overwritten.

    Args:
        folder: folder written by ``save``. repo_id: ``user/name``; created if it does not exist.
        dry_run: only plan, send nothing. public: create a new repository as public; an existing one is never changed.
        branch: created if it does not exist. tag: tag of the new commit. pull_request: open a pull request instead of committing.
        exclude: globs of files to leave out; each must match one, and none a part of the model. lenient: leave out unexpected files, and also accept a soft model.
        token: token of huggingface_hub's login by default; it is neither stored nor shown.

    Raises:
        HardAttentionError: the files are unsafe, unexpected or incomplete, the model is soft, the repository has the other visibility, the user may
            not write to it, or the upload was interrupted.
    """
    named = {"repository's name": repo_id, "message": message, "branch": branch, "tag": tag}
    for word, given in named.items():
        if given and is_secret(given, token):
            raise HardAttentionError(
                f"the {word} holds an access token or a password; everyone with access to the repository could read it. Remove it; "
                "provide a token with 'hf auth login' or HF_TOKEN."
            )
    try:
        validate_repo_id(repo_id)
    except HFValidationError:  # its message repeats the name, which may be a misplaced token
        raise HardAttentionError(
            f"{redact(repo_id, token)[:200]!r} is not the name of a repository; a name is 'user/name'."
        ) from None
    if "/" not in repo_id:
        raise HardAttentionError(f"{redact(repo_id, token)!r} has no owner; the name of a repository is 'user/name'.")
    if pull_request and (branch or tag):
        raise HardAttentionError(
            "a pull request accepts neither branch nor tag; it is opened against main. Remove one of them."
        )
    plan = make_plan(Path(folder), repo_id, public, branch, tag, pull_request, exclude, lenient, token, dry_run)
    return plan if dry_run else _send(plan, Path(folder), message, token)


def make_plan(
    folder: Path,
    repo_id: str,
    public: bool,
    branch: str | None,
    tag: str | None,
    pull_request: bool,
    exclude: tuple[str, ...],
    lenient: bool,
    token: str | None,
    local_too: bool = False,
) -> Plan:
    """Plan a push from the folder and the repository, without writing anything.

    Args:
        local_too: do not raise if the Hub does not answer; the plan then says that the Hub was not asked.
    """
    names, left = list_files(folder, exclude, lenient, token)
    form = check_hard(folder, names, lenient)
    problems = check_card(folder) if {CARD, RECORD} <= set(names) else []
    if any(problem.startswith(EDITED) for problem in problems):
        raise HardAttentionError(f"{folder}: {problems[0]}")
    api = HfApi(token=token)
    exists, private, parent, there, asked = True, True, None, [], True
    try:
        info = api.model_info(repo_id)
        private = bool(info.private)
        with suppress(RevisionNotFoundError):  # a new branch starts at main
            info = api.model_info(repo_id, revision=branch) if branch else info
        parent, there = info.sha, [sibling.rfilename for sibling in info.siblings or []]
    except RepositoryNotFoundError:
        exists = False
    except Exception as error:
        if not local_too or getattr(getattr(error, "response", None), "status_code", None) is not None:
            raise _failed("the Hub could not be queried about", repo_id, error, token) from error
        exists = asked = False
    if exists and private == public:
        raise HardAttentionError(_other_visibility(repo_id, private))
    if pull_request and asked and not exists:
        raise HardAttentionError(
            f"{repo_id} does not exist (or is not visible with this token); a pull request needs a repository. Push without one."
        )
    return Plan(
        repo_id=repo_id,
        form=form,
        exists=exists,
        private=not public,
        files={name: (folder / name).stat().st_size for name in names},
        left_out=tuple(redact(name, token) for name in left),
        removed=tuple(sorted(name for name in there if STALE.fullmatch(name) and name not in (*names, *left))),
        branch=branch,
        tag=tag,
        pull_request=pull_request,
        parent=parent,
        card_problems=tuple(problems),
        asked=asked,
    )


def _send(plan: Plan, folder: Path, message: str, token: str | None) -> Plan:
    api, repo_id, parent, made = HfApi(token=token), plan.repo_id, plan.parent, None
    try:
        if plan.tag and plan.exists and plan.tag in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
            raise HardAttentionError(f"{repo_id} already has a tag {plan.tag!r}; tags are not moved. Use another name.")
        if not plan.exists:
            api.create_repo(repo_id, private=plan.private)
            info = api.model_info(repo_id)
            parent = info.sha
            if bool(info.private) != plan.private:
                raise HardAttentionError(_other_visibility(repo_id, bool(info.private)))
        if plan.branch and plan.branch != "main":
            api.create_branch(repo_id, branch=plan.branch, exist_ok=True)
        operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in plan.files]
        operations += [CommitOperationDelete(name) for name in plan.removed]
        made = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=plan.branch,
            create_pr=plan.pull_request,
            parent_commit=parent,
        )
        if plan.tag:
            api.create_tag(repo_id, tag=plan.tag, revision=made.oid)
    except HardAttentionError:
        raise
    except Exception as error:  # noqa: BLE001 - network and permissions, as any type of error of the client
        if made is not None:
            raise HardAttentionError(
                f"the files are in {repo_id} as commit {made.oid}, but the tag {plan.tag!r} failed ({type(error).__name__}: "
                f"{redact(' '.join(str(error).split()), token)[:300]}). Set the tag on that commit; do not push again."
            ) from error
        raise _failed("the push failed:", repo_id, error, token) from error
    return Plan(**{**vars(plan), "parent": parent, "commit": made.oid, "url": made.pr_url or made.commit_url})


def _other_visibility(repo_id: str, private: bool) -> str:
    if private:
        return (
            f"{repo_id} exists and is private; public=True makes only new repositories public. Push without it, and change the "
            "visibility in the repository's settings."
        )
    return f"{repo_id} is PUBLIC; the push was meant to be private. Nothing was sent. Pass public=True (--public), or use another name."


def _failed(what: str, repo_id: str, error: Exception, token: str | None) -> HardAttentionError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = redact(" ".join(str(error.__cause__ or error).split()), token)[:400]
    if status == 412:
        return HardAttentionError(
            f"someone else pushed to {repo_id} in the meantime; nothing was overwritten. Check their commit, then push again."
        )
    if status in (401, 403):
        return HardAttentionError(
            f"{what} {repo_id} ({status}: {text}); a token with write access is required. Log in with: hf auth login"
        )
    return HardAttentionError(
        f"{what} {repo_id} ({type(error).__name__}: {text}); no commit was made, so nothing was changed. Push again: large files that "
        "arrived are not sent twice."
    )
