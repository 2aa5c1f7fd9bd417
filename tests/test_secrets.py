"""Secrets stay on this machine: in whatever form a file, a name or an argument holds them, and errors do not repeat them."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hf_hardattn
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.hub.contents import list_files
from hf_hardattn.hub.secrets import holds_token, is_secret, redact

WORD = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zAbCdEf"
JWT = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=")
    for part in (b'{"alg":"HS256"}', b'{"sub":"1234567890"}', b"s" * 32)
)
# Put together here, so that this file holds none.
SECRETS = {
    "hugging_face": "hf_" + WORD,
    "github_classic": "ghp_" + WORD[:36],
    "github_fine_grained": "github_" + "pat_11" + WORD + "_" + WORD,
    "openai": "sk-" + WORD,
    "openai_project": "sk-" + "proj-" + WORD + "_-" + WORD,
    "openai_service": "sk-" + "svcacct-" + WORD,
    "anthropic": "sk-" + "ant-api03-" + WORD,
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws_temporary": "ASIA" + "IOSFODNN7EXAMPLE",
    "gitlab": "glpat-" + WORD[:20],
    "slack": "xoxb-" + "123456789012-123456789012-" + WORD[:24],
    "google": "AIza" + WORD[:35],
    "npm": "npm_" + WORD[:36],
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + WORD + WORD,
    "stripe": "sk_" + "live_" + WORD[:24],
    "telegram": "1234567890:" + WORD[:35],
    "sendgrid": "SG." + WORD[:22] + "." + WORD + "abcdef",
    "jwt": JWT,
    "private_key": "-----BEGIN " + "RSA PRIVATE KEY-----",
    "openssh_key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "url": "https://ann:" + "s3cretPw@example.com/repo.git",
    "database": "postgresql://admin:" + "hunter2hunter2@10.0.0.1/db",
    "azure": "AccountKey=" + "A" * 86 + "==",
}
ENCODINGS = {
    "plain": lambda secret: f"a line\nbefore {secret} after\n".encode(),
    "json": lambda secret: json.dumps({"note": f"first\n{secret}"}).encode(),
    "json_escapes": lambda secret: ('{"note": "' + "".join(f"\\u{ord(c):04x}" for c in secret) + '"}').encode(),
    "base64": lambda secret: b"data: " + base64.b64encode(secret.encode()),
    "base64_twice": lambda secret: base64.b64encode(base64.b64encode(secret.encode())),
    "url": lambda secret: ("x=" + "".join(f"%{ord(c):02X}" for c in secret)).encode(),
    "html": lambda secret: "".join(f"&#{ord(c)};" for c in secret).encode(),
    "utf16": lambda secret: f"before {secret} after".encode("utf-16"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_found_however_it_is_written(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / "README.md").write_bytes(ENCODINGS[encoding](SECRETS[name]))
    assert holds_token(tmp_path / "README.md")


@pytest.mark.parametrize("name", [name for name in SECRETS if not name.endswith("_key")])
def test_a_message_does_not_repeat_a_secret(name: str) -> None:
    secret = SECRETS[name]
    tail = secret.rpartition(":")[2][8:20] if name not in ("url", "database") else secret.partition("@")[0][-8:]
    assert tail not in redact(f"cannot open {secret} today")


@pytest.mark.parametrize(
    "line", ['password = "Tr0ub4dor&3"', "'api_key': 'q9w8e7r6t5'", "Authorization: Bearer " + WORD.lower()]
)
def test_a_value_named_a_password_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "config.json").write_text(line)
    assert holds_token(tmp_path / "config.json")


def test_a_secret_across_two_blocks_is_found(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("x" * ((1 << 20) - 10) + " " + SECRETS["hugging_face"])
    assert holds_token(tmp_path / "log.jsonl")


@pytest.mark.parametrize("unit", ["x", "eyJ", "sk-", "//x/", "://", "a ", '"'])
def test_a_long_line_takes_seconds_and_not_hours(tmp_path: Path, unit: str) -> None:
    (tmp_path / "README.md").write_text(unit * (300_000 // len(unit)))
    started = time.process_time()
    assert not holds_token(tmp_path / "README.md")
    assert time.process_time() - started < 20


def test_a_secret_in_the_metadata_of_weights_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"url": SECRETS["url"]})
    assert holds_token(tmp_path / "model.safetensors")


def test_what_models_hold_is_no_secret(tmp_path: Path) -> None:
    vocabulary = {"password": 1, "sk-learn": 2, "hf_hardattn": 3, "AKIA": 4, "secret": 5, "://": 6, "key": "[PAD]"}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "README.md").write_text(
        "import hf_hardattn.training.cluttered_digits; sha256: "
        + "0a1b2c3d" * 8
        + "\n`pad_token`: '[PAD]', https://huggingface.co/a/b@main "
        "task-classification-of-cluttered-digits 10.0.0.1 me@example.com"
    )
    generator = torch.Generator().manual_seed(0)
    save_file({"a": torch.randn(1_000_000, generator=generator)}, tmp_path / "model.safetensors")
    assert not any(holds_token(path) for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hugging_face", "github_fine_grained", "anthropic", "google"])
def test_a_secret_in_a_file_name_is_refused_and_not_repeated(folder: Path, name: str) -> None:
    (folder / "images").mkdir()
    (folder / "images" / f"{SECRETS[name]}.png").write_bytes(b"x")
    with pytest.raises(HardAttentionError, match="the name of a file .* holds an access token") as refused:
        list_files(folder)
    assert SECRETS[name] not in str(refused.value)


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("hidden", [".git/config", "training_args.bin", "runs/events"])
def test_a_link_does_not_send_a_file_that_is_left_out(folder: Path, hidden: str, link) -> None:
    (folder / hidden).parent.mkdir(exist_ok=True)
    (folder / hidden).write_text("url = somewhere")
    link(folder / hidden, folder / "LICENSE")
    with pytest.raises(HardAttentionError, match="LICENSE is a link to a file .* that is left out"):
        list_files(folder)


def test_a_link_to_a_folder_or_to_nothing_is_refused(folder: Path) -> None:
    for target in ("nowhere", "."):
        (folder / "LICENSE").unlink(missing_ok=True)
        (folder / "LICENSE").symlink_to(folder / target)
        with pytest.raises(HardAttentionError, match="LICENSE is not a file"):
            list_files(folder)


def test_a_link_between_files_that_are_pushed_is_fine(folder: Path) -> None:
    (folder / "README.md").write_text("# A card")
    (folder / "NOTICE").symlink_to(folder / "README.md")
    assert "NOTICE" in list_files(folder)[0]


@pytest.mark.parametrize("name", ["hugging_face", "github_fine_grained", "openai_project"])
@pytest.mark.parametrize("place", ["owner", "whole", "revision"])
def test_a_secret_in_an_argument_is_refused_and_not_repeated(tmp_path: Path, place: str, name: str) -> None:
    secret = SECRETS[name]
    repo = {"owner": f"{secret}/model", "whole": secret, "revision": "me/model"}[place]
    with pytest.raises(HardAttentionError, match="access token") as refused:
        hf_hardattn.load(repo, revision=secret if place == "revision" else None, cache_dir=tmp_path)
    assert secret not in str(refused.value)
    with pytest.raises(HardAttentionError, match="access token") as refused:
        hf_hardattn.push(tmp_path, repo, tag=secret if place == "revision" else None)
    assert secret not in str(refused.value)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "a" * 5000, "me/" + "b" * 300])
def test_a_name_that_no_file_system_takes_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HardAttentionError, match="is neither a folder nor the name of a repository"):
        hf_hardattn.load(name, cache_dir=tmp_path)


def test_plain_names_are_no_secrets() -> None:
    for name in (
        "me/vit-hard",
        "google/vit-base-patch16-224",
        "model-00001-of-00002.safetensors",
        "v1.0",
        "refs/pr/1",
        "0" * 40,
    ):
        assert not is_secret(name)


def test_looking_for_secrets_leaves_logs_and_warnings_alone() -> None:
    """In a fresh process: detect-secrets sends all warnings to a log when it is imported."""
    code = """
import logging, warnings
logging.basicConfig(level=logging.INFO)
root, shown = logging.getLogger(), warnings.showwarning
before = list(root.handlers), root.level
from hf_hardattn.hub.secrets import is_secret
is_secret("x")
assert warnings.showwarning is shown and before == (root.handlers, root.level)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
