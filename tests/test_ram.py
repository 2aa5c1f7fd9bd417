"""The recurrent attention model: what it sees, what its gradient is, and that it learns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_hardattn.backbones import ram
from hf_hardattn.backbones.ram import RamConfig, RamForImageClassification, Retina


def tiny(**options: object) -> RamConfig:
    given = {"image_size": 8, "glimpses": 2, "patch": 4, "scales": 2, "step": 8, "hidden_size": 6, "part_size": 5}
    return RamConfig(**{**given, "num_labels": 3, "sigma": 1.0, "start": "learned", "policy_weight": 1.0, **options})


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_retina_sees_what_a_loop_sees(step: int) -> None:
    config = RamConfig(image_size=10, num_channels=2, patch=4, scales=3, step=step)
    torch.manual_seed(0)
    pixels = torch.randn(3, 2, 10, 10, dtype=torch.float64)
    retina = Retina(config)
    levels = retina.pyramid(pixels)
    for row, column in itertools.product(range(0, 11, step), repeat=2):  # the borders too
        seen = retina(levels, torch.tensor([[row, column]]).expand(3, 2)).view(3, 3, 2, 4, 4)
        for example, scale, channel, i, j in itertools.product(range(3), range(3), range(2), range(4), range(4)):
            side = 2**scale
            top, left = row - 2 * side + i * side, column - 2 * side + j * side
            inside = [
                float(pixels[example, channel, y, x]) - config.background if 0 <= y < 10 and 0 <= x < 10 else 0.0
                for y in range(top, top + side)
                for x in range(left, left + side)
            ]
            assert math.isclose(float(seen[example, scale, channel, i, j]), sum(inside) / side**2, abs_tol=1e-12)


@pytest.mark.parametrize(("estimator", "draws"), [("reinforce", 1), ("rloo", 2)])
@pytest.mark.parametrize("reward", ["loss", "right"])
def test_gradient_is_that_of_the_expectation(
    monkeypatch: pytest.MonkeyPatch, estimator: str, draws: int, reward: str
) -> None:
    """Every choice of two glimpses among four centres, weighted by its probability."""
    torch.manual_seed(1)
    config = tiny(estimator=estimator, samples=2, reward=reward)
    model = RamForImageClassification(config).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    pixels, labels = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.tensor([1])
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("baseline")}
    paths = list(itertools.product(itertools.product(range(2), repeat=2), repeat=2))  # of 2 glimpses: (row, column)
    probabilities: dict[object, Tensor] = {}

    def look(chosen: tuple[object, ...], **options: object) -> ram.RamOutput:
        turns = iter(torch.tensor(chosen).transpose(0, 1))  # [glimpses, draws, 2]
        monkeypatch.setattr(ram, "_draw", lambda scores: next(turns))
        return model(pixels, labels=labels, **options)

    expected: Tensor | float = 0.0
    model.eval()
    for path in paths:
        output = look((path,), sample=True)
        probability = probabilities[path] = output.log_prob.exp().squeeze(0)
        if reward == "loss":
            expected = expected + probability * output.loss
        else:
            right = float(output.logits.argmax(-1) == labels)
            expected = expected + probability.detach() * output.loss - probability * right
    assert math.isclose(float(sum(p.item() for p in probabilities.values())), 1.0, abs_tol=1e-12)
    exact = torch.autograd.grad(expected, list(parameters.values()), retain_graph=True)
    mean = [torch.zeros_like(part) for part in exact]
    model.train()
    for chosen in itertools.product(paths, repeat=draws):
        weight = math.prod(probabilities[path].item() for path in chosen)
        for total, part in zip(mean, torch.autograd.grad(look(chosen).loss, list(parameters.values())), strict=True):
            total += weight * part
    for name, one, other in zip(parameters, mean, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_evaluation_is_deterministic_unless_it_is_to_draw() -> None:
    torch.manual_seed(0)
    model = RamForImageClassification(tiny(step=1, glimpses=4)).eval()
    pixels = torch.randn(16, 1, 8, 8)
    one, other = model(pixels), model(pixels)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.locations, other.locations)
    assert one.log_prob is None and one.locations.shape == (16, 4, 2) and one.locations.dtype == torch.int64
    drawn = model(pixels, sample=True)
    assert drawn.log_prob.shape == (16,) and not torch.equal(drawn.locations, one.locations)
    assert 0 <= int(drawn.locations.min()) and int(drawn.locations.max()) <= 8


def test_what_was_not_looked_at_changes_nothing() -> None:
    torch.manual_seed(0)
    model = RamForImageClassification(tiny(step=1, scales=1, glimpses=3)).eval()
    pixels = torch.randn(1, 1, 8, 8, requires_grad=True)
    output = model(pixels)
    (gradient,) = torch.autograd.grad(output.logits.square().sum(), pixels)
    seen = torch.zeros(8, 8, dtype=torch.bool)
    for row, column in output.locations[0].tolist():
        seen[max(row - 2, 0) : row + 2, max(column - 2, 0) : column + 2] = True
    assert not seen.all() and not gradient[0, 0][~seen].any() and gradient[0, 0][seen].any()


@pytest.mark.parametrize("policy", ["gaussian", "random"])
def test_a_saved_model_says_the_same(tmp_path: object, policy: str) -> None:
    torch.manual_seed(0)
    model = RamForImageClassification(tiny(policy=policy, step=1)).eval()
    for parameter in model.parameters():  # trained ones are not those that loading would make
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = ram.AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = torch.randn(5, 1, 8, 8)
    torch.manual_seed(1)
    logits = model(pixels).logits
    torch.manual_seed(1)
    assert torch.equal(loaded(pixels).logits, logits)


@pytest.mark.parametrize(
    "wrong", [{"patch": 3}, {"glimpses": 0}, {"policy": "all"}, {"sigma": 0.0}, {"estimator": "none"}]
)
def test_a_wrong_setting_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tiny(**wrong)


@pytest.mark.parametrize("estimator", ["reinforce", "rloo"])
def test_it_learns_where_to_look(estimator: str) -> None:
    """A coarse look shows at which of two places the mark is, and only a fine one there which mark it is."""
    torch.manual_seed(0)
    config = RamConfig(
        image_size=16,
        glimpses=2,
        patch=4,
        scales=3,
        step=2,
        hidden_size=32,
        part_size=32,
        num_labels=2,
        sigma=0.3,
        estimator=estimator,
        reward="loss",
        policy_weight=1.0,
    )
    model = RamForImageClassification(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    marks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(2, (size,), generator=generator)
        corners = torch.randint(2, (size, 1), generator=generator).expand(-1, 2) * 8 + 2
        pixels = torch.full((size, 1, 16, 16), -1.0)
        for image, label, (top, left) in zip(pixels, labels.tolist(), corners.tolist(), strict=True):
            image[0, top : top + 4, left : left + 4] = marks * (2 * label - 1)
        return pixels, labels

    for _ in range(400):
        pixels, labels = draw(64)
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
    pixels, labels = draw(256)
    assert (model.eval()(pixels).logits.argmax(-1) == labels).float().mean() > 0.75
