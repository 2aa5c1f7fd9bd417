"""Check the licence of a model against that of its base model. This is a first check, not legal advice."""

from __future__ import annotations

PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "afl-3.0", "artistic-2.0"}
PUBLIC_DOMAIN = {"cc0-1.0", "unlicense", "wtfpl", "pddl"}
ATTRIBUTION = {"cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by"}


def conflict(licence: str, base: str) -> str | None:
    """Return why ``licence`` is incompatible with a base model under ``base``; None if no conflict is known.

    Both are identifiers of the Hub; ``none`` stands for a model without a base model.
    """
    licence, base = licence.lower(), base.lower()
    if licence in ("", "unknown", "none"):
        return f"license={licence!r} states no licence; use one of the Hub's licence identifiers."
    if base in ("none", licence) or base in PUBLIC_DOMAIN:
        return None
    if "-nd" in base:
        return f"the base model's licence {base} forbids derived works."
    if base in PERMISSIVE | ATTRIBUTION:
        if licence in PUBLIC_DOMAIN:
            return f"license={licence} drops the notice that the base model's {base} requires."
        return None
    return f"license={licence} differs from the base model's {base}, which is not known to allow that; use the same licence."
