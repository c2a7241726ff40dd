"""What a training step minimises beside cross entropy: to write as a teacher does.

    targets = kept_in(file, lambda: ask_teacher(teacher, training, hardware))      # once
    objective = Distillation(CrossEntropyObjective(options.training), targets, weight=0.5)

An ensemble spreads its probability over every word that would do; the reference names one of them. A
single model that learns both keeps most of what the ensemble knows, at the price of a single model.
Axes: V words, K likeliest words of a teacher.
Sources: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2; Kim and Rush 2016,
Sequence-Level Knowledge Distillation, section 3.1, word by word.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoints
import process_group
from progress import Progress
from runtime import large_blocks_returned, to_device

LIKELIEST = 32  # words of which a teacher's probabilities are kept


class SoftTargets(NamedTuple):
    """A teacher's next words at each token of the training captions, the likeliest first."""

    words: torch.Tensor  # (tokens, K) int32
    probabilities: torch.Tensor  # (tokens, K) float16, a row sums to 1


class Distillation:
    """`weight` times the cross entropy to the teacher's words, the rest another objective's loss."""

    def __init__(self, references, targets, weight):
        """references: has `loss(logits, alphas, batch)`; targets: SoftTargets by a batch's `places`."""
        self.references, self.targets, self.weight = references, targets, weight

    def __call__(self, model, features, batch):
        """features (N, P, F), batch -> loss to minimise () and plain nats (), as the references' alone."""
        logits, alphas = model(features, batch)
        loss, nats = self.references.loss(logits, alphas, batch)
        words, probabilities = (
            to_device(table[batch.places], logits.device) for table in self.targets
        )
        soft = soft_cross_entropy(logits, words, probabilities) / batch.num_tokens
        return (1 - self.weight) * loss + self.weight * soft, nats


def soft_cross_entropy(logits, words, probabilities):
    """logits (tokens, V), a teacher's words and probabilities (tokens, K) -> nats () of all tokens."""
    logits = logits.float()
    log_probs = logits.gather(1, words.long()) - logits.logsumexp(1, keepdim=True)
    return -(probabilities.float() * log_probs).sum()


def ask_teacher(teacher, training, hardware):
    """A decoder's SoftTargets for all captions of a split_data.Split, of images that are not mirrored."""
    batches = training.batches
    bar = Progress(
        training.epoch(0, shuffle=False),
        "asking the teachers",
        batches.num_batches,
        "captions",
        batches.batch_size,
        disable=process_group.rank() > 0,
    )
    return soft_targets(teacher.to(hardware.device), bar, len(batches.tokens), hardware)


def soft_targets(teacher, batches, num_tokens, hardware):
    """The SoftTargets of a decoder, or an ensemble, for all training captions.

    Args:
        batches: (batch, features (N, P, F)) of an epoch; of several processes each has its share.
        num_tokens: rows of the tables, which a batch's `places` number.
    """
    teacher.eval()
    with large_blocks_returned():
        shares = [
            (batch.places, *likeliest_words(teacher, features, batch.to(hardware.device), hardware))
            for batch, features in batches
        ]
    number = min(LIKELIEST, shares[0][1].size(1))
    words = torch.zeros(num_tokens, number, dtype=torch.int32)
    probabilities = torch.zeros(num_tokens, number, dtype=torch.float16)
    for places, *found in itertools.chain.from_iterable(process_group.all_gather(shares)):
        words[places], probabilities[places] = found
    return SoftTargets(words, probabilities)


@torch.inference_mode()
def likeliest_words(teacher, features, batch, hardware):
    """The teacher's likeliest words after each token, (tokens, K), and their shares of its probability."""
    with hardware.autocast():
        logits, _ = teacher(features, batch)
    logits, words = logits.float().topk(min(LIKELIEST, logits.size(1)))
    return words.int().cpu(), logits.softmax(1).half().cpu()


def targets_file(cache, teachers, tokens, encoder):
    """Where the SoftTargets of these files of teachers are kept, in the folder `cache`; None if that is.

    tokens: the training captions'; encoder: its key. Both decide the answers, too.
    """
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in teachers]
    contents += [hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), encoder]
    name = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
    return cache and cache / "teachers" / f"{name}.pt"


def kept_in(file, compute):
    """The SoftTargets in a file; if it is not there or damaged, what `compute` gives, kept there.

    file: None to keep nothing. Of several processes all must see it.
    """
    found = process_group.broadcast(file is not None and file.is_file())
    targets = read_targets(file) if found else None
    if process_group.all_reduce_max(int(targets is None)):  # by all of them together
        targets = compute()
        if file is not None and process_group.rank() == 0:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            checkpoints.save_tensors(file, targets._asdict())
    return targets


def read_targets(file):
    """SoftTargets from a file, None where it holds no such thing."""
    try:
        targets = SoftTargets(**checkpoints.load_tensors(file))
        fits = targets.words.dtype == torch.int32 and targets.probabilities.dtype == torch.float16
        return targets if fits and targets.words.shape == targets.probabilities.shape else None
    except (ValueError, TypeError, AttributeError):
        return None
