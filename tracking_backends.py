"""Where a run can be watched beside its own files: TensorBoard, and Weights & Biases.

    listeners = open_listeners(options.run, run_dir, decoder.named_parameters)
    tracker = ExperimentTracker(run_dir, listeners=listeners)   # tells them what is logged

A backend is a class with Listener's methods and a row in BACKENDS, whose name is that of the option.
Its package is imported inside it: caption_options has said before which one is missing.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from image_loading import open_images

PICTURED = 3  # of the sample images have their attention drawn, which takes a second each
WANDB_PROJECT = "image-captioning"  # where WANDB_PROJECT names no other
WANDB_SECONDS = 30  # that its server may take to answer
FINAL_SCORES = ("CIDEr", "BLEU-4", "val_loss")


class Listener:
    """What an ExperimentTracker tells; a backend has the methods that it has a use for."""

    name = "listener"

    def config_logged(self, config):
        """config: every setting by its name."""

    def metrics_logged(self, row):
        """row: an epoch's values by name, `epoch` among them; None where there is no value."""

    def samples_logged(self, epoch, samples):
        """samples: experiment_utils.Sample of the same images each time."""

    def run_ended(self, summary):
        """summary: the content of run_summary.json."""


def numbers(row):
    """The values of a row that are numbers, `epoch` aside."""
    return {
        name: value
        for name, value in row.items()
        if name != "epoch" and isinstance(value, int | float)
    }


def attention_picture(sample):
    """A Sample's photograph and where each word looked, as an RGB array (H, W, 3) uint8."""
    from attention_visualization import save_attention_viz  # matplotlib takes a second

    (photograph,) = open_images([sample.path])
    with tempfile.TemporaryDirectory() as folder:
        picture, *_ = save_attention_viz(
            folder, "sample", photograph, sample.words, sample.maps, beside=sample.beside
        )
        with Image.open(picture) as image:
            return np.asarray(image.convert("RGB"))


def captions_table(samples):
    """Markdown: a row per image with its caption and references. Their text is text, never markup."""
    rows = ["| image | caption | references |", "|---|---|---|"]
    for sample in samples:
        cells = (sample.image, sample.caption, " / ".join(sample.references))
        rows.append(f"| {' | '.join(map(escaped, cells))} |")
    return "\n".join(rows)


def escaped(text):
    """Text with Markdown's and HTML's special characters as entities."""
    return "".join(c if c.isalnum() or c in " .,'-/" else f"&#{ord(c)};" for c in text)


class TensorBoard(Listener):
    """Event files in the run's logs/: scalars, histograms of weights, captions, attention, settings.

    parameters: a function that gives pairs of a name and a tensor, of the weights as they are.
    """

    name = "TensorBoard"

    def __init__(self, run_dir, parameters):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.parameters = SummaryWriter(Path(run_dir) / "logs"), parameters

    def metrics_logged(self, row):
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["epoch"])
        for name, tensor in self.parameters():
            self.writer.add_histogram(
                f"weights/{name}", tensor.detach().float().cpu(), row["epoch"]
            )
        self.writer.flush()

    def samples_logged(self, epoch, samples):
        self.writer.add_text("validation captions", captions_table(samples), epoch)
        for sample in samples[:PICTURED]:
            if sample.maps is not None:
                tag, picture = f"attention/{sample.image}", attention_picture(sample)
                self.writer.add_image(tag, picture, epoch, dataformats="HWC")

    def run_ended(self, summary):
        best = numbers(summary["best_metrics"])
        scores = {f"best/{name}": best[name] for name in FINAL_SCORES if name in best}
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in summary["config"].items()
        }
        self.writer.add_hparams(plain, scores, run_name=".")
        self.writer.close()


class WeightsAndBiases(Listener):
    """A W&B run with its files in the run's folder: losses, scores, sample captions, the best checkpoint.

    Without an API key, or where the server does not answer, it is an offline run: `wandb sync` sends
    it later. WANDB_MODE, WANDB_PROJECT and W&B's other variables are W&B's own affair.
    """

    name = "W&B"

    def __init__(self, run_dir, _parameters):
        import wandb

        self.run_dir, self.wandb = Path(run_dir), wandb
        mode = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if wandb.login(prompt=False) else "offline")
        try:
            self.run = self._open(mode)
        except wandb.Error as error:
            print(
                f"warning: W&B keeps this run offline: {str(error).splitlines()[0]}",
                file=sys.stderr,
            )
            self.run = self._open("offline")

    def _open(self, mode):
        settings = self.wandb.Settings(init_timeout=WANDB_SECONDS, console="off", silent=True)
        return self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            name=os.environ.get("WANDB_RUN_NAME")
            or os.environ.get("WANDB_NAME", self.run_dir.name),
            dir=self.run_dir,
            mode=mode,
            settings=settings,
        )

    def config_logged(self, config):
        self.run.config.update(config)

    def metrics_logged(self, row):
        self.run.log(numbers(row), step=row["epoch"])

    def samples_logged(self, epoch, samples):
        columns = ["epoch", "image", "caption", "references"]
        rows = [[epoch, s.image, s.caption, "\n".join(s.references)] for s in samples]
        table = self.wandb.Table(columns=columns, data=rows)
        self.run.log({"validation captions": table}, step=epoch)

    def run_ended(self, summary):
        best, run = numbers(summary["best_metrics"]), summary["metadata"]
        self.run.summary.update({f"best/{name}": value for name, value in best.items()})
        self.run.summary.update(summary["bleu_scores"])
        checkpoint = self.run_dir / "best.pt"
        if checkpoint.is_file():
            known = {"status": run["status"], "run_id": run["run_id"]}
            artifact = self.wandb.Artifact(f"model-{run['run_id']}", "model", metadata=best | known)
            artifact.add_file(str(checkpoint))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=0 if run["status"] == "completed" else 1)


BACKENDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_listeners(asked, run_dir, parameters):
    """The listeners that are asked for: `asked` has an attribute, true or false, for each of BACKENDS."""
    return [
        backend(run_dir, parameters) for name, backend in BACKENDS.items() if getattr(asked, name)
    ]
