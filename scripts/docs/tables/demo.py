"""What `make demo` says."""

from __future__ import annotations

from . import read

TITLES = {"soft": "full attention", "hard": "hard", "random": "random selection"}


def table() -> str:
    r = read("demo.json")
    lines = [
        "| model | accuracy | patches kept | GFLOPs per image (counted) | images/s (measured) | × full attention |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in r["models"].items():
        lines.append(
            f"| {TITLES[name]} | {row['accuracy']:.1%} | {row['kept']:.0%} | {row['gflops']:.4f} | {row['images_per_second']:,.0f} | {row['speedup']:.2f} |"
        )
    m, site = r["measured"], r["certificate"]["sites"][0]
    lines += [
        "",
        f"Measured on {m['threads']} {m['device'].upper()} threads, batch {m['batch']}, {m['dtype']}, median of {m['rounds']} interleaved rounds; "
        f"{r['recipe']['test_images']:,} test images; {r['seconds'] / 60:.1f} minutes in total. The hard model kept {r['found']:.0%} of the patches "
        f"that show the digits, and reached the same {r['reload']['accuracy']:.1%} after a reload in a new process. `verify` reports: *{site['statement']}*.",
    ]
    return "\n".join(lines)
