"""Sections of the card, each a function of the record. Free text is escaped by ``plain``; numbers are copied unchanged."""

from __future__ import annotations

from typing import Any

import transformers

from .card_metadata import run_values, shown, shown_values
from .markdown import block, bullets, code, facts, number, plain, table
from .record import VARIANTS, missing

Record = dict[str, Any]
# names of a recipe's fields in words
RECIPE_WORDS = {
    "trunk_steps": "steps of the base checkpoint, with full attention",
    "branch_steps": "steps of the model, from that checkpoint",
    "trunk_warmup": "of them, warm-up (base checkpoint)",
    "branch_warmup": "of them, warm-up (model)",
    "ramp": "of the base checkpoint's training, until the task has its full difficulty (steps, or a share)",
    "anneal": "of the model's training, until the budget is at its target (a share)",
    "clutter": "pieces of clutter in an image",
}


def behaviour(record: Record) -> str:
    """Behaviour of the model by the way it is loaded, which a reader must know first."""
    hard, soft = "**hard**", "**soft**: full attention, for which the numbers below do not hold"
    how = {
        "full": [
            ("`import hf_hardattn`, then `hf_hardattn.load` or `from_pretrained`", hard),
            ("plain Transformers, without the import", f"{soft}; Transformers names the selectors as unexpected keys"),
        ],
        "selectors": [
            ("`hf_hardattn.load`", f"{hard}: base model and selectors"),
            ("plain Transformers", "does not load; the base model alone is soft"),
        ],
        "adapter": [
            ("`hf_hardattn.load`", f"{hard}: base model, adapter and selectors"),
            ("plain PEFT, without `hf_hardattn`", f"does not load, or {soft}"),
        ],
    }[record["form"]]
    rows = [*how, ("inside `with hf_hardattn.soft(model):`", "**soft**, for comparison")]
    selection = record["selection"]
    return "\n".join(
        [
            "## Hard or soft?",
            table(("loaded by", "it runs"), rows),
            "",
            f"At inference: {plain(selection['inference'])} Always kept, and not part of the selection: {plain(selection['always_kept'])}.",
        ]
    )


def start(record: Record) -> str:
    """Code to copy."""
    repo, classes = record["repo_id"], (record["auto_class"], record["model_class"])
    lines = ["import hf_hardattn  # without it the model runs soft", ""]
    lines += [f'model = hf_hardattn.load("{repo}")', "print(hf_hardattn.status(model))"]
    # a task without an auto class, such as captioning, uses its own class; a user-defined class can only be loaded by load()
    name = next((name for name in classes if hasattr(transformers, name)), None)
    if record["form"] == "full" and name:
        lines += ["", f"from transformers import {name}", "", f'model = {name}.from_pretrained("{repo}")  # the same']
    where = f"{plain(record['availability'])}\n\n" if "availability" in record else ""
    return f"## Load\n{where}{block('pip install hf-hardattn', 'bash')}\n\n{block(chr(10).join(lines), 'python')}"


def selection(record: Record) -> str:
    """Sites, with the target and the achieved share of kept positions."""
    chosen = record["selection"]
    rows = [
        (code(site["site"]), number(site["target"], ".1%"), number(site["achieved"], ".1%")) for site in chosen["sites"]
    ]
    words = (
        f"Scorer {code(chosen['scorer'])}, estimator {code(chosen['estimator'])}. Schedule: {plain(chosen['schedule'])}"
    )
    return "\n".join(
        [
            "## Selection",
            table(("site", "to keep (target)", "kept (measured)"), rows),
            "",
            words,
            "",
            "Recipe:",
            "",
            facts({RECIPE_WORDS.get(name, name.replace("_", " ")): value for name, value in chosen["recipe"].items()}),
        ]
    )


def quality(record: Record) -> str:
    """Every run, including failed ones, and the mean of each variant."""
    task, unit = record["task"], record["task"]["unit"]
    names = list(dict.fromkeys([*VARIANTS, *(run["variant"] for run in record["runs"])]))
    rows, totals = [], []
    for name in names:
        runs, values = [run for run in record["runs"] if run["variant"] == name], run_values(record, name)
        rows += [(plain(name), plain(run["seed"]), plain(run["status"]), _value(run["value"], unit)) for run in runs]
        mean = (
            shown_values(values, unit) if len(values) > 1 else shown(values[0], unit) if values else "no completed run"
        )
        totals.append((plain(name), str(mean), f"{len(values)} of {len(runs)}"))
    examples = "" if missing(task["examples"]) else f" ({number(task['examples'], ',')} examples)"
    return "\n".join(
        [
            "## Results",
            f"{plain(task['metric_name'])} on {plain(task['dataset_name'])}, split {code(task['split'])}{examples}.",
            "",
            table(("variant", plain(task["metric_name"]), "completed runs"), totals),
            "",
            table(("variant", "seed", "run", plain(task["metric_name"])), rows),
            "",
            "`soft` is the same model with full attention; `random` keeps the same number of positions, selected at random.",
            "",
            f"External validation: {plain(record['external_validation'])}",
        ]
    )


def efficiency(record: Record) -> str:
    """Counted and measured cost, in separate columns."""
    found = record["efficiency"]
    if why := missing(found):
        return f"## Cost\nNot measured: {plain(why)}"
    rows = [
        (
            plain(r["variant"]),
            number(r["gflops"]),
            number(r["examples_per_second"], ",.0f"),
            number(r["speedup"], ".2f"),
        )
        for r in found["rows"]
    ]
    header = ("variant", "GFLOPs per example (counted)", "examples/s (measured)", "× soft (measured)")
    return "\n".join(["## Cost", table(header, rows), "", "Measured on:", "", facts(found["machine"])])


def faithfulness(record: Record) -> str:
    """Statements of the certificate, and their limits."""
    found = record["faithfulness"]
    warning = "A selection is not an explanation of the whole model: after the first layers, kept positions already carry information from the others."
    if why := missing(found):
        return f"## Faithfulness\nNot measured: {plain(why)}\n\n{warning}"
    return "\n".join(
        [
            "## Faithfulness",
            f"`hf_hardattn.verify` (masked and gathered execution differ by {found['parity']:.2g} at most):",
            "",
            bullets(found["statements"]),
            "",
            f"Read it as: {plain(found['reads_as'])} {warning}",
        ]
    )


def subgroups(record: Record) -> str:
    """Results by subgroup, which show where the model is worse."""
    found = record["subgroups"]
    if why := missing(found):
        return f"## Subgroups\nNot measured: {plain(why)}"
    parts, unit = ["## Subgroups"], record["task"]["unit"]
    if why := missing(found["quality"]):
        parts.append(f"{plain(record['task']['metric_name'])} by subgroup: not measured ({plain(why)})")
    else:
        rows = [
            (plain(row["group"]), number(row["examples"], ","), shown(row["hard"], unit), shown(row["soft"], unit))
            for row in found["quality"]
        ]
        name = plain(record["task"]["metric_name"])
        parts.append(table(("group", "examples", f"{name}, hard", f"{name}, soft"), rows))
    parts += [
        "",
        "What the model keeps and drops by subgroup, as reported by `hf-hardattn audit`:",
        "",
        bullets(found["selection"]),
    ]
    return "\n".join([*parts, "", plain(found["reads_as"])])


def governance(record: Record) -> str:
    """Data, uses, limits."""
    header = ("data", "source", "licence", "splits", "people in it")
    keys = ("name", "source", "licence", "splits", "people")
    rows = [tuple(plain(row[key]) for key in keys) for row in record["data"]]
    uses = record["uses"]
    parts = [f"## Data\n{table(header, rows)}", f"## Intended uses\n{bullets(uses['intended'])}"]
    parts += [f"## Out of scope\n{bullets(uses['out_of_scope'])}", f"## Limits\n{bullets(uses['limits'])}"]
    return "\n\n".join(parts)


def energy(record: Record) -> str:
    """Energy of the training, and its scope."""
    found = record["energy"]
    if why := missing(found):
        return f"## Energy\nNot measured: {plain(why)}"
    return (
        f"## Energy\n{number(found['kwh'])} kWh, {number(found['co2_grams'])} g CO2eq ({plain(found['how'])} with {plain(found['software'])}; "
        f"{plain(found['scope'])}; {plain(found['hardware'])}; {plain(found['region'])})."
    )


def transparency(record: Record) -> str:
    """Facts that regulation requires of providers, without a claim that they are sufficient."""
    found, used = record["transparency"], record["energy"]
    rows = [
        ("parameters", number(found["parameters"], ",")),
        ("of them in selectors", number(found["selector_parameters"], ",")),
        ("training compute (FLOP)", number(found["training_flop"], ".3g")),
        ("training time (s)", number(found["training_seconds"], ",.0f")),
        ("energy (kWh)", f"not measured ({plain(missing(used))})" if missing(used) else number(used["kwh"])),
        ("base model", plain(record["base"]["model"])),
        ("licence", f"{plain(record['license'])} (base model: {plain(record['base']['license'])})"),
    ]
    return f"## Transparency facts\nThese are facts, not a claim of compliance.\n\n{table(('', ''), rows)}"


def pictures(record: Record) -> str:
    return "\n\n".join(f"![{plain(p['alt'])}](images/{p['file'].rpartition('/')[2]})" for p in record["pictures"])


def reproduce(record: Record) -> str:
    """Commands, versions, hashes."""
    found = record["reproduce"]
    parts = ["## Repeat it", block("\n".join(found["commands"]), "bash"), "", facts(record["versions"]), ""]
    hashes = {"not measured": missing(found["hashes"])} if missing(found["hashes"]) else found["hashes"]
    sources = {name.replace("../", ""): digest for name, digest in record["sources"].items()}
    parts += ["Hashes (sha256):", "", facts({**hashes, **sources})]
    return "\n".join(parts)


def _value(value: Any, unit: str) -> str:
    return number(value) if missing(value) else shown(value, unit)
