"""Selection on real weights without training."""

from __future__ import annotations

from . import read


def table() -> str:
    r = read("real_weights.json")
    lines = [
        "| ViT-S/14, layer of selection | keep | 1-NN accuracy, `cls_attention` | 1-NN accuracy, `random` | cosine to full attention, `cls_attention` | cosine, `random` |",
        "|---|---|---|---|---|---|",
    ]
    soft, full = r["vit"][0], next(row for row in r["vit"][1:] if row["budget"] == 1.0)
    lines.append(f"| none (full attention) | 100% | {soft['accuracy']:.1%} | | 1.000 | |")
    rows = {(row["site"], row["budget"], row["scorer"]): row for row in r["vit"][1:]}
    for site, budget in dict.fromkeys((row["site"], row["budget"]) for row in r["vit"][1:] if row["budget"] < 1):
        ours, control = rows[site, budget, "cls_attention"], rows[site, budget, "random"]
        lines.append(
            f"| `{site}` | {budget:.0%} | {ours['accuracy']:.1%} | {control['accuracy']:.1%} | {ours['cosine']:.3f} | {control['cosine']:.3f} |"
        )
    blip = {(row["scorer"], row["budget"]): row for row in r["blip"]}
    exact = [row for row in r["blip"] if row["budget"] == 1.0]
    half, control = blip["cls_attention", 0.5], blip["random", 0.5]
    lines += [
        "",
        f"{r['images']} images of {r['classes']} classes, leave-one-out nearest neighbour on CLS (majority {r['majority']:.1%}). Budget 1.0 differs from the original model by "
        f"{full['difference']:.1g} at most (ViT features) and {max(row['difference'] for row in exact):.1g} (BLIP logits, up to {exact[0]['largest_logit']:.0f}). "
        f"BLIP's image vector at keep 50 % after layer 3 has cosine {half['cosine_of_image']:.3f} to that of full attention (`random`: {control['cosine_of_image']:.3f}).",
    ]
    return "\n".join(lines)
