"""Different parameters, and the same parameters in the same second, get directories of their own.

python tests/test_unique_directories.py     shows each, with its files
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest

from experiment_utils import create_run_dir, write_run_files

STAMP = "20241201_143022"
BASE = {
    "dataset_type": "flickr8k", "encoder": "resnet50", "decoder": "lstm", "epochs": 10,
    "batch_size": 128, "learning_rate": 1e-4, "use_scheduler": False, "scheduler_type": "step",
    "save_attention_viz": False,
}  # fmt: skip
ONE_CYCLE = {"use_scheduler": True, "scheduler_type": "one_cycle"}
PICTURES = {"decoder": "attention", "save_attention_viz": True}
CHANGES = {  # one parameter at a time -> where the run goes
    "as it is": ({}, "flickr8k/resnet_lstm/flickr8k_lstm_ep10_bs128_lr1e-04"),
    "dataset": ({"dataset_type": "flickr30k"},
                "flickr30k/resnet_lstm/flickr30k_lstm_ep10_bs128_lr1e-04"),
    "encoder": ({"encoder": "mobilenet_v2"},
                "flickr8k/mobilenet_v2_lstm/flickr8k_lstm_ep10_bs128_lr1e-04"),
    "decoder": ({"decoder": "attention"},
                "flickr8k/resnet_attention/flickr8k_attention_ep10_bs128_lr1e-04"),
    "epochs": ({"epochs": 15}, "flickr8k/resnet_lstm/flickr8k_lstm_ep15_bs128_lr1e-04"),
    "batch size": ({"batch_size": 64}, "flickr8k/resnet_lstm/flickr8k_lstm_ep10_bs64_lr1e-04"),
    "learning rate": ({"learning_rate": 0.00015},
                      "flickr8k/resnet_lstm/flickr8k_lstm_ep10_bs128_lr1.5e-04"),
    "scheduler": (ONE_CYCLE, "flickr8k/resnet_lstm/flickr8k_lstm_ep10_bs128_lr1e-04_one_cycle"),
    "attention pictures": (PICTURES,
                           "flickr8k/resnet_attention/flickr8k_attention_ep10_bs128_lr1e-04_att"),
}  # fmt: skip


@pytest.mark.parametrize("changed", CHANGES)
def test_a_run_goes_where_its_parameters_say(tmp_path, changed):
    changes, expected = CHANGES[changed]
    run_dir = create_run_dir(tmp_path, BASE | changes, STAMP)
    assert run_dir == tmp_path / f"{expected}_{STAMP}"
    write_run_files(run_dir, BASE | changes, ["python", "flickr_image_caption.py"])
    files = sorted(file.name for file in run_dir.iterdir())
    print(f"\n{changed}: {run_dir.relative_to(tmp_path)}/  {', '.join(files)}")
    assert files == ["run_config.json", "run_summary.txt"]


def test_no_two_parameters_share_a_directory(tmp_path):
    made = {create_run_dir(tmp_path, BASE | changes, STAMP) for changes, _ in CHANGES.values()}
    assert len(made) == len(CHANGES)
    assert not any(run_dir.name.endswith("_2") for run_dir in made)


def test_the_same_parameters_in_the_same_second_are_numbered(tmp_path):
    names = [create_run_dir(tmp_path, BASE, STAMP).name for _ in range(3)]
    first = f"flickr8k_lstm_ep10_bs128_lr1e-04_{STAMP}"
    assert names == [first, f"{first}_2", f"{first}_3"]


def test_a_run_never_writes_into_an_older_one(tmp_path):
    older = create_run_dir(tmp_path, BASE, STAMP)
    (older / "best.pt").write_bytes(b"weights")
    write_run_files(
        create_run_dir(tmp_path, BASE, STAMP), BASE, ["python", "flickr_image_caption.py"]
    )
    assert {file.name: file.read_bytes() for file in older.iterdir()} == {"best.pt": b"weights"}


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-v", "-s"]))
