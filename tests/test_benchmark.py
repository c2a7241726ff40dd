"""benchmark.py: its plain ways give what the program's fast ways give, and its report has the promised form."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmark
import caption_decoding
import download_datasets
import feature_cache
import flickr_image_caption as program
import image_loading
import runtime

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_the_training_step_is_the_textbooks(kind):
    fast, plain = benchmark.new_run(kind, "float32"), benchmark.new_run(kind, "float32")
    features, batch = benchmark.generated(40)
    for run in (fast, plain):
        run.args.grad_clip, run.args.label_smoothing = 0.5, 0.1
        run.decoder.eval()  # without dropout
    with torch.no_grad():
        _, captions, lengths, image_index = batch
        ours, alphas = fast.decoder(features, captions[:, :-1], lengths, image_index)
        theirs, looked = benchmark.plain_logits(
            plain.decoder, features[image_index], captions[:, :-1]
        )
        mask = program.token_mask(lengths, ours.size(1))
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
        if alphas is not None:
            torch.testing.assert_close(alphas[mask], looked[mask], atol=1e-5, rtol=0)
    losses = [float(step(run, features, batch)) for step, run in
              [(program.train_step, fast), (benchmark.plain_step, plain)]]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in plain.decoder.parameters())
    for (name, ours), theirs in zip(
        fast.decoder.named_parameters(), plain.decoder.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5 * largest, rtol=1e-4, msg=name)


@torch.inference_mode()
def test_beam_search_finds_the_textbooks_captions():
    decoder, vocabulary, _ = benchmark.searcher()
    features = torch.rand(
        12, benchmark.CELLS, benchmark.CHANNELS, generator=torch.Generator().manual_seed(3)
    )
    found = caption_decoding.generate(decoder, features, vocabulary, **benchmark.BEAM)
    texts = set()
    for image, (best,) in zip(features, found, strict=True):
        tokens, log_prob = benchmark.plain_beam_search(decoder, image, vocabulary, **benchmark.BEAM)
        assert best.log_prob == pytest.approx(log_prob, abs=1e-3)
        assert best.tokens == tokens
        texts.add(tuple(tokens))
    assert len(texts) > 3 and any(len(text) > benchmark.BEAM["min_length"] for text in texts)


def test_the_cache_holds_the_textbooks_features(tmp_path):
    images = download_datasets.draw_sample_dataset(tmp_path / "sample", num_images=10) / "Images"
    paths = image_loading.pictures_in(images)
    encoder = program.Encoder(
        "mobilenet_v2", program.load_encoder_weights("mobilenet_v2", "random", 0), "random"
    )
    plain = torch.cat(benchmark.plain_encoding(encoder, paths)).flatten(2).transpose(1, 2)
    cached, _ = feature_cache.cached_features(
        paths, encoder, cache_dir=tmp_path / "cache", progress=False
    )
    torch.testing.assert_close(
        cached[torch.arange(10)].float(), plain, atol=1e-4, rtol=2e-3
    )  # float16 on disk


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
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_captions_that_differ_is_counted(monkeypatch):
    monkeypatch.setattr(runtime, "resolve_precision", lambda *_: "float32")
    args = SimpleNamespace(search=100, rounds=1)
    assert benchmark.beam_search(args)["differing"] == 0
    monkeypatch.setattr(benchmark, "plain_beam_search", lambda *_args, **_options: ([], 0.0))
    assert benchmark.beam_search(args)["differing"] == 1


def test_a_stage_that_is_none_is_misuse():
    done = subprocess.run(
        [sys.executable, "benchmark.py", "coffee"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no stage coffee" in done.stderr


def check_scale(found):
    parts = ("import", "cache", "data_and_model", "first_step")
    assert sum(found[f"{part}_seconds"] for part in parts) == pytest.approx(
        found["startup_seconds"], abs=1e-3
    )
    assert found["training_captions"] == 24 * 5 and found["words"] > 400
    assert found["epoch_seconds"] == pytest.approx(found["ms_per_caption"] * 0.12)


def test_scale_measures_the_programs_training_in_a_process_of_its_own(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(benchmark, "SCALED", ("attention",))
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
    assert benchmark.fill_cache(tmp_path, "lstm") == 30 * 1280 * 4
    benchmark.start_and_step(benchmark.scale_options(tmp_path, "lstm"), 1, 4, time.time())
    check_scale(json.loads(capsys.readouterr().out))


def test_scale_refuses_what_the_disk_does_not_hold(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--scale", "1000000000", "--scale_dir", str(tmp_path)])
    assert "1,000,000,000 images need" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
