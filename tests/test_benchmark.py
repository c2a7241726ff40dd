"""benchmark.py: its plain ways give what the program's fast ways give, and its report has the promised form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmark
import caption_data
import caption_decoding
import download_datasets
import flickr_image_caption as program

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
        theirs, looked = benchmark.plain_logits(plain.decoder, features[image_index], captions[:, :-1])
        mask = program.token_mask(lengths, ours.size(1))
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
        if alphas is not None:
            torch.testing.assert_close(alphas[mask], looked[mask], atol=1e-5, rtol=0)
    losses = [float(step(run, features, batch)) for step, run in
              [(program.train_step, fast), (benchmark.plain_step, plain)]]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in plain.decoder.parameters())
    for (name, ours), theirs in zip(fast.decoder.named_parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5 * largest, rtol=1e-4, msg=name)


@torch.inference_mode()
def test_beam_search_finds_the_textbooks_captions():
    decoder, vocabulary, _ = benchmark.searcher()
    features = torch.rand(12, benchmark.CELLS, benchmark.CHANNELS, generator=torch.Generator().manual_seed(3))
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
    paths = caption_data.pictures_in(images)
    encoder = program.Encoder("mobilenet_v2", program.load_encoder_weights("mobilenet_v2", "random", 0), "random")
    plain = torch.cat(benchmark.plain_encoding(encoder, paths)).flatten(2).transpose(1, 2)
    cached, _ = caption_data.cached_features(
        paths, encoder, cache_dir=tmp_path / "cache", key={"encoder": "mobilenet_v2"}, grid=tuple(encoder.grid),
        channels=encoder.channels, image_size=encoder.image_size, num_workers=0, progress=False,
    )  # fmt: skip
    torch.testing.assert_close(cached[torch.arange(10)].float(), plain, atol=1e-4, rtol=2e-3)  # float16 on disk


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


def test_a_stage_that_is_none_is_misuse():
    done = subprocess.run([sys.executable, "benchmark.py", "coffee"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no stage coffee" in done.stderr
