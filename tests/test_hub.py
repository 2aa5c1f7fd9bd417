"""Push and load against a real server on loopback, with the unmodified huggingface_hub client, each user a process of their own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server.models import answer, harden, same, stock, with_adapter
from hub_server.process import ANN, BOB, READER, WRONG, HubProcess, Refused

import hf_hardattn
from hf_hardattn.hub import pushing

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
TESTS = Path(__file__).parent
FORMS = ("full", "sharded", "selectors", "peft")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    process = HubProcess(tmp_path_factory.mktemp("homes"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def ann(hub):
    person = hub.person(ANN, "ann")
    person.do(f"import sys; sys.path.insert(0, {str(TESTS)!r}); import hf_hardattn, huggingface_hub")
    return person


@pytest.fixture(scope="module")
def bob(hub):
    person = hub.person(BOB, "bob")
    person.do("import hf_hardattn, huggingface_hub")
    return person


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in every form, and what it says: form to folder; its answer lies beside."""
    root = tmp_path_factory.mktemp("models")
    stock().save_pretrained(root / "base")
    hard = harden(stock())
    hf_hardattn.save(hard, root / "full")
    hf_hardattn.save(hard, root / "sharded", max_shard_size="20KB")
    hf_hardattn.save(hard, root / "selectors", selectors_only=True, base_model="ann/base")
    torch.save(answer(hard), root / "answer.pt")
    adapted = with_adapter(harden(stock()))
    torch.save(answer(adapted), root / "answer_peft.pt")
    hf_hardattn.save(adapted, root / "peft", base_model="ann/base")
    return root


@pytest.fixture(scope="module")
def pushed(ann, folders):
    """All forms on the Hub, under ann."""
    # a soft model goes up as any other
    ann.do(
        f"huggingface_hub.create_repo('ann/base', private=True); huggingface_hub.upload_folder(repo_id='ann/base', folder_path={str(folders / 'base')!r})"
    )
    for form in FORMS:
        ann.do(f"plan = hf_hardattn.push({str(folders / form)!r}, 'ann/{form}', dry_run=False)")
    return folders


def push(person, folder, repo, **options):
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return person.do(
        f"plan = hf_hardattn.push({str(folder)!r}, {repo!r}{given}); result = {{**vars(plan), 'text': str(plan)}}"
    )


LOAD = """
import sys; sys.path.insert(0, {tests!r})
import hf_hardattn
from hub_server.models import keep_answer
for form in {forms!r}:
    model = hf_hardattn.load("ann/" + form)
    keep_answer(model, {folder!r} + "/" + form + ".pt")
model = hf_hardattn.load("ann/full", budget=0.25)
result = model.config.hard_attention["budget"]
from transformers import AutoModelForImageClassification
keep_answer(AutoModelForImageClassification.from_pretrained("ann/full").eval(), {folder!r} + "/stock_way.pt")
"""


def test_a_fresh_process_and_cache_load_every_form_hard(hub, pushed, tmp_path):
    fresh = hub.person(ANN, "fresh")
    budget = fresh.do(LOAD.format(tests=str(TESTS), forms=FORMS, folder=str(tmp_path)))
    assert budget == {"ratio": 0.25}
    expected = torch.load(pushed / "answer.pt")
    for form in ("full", "sharded", "selectors", "stock_way"):
        assert same(torch.load(tmp_path / f"{form}.pt"), expected), form
    assert same(torch.load(tmp_path / "peft.pt"), torch.load(pushed / "answer_peft.pt"))
    assert not same(torch.load(pushed / "answer_peft.pt"), expected)
    assert sum(f.stat().st_size for f in (pushed / "selectors").iterdir()) < 3000


def test_a_dry_run_sends_nothing_and_shows_all(hub, ann, folders):
    hub.forget()
    plan = push(ann, folders / "full", "ann/dry")
    assert hub.log("POST", "PUT", "DELETE") == [] and plan["commit"] is None
    assert "ann/dry: will be created, private" in plan["text"] and "nothing was sent" in plan["text"]
    assert (
        "model.safetensors" in plan["text"]
        and f"{(folders / 'full/model.safetensors').stat().st_size:,}" in plan["text"]
    )
    assert plan["files"].keys() == {"config.json", "model.safetensors"}


def test_private_by_default_and_hidden_from_others(hub, ann, bob, pushed):
    assert ann.do("result = huggingface_hub.model_info('ann/full').private") is True
    with pytest.raises(Refused, match="RepositoryNotFoundError"):
        bob.do("hf_hardattn.load('ann/full')")
    # a selector repository that is public does not open its private base
    push(ann, pushed / "selectors", "ann/open-selectors", dry_run=False, public=True)
    with pytest.raises(Refused, match="(?s)RepositoryNotFoundError.*ann/base"):
        bob.do("hf_hardattn.load('ann/open-selectors')")


def test_public_only_when_asked_and_never_by_accident(hub, ann, bob, folders):
    plan = push(ann, folders / "full", "ann/open", dry_run=False, public=True)
    assert "PUBLIC: everyone can see" in plan["text"]
    assert bob.do("result = hf_hardattn.load('ann/open').config.hard_attention['budget']") == {"ratio": 0.5}
    hub.forget()
    with pytest.raises(
        Refused, match="HardAttentionError: ann/open is PUBLIC; the push was meant to be private. Nothing was sent"
    ):
        push(ann, folders / "full", "ann/open", dry_run=False)
    push(ann, folders / "full", "ann/closed", dry_run=False)
    with pytest.raises(
        Refused, match="ann/closed exists and is private; public=True makes only new repositories public"
    ):
        push(ann, folders / "full", "ann/closed", dry_run=False, public=True)
    assert not any("ann/open" in path for _, path, _ in hub.log("POST", "PUT"))


@pytest.mark.parametrize(
    ("token", "why"),
    [(WRONG, "401"), (READER, "403"), (None, "401"), (BOB, "403")],
    ids=["wrong", "read only", "none", "somebody else's"],
)
def test_without_the_right_to_write(hub, folders, token, why):
    person = hub.person(token, f"home-{token}")
    person.do("import hf_hardattn")
    with pytest.raises(Refused, match=f"HardAttentionError: .*{why}.*hf auth login") as refused:
        push(person, folders / "full", "ann/not-mine", dry_run=False)
    assert token is None or token not in refused.value.trace
    assert not any("not-mine" in path and status == 200 for _, path, status in hub.log())


def test_gated(hub, ann, bob, folders):
    push(ann, folders / "full", "ann/gated", dry_run=False, public=True)
    ann.do("huggingface_hub.update_repo_settings('ann/gated', gated='manual')")
    with pytest.raises(Refused, match="GatedRepoError"):
        bob.do("hf_hardattn.load('ann/gated')")
    assert ann.do("result = hf_hardattn.load('ann/gated').training") is False


def test_branches_tags_and_pinned_revisions(ann, pushed):
    folders = pushed
    first = push(ann, folders / "full", "ann/versions", dry_run=False, tag="v1")
    again = push(ann, folders / "selectors", "ann/versions", dry_run=False, branch="small")
    assert again["branch"] == "small" and "model.safetensors" in again["removed"]
    ask = "result = type(hf_hardattn.load('ann/versions', revision={!r})).__name__"
    for revision in ("v1", "main", first["commit"], "small"):
        assert ann.do(ask.format(revision)) == "ViTForImageClassification"
    kept = "result = huggingface_hub.list_repo_files('ann/versions', revision={!r})"
    assert "hard_attention.json" in ann.do(kept.format("small")) and "hard_attention.json" not in ann.do(
        kept.format("main")
    )
    assert "model.safetensors" not in ann.do(kept.format("small"))
    with pytest.raises(Refused, match="RevisionNotFoundError"):
        ann.do(ask.format("v2"))
    with pytest.raises(Refused, match="already has a tag 'v1'; tags are not moved"):
        push(ann, folders / "full", "ann/versions", dry_run=False, tag="v1")


def test_a_pull_request_to_an_existing_repository(ann, folders):
    push(ann, folders / "full", "ann/reviewed", dry_run=False)
    before = ann.do("result = huggingface_hub.model_info('ann/reviewed').sha")
    plan = push(ann, folders / "sharded", "ann/reviewed", dry_run=False, pull_request=True)
    assert "/discussions/1" in plan["url"] and "a pull request" in plan["text"]
    assert ann.do("result = huggingface_hub.model_info('ann/reviewed').sha") == before
    assert ann.do(
        "result = 'model.safetensors.index.json' in huggingface_hub.list_repo_files('ann/reviewed', revision='refs/pr/1')"
    )
    with pytest.raises(Refused, match="a pull request needs a repository"):
        push(ann, folders / "full", "ann/nowhere", dry_run=False, pull_request=True)


def test_somebody_else_pushed_meanwhile(hub, ann, folders):
    push(ann, folders / "full", "ann/busy", dry_run=False)
    hub.control(races=["ann/busy"])
    with pytest.raises(Refused, match="someone else pushed to ann/busy in the meantime; nothing was overwritten"):
        push(ann, folders / "sharded", "ann/busy", dry_run=False)
    assert ("POST", "/api/models/ann/busy/commit/main", 412) in hub.log()
    files = ann.do("result = huggingface_hub.list_repo_files('ann/busy')")
    assert "theirs.txt" in files and "model.safetensors" in files
    push(ann, folders / "sharded", "ann/busy", dry_run=False)
    assert "theirs.txt" in ann.do("result = huggingface_hub.list_repo_files('ann/busy')")


def test_an_upload_that_breaks_is_resumed(hub, ann, folders, tmp_path):
    model = harden(stock(seed=5))
    hf_hardattn.save(model, tmp_path / "new", max_shard_size="20KB")
    shards = sorted((tmp_path / "new").glob("model-*.safetensors"))
    broken = hashlib.sha256(shards[0].read_bytes()).hexdigest()
    hub.forget()
    hub.control(cuts={broken: 6})  # the client itself tries six times
    with pytest.raises(Refused, match="HardAttentionError: the push failed: ann/cut .*nothing was changed. Push again"):
        push(ann, tmp_path / "new", "ann/cut", dry_run=False)
    assert ann.do("result = huggingface_hub.list_repo_files('ann/cut')") == []  # nothing half-written
    assert hub.log("PUT").count(("PUT", f"/_objects/{broken}", 0)) == 6
    hub.forget()
    push(ann, tmp_path / "new", "ann/cut", dry_run=False)
    sent = [path.rpartition("/")[2] for _, path, _ in hub.log("PUT")]
    assert broken in sent and len(sent) < len(shards)  # what had arrived was not sent again
    again = ann.do(
        "from hub_server.models import answer; result = answer(hf_hardattn.load('ann/cut'))['logits'].tolist()"
    )
    assert again == answer(model)["logits"].tolist()


def test_the_stock_ways_to_push_reload_hard(hub, ann, folders, tmp_path):
    """``model.push_to_hub`` and ``Trainer(push_to_hub=True)``, then a fresh process."""
    ann.do(
        f"""
        import torch
        from transformers import Trainer, TrainingArguments
        from hub_server.models import harden, stock, keep_answer
        model = harden(stock())
        model.push_to_hub("ann/stock-push", private=True)
        keep_answer(model, {str(tmp_path / "pushed.pt")!r})
        rows = [dict(pixel_values=torch.rand(2, 12, 12), labels=i % 5) for i in range(4)]
        arguments = TrainingArguments({str(tmp_path / "run")!r}, push_to_hub=True, hub_model_id="ann/trained", hub_private_repo=True,
            max_steps=2, per_device_train_batch_size=2, save_strategy="no", use_cpu=True)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        trainer.push_to_hub()
        keep_answer(model.eval(), {str(tmp_path / "trained.pt")!r})
        """
    )
    fresh = hub.person(ANN, "fresh-stock")
    fresh.do(
        f"""
        import sys; sys.path.insert(0, {str(TESTS)!r})
        import hf_hardattn
        from hub_server.models import keep_answer
        keep_answer(hf_hardattn.load("ann/stock-push"), {str(tmp_path / "pushed2.pt")!r})
        keep_answer(hf_hardattn.load("ann/trained"), {str(tmp_path / "trained2.pt")!r})
        """
    )
    assert same(torch.load(tmp_path / "pushed.pt"), torch.load(tmp_path / "pushed2.pt"))
    assert same(torch.load(tmp_path / "trained.pt"), torch.load(tmp_path / "trained2.pt"))


def test_pefts_own_ways_to_push_reload_hard(hub, ann, pushed, tmp_path):
    """``peft_model.push_to_hub`` and a Trainer of a PEFT model: PEFT saves, and the hard configuration goes with it."""
    ann.do(
        f"""
        import torch
        from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
        from hub_server.models import harden, with_adapter, keep_answer
        base = AutoModelForImageClassification.from_pretrained("ann/base")
        model = with_adapter(harden(base))
        model.push_to_hub("ann/peft-push", private=True)
        keep_answer(model, {str(tmp_path / "pushed.pt")!r})
        rows = [dict(pixel_values=torch.rand(2, 12, 12), labels=i % 5) for i in range(4)]
        arguments = TrainingArguments({str(tmp_path / "run")!r}, push_to_hub=True, hub_model_id="ann/peft-trained", hub_private_repo=True,
            max_steps=2, per_device_train_batch_size=2, save_strategy="no", use_cpu=True)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        trainer.push_to_hub()
        keep_answer(model.eval(), {str(tmp_path / "trained.pt")!r})
        """
    )
    fresh = hub.person(ANN, "fresh-peft")
    fresh.do(
        f"""
        import sys; sys.path.insert(0, {str(TESTS)!r})
        import hf_hardattn
        from hub_server.models import keep_answer
        keep_answer(hf_hardattn.load("ann/peft-push"), {str(tmp_path / "pushed2.pt")!r})
        keep_answer(hf_hardattn.load("ann/peft-trained"), {str(tmp_path / "trained2.pt")!r})
        """
    )
    assert same(torch.load(tmp_path / "pushed.pt"), torch.load(tmp_path / "pushed2.pt"))
    assert same(torch.load(tmp_path / "trained.pt"), torch.load(tmp_path / "trained2.pt"))


@pytest.fixture(scope="module")
def fetched(hub, pushed, tmp_path_factory):
    """Each form in a repository that holds other files too, fetched by three names of its commit, then read offline: the user, and a folder."""
    folder, ann = tmp_path_factory.mktemp("offline"), hub.person(ANN, "offline")
    commits = ann.do(
        f"""
        import sys; sys.path.insert(0, {str(TESTS)!r})
        import hf_hardattn, huggingface_hub
        from hub_server.models import keep_answer
        result = {{}}
        for form in {FORMS!r}:
            name = f"ann/offline-{{form}}"
            hf_hardattn.push({str(pushed)!r} + "/" + form, name, dry_run=False, tag="v1")
            for extra in (".gitattributes", "README.md", "training/notes.txt"):
                made = huggingface_hub.upload_file(repo_id=name, path_in_repo=extra, path_or_fileobj=b"words")
            huggingface_hub.create_tag(name, tag="v2")
            for revision in (None, "v2", made.oid):
                hf_hardattn.load(name, revision=revision)
            result[form] = made.oid
        """
    )
    hub.forget()
    ann.do(
        f"""
        for form, commit in {commits!r}.items():
            for number, revision in enumerate((None, "main", "v2", commit)):
                model = hf_hardattn.load(f"ann/offline-{{form}}", revision=revision, local_files_only=True)
                keep_answer(model, f"{folder}/{{form}}-{{number}}.pt")
        """
    )
    environment = hub.environment(ANN, "offline") | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS)}
    code = f"""
import hf_hardattn
from hub_server.models import keep_answer
for form in {FORMS!r}:
    keep_answer(hf_hardattn.load(f"ann/offline-{{form}}"), f"{folder}/{{form}}-4.pt")
"""
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert hub.log() == []
    return ann, folder


@pytest.mark.parametrize("form", FORMS)
def test_what_load_fetched_loads_offline(fetched, pushed, form):
    """By the name it was fetched by (branch, tag, commit) and by the commit that name stood for."""
    ann, folder = fetched
    expected = torch.load(pushed / ("answer_peft.pt" if form == "peft" else "answer.pt"))
    answers = [torch.load(path) for path in folder.glob(f"{form}-*.pt")]
    assert len(answers) == 5 and all(same(found, expected) for found in answers)
    name = f"ann/offline-{form}"
    with pytest.raises(
        Refused, match=f"{name} at revision 'v1' is not in the cache, and nothing is downloaded offline"
    ):
        ann.do(f"hf_hardattn.load({name!r}, revision='v1', local_files_only=True)")


@pytest.mark.parametrize(
    "quirks", [["all regular", "small headers"], ["all lfs", "bare", "other words"]], ids=["regular", "bare"]
)
def test_other_answers_that_the_protocol_allows(hub, ann, bob, pushed, tmp_path, quirks):
    """Files inline or all large, optional fields left out and unknown ones added, header names and error texts of another server."""
    word = quirks[0].replace(" ", "-")
    hub.control(quirks=quirks)
    try:
        for form in ("sharded", "selectors"):
            push(ann, pushed / form, f"ann/{word}-{form}", dry_run=False, tag="v1", branch="side")
        again = push(ann, pushed / "full", f"ann/{word}-sharded", dry_run=False)
        assert again["exists"] and again["private"]
        request = push(ann, pushed / "full", f"ann/{word}-selectors", dry_run=False, pull_request=True)
        assert "/discussions/1" in request["url"]
        fresh = hub.person(ANN, f"fresh-{word}")
        fresh.do(
            f"""
            import sys; sys.path.insert(0, {str(TESTS)!r})
            import hf_hardattn
            from hub_server.models import keep_answer
            for number, (name, revision) in enumerate({[(f"ann/{word}-sharded", None), (f"ann/{word}-sharded", "v1"), (f"ann/{word}-selectors", "side")]!r}):
                for offline in (False, True):
                    model = hf_hardattn.load(name, revision=revision, local_files_only=offline)
                    keep_answer(model, {str(tmp_path)!r} + f"/{{number}}-{{offline}}.pt")
            """
        )
        for path in tmp_path.glob("*.pt"):
            assert same(torch.load(path), torch.load(pushed / "answer.pt")), path.name
        assert len(list(tmp_path.glob("*.pt"))) == 6
        with pytest.raises(Refused, match="RepositoryNotFoundError"):
            bob.do(f"hf_hardattn.load('ann/{word}-sharded')")
        with pytest.raises(Refused, match="HardAttentionError: the push failed: ann/.*403.*hf auth login"):
            push(bob, pushed / "full", "ann/bobs", dry_run=False)
        hub.control(races=[f"ann/{word}-sharded"])
        with pytest.raises(Refused, match="someone else pushed to .* in the meantime"):
            push(ann, pushed / "sharded", f"ann/{word}-sharded", dry_run=False)
    finally:
        hub.control(quirks=[])


def test_the_command_line_of_hf_and_ours(hub, folders, tmp_path):
    environment = hub.environment(ANN, "cli")

    def run(*words):
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)

    binaries = Path(sys.executable).parent
    ours, hf = [str(binaries / "hf-hardattn"), "push", str(folders / "full"), "ann/by-cli"], str(binaries / "hf")
    dry = run(*ours)
    assert dry.returncode == 0 and "dry run; to push" in dry.stdout and "will be created, private" in dry.stdout
    assert run(hf, "repos", "create", "ann/other", "--private").returncode == 0
    real = run(*ours, "--no-dry-run", "--tag", "v1")
    assert real.returncode == 0 and "pushed: " in real.stdout, real.stderr
    down = run(hf, "download", "ann/by-cli", "--revision", "v1", "--local-dir", str(tmp_path / "down"))
    assert down.returncode == 0, down.stderr
    assert same(answer(hf_hardattn.load(tmp_path / "down")), torch.load(folders / "answer.pt"))
    given = run(*ours, "--token", ANN)
    assert given.returncode != 0 and ANN not in given.stdout + given.stderr


def test_path_tricks_in_file_names(hub, ann, folders):
    """Nothing of a repository with such a name is read or written."""
    for number, name in enumerate(
        ("../evil.json", "a/../../evil.safetensors", "/abs.json", "C:\\evil.json", "x\n.json", "x\u202e.json")
    ):
        repo = f"ann/tricks{number}"
        push(ann, folders / "full", repo, dry_run=False)
        hub.plant(repo, {name: b"{}"})
        hub.forget()
        with pytest.raises(
            Refused, match="HardAttentionError: .*is not a valid file name in ann/tricks.*Nothing was read"
        ):
            ann.do(f"hf_hardattn.load({repo!r})")
        assert not any("/resolve/" in path for _, path, _ in hub.log())


def test_pickles_on_the_hub_are_never_fetched(hub, ann, folders):
    push(ann, folders / "full", "ann/both", dry_run=False)
    hub.plant("ann/both", {"pytorch_model.bin": b"evil", "modeling_evil.py": b"evil"})
    hub.forget()
    ann.do("hf_hardattn.load('ann/both')")
    assert not any(path.endswith((".bin", ".py")) for _, path, _ in hub.log())


SECRETS = """
import logging, torch, json
logging.basicConfig(level=logging.DEBUG)
for name in ("httpx", "httpcore", "huggingface_hub", "transformers", "hf_hardattn", "accelerate"):
    logging.getLogger(name).setLevel(logging.DEBUG)
"""


def test_the_token_appears_nowhere(hub, folders, tmp_path):
    """Train, push, fail in every way, with all logs on; then look into everything that was written."""
    sentinel = "hf_" + "SENTINELtoken" + "z" * 21
    hub.control(users={sentinel: {"name": "sue"}})
    sue = hub.person(sentinel, "sue")
    sue.do(f"import sys; sys.path.insert(0, {str(TESTS)!r}); import hf_hardattn, huggingface_hub" + SECRETS)
    heard = [push(sue, folders / "full", "sue/model", dry_run=False)["text"]]
    sue.do(
        f"""
        import os; os.makedirs({str(tmp_path / "data")!r})
        from PIL import Image
        for label in ("a", "b"):
            os.makedirs({str(tmp_path / "data")!r} + "/" + label)
            for i in range(4):
                Image.new("L", (12, 12), 20 * i).convert("RGB").save({str(tmp_path / "data")!r} + f"/{{label}}/{{i}}.png")
        from transformers import ViTConfig, ViTImageProcessorPil
        config = ViTConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=12, patch_size=4)
        config.save_pretrained({str(tmp_path / "start")!r})
        ViTImageProcessorPil(size=dict(height=12, width=12)).save_pretrained({str(tmp_path / "start")!r})
        """
    )
    script = str(TESTS.parent / "scripts" / "train_vit.py")
    flags = [
        "--model_name_or_path",
        str(tmp_path / "start"),
        "--train_dir",
        str(tmp_path / "data"),
        "--validation_dir",
        str(tmp_path / "data"),
    ]
    flags += ["--sites", "vision.tokens.0", "--max_train_steps", "2", "--cpu", "--output_dir", str(tmp_path / "run")]
    flags += ["--push_to_hub", "--hub_model_id", "sue/trained", "--report_to", "trackio"]
    environment = hub.environment(sentinel, "sue") | {"HF_HOME": str(tmp_path / "hf")}
    environment["TRACKIO_DIR"] = str(tmp_path / "tracked")
    trained = subprocess.run(
        [sys.executable, script, *flags], env=environment, capture_output=True, text=True, timeout=900
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "sue/trained" in trained.stderr and (tmp_path / "run" / "card.json").is_file()
    assert any((tmp_path / "tracked").rglob("*.db"))  # the tracker wrote its record
    assert sue.do("result = huggingface_hub.model_info('sue/trained').card_data.library_name") == "hf-hardattn"
    heard += [trained.stdout, trained.stderr]
    for flag in ("--hub_token",):
        refused = subprocess.run(
            [sys.executable, script, *flags, flag, sentinel],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert refused.returncode != 0 and "is refused on the command line" in refused.stderr
        heard += [refused.stdout, refused.stderr]
    (tmp_path / "leak").mkdir()
    for file in (folders / "full").iterdir():
        (tmp_path / "leak" / file.name).write_bytes(file.read_bytes())
    hub.control(races=["sue/model"])
    failures = [
        f"hf_hardattn.push({str(folders / 'full')!r}, 'ann/base', dry_run=False)",
        f"hf_hardattn.push({str(folders / 'sharded')!r}, 'sue/model', dry_run=False)",
        f"hf_hardattn.push({str(folders / 'full')!r}, {sentinel!r}, dry_run=False)",
        "hf_hardattn.load('ann/full')",
        "hf_hardattn.load('sue/nothing')",
        f"open({str(tmp_path / 'leak' / 'README.md')!r}, 'w').write('my token is ' + os.environ['HF_TOKEN']); hf_hardattn.push({str(tmp_path / 'leak')!r}, 'sue/leak', dry_run=False)",
    ]
    for code in failures:
        with pytest.raises(Refused) as refused:
            sue.do(code)
        heard += [refused.value.message, refused.value.trace.replace(code, "")]
    assert "README.md holds an access token; it must not leave this machine" in heard[-2]
    (tmp_path / "leak" / "README.md").unlink()
    heard.append(sue.log.read_text())
    assert len(heard[-1]) > 1000  # the logs were on
    assert [number for number, text in enumerate(heard) if sentinel in text] == []
    for root in (tmp_path, hub.home / "sue", folders):
        for folder, _, files in os.walk(root):
            for name in files:
                assert sentinel.encode() not in Path(folder, name).read_bytes(), Path(folder, name)
    rows = json.dumps(hub.log())
    assert sentinel not in rows.replace(f"/api/models/{sentinel}", "")


def test_a_tag_that_fails_after_the_commit_does_not_deny_the_commit(tmp_path, monkeypatch):
    class Api:
        def __init__(self, token=None):
            pass

        def list_repo_refs(self, repo_id):
            return SimpleNamespace(tags=[])

        def create_commit(self, *args, **kwargs):
            return SimpleNamespace(oid="abc123", pr_url=None, commit_url="there")

        def create_tag(self, *args, **kwargs):
            raise RuntimeError("the server went away")

    monkeypatch.setattr(pushing, "HfApi", Api)
    plan = pushing.Plan("ann/x", "full", True, True, {}, (), (), None, "v1", False, "parent")
    with pytest.raises(
        hf_hardattn.HardAttentionError, match="in ann/x as commit abc123, but the tag 'v1' failed.*went away"
    ):
        pushing._send(plan, tmp_path, "message", None)
