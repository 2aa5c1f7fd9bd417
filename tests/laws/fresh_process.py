"""Run by ``test_reload``: what a process that has never seen the models says about their checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def outputs(model, batch):
    from cases import tensors

    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model.eval()(**batch))


def main(folder: Path) -> None:
    stock = {p.name: p for p in folder.glob("stock-*")}
    models = {name: load(path) for name, path in stock.items()}  # before the library is imported
    assert "hf_hardattn" not in sys.modules
    classes = {type(module) for model in models.values() for module in model.modules()}
    before = {cls: dict(vars(cls)) for cls in classes if cls is not transformers.PreTrainedModel}
    batches = {name: torch.load(path / "batch.pt") for name, path in stock.items()}
    plain = {}
    with torch.no_grad():
        for name, model in models.items():
            plain[name] = model.eval()(**batches[name])
    import hf_hardattn

    sys.path.insert(0, str(Path(__file__).parent))
    from cases import tensors

    assert all(dict(vars(cls)) == attributes for cls, attributes in before.items()), "a stock class was patched"
    for name, path in stock.items():
        for model in (models[name], load(path)):
            assert {type(m) for m in model.modules()} <= classes
            found, expected = outputs(model, batches[name]), tensors(plain[name])
            assert all(torch.equal(found[key], expected[key]) for key in expected), name
    answers = {}
    for path in folder.glob("hard-*"):
        model = load(path)
        batch = torch.load(path / "batch.pt")
        with hf_hardattn.record(model) as selections:
            found = outputs(model, batch)
        answers[path.name] = found, [(s.site, s.mask) for s in selections]
    torch.save(answers, folder / "answers.pt")


def load(path):
    name = path.name.split("-")[1]
    if not hasattr(transformers, name):  # a backbone of the library's own
        from hf_hardattn.backbones import gru

        return getattr(gru, name).from_pretrained(path)
    return getattr(transformers, name).from_pretrained(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
