"""What selection saves: FLOPs and bytes against closed forms, nothing that waits for the device, and a benchmark that refuses to boast."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples import build
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.cli import app
from hf_hardattn.efficiency import allocator, bench, export, host, joules, report, suites
from hf_hardattn.efficiency.counting import count_flops, work
from hf_hardattn.efficiency.limits import amdahl, profile_call, streaming_rows
from hf_hardattn.efficiency.memory import activation_bytes, peak_resident_bytes
from hf_hardattn.efficiency.timing import ratios, speedups
from hf_hardattn.efficiency.workloads import Workload, cache_bytes, share_weights
from hf_hardattn.functional import position_bias as distances
from hf_hardattn.functional.attention import attend

D, F, LAYERS, PATCHES, CLASSES = 32, 56, 3, 16, 5


def vit(**config):
    sizes = dict(
        hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=4, num_labels=CLASSES
    )
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes))
    return hf_hardattn.apply(model, {"scorer": "linear", **config}).eval() if config else model.eval()


def t5(**config):
    sizes = dict(vocab_size=50, d_model=D, d_kv=8, d_ff=F, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes))
    return hf_hardattn.apply(model, config).eval() if config else model.eval()


def layer(queries, keys):
    """FLOPs of one layer: query and output projections, key and value projections, attention, MLP."""
    return 2 * (2 * queries * D * D + 2 * keys * D * D + 2 * queries * keys * D + 2 * queries * D * F)


def ends():
    """FLOPs before and behind the layers of the ViT: patch embedding and classifier."""
    return 2 * (PATCHES * 3 * 8 * 8 * D + D * CLASSES)


# ---------------------------------------------------------------- counted against a closed form


@pytest.mark.parametrize(
    ("sites", "budget", "rows"),
    [
        (["vision.tokens.0"], 0.25, [(17, 17), (5, 5), (5, 5)]),  # CLS and a quarter of 16 patches
        (["vision.inputs"], 3, [(4, 4)] * 3),
        (["vision.tokens.0", "vision.tokens.1"], 0.5, [(17, 17), (9, 9), (5, 5)]),
        (["vision.self.*"], 0.25, [(17, 5)] * 3),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_counted_flops_of_a_vit(sites, budget, rows):
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    model = vit(sites=sites, budget=budget)
    assert count_flops(vit(), pixels) == LAYERS * layer(17, 17) + ends()
    assert count_flops(model, pixels) == sum(layer(*row) for row in rows) + ends()
    with hf_hardattn.execution(model, "masked"):
        assert count_flops(model, pixels) == LAYERS * layer(17, 17) + ends()  # masked saves nothing, and says so


@pytest.mark.parametrize("share", [False, True])
def test_counted_flops_of_shared_keys(share):
    ids = torch.randint(2, 50, (1, 24))
    config = {"sites": ["encoder.self.*"], "budget": 7, "share_selection": share}
    model = hf_hardattn.apply(encoder(), config).eval()
    assert count_flops(model, {"input_ids": ids}) == LAYERS * layer(24, 8)  # </s> is kept always
    assert len(hf_hardattn.selectors(model)) == (1 if share else LAYERS)


@pytest.mark.parametrize("site", ["vision.tokens.0", "vision.inputs", "vision.self.*"])
def test_counted_flops_of_rows_that_keep_different_counts(site):
    """Each image costs what it keeps, not what the one that keeps most does."""
    pixels = {"pixel_values": torch.randn(4, 3, 32, 32)}
    lengths = (3, 9, 9, 17)  # with CLS
    masks = torch.arange(17) < torch.tensor(lengths)[:, None]
    keys = site == "vision.self.*"

    def counted(**config):
        model = vit(sites=[site], budget="threshold:0.5", **config)
        with hf_hardattn.replay(model, dict.fromkeys(hf_hardattn.selectors(model), masks)):
            return count_flops(model, pixels)

    def of(lengths):
        whole = 1 if site == "vision.tokens.0" else 0  # layers before the choice
        later = sum(layer(17 if keys else kept, kept) for kept in lengths)
        return len(lengths) * (whole * layer(17, 17) + ends()) + (LAYERS - whole) * later

    assert counted() == of(lengths)
    assert counted(pack=False) == of([17] * 4)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_scorer_attention_costs_no_more_than_attention(per_head):
    """Its logits are the layer's own, made once; while decoding, only kept values are weighed."""
    batch = {"input_ids": torch.randint(2, 50, (1, 24)), "decoder_input_ids": torch.randint(2, 50, (1, 9))}
    config = dict(sites=["decoder.cross.*"], scorer="attention", per_head=per_head)
    assert count_flops(t5(budget=4, **config), batch) == count_flops(t5(), batch)
    step = {**batch, "decoder_input_ids": batch["decoder_input_ids"][:, :1]}
    saved = LAYERS * 2 * (24 - 4) * D  # values of the dropped keys, one query
    assert count_flops(t5(budget=4, **config), step) == count_flops(t5(), step) - saved


def encoder():
    return T5EncoderModel(T5Config(vocab_size=50, d_model=D, d_kv=8, d_ff=F, num_layers=LAYERS, num_heads=4)).eval()


def test_shapes_alone_give_the_same_work_as_computing():
    model, ids = hf_hardattn.apply(encoder(), {"sites": ["encoder.tokens.0"], "budget": 0.5}).eval(), torch.ones(1, 12)
    batch = {"input_ids": ids.long()}
    assert work(lambda: model(**batch)) == work(lambda: model(**batch), fake=False)


# ---------------------------------------------------------------- bytes


CACHES = pytest.mark.parametrize("static", [False, True])


def writing(static, **options):
    static = dict(cache_implementation="static", disable_compile=True) if static else {}
    return dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True, **static, **options)


@CACHES
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("share", [False, True])
def test_cross_cache_holds_the_kept_keys_alone(share, beams, static):
    model = t5(sites=["decoder.cross.*"], budget=5, share_selection=share)
    ids = torch.randint(2, 50, (2, 40))
    options = writing(static, num_beams=beams)
    kept, full = (cache_bytes(m.generate(ids, **options)) for m in (model, t5()))
    assert full == 2 * LAYERS * (2 * beams) * 40 * D * 4
    assert kept == full * 6 // 40  # 5 and </s>; no column of marks where every slot is in use


@CACHES
def test_cross_cache_holds_the_longest_row_alone(static):
    """Under a threshold the encoder's survivors are counted, and the decoder's cache has no place for the others."""
    torch.manual_seed(0)
    model, ids = t5(sites=["encoder.tokens.0"], budget="threshold:0.5"), torch.randint(2, 50, (3, 40))
    with hf_hardattn.record(model) as selections:
        kept = cache_bytes(model.generate(ids, **writing(static)))
    longest = int(selections["encoder.tokens.0"][0].mask.sum(-1).max())
    assert longest < 36 and kept == 2 * LAYERS * 3 * longest * D * 4


@CACHES
@pytest.mark.parametrize("site", ["encoder.inputs", "encoder.tokens.0"])
def test_a_trained_models_cross_cache_follows_the_end_of_its_schedule(site, static):
    """What a recipe leaves in the config: the decoder's keys are as few as the encoder's surviving rows, not as the schedule's start."""
    model = t5(sites=[site], budget={"start": 1.0, "end": 0.25, "steps": 0.4})
    ids = torch.randint(2, 50, (2, 41))
    made = model.generate(ids, **writing(static))
    assert cache_bytes(made) == 2 * LAYERS * 2 * (10 + 1) * D * 4  # a quarter of 40, and </s>


def test_training_gathered_keeps_activations_of_the_kept_rows_alone():
    """Everything that grows with the rows shrinks with them; the patch embedding and the scorer see all rows."""
    pixels = {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8) % CLASSES}
    soft = activation_bytes(vit().train(), pixels)
    shared = {"estimator": "reinforce", "baseline": "none"}
    found = {b: activation_bytes(vit(sites=["vision.inputs"], budget=b, **shared), pixels) for b in (1.0, 8, 3)}
    assert found[3] < 0.35 * soft and found[8] < 0.65 * soft
    # linear in the rows: of 17, 9 and 4 rows
    slope = (found[1.0] - found[8]) / 8
    assert abs((found[8] - found[3]) / 5 - slope) < 0.1 * slope
    assert activation_bytes(vit(sites=["vision.inputs"], budget=3, estimator="simple"), pixels) > soft  # masked


def test_peak_falls_with_the_budget_and_is_never_above_stock():
    ids = {"input_ids": torch.randint(2, 50, (1, 512))}
    stock = encoder()
    models = {
        b: hf_hardattn.apply(encoder(), {"sites": ["encoder.tokens.0"], "budget": b}).eval() for b in (1.0, 0.5, 0.1)
    }
    with torch.inference_mode():
        peaks = {b: profile_call(lambda m=model: m(**ids)).peak_bytes for b, model in models.items()}
        reference = profile_call(lambda: stock(**ids)).peak_bytes
    assert peaks[0.1] < peaks[0.5] < 1.1 * reference
    assert peaks[1.0] == reference  # nothing is attached
    grown = peak_resident_bytes(lambda: torch.ones(32 * 2**20, dtype=torch.uint8))
    assert grown is None or 30 * 2**20 < grown < 80 * 2**20


@pytest.mark.parametrize("share", [True, False])
def test_kept_keys_of_a_large_batch_take_no_more_memory_than_stock(share):
    """T5's position bias is one for all examples, its kept columns are one of each."""
    ids = torch.randint(2, 50, (32, 512))
    stock = encoder()
    hard = hf_hardattn.apply(encoder(), {"sites": ["encoder.self.*"], "budget": 0.25, "share_selection": share}).eval()
    with torch.inference_mode():
        peaks = [profile_call(lambda m=model: m(input_ids=ids)).peak_bytes for model in (hard, stock)]
        together = hard(input_ids=ids).last_hidden_state
        apart = torch.cat([hard(input_ids=row[None]).last_hidden_state for row in ids])
    assert peaks[0] < 1.1 * peaks[1]
    torch.testing.assert_close(together, apart)


# ---------------------------------------------------------------- the fast path


@pytest.mark.parametrize(
    ("build", "sites", "budget"),
    [
        (vit, ["vision.inputs"], 3),
        (vit, ["vision.tokens.0", "vision.tokens.1"], 0.25),
        (vit, ["vision.self.*"], 0.25),
        (t5, ["encoder.tokens.0", "decoder.cross.*"], 0.25),
        (t5, ["encoder.self.*"], 3),
        (t5, ["encoder.inputs"], 0.25),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_nothing_waits_for_the_device(build, sites, budget):
    model = build(sites=sites, budget=budget, share_selection="self" in sites[0])
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if build is t5:
        batch = {"input_ids": torch.randint(2, 50, (2, 12)), "decoder_input_ids": torch.randint(2, 50, (2, 4))}
    with torch.inference_mode():
        expected = model(**batch).logits
        with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without values: whoever asks for one raises
            assert model(**batch).logits.shape == expected.shape


def test_a_threshold_does_wait():
    """The check above can fail."""
    model = vit(sites=["vision.tokens.0"], budget="threshold:0.5")
    with (
        pytest.raises(DataDependentOutputException),
        torch.inference_mode(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model(pixel_values=torch.randn(2, 3, 32, 32))


def test_table_of_distances():
    """The bias by its definition, one number after the other, and every way to read it."""
    table, n = torch.randn(3, 2 * 6 - 1), 6
    whole = torch.tensor([[[float(table[h, k - q + n - 1]) for k in range(n)] for q in range(n)] for h in range(3)])[
        None
    ]
    assert torch.equal(distances.matrix(table), whole)
    assert torch.equal(distances.reversed_rows(table).flip(2), whole)
    assert distances.reversed_rows(table).untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    shared, own = torch.tensor([[[0, 3]], [[2, 5]]]), torch.tensor([[[0, 3], [1, 2], [4, 5]]])
    for indices in (shared, own):
        found = distances.columns(table, indices)
        for b in range(len(indices)):
            for h in range(3):
                kept = indices[b, min(h, indices.shape[1] - 1)]
                assert torch.equal(found[b, h], whole[0, h][:, kept])
    rows = torch.tensor([[1, 4, 5], [0, 2, 3]])
    for b, row in enumerate(rows):
        assert torch.equal(distances.pairs(table, rows)[b], whole[0][:, row][:, :, row])
    q, k, v = torch.randn(3, 2, 3, n, 4)
    allowed = torch.tensor([True] * 4 + [False] * 2)[None, None, None]
    for mask in (None, allowed):
        expected, _ = attend(q, k, v, scale=0.5, bias=whole, allowed=mask)
        found, _ = attend(q, k, v, scale=0.5, bias=table, allowed=mask)
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- the benchmark


def test_amdahl_by_hand():
    shares = {"linear": 0.5, "attention": 0.4, "convolution": 0.0, "other": 0.1}
    before = {"linear": 100, "attention": 100, "convolution": 0, "other": 10}
    after = {"linear": 50, "attention": 25, "convolution": 0, "other": 10}
    assert amdahl(shares, before, after) == pytest.approx(1 / (0.25 + 0.1 + 0.1))
    with pytest.raises(HardAttentionError, match="no limit can be computed from them"):
        amdahl(dict.fromkeys(shares, 0.0), before, after)


def test_reading_the_weights_is_no_saving():
    """A product of few rows takes as long as reading its weights: fewer of them leave the limit where it is."""
    weight, shares = torch.randn(8, 5), {"linear": 1.0, "attention": 0.0, "convolution": 0.0, "other": 0.0}
    found = [work(lambda rows=rows: torch.randn(rows, 8) @ weight, least_rows=4) for rows in (1, 3, 8)]
    assert [w["linear"] for w in found] == [2 * rows * 8 * 5 for rows in (1, 3, 8)]
    assert [w["streamed"] for w in found] == [2 * rows * 8 * 5 for rows in (4, 4, 8)]
    assert amdahl(shares, found[1], found[0]) == 1.0 and amdahl(shares, found[2], found[0]) == 2.0
    assert streaming_rows(torch.float32, size=64, copies=2, many=8) >= 1.0


def test_a_floor_bounds_what_its_group_can_gain():
    """Keeping one position takes 2 of stock's 10 seconds: a tenth and 25 of 100 positions can at best take 2.8 and 4."""
    rows = [{"name": "a", "hard": {"budget": 0.1}}, {"name": "b", "hard": {"budget": 25}}]
    floor = {"name": "one", "floor": True, "hard": {"budget": 1}}
    item = {"name": "g", "model": "t5_decode", "size": 100, "rows": [*rows, floor]}
    seconds = {"stock": 10.0, "exact": 9.0, "one": 2.0, "a": 3.0, "b": 4.0}
    (group,) = suites.parse({"groups": [item]}, "x").groups
    assert bench.limits_above_floor(group, seconds) == pytest.approx({"a": 10 / 2.8, "b": 2.5})
    (group,) = suites.parse({"groups": [{**item, "rows": rows}]}, "x").groups
    assert bench.limits_above_floor(group, seconds) == {}


def test_no_speedup_without_its_baseline():
    seconds = {"stock": [2.0, 4.0, 3.0], "hard": [1.0, 1.0, 1.0]}
    assert speedups(seconds, "stock") == {"stock": 1.0, "hard": 3.0}
    with pytest.raises(HardAttentionError, match="a speed-up needs its baseline: 'stock' was not timed"):
        ratios({"hard": [1.0]}, "stock")
    with pytest.raises(HardAttentionError, match="Time them together, in one run"):
        ratios({"stock": [1.0], "hard": [1.0, 1.0]}, "stock")
    row = {"against_stock": {"median": 3.0, "quartiles": [1.0, 3.0, 4.0]}}
    group = {"name": "g", "rows": {"hard": row, "stock": row}}
    assert report.speedup(group, "hard", "stock") == "3.00 (1.00-4.00)"
    with pytest.raises(
        HardAttentionError, match="'hard' of 'g' has a speed-up against 'stock', which is not among its rows"
    ):
        report.speedup({"name": "g", "rows": {"hard": row}}, "hard", "stock")


def test_energy_is_read_or_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(joules, "_RAPL", tmp_path)
    assert joules.joules_per_call(lambda: None, 3) is None  # never 0
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("1000000")
    assert joules.joules_per_call(lambda: counter.write_text(str(int(counter.read_text()) + 2_000_000)), 4) == 2.0
    assert joules.joules_per_call(lambda: None, 4) is None  # a counter that stands still measures nothing


def test_allocator_settings_survive_a_restart():
    code = (
        "import sys; from hf_hardattn.efficiency import allocator; allocator.restart_with_settings();"
        "print(sys.argv[1], *allocator.settings().values())"
    )
    ran = subprocess.run([sys.executable, "-c", code, "kept"], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["kept", *allocator.SETTINGS.values()]


def test_suites_are_read_and_multiply_out():
    assert {"quick", "targets", "break_even", "growth", "export"} <= set(suites.names())
    assert all(suites.load(name).groups for name in suites.names())
    with pytest.raises(HardAttentionError, match="unknown suite 'qick'.*Did you mean 'quick'"):
        suites.load("qick")
    with pytest.raises(HardAttentionError, match="suite 'x' has no groups"):
        suites.parse({"groups": []}, "x")
    groups = suites.load("growth").groups
    assert [group.stock for group in groups if group.workload.size in (8192, 16384)] == [True, False]
    with pytest.raises(HardAttentionError, match="'nowhere' is neither a model of the benchmark"):
        Workload("nowhere", 32).build()
    with pytest.raises(HardAttentionError, match="unknown dtype 'float8'"):
        Workload("vit", 32, dtype="float8").build()


def test_shared_weights_are_one_copy():
    stock = vit()
    hard = hf_hardattn.apply(share_weights(stock), {"sites": ["vision.tokens.0"]})
    names = dict(stock.named_parameters())
    assert all(p is names[name] for name, p in hard.named_parameters() if "selector" not in name)
    assert not hf_hardattn.selectors(stock)


def test_bench_of_a_trained_model_measures_its_own_selectors(tmp_path):
    """At a threshold the scores decide what is kept, and so the cost: these keep everything."""
    model = hf_hardattn.apply(vit(), {"sites": {"vision.tokens.0": "threshold:0.5"}})
    (selector,) = hf_hardattn.selectors(model).values()
    with torch.no_grad():
        selector.scorer.weight.zero_()
        selector.scorer.bias.fill_(9.0)
    model.save_pretrained(tmp_path / "vit")
    common = ["--rounds", "2", "--threads", "1", "--no-fixed-allocator", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "--model", str(tmp_path / "vit"), *common])
    assert result.exit_code == 0, result.output
    (group,) = json.loads((tmp_path / "own.json").read_text())["groups"]
    flops = {name: row["flops"]["executed"] for name, row in group["rows"].items()}
    assert 0 <= flops["as saved"] - flops["stock"] <= 2 * 17 * D  # all layers on all rows, and the scorer
    written = (tmp_path / "own.md").read_text()
    assert "with its own selectors" in written and "The checkpoint's weights;" in written and "| 0.0 |" not in written


def test_bench_compares_rows_that_compute_the_same(tmp_path):
    padded, packed = (
        {"sites": ["encoder.tokens.0"], "budget": "threshold:0.5", "pack": pack} for pack in (False, True)
    )
    rows = [{"name": "padded", "hard": padded}, {"name": "packed", "hard": packed, "beside": "padded"}]
    rows[1]["targets"] = {"beside": 1e-3}
    shape = {"model": "t5_encoder", "size": 16, "batch": 4, "layers": 2, "shortest": 0.25}
    (tmp_path / "mine.yaml").write_text(json.dumps({"groups": [{"name": "texts", **shape, "rows": rows}]}))
    common = ["--rounds", "2", "--threads", "1", "--no-fixed-allocator", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "--suite", str(tmp_path / "mine.yaml"), *common])
    assert result.exit_code == 0, result.output
    (group,) = json.loads((tmp_path / "mine.json").read_text())["groups"]
    beside = group["rows"]["packed"]["beside"]
    assert beside["row"] == "padded" and beside["speed"]["median"] > 0 and beside["largest_difference"] < 1e-4
    assert "beside" not in group["rows"]["padded"]
    assert "| texts | packed | padded | " in (written := (tmp_path / "mine.md").read_text()) and "0.001 met" in written


def test_bench_of_a_users_own_checkpoint(tmp_path):
    vit().save_pretrained(tmp_path / "vit")
    arguments = [
        "bench",
        "--model",
        str(tmp_path / "vit"),
        "--size",
        "32",
        "--site",
        "vision.tokens.0",
        "--budget",
        "0.25",
    ]
    common = ["--rounds", "2", "--threads", "1", "--no-fixed-allocator", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--budget", "3", *common])
    assert result.exit_code == 0, result.output
    (group,) = json.loads((tmp_path / "own.json").read_text())["groups"]
    assert list(group["rows"]) == ["stock", "exact", "vision.tokens.0 keep 0.25", "vision.tokens.0 keep 3"]
    row = group["rows"]["vision.tokens.0 keep 0.25"]
    assert row["flops"]["executed"] == layer(17, 17) + 2 * layer(5, 5) + ends() and row["limit"] > 1
    written = Path(tmp_path / "own.md").read_text()
    assert "not measured" in written or row["joules"] > 0
    assert "scorer, top-k and gather" in written and (tmp_path / "own.png").stat().st_size > 10_000
    with pytest.raises(HardAttentionError, match="does not say what to measure; pass --size"):
        CliRunner().invoke(app, ["bench", "--model", "vit", "--no-fixed-allocator"], catch_exceptions=False)
    with pytest.raises(HardAttentionError, match="no group of suite 'quick' matches --only 'nothing'"):
        CliRunner().invoke(app, ["bench", "--only", "nothing", "--no-fixed-allocator"], catch_exceptions=False)


# ---------------------------------------------------------------- compiled


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds with g++")


@needs_compiler
def test_bench_of_compiled_models(tmp_path):
    """Stock and exact are compiled too, and stock as it is stands beside them."""
    wanted = ["--model", "vit", "--size", "32", "--layers", "2", "--site", "vision.tokens.0", "--budget", "0.5"]
    options = ["--mode", "compiled", "--rounds", "2", "--no-fixed-allocator", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", *wanted, *options])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "own_compiled.json").read_text())
    (group,) = made["groups"]
    assert list(group["rows"]) == ["stock", "exact", "vision.tokens.0 keep 0.5", "stock, not compiled"]
    assert made["mode"] == "compiled" and "frozen weights" in (tmp_path / "own_compiled.md").read_text()


@needs_compiler
def test_compiled_calls_say_the_same_with_packed_weights_and_a_static_cache_of_the_kept_keys():
    workload = Workload("t5_decode", 40, layers=1, new_tokens=3)
    stock = workload.build()
    model = hf_hardattn.apply(share_weights(stock), {"sites": ["decoder.cross.*"], "budget": 5}).eval()
    inputs = workload.inputs(stock)
    written, call = workload.call(model, inputs), workload.compiled(model, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        compiled = call()
    assert torch.equal(compiled.sequences, written.sequences)
    assert cache_bytes(compiled) == cache_bytes(written) == 2 * 6 * 768 * 4  # 5 and </s>
    assert any("_mkl_linear" in event.key for event in profiler.key_averages()) or not torch.backends.mkl.is_available()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["--mode", "compile"], "Did you mean 'compiled'"),
        (["--suite", "export", "--mode", "compiled"], "'export' does not support --mode compiled"),
        (["--suite", "growth", "--mode", "cuda_graphs"], "'growth' does not support --mode cuda_graphs"),
        (["--suite", "competing", "--mode", "compiled"], "'competing' does not support --mode compiled"),
        (["--suite", "host", "--mode", "compiled"], "'host' does not support --mode compiled"),
    ],
)
def test_modes_that_a_suite_has_not(wanted, message):
    with pytest.raises(HardAttentionError, match=message):
        CliRunner().invoke(app, ["bench", "--no-fixed-allocator", *wanted], catch_exceptions=False)


def test_growth_and_break_even_reports(tmp_path):
    suite = {
        "picture": "break_even",
        "groups": [
            {
                "name": "tiny {size}",
                "model": "vit",
                "layers": 1,
                "sizes": [32, 48],
                "rows": [
                    {"name": "vision.inputs keep {budget}", "hard": {"sites": ["vision.inputs"]}, "budgets": [0.5, 0.9]}
                ],
            }
        ],
    }
    for picture in ("break_even", "growth"):
        path = tmp_path / f"{picture}.yaml"
        path.write_text(json.dumps({**suite, "picture": picture}))
        common = ["--rounds", "2", "--threads", "1", "--no-fixed-allocator", "--output", str(tmp_path)]
        result = CliRunner().invoke(app, ["bench", "--suite", str(path), *common])
        assert result.exit_code == 0, result.output
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000
    lines = (tmp_path / "break_even.md").read_text().splitlines()
    assert any(line.startswith("| r | 32 | 48 |") for line in lines)
    found = json.loads((tmp_path / "growth.json").read_text())["groups"][0]["rows"]
    assert found["vision.inputs keep 0.5"]["later_layers_seconds"] > 0


# ---------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("build", "sites", "budget"),
    [(vit, ["vision.tokens.0"], 0.25), (encoder, ["encoder.self.*"], 7), (encoder, ["encoder.tokens.0"], 0.5)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_exported_models_say_the_same(build, sites, budget, tmp_path):
    batch = (
        {"pixel_values": torch.randn(1, 3, 32, 32)} if build is vit else {"input_ids": torch.randint(2, 50, (1, 24))}
    )
    model = hf_hardattn.apply(build(), {"sites": sites, "budget": budget, "share_selection": "self" in sites[0]}).eval()
    with torch.no_grad():
        expected = model(**batch)[0]
    path = export.export_onnx(model, batch, tmp_path / "model.onnx")
    torch.testing.assert_close(torch.from_numpy(export.onnx_call(path, batch)()[0]), expected, rtol=0, atol=1e-4)
    program = export.export_program(model, batch)
    torch.testing.assert_close(program.module()(**batch)[0], expected, rtol=0, atol=1e-5)


def test_the_saving_of_exported_models_is_measured_beside_pytorch(tmp_path):
    rows = [{"name": "vision.inputs keep 1", "hard": {"sites": ["vision.inputs"], "budget": 1}}]
    group = {"name": "tiny", "model": "vit", "layers": 1, "size": 64, "rows": rows}
    suite = tmp_path / "exported.yaml"
    suite.write_text(json.dumps({"title": "Exported", "runtime": "onnxruntime", "groups": [group]}))
    common = ["--rounds", "2", "--threads", "1", "--no-fixed-allocator", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "--suite", str(suite), *common])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "exported.json").read_text())["groups"][0]["rows"]
    assert list(rows) == ["stock", "exact", "vision.inputs keep 1"]
    hard = rows["vision.inputs keep 1"]
    assert hard["flops"] < rows["stock"]["flops"] and hard["largest_difference"] < 1e-4
    assert rows["stock"]["against_stock"]["median"] == rows["stock"]["pytorch_against_stock"]["median"] == 1.0
    assert hard["pytorch_seconds"] > 0 and hard["file_bytes"] > 1_000_000
    assert "| tiny | vision.inputs keep 1 |" in (tmp_path / "exported.md").read_text()


def test_a_budget_that_only_the_scores_know_is_not_exported(tmp_path):
    model = vit(sites=["vision.tokens.0"], budget="top_p:0.5")
    with pytest.raises(
        HardAttentionError, match="budget='top_p:0.5' at 'vision.tokens.0' lets the scores decide how many"
    ):
        export.export_onnx(model, {}, tmp_path / "model.onnx")


# ---------------------------------------------------------------- what the host has to do


@pytest.mark.parametrize(
    ("call", "launched"),
    [
        (
            lambda x: x.t().unsqueeze(0).reshape(12)[::2].detach(),
            {"reshape": 1},
        ),  # a transposed row is copied, the rest looks
        (lambda x: x.view(2, 6).to(torch.float32).contiguous(), {}),
        (lambda x: x.to(torch.float64), {"to": 1}),
        (lambda x: x.add_(1).masked_fill_(x > 1, 0.0), {"add_": 1, "gt": 1, "masked_fill_": 1}),
        (lambda x: torch.empty_like(x).copy_(x), {"copy_": 1}),
        (lambda x: torch.nn.functional.linear(x, x), {"linear": 1}),  # one kernel on a GPU
        (lambda x: x.sort(-1, descending=True), {"sort": 1}),
        (lambda x: x.split(2, -1), {}),
    ],
)
def test_what_launches_a_kernel(call, launched):
    with torch.inference_mode():
        rows = torch.zeros(3, 4)
        assert host.count_kernels(lambda: call(rows)) == launched


def test_host_suite_counts_times_and_says_what_is_not_held(tmp_path, monkeypatch):
    rows = (
        host.HostRow("allowed", {"sites": ["vision.tokens.0"], "budget": 0.5}, most_kernels=1_000, most_host=1_000.0),
        host.HostRow("too much", {"sites": ["vision.self.*"], "budget": 0.5}, most_kernels=0),
        host.HostRow("no limit", {"sites": ["vision.inputs"], "budget": 0.5}),
    )
    pixels = torch.randn(1, 3, 32, 32)
    monkeypatch.setattr(host, "WORKLOADS", (host.HostWorkload("a ViT", vit, lambda: {"pixel_values": pixels}, rows),))
    monkeypatch.setattr(host, "TURNS", 2)
    options = ["--rounds", "2", "--no-fixed-allocator", "--output", str(tmp_path)]
    CliRunner().invoke(app, ["bench", "--suite", "host", *options], catch_exceptions=False)
    (group,) = json.loads((tmp_path / "host.json").read_text())["groups"]
    assert [row["held"] for row in group["rows"]] == [True, False, True]
    for row in group["rows"]:
        assert row["kernels_added"] == sum(row["operations"].values()) and row["host"]["rounds"] == 2
    table = (tmp_path / "host.md").read_text()
    assert table.count("missed") == 1 and table.count("stock, timed again") == 1


def test_a_model_adds_no_kernels_to_itself():
    pixels = torch.randn(1, 3, 32, 32)
    workload = host.HostWorkload("a ViT", vit, lambda: {"pixel_values": pixels}, ())
    calls = host._calls(workload)
    assert host._added({**calls, "again": calls[host.STOCK]})["again"].total() == 0


def test_products_are_counted_whatever_the_model_and_its_attention():
    """BLIP-2 makes views of its inputs, which hooks on autograd do not survive; flex attention is one operation."""
    example = build("blip_2", "Blip2ForConditionalGeneration")
    assert count_flops(example.model, example.batch) > 0
    model = vit()
    pixels = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    expected = count_flops(model, pixels)
    model.set_attn_implementation("flex_attention")
    assert count_flops(model, pixels) == expected and model.config._attn_implementation == "flex_attention"
