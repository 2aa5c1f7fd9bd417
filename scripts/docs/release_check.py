"""Build wheel and sdist, install each in an empty environment, and run the quickstart there, outside the checkout.

    python scripts/docs/release_check.py --constraints constraints.txt [arguments of pip]

Also checks that the wheel contains the sample model and the files that users run, and none of the scripts that only serve this repository.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WANTED = (
    "hf_hardattn/py.typed",
    "hf_hardattn/sample/model/model.safetensors",
    "hf_hardattn/_scripts/train_vit.py",
    "hf_hardattn/_scripts/accelerate/ddp.yaml",
    "hf_hardattn_cli.py",
)
UNWANTED = re.compile(r"research|scripts/docs|scripts/data|(^|/)tests/|results/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    arguments, pip = parser.parse_known_args()
    dist = ROOT / "dist"
    if dist.exists():
        shutil.rmtree(dist)
    run([sys.executable, "-m", "build", "--outdir", dist, ROOT])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    check_contents(wheel)
    check_addresses(wheel)
    for built in (wheel, sdist):
        with tempfile.TemporaryDirectory() as folder:
            try_in_an_empty_environment(built, Path(folder), ["-c", arguments.constraints.resolve(), *pip])
        print(f"{built.name}: installed, and the quickstart runs")


def check_contents(wheel: Path) -> None:
    """Exit if the wheel lacks a file that users need, or contains one that they do not need."""
    names = zipfile.ZipFile(wheel).namelist()
    if missing := [name for name in WANTED if name not in names]:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    if extra := [name for name in names if UNWANTED.search(name)]:
        sys.exit(f"{wheel.name} holds what only this repository needs: {', '.join(extra)}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def check_addresses(wheel: Path) -> None:
    """Exit if the URLs in the wheel are not exactly those of the repository that it was built in."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    found = re.findall(r"^Project-URL: (.*?), (.*)$", archive.read(name).decode(), flags=re.M)
    address = os.environ.get("PROJECT_URL", "").rstrip("/")
    if bool(found) != bool(address) or not all(url.startswith(address) for _, url in found):
        sys.exit(f"{wheel.name} names the addresses {found}; PROJECT_URL is {address!r}")
    print(f"{wheel.name}: {len(found)} addresses of the project")


def try_in_an_empty_environment(built: Path, folder: Path, pip: list[str | Path]) -> None:
    """Install a distribution with the extras of the quickstart, and run the code blocks of the README on local stand-ins."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", *pip, f"{built}[vision,plots,interpret]"])
    work = folder / "work"
    work.mkdir()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    (work / "quickstart.py").write_text("\n\n".join(blocks), encoding="utf-8")
    shutil.copy(ROOT / "tests" / "stand_ins.py", work)
    run([python, "-c", "from pathlib import Path; import stand_ins; stand_ins.write_all(Path('.'))"], work)
    run([python, "quickstart.py"], work)
    run([folder / "env" / "bin" / "hf-hardattn", "explain", "sample"], work)
    run([folder / "env" / "bin" / "hf-hardattn", "--version"], work)


def run(command: list[str | Path], cwd: Path | None = None) -> None:
    """Run a command; exit with its output if it fails."""
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": tempfile.gettempdir()}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=None if cwd is None else environment,
        capture_output=cwd is not None,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout or ''}{done.stderr or ''}")


if __name__ == "__main__":
    main()
