"""Energy and CO2 of a block of code on this machine, by CodeCarbon."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WORLD_AVERAGE = (
    475.0  # grams of CO2 equivalents per kWh; IEA, Global Energy & CO2 Status Report 2019, as stored in CodeCarbon
)
MEASURING = ("rapl", "powermetrics", "power_gadget", "psys")  # interfaces of CodeCarbon to a processor's energy meter


@contextmanager
def metered(country: str | None = None) -> Iterator[dict[str, Any]]:
    """Meter the energy of the whole machine while the block runs; use one meter per machine, not one per process.

    Args:
        country: three-letter ISO code, for the carbon intensity of its electricity; the world average by default.

    Yields:
        A dict, filled when the block ends, with the fields of a model card: ``kwh``, ``co2_grams``, ``how`` (measured or estimated),
        ``scope``, ``software``, ``hardware``, ``region``; or ``{"not_measured": why}`` without CodeCarbon or without a reading.
    """
    found: dict[str, Any] = {}
    make: Any = None
    try:
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(
            logging.ERROR
        )  # its import sets INFO, and it logs before it reads log_level
        make = OfflineEmissionsTracker
    except ImportError:
        found["not_measured"] = "codecarbon is not installed (pip install 'hf-hardattn[energy]')"
    if make is None:
        yield found
        return
    place: dict[str, Any] = {"country_iso_code": country}
    if country is None:
        place = {
            "country_iso_code": "USA",
            "force_carbon_intensity_g_co2e_kwh": WORLD_AVERAGE,
        }  # it requires a country nevertheless
    tracker = make(
        **place,
        tracking_mode="machine",
        measure_power_secs=5,
        output_methods=[],
        save_to_file=False,
        allow_multiple_runs=True,
        log_level="error",
    )
    tracker.start()
    try:
        yield found
    finally:
        tracker.stop()
    found |= _reading(tracker, country)


def total(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of several readings; it is not measured if one of them was not."""
    for reading in readings:
        if "not_measured" in reading:
            return reading
    return {**readings[0], **{name: sum(r[name] for r in readings) for name in ("kwh", "co2_grams")}}


def _reading(tracker: Any, country: str | None) -> dict[str, Any]:
    data = tracker.final_emissions_data
    if not data.energy_consumed > 0:
        return {
            "not_measured": "CodeCarbon measured no energy; the run was too short, or the machine does not report it"
        }
    parts = [str(part) for part in tracker._conf.get("hardware", ())]
    own_meter = any(name in part.lower().replace(" ", "_") for part in parts for name in MEASURING)
    graphics = f", {data.gpu_count} x {data.gpu_model}" if data.gpu_count else ""
    return {
        "kwh": data.energy_consumed,
        "co2_grams": 1000 * data.emissions,
        "how": "processor measured by its own meter, memory estimated"
        if own_meter
        else "estimated from the load of the processor and its nominal power",
        "scope": "whole machine: processor and memory" + (" and GPUs" if data.gpu_count else "") + ", without cooling",
        "software": f"CodeCarbon {data.codecarbon_version}",
        "hardware": f"{data.cpu_count} x {data.cpu_model}{graphics}, {data.ram_total_size:.0f} GB of memory",
        "region": country or f"unknown; {WORLD_AVERAGE:.0f} g CO2eq per kWh, the world average",
    }
