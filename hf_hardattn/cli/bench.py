"""``hf-hardattn bench``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import HardAttentionError, unknown
from ._output import place, refuse_unused

# names of the files in the folder, read without importing the package
SUITES = sorted(
    [*(path.stem for path in (Path(__file__).parents[1] / "efficiency" / "suites").glob("*.yaml")), "competing", "host"]
)


def command(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(SUITES)}, or a YAML file of the same form."),
    ] = "quick",
    model: Annotated[
        str | None,
        typer.Option(
            help="Measure this model instead of a suite: vit, t5_encoder, t5_decode, blip_vision, blip_caption, or a checkpoint."
        ),
    ] = None,
    size: Annotated[
        list[int], typer.Option(help="Pixels per side of the images, or source tokens; may be given several times.")
    ] = [],  # noqa: B006
    site: Annotated[list[str], typer.Option(help="Globs of the sites; may be given several times.")] = [],  # noqa: B006
    budget: Annotated[
        list[float],
        typer.Option(
            help="Budgets to measure, at the given sites or at a checkpoint's own; 0.5 and 0.25 by default at given sites."
        ),
    ] = [],  # noqa: B006
    config: Annotated[
        Path | None, typer.Option(help="JSON file with the hard-attention configuration, instead of sites and budgets.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Number of tokens to generate per call, for models that use generate().")
    ] = 16,
    dtype: Annotated[str, typer.Option(help="Dtype of weights and inputs.")] = "float32",
    layers: Annotated[
        int | None, typer.Option(help="Number of layers of the models that are built here, instead of the suite's.")
    ] = None,
    only: Annotated[str, typer.Option(help="Glob of the groups to run; the others keep their earlier results.")] = "*",
    rounds: Annotated[int, typer.Option(help="Maximum number of interleaved rounds.")] = 9,
    seconds: Annotated[
        float, typer.Option(help="Stop timing a group after this many seconds; at least two rounds are run.")
    ] = 60.0,
    threads: Annotated[int, typer.Option(help="Number of PyTorch threads.")] = 2,
    fixed_allocator: Annotated[
        bool,
        typer.Option(
            help="Restart with glibc's allocator settings fixed, because page faults would distort the ratios."
        ),
    ] = True,
    mode: Annotated[
        str,
        typer.Option(
            help="How all models are run: eager, compiled (torch.compile with packed weights) or cuda_graphs."
        ),
    ] = "eager",
    import_cost: Annotated[
        bool, typer.Option(help="Also measure the cost of importing the library for an original model.")
    ] = False,
    models: Annotated[
        Path, typer.Option(help="For the suite competing: folder with the trained models 'soft' and 'hard'.")
    ] = Path("outputs/demo"),
    task: Annotated[str, typer.Option(help="For the suite competing: the task of these models.")] = "cluttered_digits",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write the results, the table and the picture to; outputs/bench by default."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier results in the output folder.")
    ] = False,
) -> None:
    """Measure time, memory and FLOPs of selection, interleaved with the original model and with budget 1.0."""
    from ..efficiency import allocator

    _check_options(context, suite, model, config, site)
    if fixed_allocator:
        allocator.restart_with_settings()
    import torch

    from ..efficiency import bench, bench_exported, report, suites, workloads
    from ..efficiency.imported import cost_of_import
    from ..efficiency.pictures import draw

    if mode not in bench.MODES:
        raise unknown("mode", mode, bench.MODES)
    _check_suite(suite, model)
    torch.set_num_threads(threads)
    if suite == "competing":
        _eagerly(suite, mode)
        return _competing(models, task, rounds, threads, output, overwrite)
    if suite == "host":
        _eagerly(suite, mode)
        return _host(rounds, seconds, output, overwrite)
    if model is None:
        chosen = suites.load(suite)
    else:
        chosen = suites.parse(_own(model, size, site, budget, config, batch, dtype, new_tokens), "own")
    exported, growing = chosen.runtime == "onnxruntime", chosen.picture == "growth"
    if exported or growing:
        _eagerly(chosen.name, mode)
    groups = [_resized(group, layers) for group in chosen.groups if fnmatch(group.name, only)]
    if not groups:
        known = ", ".join(repr(group.name) for group in chosen.groups)
        raise HardAttentionError(f"no group of suite {chosen.name!r} matches --only {only!r}; it has: {known}.")
    path = _file(output, f"{chosen.name}{'' if mode == 'eager' else f'_{mode}'}.json", overwrite or only != "*")
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() and only != "*" else {"groups": []}
    by_name = {group["name"]: group for group in before["groups"]}
    as_run = "" if mode == "eager" else f" --mode {mode}"
    if exported:
        measured: Iterator[dict[str, Any]] = bench_exported.run(groups, rounds=rounds, seconds=seconds, threads=threads)
    else:
        measured = bench.run(groups, rounds=rounds, seconds=seconds, layers_too=growing, mode=mode)
    results: dict[str, Any] = {
        "command": " ".join(["hf-hardattn", *sys.argv[1:]])
        if only == "*"
        else f"hf-hardattn bench --suite {suite}{as_run}",
        "title": chosen.title,
        "mode": mode,
        "weights": "The checkpoint's weights"
        if model is not None and model not in workloads.MODELS
        else "Random weights",
        "picture": chosen.picture,
        "machine": bench.machine(threads),
        "groups": [],
        "import": cost_of_import(threads, 56) if import_cost else before.get("import"),
    }
    for group in measured:  # write after each group, so that an interrupted run keeps its results
        by_name[group["name"]] = group
        results["groups"] = [by_name[known.name] for known in chosen.groups if known.name in by_name]
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if exported:
        path.with_suffix(".md").write_text(report.exported(results), encoding="utf-8")
        return typer.echo(report.exported(results))
    path.with_suffix(".md").write_text(report.markdown(results), encoding="utf-8")
    draw(results, path.with_suffix(".png"))
    _show(results)
    typer.echo(f"results: {path}")


def _file(output: Path | None, name: str, overwrite: bool) -> Path:
    """Return the file of the results, and create its folder."""
    path = place(None if output is None else output / name, Path("outputs/bench") / name, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _check_options(
    context: typer.Context, suite: str, model: str | None, config: Path | None, sites: list[str]
) -> None:
    """Refuse options that the run would ignore."""
    if model is None:
        refuse_unused(
            context,
            "size site budget config batch new_tokens dtype",
            "without --model, because a suite defines these settings itself",
        )
    else:
        refuse_unused(context, "suite only", "with --model, which is measured alone")
    if config is not None:
        refuse_unused(context, "site budget", "with --config, which defines these settings itself")
    if suite != "competing":
        refuse_unused(context, "models task", "for any suite except 'competing'")
    if suite in ("competing", "host"):
        refuse_unused(context, "only layers import_cost", f"for suite {suite!r}")


def _check_suite(suite: str, model: str | None) -> None:
    """Refuse a suite that does not exist, or that this machine cannot measure."""
    import torch

    if suite == "gpu" and model is None and not torch.cuda.is_available():
        raise HardAttentionError(
            "suite 'gpu' measures a GPU, and PyTorch sees none here; on a CPU it would take hours and mean nothing. Run it on a machine with a "
            "GPU, or use --suite quick or targets."
        )
    if suite not in SUITES and not suite.endswith((".yaml", ".yml")):
        raise unknown("suite", suite, SUITES)


def _eagerly(suite: str, mode: str) -> None:
    """Refuse other modes for suites that time exported models, single layers, or unmodified other methods."""
    if mode != "eager":
        raise HardAttentionError(
            f"suite {suite!r} does not support --mode {mode}, only eager execution. Leave --mode out."
        )


def _competing(models: Path, name: str, rounds: int, threads: int, output: Path | None, overwrite: bool) -> None:
    """Compare trained models with other methods on the test set of their task."""
    from ..efficiency import bench, compare_methods, report
    from ..efficiency.pictures import accuracy_and_speed
    from ..training import tasks

    path = _file(output, "competing.json" if name == "cluttered_digits" else f"competing_{name}.json", overwrite)
    task: Any = tasks.load(name, {})
    found = compare_methods.run(models, columns := task.columns(), batch=64, rounds=rounds)
    results: dict[str, Any] = {
        "command": " ".join(["hf-hardattn", *sys.argv[1:]]),
        "title": f"Ways to spare tokens, on a trained ViT: {name.replace('_', ' ')}",
        "images": len(columns["labels"]),
        "batch": 64,
        "machine": bench.machine(threads),
        "methods": found,
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report.competing(results), encoding="utf-8")
    accuracy_and_speed(results, path.with_suffix(".png"))
    typer.echo(report.competing(results))


def _host(rounds: int, seconds: float, output: Path | None, overwrite: bool) -> None:
    """Measure the kernels and the processor time that sites add to narrow models."""
    from tqdm.auto import tqdm

    from ..efficiency import bench, host, report

    path = _file(output, "host.json", overwrite)
    results: dict[str, Any] = {
        "command": " ".join(["hf-hardattn", *sys.argv[1:]]),
        "title": "What selection costs the host",
        "machine": bench.machine(threads=1),
        "groups": list(tqdm(host.run(rounds=rounds, seconds=seconds), "bench", total=len(host.WORKLOADS))),
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report.host(results), encoding="utf-8")
    typer.echo(report.host(results))


def _own(
    model: str,
    sizes: list[int],
    sites: list[str],
    budgets: list[float],
    config: Path | None,
    batch: int,
    dtype: str,
    new_tokens: int,
) -> dict[str, Any]:
    """Return a suite for the user's own model."""
    from ..efficiency import checkpoints, workloads

    built = model in workloads.MODELS
    known = None if built else checkpoints.facts(model, new_tokens)
    saved = None if known is None or sites or config else known.hard
    sizes = sizes or ([] if known is None else [known.size])
    if saved is None and not (sizes and (config or sites)):
        raise HardAttentionError(
            f"--model {model!r} does not say what to measure; pass --size (pixels per side, or tokens), and --site or --config."
        )
    counts = [int(value) if value > 1 else value for value in budgets or ([] if saved else [0.5, 0.25])]
    rows: list[dict[str, Any]]
    if config is not None:
        rows = [{"name": config.stem, "hard": json.loads(config.read_text(encoding="utf-8"))}]
    elif saved is None:
        rows = [{"name": f"{', '.join(sites)} keep {{budget}}", "hard": {"sites": sites}, "budgets": counts}]
    elif counts:
        own = {site: {k: v for k, v in part.items() if k != "budget"} for site, part in saved["sites"].items()}
        hard = {**saved, "sites": own}
        rows = [{"name": "its sites keep {budget}", "hard": hard, "budgets": counts, "trained": True}]
    else:
        rows = [{"name": "as saved", "hard": saved, "trained": True}]
    item = {"name": f"{model} {{size}}", "model": model, "sizes": sizes, "batch": batch, "dtype": dtype, "rows": rows}
    if (known is not None and known.writes) or model in workloads.WRITERS:
        item["new_tokens"] = new_tokens
    title = f"{model} at its own sites, with its own selectors" if saved else f"{model}, {', '.join(sites) or config}"
    return {"title": title, "groups": [item]}


def _resized(group: Any, layers: int | None) -> Any:
    from dataclasses import replace

    from ..efficiency.workloads import MODELS

    if layers is not None and group.workload.model not in MODELS:
        raise HardAttentionError("--layers has no effect on a checkpoint, which has its own. Leave it out.")

    return group if layers is None else replace(group, workload=replace(group.workload, layers=layers))


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..efficiency import report

    table = Table(title=results["title"], caption=report.conditions(results["machine"], results["weights"]))
    shown = (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 14)
    for column in shown:
        table.add_column(report.HEAD[column], justify="left" if column == 1 else "right")
    for group in results["groups"]:
        table.add_section()
        table.add_row(f"[bold]{group['name']}[/bold]")
        for row in report.cells(group):
            table.add_row(*(row[column] for column in shown))
    console = Console()
    (console if console.is_terminal else Console(width=170)).print(table)
