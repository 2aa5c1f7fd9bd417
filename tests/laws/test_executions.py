"""Law 2: masked and gathered execution give the same outputs, of the same shapes, in evaluation."""

from __future__ import annotations

import pytest
from cases import HEADS, cases, close, hard, harden, has_kind, run, stock

import hf_hardattn
from hf_hardattn import HardAttentionError, models
from hf_hardattn.models import family_of

SETS = {
    "all": ["*"],
    "rows": ["*.inputs", "*.tokens.*"],
    "attention": ["*.self.*", "*.cross.*"],
    "late": ["*.tokens.1", "*.self.1", "*.cross.1"],
}


def both(example):
    """The outputs in either execution; the kept positions must be the same too."""
    with hf_hardattn.execution(example.model, "gathered"), hf_hardattn.record(example.model) as gathered:
        one = run(example)
    with hf_hardattn.execution(example.model, "masked"), hf_hardattn.record(example.model) as masked:
        other = run(example)
    assert gathered.sites == masked.sites and len(gathered) == len(masked)
    return one, other


@pytest.mark.parametrize("case", cases(), ids=str)
def test_masked_is_gathered(case):
    close(*both(hard(case)))


@pytest.mark.parametrize("case", cases(budgets=(2, 0.4), where=lambda p: p.kind in ("self", "cross")), ids=str)
def test_masked_is_gathered_when_each_head_chooses(case):
    close(*both(hard(case, per_head=True)))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_masked_is_gathered_with_many_sites(architecture, head, name):
    example = stock(architecture, head)
    averages = head in models.load(architecture).spec.averaging_heads  # these take fixed budgets only
    for budget in (0.6, 0.3) if averages else (0.6, "top_p:0.7"):
        config = {"sites": [p for p in SETS[name] if p == "*" or matches(example.model, p)], "budget": budget}
        if config["sites"]:
            harden(example.model, config)
            close(*both(example))


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize(("architecture", "head"), [h for h in HEADS if has_kind(*h, "tokens")])
def test_masked_is_gathered_whether_the_length_is_restored(architecture, head, restore):
    if head in ("T5ForTokenClassification", "ViTForMaskedImageModeling") and not restore:
        return  # what they predict is aligned with the input
    example = stock(architecture, head)
    if not restore and "decoder" in family_of(example.model).towers(example.model):
        with pytest.raises(HardAttentionError, match="restore=False leaves 'encoder' of .* Use restore=None"):
            harden(example.model, {"sites": ["*.tokens.*"], "restore": False})
        return
    harden(example.model, {"sites": ["*.tokens.*"], "budget": 0.5, "restore": restore})
    close(*both(example))


def matches(model, pattern):
    from fnmatch import fnmatchcase

    from cases import all_sites

    return any(fnmatchcase(site, pattern) for site in all_sites(model))
