"""Trainings under test, each on one or two gloo CPU processes, that note what every step did; some are killed on the way.

    python tests/processes/worker.py plan.json

The plan is a list of launches, ``{"processes": 2, "jobs": [["train_vit", flags...], ...], "kill_at": 5, "kill": "SIGKILL",
"fsdp": false}``; a launch forks its processes, as torchrun would start them, and its exit codes go to ``codes.json`` beside the plan.
The imports, which take most of the time, are made once. Each job's ``--output_dir`` gets ``trace_<rank>.jsonl``, a row a
micro-batch: optimizer step, a digest of each example that the model saw, the positions it kept, its loss. ``gradients.pt``
holds those of the first step, ``logits.pt`` what the trained model says of the first training batch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from hf_hardattn.recording import selectors
from hf_hardattn.training import fine_tune, loop, running
from hf_hardattn.training.driver import Driver

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Trace:
    """Notes what a training does; ``kill_at`` sends this process the signal ``kill`` in the middle of that step."""

    def __init__(self, training: loop.Training, kill_at: int | None, kill: str, killed: int) -> None:
        self.training, self.row = training, {}
        self.kill = kill if killed == training.accelerator.process_index else None
        self.kill_at = kill_at
        self.folder = Path(training.args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        training.inner.register_forward_pre_hook(self.forward, with_kwargs=True)
        training.inner.register_forward_hook(self.loss)
        for selector in selectors(training.inner).values():
            selector.register_forward_hook(self.choice)

    def forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            inputs = kwargs["pixel_values"] if "pixel_values" in kwargs else kwargs["labels"]
            seen = [hashlib.blake2b(row[row != -100].numpy().tobytes(), digest_size=6).hexdigest() for row in inputs]
            self.row = {"step": self.training.run.step, "examples": seen}
            self.batch = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}

    def choice(self, selector: Any, args: Any, selection: Any) -> None:
        if selector.training:
            self.row["kept"] = [row.nonzero().flatten().tolist() for row in selection.mask[:, 0, 0]]

    def loss(self, model: Any, args: Any, output: Any) -> None:
        if model.training:
            self.row["loss"] = output["loss"].item()
            path = self.folder / f"trace_{self.training.accelerator.process_index}.jsonl"
            with path.open("a") as file:
                file.write(json.dumps(self.row) + "\n")

    def before_update(self, driver: Driver) -> None:
        if self.kill and driver.step == self.kill_at:
            os.kill(os.getpid(), getattr(signal, self.kill))
        if driver.step == 0 and self.training.accelerator.is_main_process:
            found = {n: p.grad for n, p in driver.model.named_parameters() if p.grad is not None}
            if all(type(gradient) is torch.Tensor for gradient in found.values()):
                torch.save(found, self.folder / "gradients.pt")

    def close(self) -> None:
        model = self.training.model.eval()
        with torch.no_grad():
            logits = model(**self.batch).logits
        if self.training.accelerator.is_main_process:
            torch.save((self.batch, logits), self.folder / "logits.pt")


def load_script(name: str) -> ModuleType:
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def start_fsdp(start: Any, args: Any) -> Accelerator:
    """Accelerate refuses FSDP on CPU processes (``MULTI_CPU`` is not in its list); PyTorch's FSDP2 runs on gloo all the same."""
    accelerator = start(args)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def process(launch: dict[str, Any], rank: int, ports: list[int]) -> None:
    """What one process of a launch does."""
    torch.set_num_threads(1)
    size = launch["processes"]
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE=str(size), RANK=str(rank))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), ACCELERATE_USE_CPU="true")
    traces: list[Trace] = []
    run_steps, before_update = loop.Training.run_steps, Driver.before_update

    def traced(self: loop.Training, interruption: Any) -> None:
        traces.append(Trace(self, launch.get("kill_at"), launch.get("kill", "SIGKILL"), launch.get("killed", size - 1)))
        run_steps(self, interruption)

    def noted(self: Driver) -> None:
        traces[-1].before_update(self)
        before_update(self)

    loop.Training.run_steps, Driver.before_update = traced, noted
    for (name, *flags), port in zip(launch["jobs"], ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a training ends with the end of its process group
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        script = load_script(name)
        if launch.get("fsdp"):
            fine_tune.start = lambda args: start_fsdp(running.start, args)
        script.main([str(flag) for flag in [*flags, "--cpu"]])
        if traces[-1].row:
            traces[-1].close()


def free_port() -> int:
    """A port for a later job. Not one of those the kernel hands out: by then another connection may well have it."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run(launch: dict[str, Any], log: Path) -> list[int]:
    """Fork the processes of a launch; when one ends badly the others do too, as under torchrun. Returns their exit codes."""
    ports = [free_port() for _ in launch["jobs"]]
    children = {}
    for rank in range(launch["processes"]):
        child = os.fork()
        if child == 0:
            code = 1
            with log.with_name(f"{log.name}.{rank}.log").open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            try:
                process(launch, rank, ports)
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        children[child] = rank
    codes = [0] * launch["processes"]
    left = set(children)
    while left:
        child, status = os.wait()
        left.discard(child)
        codes[children[child]] = os.waitstatus_to_exitcode(status)
        if status and launch.get("kill", "SIGKILL") == "SIGKILL":
            for other in left:
                os.kill(other, signal.SIGKILL)
    return codes


if __name__ == "__main__":
    plan = Path(sys.argv[1])
    codes = []
    for number, launch in enumerate(json.loads(plan.read_text())):
        codes.append(run(launch, plan.with_suffix(f".{number}")))
        plan.with_name("codes.json").write_text(json.dumps(codes))
