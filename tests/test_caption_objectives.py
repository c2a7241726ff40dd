"""caption_objectives.py: what a step learns from teachers, against the plain formula."""

import sys
from pathlib import Path

import pytest
import torch
from small_runs import CPU, make_batch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caption_objectives
import checkpoints
import flickr_image_caption as program
from caption_objectives import Distillation, SoftTargets
from caption_options import parse_args

WORDS = 50


class Fixed(nn.Module):
    """A decoder whose logits depend on the token it reads alone."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(4 * torch.randn(WORDS, WORDS, generator=generator))

    def forward(self, features, batch):
        return self.logits[batch.inputs], None


@pytest.fixture
def batch():
    """Two captions, of 3 and 5 tokens, that stand from places 10 and 20 on in the table."""
    captions = torch.tensor([[1, 7, 8, 2, 0, 0], [1, 9, 7, 30, 8, 2]])
    made = make_batch(captions, torch.tensor([3, 5]), torch.tensor([0, 0]))
    return made._replace(places=torch.tensor([20, 10, 21, 11, 22, 12, 23, 24]))


FEATURES = torch.zeros(1, 1, 1)


def test_soft_targets_are_the_teachers_likeliest_words_at_their_places(batch):
    teacher = Fixed(1).train()
    targets = caption_objectives.soft_targets(teacher, [(batch, FEATURES)], 30, CPU)
    assert targets.words.shape == (30, 32) and not teacher.training
    for row, place in enumerate(batch.places.tolist()):
        expected, words = teacher.logits[batch.inputs[row]].softmax(0).sort(descending=True)
        assert targets.words[place].tolist() == words[:32].tolist()
        kept = expected[:32] / expected[:32].sum()
        torch.testing.assert_close(targets.probabilities[place].float(), kept, atol=1e-3, rtol=0)
    assert not targets.probabilities[13].any()


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_loss_is_the_weighted_sum_of_references_and_teacher(batch, weight):
    references = program.CrossEntropyObjective(parse_args(["--label_smoothing", "0.1"]).training)
    targets = caption_objectives.soft_targets(Fixed(1), [(batch, FEATURES)], 30, CPU)
    student = Fixed(2)
    loss, nats = Distillation(references, targets, weight)(student, FEATURES, batch)
    hard, expected_nats = references(student, FEATURES, batch)
    log_probs = student.logits[batch.inputs].log_softmax(1)
    whole = torch.zeros(8, WORDS)
    for row, place in enumerate(batch.places.tolist()):
        whole[row, targets.words[place].long()] = targets.probabilities[place].float()
    soft = F.cross_entropy(log_probs, whole, reduction="sum") / batch.num_tokens
    torch.testing.assert_close(loss, (1 - weight) * hard + weight * soft)
    torch.testing.assert_close(nats, expected_nats)


def test_a_student_of_the_teacher_alone_becomes_the_teacher(batch):
    """All words are kept here, so the least loss is the teacher's own entropy."""
    teacher, student = Fixed(1), Fixed(2)
    teacher.logits.data *= 3
    references = program.CrossEntropyObjective(parse_args([]).training)
    targets = caption_objectives.soft_targets(teacher, [(batch, FEATURES)], 30, CPU)
    objective = Distillation(references, targets, 1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        objective(student, FEATURES, batch)[0].backward()
        optimizer.step()
    read = batch.inputs.unique()
    found, expected = (model.logits[read].softmax(1) for model in (student, teacher))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_targets_are_computed_once_and_a_damaged_file_is_made_again(tmp_path):
    file, calls = tmp_path / "new/targets.pt", []
    made = SoftTargets(torch.ones(3, 2, dtype=torch.int32), torch.ones(3, 2).half() / 2)

    def compute():
        calls.append(1)
        return made

    for _ in range(2):
        kept = caption_objectives.kept_in(file, compute)
        assert all(torch.equal(*pair) for pair in zip(kept, made, strict=True))
    assert len(calls) == 1
    file.write_bytes(file.read_bytes()[:100])
    caption_objectives.kept_in(file, compute)
    caption_objectives.kept_in(file, compute)
    assert len(calls) == 2
    checkpoints.save_tensors(file, made._replace(words=made.words.long())._asdict())
    caption_objectives.kept_in(file, compute)
    caption_objectives.kept_in(None, compute)
    assert len(calls) == 4
