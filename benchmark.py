"""Time what the README says is fast against the plain way of doing it, in turn, in one run.

    python benchmark.py --images data/sample/Images --encoder mobilenet_v2
    python benchmark.py --images ... --encoder_weights FILE --number 200 --rounds 3

Encoding: our path (workers decode, batches of 32, channels last, float16 rows to a fresh cache) against
the textbook loop (float32, one image at a time, decoded in the same process). Reported: images per second of each as
medians over the rounds, A B A B, and the ratio's range. The cache's own cost, disk included, counts on our side.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path


def plain_encoding(encoder, paths):
    """The textbook loop: one image at a time through torchvision's own layers, float32, default memory layout."""
    import torch

    import caption_data

    trunk = encoder.trunk.to(memory_format=torch.contiguous_format)
    features = []
    with torch.inference_mode():
        for path in paths:
            image = torch.from_numpy(caption_data.load_image(path, encoder.image_size)).permute(2, 0, 1).unsqueeze(0)
            features.append(trunk(((image / 255 - encoder.mean) / encoder.std).contiguous()))
    encoder.trunk.to(memory_format=torch.channels_last)
    return features


def cached_encoding(encoder, paths, num_workers):
    """The program's way, into an empty cache."""
    import caption_data

    with tempfile.TemporaryDirectory() as folder:
        caption_data.cached_features(
            paths, encoder, cache_dir=folder, key={"encoder": encoder.name}, grid=tuple(encoder.grid),
            channels=encoder.channels, image_size=encoder.image_size, num_workers=num_workers, progress=False,
        )  # fmt: skip


def seconds(function, *arguments):
    """Wall time of one call."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def main(argv=None):
    """Print one JSON object: `encode` with ratio, ours, plain, unit and spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures")
    parser.add_argument("--encoder", default="mobilenet_v2")
    parser.add_argument("--encoder_weights", default="random")
    parser.add_argument("--number", type=int, default=200, help="pictures per round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each way, in turn (%(default)s)")
    parser.add_argument("--num_workers", type=int, default=2)
    args = parser.parse_args(argv)

    import torch

    import caption_data
    import experiment_utils
    import flickr_image_caption as program

    weights = program.load_encoder_weights(args.encoder, args.encoder_weights, 0)
    encoder = program.Encoder(args.encoder, weights, args.encoder_weights)
    paths = caption_data.pictures_in(args.images)[: args.number]
    plain_encoding(encoder, paths[:8])
    cached_encoding(encoder, paths[:8], 0)
    rounds = [
        (seconds(cached_encoding, encoder, paths, args.num_workers), seconds(plain_encoding, encoder, paths))
        for _ in range(args.rounds)
    ]
    ratios = sorted(plain / ours for ours, plain in rounds)
    report = {
        "encode": {
            "ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]], "unit": "images per second",
            "ours": len(paths) / statistics.median(ours for ours, _ in rounds),
            "plain": len(paths) / statistics.median(plain for _, plain in rounds),
        },
        "encoder": args.encoder, "images": len(paths), "threads": torch.get_num_threads(),
        "commit": experiment_utils.git_info()["commit"], "environment": experiment_utils.environment(),
    }  # fmt: skip
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
