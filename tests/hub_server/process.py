"""Start the stand-in Hub and its users, from a test."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
# Tokens look like real ones, so that whatever looks for tokens finds them.
ANN, BOB, READER, WRONG = (
    f"hf_{name}{'x' * (34 - len(name))}" for name in ("ANNwrites", "BOBwrites", "ANNreads", "NOBODY")
)
USERS = {
    ANN: {"name": "ann", "organisations": ["lab"]},
    BOB: {"name": "bob"},
    READER: {"name": "ann", "role": "read"},
}


class HubProcess:
    """The stand-in Hub in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.home, self.people = home, list[Person]()
        self.process = subprocess.Popen([sys.executable, str(HERE)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()
        self.control(users=USERS)

    def control(self, **asked: object) -> dict:
        data = json.dumps(asked).encode()
        request = urllib.request.Request(f"{self.endpoint}/_control", data=data, method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def plant(self, name: str, files: dict[str, bytes]) -> None:
        """Put files into a repository that no client would send."""
        self.control(plant={name: {path: base64.b64encode(data).decode() for path, data in files.items()}})

    def log(self, *methods: str) -> list[tuple[str, str, int]]:
        with urllib.request.urlopen(f"{self.endpoint}/_control/log", timeout=30) as answer:
            rows = [(row["method"], row["path"], row["status"]) for row in json.load(answer)]
        return [row for row in rows if not methods or row[0] in methods]

    def forget(self) -> None:
        """Empty the log."""
        self.control(forget=True)

    def environment(self, token: str | None, home: str) -> dict[str, str]:
        """What a user's process sees. A home of its own is a fresh cache."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(self.home / home)}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        kept |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def person(self, token: str | None, home: str) -> Person:
        made = Person(self.environment(token, home), self.home / f"{home}.log")
        self.people.append(made)
        return made

    def close(self) -> None:
        for person in self.people:
            person.close()
        self.process.terminate()
        self.process.wait(10)


class Person:
    """A user with an environment and a log; ``do`` runs Python there and returns its ``result``, or raises ``Refused``."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log
        command = [sys.executable, str(HERE / "worker.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log.open("w")}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def do(self, code: str) -> object:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "Died", "message": ""}')
        if answer["error"]:
            raise Refused(answer["error"], answer["message"], answer.get("trace", ""))
        return answer["result"]

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(30)


class Refused(Exception):
    """What a user's code raised; ``str`` is ``<type>: <message>``."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace
