"""benchmark.py: its plain ways give what the program's fast ways give, and its report has the promised form."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import baselines
import benchmark
import caption_decoding
import download_datasets
import feature_cache
import flickr_image_caption as program
import image_loading
from runtime import Hardware

ROOT = Path(__file__).resolve().parents[1]
FLOAT32 = Hardware(torch.device("cpu"), "float32")


def in_turn(batch, padded):
    """Which caption and which step each token of a packed batch is, as positions in padded ones."""
    order = padded.lengths.sort(descending=True, stable=True).indices
    steps = torch.arange(len(batch.batch_sizes)).repeat_interleave(batch.batch_sizes)
    return order[batch.caption_index], steps


def test_the_packed_batch_holds_the_padded_captions():
    features, padded = benchmark.generated(43)
    batch = benchmark.packed(padded)
    rows, steps = in_turn(batch, padded)
    assert sorted(zip(rows.tolist(), steps.tolist(), strict=True)) == [
        (row, step) for row, length in enumerate(padded.lengths) for step in range(length)
    ]
    assert batch.inputs.equal(padded.captions[rows, steps])
    assert batch.targets.equal(padded.captions[rows, steps + 1])
    assert batch.image_rows[batch.image_index][batch.caption_index].equal(padded.image_index[rows])
    assert padded.image_index.bincount().tolist() == [5] * 8 + [3] and len(features) == 9


@pytest.mark.parametrize("kind", benchmark.DECODERS)
def test_the_training_step_is_the_textbooks(kind):
    typed = ["--grad_clip", "0.5", "--label_smoothing", "0.1"]
    fast, plain = (benchmark.new_run(kind, FLOAT32, *typed) for _ in range(2))
    decoders = fast.captioner.decoder.eval(), plain.captioner.decoder.eval()  # without dropout
    features, padded = benchmark.generated(40)
    batch = benchmark.packed(padded)
    rows, steps = in_turn(batch, padded)
    with torch.no_grad():
        logits, alphas = decoders[0](features, batch)
        all_features, words = features[padded.image_index], padded.captions[:, :-1]
        plain_logits, plain_alphas = baselines.plain_logits(decoders[1], all_features, words)
        torch.testing.assert_close(logits, plain_logits[rows, steps], atol=1e-5, rtol=0)
        if kind == "attention":
            torch.testing.assert_close(alphas, plain_alphas[rows, steps], atol=1e-5, rtol=0)
        loss, _ = fast.objective(fast.model, features, batch)
    nats = program.train_step(fast, features, batch) / batch.num_tokens
    plain_nats = F.cross_entropy(plain_logits[rows, steps], batch.targets)
    assert float(nats) == pytest.approx(float(plain_nats), abs=1e-5)
    plain_loss = baselines.plain_step(plain, features, padded)
    assert float(loss) == pytest.approx(float(plain_loss), abs=1e-5)
    check_updates(*decoders)


def check_updates(ours, plain):
    """Two decoders got the same gradients and were changed alike."""
    largest = max(float(parameter.grad.abs().max()) for parameter in plain.parameters())
    for (name, fast), slow in zip(ours.named_parameters(), plain.parameters(), strict=True):
        close = {"atol": 1e-5 * largest, "rtol": 1e-4, "msg": name}
        torch.testing.assert_close(fast.grad, slow.grad, **close)
        clear = slow.grad.abs() > 1e-3 * largest  # Adam's first step takes the sign of any gradient
        torch.testing.assert_close(fast[clear], slow[clear], atol=1e-6, rtol=0, msg=name)


def test_the_tutorials_captions_are_padded_without_effect():
    """Alone and among longer ones a caption has the same logits and attention."""
    torch.manual_seed(0)
    decoder = baselines.tutorial_decoder(
        benchmark.CHANNELS, benchmark.WIDTH, benchmark.VOCABULARY
    ).eval()
    features, padded = benchmark.generated(10)
    lengths, order = padded.lengths.sort(descending=True)
    captions, features = padded.captions[order, :-1], features[padded.image_index[order]]
    with torch.no_grad():
        logits, alphas = baselines.tutorial_logits(decoder, features, captions, lengths.tolist())
        for row in (0, 5, 9):
            length, this = int(lengths[row]), slice(row, row + 1)
            alone = baselines.tutorial_logits(
                decoder, features[this], captions[this, :length], [length]
            )
            torch.testing.assert_close(logits[this, :length], alone[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alphas[this, :length], alone[1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alphas[row, :length].sum(1), torch.ones(length))
            assert not logits[row, length:].any() and not alphas[row, length:].any()


def test_the_tutorials_step_learns():
    torch.manual_seed(0)
    decoder = baselines.tutorial_decoder(benchmark.CHANNELS, benchmark.WIDTH, benchmark.VOCABULARY)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=4e-3)
    features, padded = benchmark.generated(5)
    losses = [
        float(baselines.tutorial_step(decoder, optimizer, features, padded)) for _ in range(5)
    ]
    assert losses[0] == pytest.approx(math.log(benchmark.VOCABULARY) + 0.6, abs=0.7)
    assert losses[-1] < losses[0] - 0.5


@torch.inference_mode()
def test_beam_search_finds_the_textbooks_captions():
    decoder, vocabulary = benchmark.searcher(FLOAT32)
    generator = torch.Generator().manual_seed(3)
    features = torch.rand(12, benchmark.CELLS, benchmark.CHANNELS, generator=generator)
    hypotheses = caption_decoding.generate(decoder, features, vocabulary, **benchmark.BEAM)
    texts = set()
    for image, (best,) in zip(features, hypotheses, strict=True):
        tokens, log_prob = baselines.plain_beam_search(decoder, image, vocabulary, **benchmark.BEAM)
        assert best.log_prob == pytest.approx(log_prob, abs=1e-3)
        assert best.tokens == tokens
        texts.add(tuple(tokens))
    assert len(texts) > 3 and any(len(text) > benchmark.BEAM["min_length"] for text in texts)


def test_the_cache_holds_the_textbooks_features(tmp_path):
    images = download_datasets.draw_sample_dataset(tmp_path / "sample", num_images=10) / "Images"
    paths = image_loading.pictures_in(images)
    weights = download_datasets.load_encoder_weights("mobilenet_v2", "random", 0)
    encoder = program.Encoder("mobilenet_v2", weights, "random")
    plain = torch.cat(baselines.plain_encoding(encoder, paths)).flatten(2).transpose(1, 2)
    source = feature_cache.FeatureSource(
        encoder,
        paths,
        pooled=False,
        cache_dir=tmp_path / "cache",
        dtype=torch.float16,
        num_workers=0,
        device=FLOAT32.device,
    )
    cached = next(source.stream([torch.arange(10)]))
    torch.testing.assert_close(cached, plain, atol=1e-4, rtol=2e-3)  # float16 on disk


def test_the_report_is_one_json_object_and_a_chart(tmp_path):
    small = ["--encoder", "mobilenet_v2", "--number", "10", "--rounds", "2", "--num_workers", "0"]
    command = [sys.executable, "benchmark.py", "metrics", "encode", "--quick", "--json", *small]
    command += ["--chart", str(tmp_path / "chart.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for stage in ("metrics", "encode"):
        assert set(report[stage]) >= {"ratio", "ours", "plain", "unit", "spread"}
        assert report[stage]["spread"][0] <= report[stage]["ratio"] <= report[stage]["spread"][1]
    assert {"threads", "commit", "environment"} <= set(report)
    precisions = {"float32", report["encode"]["precision"]}
    measured = {name.split()[0] for name in report["ceilings"] if "matrix product" in name}
    assert measured == precisions
    assert list(report["encode"]["by_batch"]) == ["8"] and report["encode"]["by_batch"]["8"] > 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_captions_that_differ_is_counted(monkeypatch):
    args = SimpleNamespace(search=100, rounds=1, hardware=FLOAT32)
    assert benchmark.beam_search(args)["differing"] == 0
    monkeypatch.setattr(baselines, "plain_beam_search", lambda *_args, **_options: ([], 0.0))
    assert benchmark.beam_search(args)["differing"] == 1


def test_gpt2_is_compared_with_generate_and_its_memory(monkeypatch, capsys):
    pytest.importorskip("transformers", reason="requirements-hub.txt is not installed")
    monkeypatch.setattr(benchmark, "GPT2", {"gpt2_width": 16, "gpt2_layers": 1, "gpt2_heads": 2})
    figures = benchmark.gpt2_search(SimpleNamespace(search=100, rounds=1, hardware=FLOAT32))
    assert figures["differing"] == 0
    assert figures["peaks"].keys() == {"ours", "plain", "in_batches"}
    benchmark.print_stage("gpt2_search", figures)
    assert "of generate with all images together" in capsys.readouterr().out
    monkeypatch.setattr(
        baselines, "plain_generate", lambda _, __, images, **___: [[]] * len(images)
    )
    found = benchmark.gpt2_search(SimpleNamespace(search=100, rounds=1, hardware=FLOAT32))
    assert found["differing"] == 1


def test_the_peak_of_memory_is_that_of_the_call_alone():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system tells no peak of memory")
    benchmark.peak_mib(lambda: torch.ones(2**28), FLOAT32.device)  # 1 GiB, given back
    assert 250 < benchmark.peak_mib(lambda: torch.ones(2**26), FLOAT32.device) < 320


def test_a_training_step_is_compared_with_both_baselines_and_with_the_peak(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SHARED", 10)
    monkeypatch.setattr(benchmark, "PLAIN", 5)
    stage = benchmark.train("attention", SimpleNamespace(rounds=1, hardware=FLOAT32))
    tutorial = stage["tutorial"]
    assert tutorial["spread"][0] <= tutorial["ratio"] <= tutorial["spread"][1]
    assert tutorial["tutorial"] > 0 and stage["plain"] > 0
    seconds = benchmark.SHARED / stage["ours"]
    assert stage["share_of_peak"] == pytest.approx(
        stage["gflop_per_step"] / seconds / stage["peak_gflop_per_second"]
    )
    benchmark.print_stage("train_attention", stage)
    assert "of the structure that tutorials have" in capsys.readouterr().out
    bars = benchmark.chart_bars({"train_attention": stage})
    assert [label for label, *_ in bars] == ["train attention", ""]
    assert [figures["ratio"] for _, figures, *_ in bars] == [stage["ratio"], tutorial["ratio"]]


def test_the_operations_of_a_training_step_are_those_worked_by_hand():
    """A multiply-add counts 2. A layer costs thrice its forward pass; twice where its input needs no gradient."""
    features, captions = benchmark.generated(benchmark.SHARED)
    images, tokens = len(features), int(captions.lengths.sum())
    cells, width = images * benchmark.CELLS, benchmark.WIDTH
    keys_and_values = 2 * 2 * 2 * cells * benchmark.CHANNELS * width
    first_state = 2 * 2 * 2 * images * benchmark.CHANNELS * width
    words, vocabulary = width * 4 * width, width * benchmark.VOCABULARY
    query_and_gate, cell, deep_output = 2 * width * width, 2 * width * 4 * width, 2 * width * width
    per_token = words + vocabulary + query_and_gate + cell + deep_output
    attended = 2 * benchmark.CELLS * width  # scores and contexts
    expected = keys_and_values + first_state + 6 * tokens * (per_token + attended)
    assert benchmark.step_gflop("attention") == pytest.approx(expected / 1e9, rel=0.05)


@pytest.mark.parametrize(
    "typed, message",
    [
        (["coffee"], "no stage coffee"),
        (["--epochs", "0"], "--epochs takes at least 1 epoch"),
        (["--scale", "9"], "--scale 9: expected at least 10 images"),
        (["--scale", "30", "--device", "cuda"], "leave --device cuda out"),
    ],
)
def test_misuse_is_refused(typed, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(typed)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_comes_without_torch():
    code = "import sys, benchmark; benchmark.build_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "benchmark" in done.stdout.split() and "torch" not in done.stdout.split()


def check_scale(found):
    parts = ("import", "cache", "data_and_model", "first_step")
    startup_seconds = sum(found[f"{part}_seconds"] for part in parts)
    assert startup_seconds == pytest.approx(found["startup_seconds"], abs=1e-3)
    assert found["training_captions"] == 24 * 5 and found["words"] > 400
    assert found["epoch_seconds"] == pytest.approx(found["ms_per_caption"] * 0.12)


def test_scale_measures_the_programs_training_in_a_process_of_its_own(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(benchmark, "KINDS", ("attention",))
    benchmark.main(["--scale", "30", "--quick", "--json", "--scale_dir", str(tmp_path)])
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "30 images need 0.00 GB" in err and list(tmp_path.iterdir()) == []
    assert not {"ceilings", *benchmark.STAGES} & report.keys()
    found = report["scale"]["30"]["attention"]
    check_scale(found)
    assert found["cache_gb"] == 30 * 49 * 1280 * 2 / 1e9
    assert 100 < found["peak_private_mib"] < 4000 and found["peak_mapped_mib"] > 100


def test_scale_trains_on_means_where_the_decoder_reads_means(tmp_path, capsys, monkeypatch):
    for module, name in ((feature_cache, "cached_features"), (program, "train_step")):
        monkeypatch.setattr(module, name, getattr(module, name))  # start_and_step replaces them
    benchmark.write_captions(tmp_path, 30)
    typed = benchmark.run_options(tmp_path, "lstm")
    assert benchmark.fill_cache(tmp_path, typed) == 30 * 1280 * 4
    benchmark.start_and_step(typed, 1, 4, time.time())
    check_scale(json.loads(capsys.readouterr().out))


@pytest.mark.slow
def test_whole_runs_are_timed_on_flickr8ks_shape(tmp_path, capsys, monkeypatch):
    """Of 24 training images, 4 to validate on and 4 others; the files are empty, so none is encoded."""
    monkeypatch.setattr(benchmark, "KINDS", ("attention",))
    lists = []
    write = benchmark.write_split_lists

    def noted(folder, train_images):
        write(folder, train_images)
        lists.extend(len(path.read_text().split()) for path in sorted(folder.glob("*Images.txt")))

    monkeypatch.setattr(benchmark, "write_split_lists", noted)
    words = ["--epochs", "2", "--train_images", "24", "--json", "--scale_dir", str(tmp_path)]
    benchmark.main(words)
    report = json.loads(capsys.readouterr().out)
    run = report["epochs"]["attention"]
    assert run["epochs"] == 2 and lists == [4, 4, 24]  # dev, test, train
    assert run["seconds"] == pytest.approx(
        2 * run["epoch_seconds"] + run["outside_epochs_seconds"], rel=0.01
    )
    assert not {"ceilings", *benchmark.STAGES} & report.keys() and list(tmp_path.iterdir()) == []


def test_scale_refuses_what_the_disk_does_not_hold(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--scale", "1000000000", "--scale_dir", str(tmp_path)])
    assert "1,000,000,000 images need" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
