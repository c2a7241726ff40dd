"""caption_batches.py: words of a caption, the vocabulary, and batches of an epoch."""

import random
import unicodedata

import pytest
import torch

import caption_batches
from caption_batches import CaptionBatches, Vocabulary, tokenize

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


def test_batches_worked_by_hand():
    batches = list(
        CaptionBatches(CAPTIONS, batch_size=4, max_length=3, seed=0).epoch(0, shuffle=False)
    )
    first, second = batches
    assert first.image_rows.tolist() == [0, 1, 3]
    assert first.image_index.tolist() == [0, 0, 1, 2]
    assert first.captions.tolist() == [
        [1, 4, 5, 2],
        [1, 6, 2, 0],
        [1, 7, 8, 2],  # 9 is beyond step 3
        [1, 10, 2, 0],
    ]
    assert first.lengths.tolist() == [3, 2, 3, 2]
    assert second.image_rows.tolist() == [3]
    assert second.captions.tolist() == [[1, 11, 12, 2], [1, 13, 2, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in first)


def _sequence(batches):
    return [[tensor.tolist() for tensor in batch] for batch in batches]


def test_an_epoch_is_decided_by_seed_and_number_alone():
    captions = [[[10 * image + k] for k in range(1 + image % 5)] for image in range(1, 40)]
    batches = CaptionBatches(captions, 7, 20, seed=3)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    straight = _sequence(batches.epoch(5))
    assert torch.equal(state, torch.get_rng_state())
    assert len(straight) == batches.num_batches == 17  # 114 captions
    assert straight == _sequence(CaptionBatches(captions, 7, 20, seed=3).epoch(5))
    for start in (1, 16, 17, 30):
        assert _sequence(batches.epoch(5, start=start)) == straight[start:]
    assert straight != _sequence(batches.epoch(6))
    assert straight != _sequence(CaptionBatches(captions, 7, 20, seed=4).epoch(5))


def test_every_caption_comes_once_with_its_own_image():
    captions = [[[1000 * image + k] for k in range(5)] for image in range(1, 30)]
    seen = []
    for batch in CaptionBatches(captions, 8, 20, seed=0).epoch(2):
        owners = batch.image_rows[batch.image_index]
        words = batch.captions[:, 1]
        assert torch.equal(words // 1000, owners + 1)
        seen += words.tolist()
        assert (batch.image_index.diff() >= 0).all()  # captions of an image lie together
    assert sorted(seen) == sorted(caption[0] for image in captions for caption in image)
