"""Selection on real weights without training."""

from __future__ import annotations

from . import read


def table() -> str:
    r = read("real_weights.json")
    lines = [
        "| `Dinov2Model`, keep after layer 3 | 1-NN accuracy, `cls_attention` | 1-NN accuracy, `random` | cosine to full attention, `cls_attention` | cosine, `random` |",
        "|---|---|---|---|---|",
    ]
    rows = {(row["budget"], row["scorer"]): row for row in r["dinov2"]}
    lines.append(f"| all (full attention) | {rows[1.0, 'soft']['accuracy']:.1%} | | 1.000 | |")
    for budget in sorted({budget for budget, _ in rows if budget < 1}, reverse=True):
        ours, control = rows[budget, "cls_attention"], rows[budget, "random"]
        lines.append(
            f"| {budget:.0%} | {ours['accuracy']:.1%} | {control['accuracy']:.1%} | {ours['cosine']:.3f} | {control['cosine']:.3f} |"
        )
    speed = r.get("speed")
    if speed is not None:
        for index, budget in enumerate(sorted({budget for budget, _ in rows}, reverse=True)):
            lines[2 + index] += f" {speed['times'][str(budget)]:.2f} × |"
        lines[0] += f" speed, {speed['threads']} thread of {speed['processor']}, {speed['batch']} images |"
        lines[1] += "---|"
    pairs = list(zip(r["dinov2"], r["vit"], strict=True))
    full = max(row["difference"] for pair in pairs for row in pair if row["budget"] == 1.0)
    apart = max(abs(one["accuracy"] - other["accuracy"]) for one, other in pairs)
    blip = {(row["scorer"], row["budget"]): row for row in r["blip"]}
    exact = [row for row in r["blip"] if row["budget"] == 1.0]
    half, control = blip["cls_attention", 0.5], blip["random", 0.5]
    lines += [
        "",
        f"The accuracy is that of a leave-one-out nearest neighbour on CLS, over {r['images']} images of {r['classes']} classes (majority {r['majority']:.1%}). Budget 1.0 differs from "
        f"the original model by at most {full:.1g} in the features and {max(row['difference'] for row in exact):.1g} in BLIP's logits, which reach {exact[0]['largest_logit']:.0f}. The features "
        f"of the same weights converted to `ViTModel` differ by at most {r['converted']:.1g}, and the accuracies above by {apart:.1%}. "
        f"With 50 % kept after layer 3, BLIP's image vector has a cosine of {half['cosine_of_image']:.3f} to that of full attention (`random`: {control['cosine_of_image']:.3f}).",
    ]
    return "\n".join(lines)
