"""run_comparison.py: runs side by side, made by hand so that every number is known."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caption_options
import run_comparison
from checkpoints import write_json

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 200


def make_run(folder, cider, rate=0.1, **config):
    """A run whose images score `cider`, an array (N,), and ROUGE-L 0.5."""
    folder.mkdir(parents=True)
    settings = {"decoder_type": "lstm", "learning_rate": rate, "command": folder.name} | config
    write_json(folder / "run_config.json", settings | {"git": {"commit": folder.name}})
    metadata = {"status": "completed", "run_id": folder.name}
    write_json(folder / "run_summary.json", {"metadata": metadata, "config": settings})
    rows = [
        {"file_name": f"{n}.jpg", "CIDEr": score, "ROUGE-L": 0.5} for n, score in enumerate(cider)
    ]
    write_json(folder / "test_captions.json", rows)
    mean = float(np.mean(cider))
    intervals = {"CIDEr": [mean - 0.1, mean + 0.1]}
    write_json(folder / "test_metrics.json", {"CIDEr": mean, "BLEU-4": 0.2, "intervals": intervals})
    text = f"epoch,train_loss,val_loss,CIDEr\n1,3.0,3.1,0.2\n2,2.5,,{mean}\n"
    (folder / "metrics.csv").write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three runs: `good`, `alike` by an image's chance, and `bad` by far."""
    scores = np.random.default_rng(1).normal(1.0, 0.3, IMAGES)
    noise = np.random.default_rng(2).normal(0, 0.2, IMAGES)
    noise -= noise.mean()
    make_run(tmp_path / "bad", scores - 0.2, rate=0.9, grad_clip=1.0)
    make_run(tmp_path / "alike", scores + noise - 0.005)
    make_run(tmp_path / "good", scores)
    return tmp_path


def answer(capsys, *paths, **output):
    """(status, stdout, stderr) of --mode compare."""
    words = ["--mode", "compare", "--runs", *map(str, paths)]
    options = caption_options.parse_args(words).output._replace(**output)
    status = run_comparison.main(options)
    return status, *capsys.readouterr()


def test_runs_are_ranked_and_their_differences_judged_by_paired_resampling(runs, capsys):
    status, out, _ = answer(capsys, *(runs / name for name in ("bad", "alike", "good")), json=True)
    found = json.loads(out)
    assert status == 0
    assert [Path(run["run"]).name for run in found["runs"]] == ["good", "alike", "bad"]
    good, alike, bad = found["runs"]
    assert good["to_best"] is None
    near, far = alike["to_best"]["CIDEr"], bad["to_best"]["CIDEr"]
    assert near["difference"] == pytest.approx(-0.005) and near["within_noise"]
    # the standard error of a mean of 200 differences whose deviation is 0.2
    assert near["high"] - near["low"] == pytest.approx(2 * 1.96 * 0.2 / IMAGES**0.5, rel=0.15)
    # the runs' own intervals overlap by far; image by image the difference is always the same
    assert far == pytest.approx(
        {"difference": -0.2, "low": -0.2, "high": -0.2, "images": IMAGES, "within_noise": False}
    )
    assert alike["to_best"]["ROUGE-L"]["difference"] == 0
    assert good["scores"]["CIDEr"]["low"] == pytest.approx(good["scores"]["CIDEr"]["value"] - 0.1)
    assert found["settings"] == {"learning_rate": [0.1, 0.1, 0.9], "grad_clip": [None, None, 1.0]}


def test_scores_of_an_ensemble_are_said_to_be_its(runs, capsys):
    file = runs / "good" / "test_metrics.json"
    metrics = json.loads(file.read_text())
    for written, shown in ((["a.pt", "b.pt"], [3, None]), ("a.pt", None), ([], None)):
        write_json(file, metrics | {"ensemble": written})
        _, out, _ = answer(capsys, runs / "good", runs / "alike", json=True)
        assert json.loads(out)["settings"].get("ensemble") == shown


def test_options_that_do_nothing_in_a_run_are_no_settings_of_it():
    config = {"decoder_type": "lstm", "attention_dim": 512, "alpha_c": 1.0, "my_option": 3}
    assert run_comparison.acting(config) == {"decoder_type": "lstm", "my_option": 3}
    attention = config | {"decoder_type": "attention", "attention": "additive"}
    assert run_comparison.acting(attention) == attention


def test_the_table_has_a_column_per_run(runs, capsys):
    _, out, _ = answer(capsys, runs / "bad", runs / "good")
    lines = out.splitlines()
    assert lines[1] == f"  1  {runs / 'good'}: completed, epochs: 2"
    assert [line.split() for line in lines if line.startswith("  learning_rate")] == [
        ["learning_rate", "0.1", "0.9"]
    ]
    (cider,) = [line for line in lines if "beyond the noise" in line]
    assert cider.split()[:2] == ["CIDEr", "-0.2000"]
    assert "seed" not in out and "command" not in out
    picture = Path(lines[-1].removeprefix("curves: "))
    assert picture == runs / "run_comparison.png"
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for colour in ((0, 114, 178), (213, 94, 0)):  # a curve of each run
        assert (np.abs(pixels - colour).sum(axis=-1) < 30).sum() > 300


def test_a_folder_of_runs_stands_for_all_of_them_and_a_file_for_its_run(runs):
    every = run_comparison.find_runs([str(runs), str(runs / "bad/run_config.json")])
    assert sorted(folder.name for folder in every) == ["alike", "bad", "good"]


@pytest.mark.parametrize(
    "name", ["run_config.json", "test_metrics.json", "test_captions.json", "metrics.csv"]
)
@pytest.mark.parametrize("content", [None, b"", b"[1, {}]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_missing_or_damaged_is_said_and_the_rest_shown(runs, capsys, name, content):
    path = runs / "good" / name
    path.unlink() if content is None else path.write_bytes(content)
    status, out, err = answer(capsys, runs / "good", runs / "bad")
    assert status == 0 and err == ""
    assert f"missing or damaged: {name}" in out
    assert ("beyond the noise" in out) == (name not in ("test_captions.json",))
    assert "0.9" in out


def test_wrong_types_inside_the_files_break_nothing(runs, capsys):
    wrong = {"CIDEr": "high", "BLEU-4": True, "METEOR": 0.2, "intervals": {"METEOR": [1]}}
    write_json(runs / "good/test_metrics.json", wrong)
    write_json(runs / "good/run_summary.json", {"metadata": [], "config": 3})
    write_json(runs / "good/test_captions.json", [3, {"file_name": 1}, {"CIDEr": "x"}])
    (runs / "good/metrics.csv").write_text("epoch,CIDEr\none,two\n")
    status, out, _ = answer(capsys, runs / "good", runs / "bad", json=True)
    run = json.loads(out)["runs"][1]
    assert status == 0 and list(run["scores"]) == ["METEOR"] and run["status"] == "unknown"


def test_runs_of_other_images_are_compared_on_those_in_common(runs, capsys):
    few = make_run(runs / "few", np.full(IMAGES // 2, 0.1))
    _, out, _ = answer(capsys, runs / "good", few, json=True)
    assert json.loads(out)["runs"][1]["to_best"]["CIDEr"]["images"] == IMAGES // 2
    _, out, _ = answer(capsys, runs / "good", few)
    assert "have captioned different images" in out


def test_names_of_anyone_do_not_drive_the_terminal(runs, capsys):
    hostile = make_run(runs / "a\x1b[31m$x$", np.ones(IMAGES), note="\x1b[2J")
    _, out, _ = answer(capsys, runs / "good", hostile)
    assert "\x1b" not in out and r"\x1b[31m" in out


@pytest.mark.parametrize(
    ("paths", "said"), [(["good"], "names one run only"), (["good", "empty"], "no run's files")]
)
def test_what_is_no_comparison_is_one_line(runs, capsys, paths, said):
    (runs / "empty").mkdir()
    status, out, err = answer(capsys, *(runs / path for path in paths))
    assert status == 2 and out == "" and said in err and err.count("\n") == 1


def test_the_command_needs_no_torch_and_marks_killed_runs(runs):
    write_json(runs / "bad/run_summary.json", {"metadata": {"status": "running"}})
    (runs / "bad/.running").touch()
    script = ROOT / "flickr_image_caption.py"
    flags = ["--mode", "compare", "--runs", str(runs / "good"), str(runs / "bad")]
    command = [sys.executable, "-X", "importtime", str(script), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and " torch" not in done.stderr
    assert f"{runs / 'bad'}: failed" in done.stdout
    summary = json.loads((runs / "bad/run_summary.json").read_text())
    assert summary["metadata"]["status"] == "failed"
