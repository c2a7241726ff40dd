"""caption_batches.py: words of a caption, the vocabulary, and batches of an epoch."""

import itertools
import random
import unicodedata

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import caption_batches
from caption_batches import CaptionBatches, Vocabulary, by_image, tokenize

# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man in a T-shirt , jumps .", "a man in a t-shirt jumps"),
        ("The dog's owner doesn't run!", "the dog 's owner does n't run"),
        ("dog--brown and dog\u2014black", "dog brown and dog black"),
        ("jumps.The dog (black/white) & $5 🐕", "jumps the dog black white 5"),
        ("cafe\u0301 \u00c9T\u00c9", "caf\u00e9 \u00e9t\u00e9"),
        ("Две собаки бегут по снегу.", "две собаки бегут по снегу"),
        ("दो कुत्ते बर्फ में दौड़ रहे हैं।", "दो कुत्ते बर्फ में दौड़ रहे हैं"),
        ("\u200fيركض كلب؟", "يركض كلب"),
        ("שני כְּלָבִים רצים", "שני כְּלָבִים רצים"),
        ("می\u200cروند", "می\u200cروند"),
        ("두 마리의 개가 달린다.", "두 마리의 개가 달린다"),
        ("两只狗,2人。", "两 只 狗 2 人"),
        ("犬がスーパー", "犬 が ス ー パ ー"),
        ("วิ่งอยู่", "วิ่ ง อ ยู่"),
        ("... !? — 🐕", ""),
    ],
)
def test_words_of_a_caption(text, words):
    assert tokenize(text) == words.split(" ") if words else tokenize(text) == []


def test_words_are_stable_under_a_second_tokenisation():
    text = "The dogs' owner can't see a t-shirt; 两只狗 at 10:30"
    assert tokenize(" ".join(tokenize(text))) == tokenize(text)


def test_splitting_at_spaces_first_changes_no_word():
    """A text's words are those that spaCy finds in the whole, whichever special cases meet."""
    draw, tokenizer = random.Random(0), caption_batches._spacy_tokenizer()
    pieces = [
        *tokenizer.rules,
        *"()[].,;:!?'\"-/&%$8DPxO",
        "\u0301",
        "A",
        "dogs'",
        "T-shirt",
        "ye\u0301",
        "犬が",
        "\t",
        "\n",
    ]
    for _ in range(3000):
        text = "".join(
            draw.choice(pieces) + draw.choice(["", " ", " ", "  "])
            for _ in range(draw.randint(1, 9))
        )
        whole = caption_batches.UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFC", text))
        words = [word for token in tokenizer(whole) if any(map(str.isalnum, word := token.lower_))]
        assert tokenize(text) == words, text


def test_vocabulary_counts_orders_and_cuts():
    vocabulary = Vocabulary.build(["b b b a a c", "A d", "d d"], freq_threshold=2)
    # a, b and d are seen three times each, so they come in alphabetical order; c is seen once
    assert vocabulary.words == ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a", "b", "d"]
    assert [vocabulary.pad, vocabulary.sos, vocabulary.eos, vocabulary.unk] == [0, 1, 2, 3]
    assert len(vocabulary) == 7
    assert vocabulary.encode("D, a c <EOS>") == [6, 4, 3, 3]  # a typed <EOS> is a word
    assert vocabulary.decode([1, 4, 3, 5, 0, 2, 6]) == "a b"


@pytest.mark.parametrize(
    "caption", ["a dog runs", "两只狗在雪地里奔跑", "2人が走る", "वह दौड़ रहे", "วิ่งอยู่", "穿t恤的人"]
)
def test_encode_then_decode_gives_the_caption(caption):
    vocabulary = Vocabulary.from_plain(Vocabulary.build([caption], 1).to_plain())
    assert vocabulary.decode(vocabulary.encode(caption)) == caption


@pytest.mark.parametrize(
    "plain",
    [
        None,
        {},
        {"words": "abc"},
        {"words": ["<PAD>", "<SOS>", "<EOS>"]},
        {"words": ["<SOS>", "<PAD>", "<EOS>", "<UNK>", "a"]},
        {"words": [*Vocabulary.SPECIALS, "a", "a"]},
        {"words": [*Vocabulary.SPECIALS, 5]},
        {"words": [*Vocabulary.SPECIALS, ""]},
        {"words": [*Vocabulary.SPECIALS, "two words"]},
        {"words": [*Vocabulary.SPECIALS, "\x1b[2J"]},
        {"words": [*Vocabulary.SPECIALS, "\ud800"]},
    ],
)
def test_a_damaged_vocabulary_is_refused(plain):
    with pytest.raises(ValueError, match=r"^vocabulary: "):
        Vocabulary.from_plain(plain)


# Batches

# of four images, one without any
CAPTIONS = [[[4, 5], [6]], [[7, 8, 9]], [], [[10], [11, 12], [13]]]


def epoch_of(captions, *, batch_size=4, max_length=20, seed=0, epoch=0, **more):
    """The batches of an epoch, as a list."""
    return list(CaptionBatches(captions, batch_size, max_length, seed).epoch(epoch, **more))


def unpacked(batch):
    """(image, inputs, targets) of each caption of a batch, one token after the other."""
    captions = []
    for number, index in enumerate(batch.image_index):
        mine = batch.caption_index == number
        captions.append(
            (
                int(batch.image_rows[index]),
                batch.inputs[mine].tolist(),
                batch.targets[mine].tolist(),
            )
        )
    return captions


def as_lists(batch):
    """A batch's fields as plain values."""
    return [field.tolist() if isinstance(field, torch.Tensor) else field for field in batch]


def test_batches_worked_by_hand():
    first, second = epoch_of(CAPTIONS, max_length=3, shuffle=False)
    assert first.image_rows.tolist() == [0, 1, 3]
    # longest first, and of one length in the order of the images: 4 5, 7 8, 6, 10
    assert first.image_index.tolist() == [0, 1, 0, 2]
    assert first.batch_sizes.tolist() == [4, 4, 2]
    assert first.caption_index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert first.image_tokens.tolist() == [[0, 2, 4, 6, 8], [1, 5, 9, 0, 0], [3, 7, 0, 0, 0]]
    assert first.token_place.tolist() == [0, 5, 1, 10, 2, 6, 3, 11, 4, 7]
    assert first.inputs.tolist() == [1, 1, 1, 1, 4, 7, 6, 10, 5, 8]
    assert first.targets.tolist() == [4, 7, 6, 10, 5, 8, 2, 2, 2, 2]  # 9 is beyond step 3
    # of all captions' tokens with <SOS> and <EOS>, one after the other: 1 4 5 2, 1 6 2, 1 7 8 2, 1 10 2
    assert first.places.tolist() == [0, 7, 4, 11, 1, 8, 5, 12, 2, 9]
    assert (first.num_tokens, first.num_captions, first.weight) == (10, 4, 1.0)
    assert second.image_rows.tolist() == [3]
    assert unpacked(second) == [(3, [1, 11, 12], [11, 12, 2]), (3, [1, 13], [13, 2])]
    assert (second.num_tokens, second.num_captions) == (5, 2)
    tensors = [field for field in (*first, *second) if isinstance(field, torch.Tensor)]
    assert len(tensors) == 18 and all(tensor.dtype == torch.int64 for tensor in tensors)


def random_captions(images, seed=0):
    """Per image 0 to 5 captions of 0 to 12 words."""
    draw = random.Random(seed)
    return [
        [
            [draw.randrange(4, 99) for _ in range(draw.randrange(13))]
            for _ in range(draw.randrange(6))
        ]
        for _ in range(images)
    ]


def test_a_batch_is_what_torch_packs_of_its_captions_longest_first():
    captions = random_captions(30)
    for batch in epoch_of(captions, batch_size=16, max_length=9, shuffle=False):
        owners = batch.image_rows[batch.image_index]
        rows = [inputs for _, inputs, _ in unpacked(batch)]
        lengths = torch.tensor([len(row) for row in rows])
        assert (lengths.diff() <= 0).all() and lengths[0] <= 9
        packed = pack_sequence([torch.tensor(row) for row in rows])
        assert torch.equal(batch.inputs, packed.data)
        assert torch.equal(batch.batch_sizes, packed.batch_sizes)
        targets = pack_sequence([torch.tensor([*row[1:], Vocabulary.eos]) for row in rows])
        assert torch.equal(batch.targets, targets.data)
        numbers = [torch.full((int(length),), n) for n, length in enumerate(lengths)]
        assert torch.equal(batch.caption_index, pack_sequence(numbers).data)
        assert batch.batch_sizes[0] == len(owners) == batch.num_captions
        assert int(batch.batch_sizes.sum()) == len(batch.inputs) == batch.num_tokens


def test_each_images_tokens_stand_together_and_are_found_again():
    """Three images with 2, 1 and 3 captions, tokens step by step: which they are, and where."""
    image_of = torch.tensor([2, 0, 2, 1, 0, 2, 2])
    image_tokens, token_place = by_image(image_of)
    assert image_tokens.tolist() == [[1, 4, 0, 0], [3, 0, 0, 0], [0, 2, 5, 6]]
    assert token_place.tolist() == [8, 0, 9, 4, 1, 10, 11]
    assert torch.equal(image_tokens.flatten()[token_place], torch.arange(7))


def test_an_epoch_is_decided_by_seed_and_number_alone():
    captions = [[[10 * image + k] for k in range(1 + image % 5)] for image in range(1, 39)]
    batches = CaptionBatches(captions, 7, 20, seed=3)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    straight = [as_lists(batch) for batch in batches.epoch(5)]
    assert torch.equal(state, torch.get_rng_state())
    assert len(straight) == batches.num_batches == 17  # 114 captions
    assert straight == [
        as_lists(batch) for batch in epoch_of(captions, batch_size=7, seed=3, epoch=5)
    ]
    for number in (1, 16, 17, 30):
        rest = [as_lists(batch) for batch in batches.epoch(5, start=7 * number)]
        assert rest == straight[number:]
        assert len(rest) == max(0, batches.num_left(7 * number))
    next_epoch = [as_lists(batch) for batch in batches.epoch(6)]
    other_seed = [as_lists(batch) for batch in epoch_of(captions, batch_size=7, seed=4, epoch=5)]
    assert straight != next_epoch != other_seed != straight


def test_an_epoch_goes_on_in_batches_of_another_size():
    """Three batches of four captions are read; batches of seven bring the other eight, once each."""
    captions = [[[10 + image], [30 + image]] for image in range(10)]
    small, large = (CaptionBatches(captions, size, 9, seed=1) for size in (4, 7))
    read = [*itertools.islice(small.epoch(0), 3), *large.epoch(0, start=12)]
    assert [batch.num_captions for batch in read] == [4, 4, 4, 7, 1] and large.num_left(12) == 2
    words = [word for batch in read for word in batch.inputs.tolist() if word >= 10]
    assert sorted(words) == [*range(10, 20), *range(30, 40)]


def test_every_caption_comes_once_with_its_own_image():
    captions = [[[1000 * image + k] for k in range(5)] for image in range(1, 30)]
    seen = []
    for batch in epoch_of(captions, batch_size=8, epoch=2):
        for image, (_, word), targets in unpacked(batch):
            assert word // 1000 == image + 1 and targets == [word, Vocabulary.eos]
            seen.append(word)
    assert sorted(seen) == sorted(caption[0] for image in captions for caption in image)


def test_captions_of_one_image_stay_together():
    captions = [[[image]] * 5 for image in range(4, 30)]
    order = [image for batch in epoch_of(captions, batch_size=8) for image, _, _ in unpacked(batch)]
    assert [image for image, _ in itertools.groupby(order)] == list(dict.fromkeys(order))
    assert order != sorted(order)  # but the images are shuffled


def test_no_captions_are_refused():
    with pytest.raises(ValueError, match="no captions"):
        CaptionBatches([[], []], 4, 9, seed=0)


@pytest.mark.parametrize("epoch", [0, 1])
def test_half_of_the_images_are_mirrored_anew_each_epoch(epoch):
    batches = CaptionBatches([[[4]]] * 20_000, 8, 9, seed=1)
    mirrored = batches.mirrored(epoch)
    assert mirrored.dtype == torch.bool
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.012)  # three deviations
    assert torch.equal(mirrored, batches.mirrored(epoch))
    assert not torch.equal(mirrored, batches.mirrored(epoch + 1))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_the_shares_of_several_processes_hold_every_caption_once(monkeypatch, world_size, start):
    captions = [
        [[100 * image + k] * (1 + k) for k in range(1 + image % 3)] for image in range(1, 20)
    ]
    options = {"batch_size": 7, "max_length": 3, "epoch": 4, "start": start}
    whole = epoch_of(captions, **options)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    shares = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(epoch_of(captions, **options))
    for batch, *parts in zip(whole, *shares, strict=True):
        counted = [part for part in parts if part.weight]
        assert {part.weight for part in counted} == {world_size}
        together = itertools.chain.from_iterable(unpacked(part) for part in counted)
        assert sorted(together) == sorted(unpacked(batch))
        assert sum(len(part.inputs) for part in counted) == batch.num_tokens
        for part in parts:
            assert (part.num_tokens, part.num_captions) == (batch.num_tokens, batch.num_captions)
            assert part.image_rows.tolist() == list(dict.fromkeys(part.image_rows.tolist()))


def test_a_process_without_captions_computes_another_ones_with_weight_0(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    weights = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        (batch,) = epoch_of([[[4, 5]], [[6]]], shuffle=False)
        weights.append(batch.weight)
        assert len(batch.inputs) > 0 and (batch.num_captions, batch.num_tokens) == (2, 5)
    assert sorted(weights) == [0.0, 3.0, 3.0]


def test_the_whole_is_not_divided_among_processes(monkeypatch):
    captions = [[[4, 5], [6]], [[7, 8, 9]], [[], [10]]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    batch = CaptionBatches(captions, 2, 9, seed=0).whole()
    (alone,) = batches_in_order(captions)
    assert all(torch.equal(*pair) for pair in zip(batch[:8], alone[:8], strict=True))
    assert batch.image_rows.tolist() == [0, 1, 2] and (batch.num_captions, batch.weight) == (5, 1)


def batches_in_order(captions):
    """The one batch of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        return epoch_of(captions, batch_size=9, shuffle=False)


def test_sizes_stay_on_the_cpu_when_a_batch_goes_to_a_device():
    (batch,) = epoch_of(CAPTIONS, batch_size=9)
    there = batch.to(torch.device("meta"))
    moved = [name for name, value in there._asdict().items() if getattr(value, "is_meta", False)]
    on_device = ["image_index", "caption_index", "inputs", "targets", "image_tokens", "token_place"]
    assert sorted(moved) == sorted(on_device)
    assert there.batch_sizes is batch.batch_sizes and there.num_tokens == batch.num_tokens


def test_crops_lie_inside_the_image_and_show_half_of_it_or_more():
    batches = CaptionBatches([[[5]]] * 2000, 4, 10, seed=1)
    left, top, width, height = batches.crops(3).T
    assert (left >= 0).all() and (left + width <= 1 + 1e-6).all()
    assert (top >= 0).all() and (top + height <= 1 + 1e-6).all()
    area, ratio = width * height, width / height
    assert area.max() > 0.97 and area.min() > 0.5 - 1e-6
    assert 0.7 < area.mean() < 0.8
    assert (ratio < 4 / 3 + 1e-5).all() and (ratio > 3 / 4 - 1e-5).all()
    assert abs(float(torch.corrcoef(torch.stack([left, batches.mirrored(3).float()]))[0, 1])) < 0.08
