"""The GPT-2 decoder against transformers itself: its forward pass, its maps, its `generate`."""

import copy
import functools
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from small_runs import CPU, make_run
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caption_options
import clip_gpt2
import flickr_image_caption as program
import gradient_maps
from caption_batches import CaptionBatches, SubwordVocabulary, Vocabulary, vocabulary_from_plain
from caption_decoding import generate
from clip_gpt2 import GPT2Decoder, PrefixGPT2Decoder

transformers = pytest.importorskip("transformers", reason="requirements-hub.txt is not installed")

WORDS = Vocabulary([*Vocabulary.SPECIALS, *(f"word{n}" for n in range(30))])
CAPTIONS = [[[5, 6, 7], [8, 9], [4]], [[10, 11, 12, 13, 14]], [[7, 8], [9, 10, 11, 12]]]
CHANNELS, CELLS, WIDTH, LAYERS, HEADS = 12, 6, 32, 3, 4
KINDS = {"cross": GPT2Decoder, "prefix": PrefixGPT2Decoder}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_decoder(kind="cross", **more):
    """A decoder whose words depend on the picture, in eval mode."""
    torch.manual_seed(0)
    if kind == "prefix":
        more["prefix_length"] = 3
    decoder = KINDS[kind](CHANNELS, len(WORDS), WIDTH, LAYERS, HEADS, **more).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return decoder


def make_data(captions=CAPTIONS):
    """Features (N, P, F) and all captions as one batch."""
    torch.manual_seed(1)
    return torch.randn(len(captions), CELLS, CHANNELS), CaptionBatches(captions, 99, 40, 0).whole()


def plain_model(decoder):
    """The same weights in a model that knows nothing of ours, with attention written out."""
    settings = decoder.gpt2.config.to_dict() | {"attn_implementation": "eager"}
    settings["activation_function"] = "gelu_new"  # as GPT-2 was published
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    model.load_state_dict(decoder.gpt2.state_dict())
    return model.eval()


def alone(decoder, features, tokens, **how):
    """What transformers makes of one caption's tokens (T,) and its image's features (P, F)."""
    model, tokens = plain_model(decoder), torch.as_tensor(tokens).unsqueeze(0)
    if isinstance(decoder, PrefixGPT2Decoder):
        words = model.transformer.wte(tokens)
        words = torch.cat([decoder.prefix(features.unsqueeze(0)), words], dim=1)
        return model(inputs_embeds=words, **how).logits[0, decoder.prefix_length :]
    seen = decoder.project(decoder.standardise(features.unsqueeze(0)))
    output = model(input_ids=tokens, encoder_hidden_states=seen, **how)
    return output if how else output.logits[0]


@pytest.mark.parametrize("group", [1, 2, 64])
@every_kind
@torch.no_grad()
def test_a_packed_batch_is_what_transformers_makes_of_each_caption_alone(kind, group, monkeypatch):
    monkeypatch.setattr(clip_gpt2, "GROUP", group)
    decoder, (features, batch) = make_decoder(kind), make_data()
    logits, alphas = decoder(features, batch)
    padded, lengths = pad_packed_sequence(PackedSequence(logits, batch.batch_sizes), True)
    inputs, _ = pad_packed_sequence(PackedSequence(batch.inputs, batch.batch_sizes), True)
    assert alphas is None and len(lengths) == 6
    for row, (length, image) in enumerate(zip(lengths, batch.image_index, strict=True)):
        expected = alone(decoder, features[image], inputs[row, :length])
        torch.testing.assert_close(padded[row, :length], expected, atol=1e-5, rtol=0)


@every_kind
@torch.no_grad()
def test_padding_changes_no_loss(kind):
    """A long caption in the batch pads the others, of which the loss is the same to 1e-6."""
    decoder = make_decoder(kind)
    features, short = make_data()
    _, mixed = make_data([*CAPTIONS, [[4, 5, 6, 7, 8] * 7]])
    more = torch.cat([features, features[:1]])

    def nats(features, batch, image):
        log_probs = decoder(features, batch)[0].log_softmax(-1)
        taken = batch.image_index[batch.caption_index] == image
        return -log_probs.gather(1, batch.targets.unsqueeze(1)).squeeze(1)[taken].mean()

    for image in range(3):
        expected = float(nats(features, short, image))
        assert float(nats(more, mixed, image)) == pytest.approx(expected, abs=1e-6)


@every_kind
@torch.no_grad()
def test_step_by_step_is_teacher_forcing(kind):
    decoder, (features, _) = make_decoder(kind), make_data()
    tokens = torch.tensor([[1, 5, 6, 9], [1, 7, 7, 8], [1, 4, 30, 12]])
    state = decoder.start(features)
    for step in range(4):
        logits, state, _ = decoder.step(tokens[:, step : step + 1], state)
        for image in range(3):
            expected = alone(decoder, features[image], tokens[image, : step + 1])[-1]
            torch.testing.assert_close(logits[image, 0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_alphas_are_transformers_cross_attentions():
    decoder, (features, _) = make_decoder(), make_data()
    tokens = torch.tensor([[1, 5, 6, 9], [1, 7, 7, 8], [1, 4, 30, 12]])
    for layer in range(LAYERS + 1):
        decoder.attention_layer, state = layer, decoder.start(features)
        for step in range(4):
            _, state, alphas = decoder.step(tokens[:, step : step + 1], state)
            torch.testing.assert_close(alphas.sum(-1), torch.ones(3, 1))
        for image in range(3):
            output = alone(decoder, features[image], tokens[image], output_attentions=True)
            every = torch.stack(output.cross_attentions)[:, 0, :, -1].mean(1)  # (layers, P)
            expected = every[layer - 1] if layer else every.mean(0)
            torch.testing.assert_close(alphas[image, 0], expected, atol=1e-5, rtol=0)


@functools.cache
@torch.enable_grad()
def taught_decoder():
    """One that has seen each of some pictures with a caption, of 1 to 8 words, and knows it a little."""
    decoder = make_decoder(drop_prob=0.0).train()
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(24, CELLS, CHANNELS, generator=generator)
    words = torch.randint(4, 12, (24, 8), generator=generator).tolist()
    captions = [[row[: 1 + number % 8]] for number, row in enumerate(words)]
    batch = CaptionBatches(captions, 99, 40, 0).whole()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        program.cross_entropy(decoder(features, batch)[0], batch)[0].backward()
        optimizer.step()
    return decoder.eval()


def transformers_search(decoder, features, **how):
    """What generate of transformers finds: (words of each hypothesis, None where it was cut; scores)."""
    vit = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=32, patch_size=16,
    )  # fmt: skip
    pair = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(vit, add_pooling_layer=False), decoder=plain_model(decoder)
    ).eval()
    seen = decoder.project(decoder.standardise(features))
    found = pair.generate(
        encoder_outputs=transformers.modeling_outputs.BaseModelOutput(seen),
        decoder_start_token_id=WORDS.sos, bos_token_id=WORDS.sos, eos_token_id=WORDS.eos,
        pad_token_id=WORDS.pad, do_sample=False, suppress_tokens=[WORDS.pad, WORDS.sos, WORDS.unk],
        return_dict_in_generate=True, output_scores=True, **how,
    )  # fmt: skip
    rows = [row[1:] for row in found.sequences.tolist()]
    words = [row[: row.index(WORDS.eos)] if WORDS.eos in row else None for row in rows]
    return words, found.get("sequences_scores")


@pytest.mark.parametrize("penalty", [0.0, 0.8, 1.0, -0.5])
@pytest.mark.parametrize("beam_size", [2, 3, 5])
@torch.no_grad()
def test_the_full_beam_finds_what_generate_finds(beam_size, penalty):
    """All captions of the beam: also those after others have ended, where a narrowing beam departs.

    But for pictures of which one was cut: generate takes it for whole, ours come after those that ended.
    """
    decoder = taught_decoder()
    features = torch.randn(40, CELLS, CHANNELS, generator=torch.Generator().manual_seed(3))
    expected, scores = transformers_search(
        decoder, features, num_beams=beam_size, num_return_sequences=beam_size, max_new_tokens=40,
        length_penalty=penalty, early_stopping="never",
    )  # fmt: skip
    how = {"beam_size": beam_size, "length_penalty": penalty, "max_length": 40}
    found = generate(decoder, features, WORDS, algorithm="full_beam", num_captions=beam_size, **how)
    expected = [
        expected[start : start + beam_size] for start in range(0, 40 * beam_size, beam_size)
    ]
    whole = [image for image, captions in enumerate(expected) if None not in captions]
    ours = [[h.tokens for h in image] for image in found]
    assert len(whole) > 30 and [ours[i] for i in whole] == [expected[i] for i in whole]
    for image in whole:
        theirs = scores.view(40, beam_size)[image].tolist()
        assert [h.score for h in found[image]] == pytest.approx(theirs, abs=1e-4)
    best = {tuple(ours[image][0]) for image in whole}
    assert len(best) > 8 and len({*map(len, best)}) > 2
    narrow = generate(decoder, features, WORDS, algorithm="beam", num_captions=beam_size, **how)
    assert [[h.tokens for h in image] for image in narrow] != ours


@torch.no_grad()
def test_greedy_decoding_finds_what_generate_finds():
    decoder = taught_decoder()
    features = torch.randn(40, CELLS, CHANNELS, generator=torch.Generator().manual_seed(3))
    expected, _ = transformers_search(decoder, features, num_beams=1, max_new_tokens=40)
    ours = generate(decoder, features, WORDS, algorithm="greedy", max_length=40)
    assert [best.tokens for (best,) in ours] == expected
    assert len({*map(len, expected)}) > 2


@torch.no_grad()
def test_the_pictures_keys_are_shared_by_all_hypotheses_and_never_copied():
    decoder, (features, _) = make_decoder(), make_data()
    state = decoder.start(features)
    first = [part.data_ptr() for layer in state[0] for part in layer]
    for width in (1, 4, 4):
        _, state, _ = decoder.step(torch.full((3, width), 5), state)
        own = tuple(
            tuple(part[:, :1].expand(-1, 4, -1, -1, -1) for part in layer) for layer in state[1]
        )
        state = state[0], own
    assert [part.data_ptr() for layer in state[0] for part in layer] == first
    assert state[0][0][0].shape == (3, HEADS, CELLS, WIDTH // HEADS)
    assert state[1][0][0].shape == (3, 4, HEADS, 3, WIDTH // HEADS)


@pytest.mark.parametrize("trainable", ["cross", "decoder", "all"])
@every_kind
def test_what_learns_is_in_the_optimizer_and_nothing_else(kind, trainable):
    decoder = make_decoder(kind, trainable=trainable)
    flags = "--decoder gpt2 --gpt2_model scratch --weight_decay 0.1 --learning_rate 0.01"
    options = caption_options.parse_args(flags.split())
    before = copy.deepcopy(decoder.state_dict())
    run = make_run(decoder, options)
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    groups = [
        {names[parameter] for parameter in group["params"]}
        for group in run.state.optimizer.param_groups
    ]
    learning = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert groups[0] | groups[1] == learning and not groups[0] & groups[1]
    embeddings = {"gpt2.transformer.wte.weight", "gpt2.transformer.wpe.weight"}
    reads = {n for n in names.values() if "project" in n or "cross" in n}
    expected = {"cross": reads, "decoder": {*names.values()} - embeddings, "all": {*names.values()}}
    assert learning == expected[trainable]
    assert not groups[0] & embeddings and all("weight" in name for name in groups[0])
    features, batch = make_data()
    program.train_step(run, features, batch)
    moved = {n for n, tensor in decoder.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved - {"gpt2.lm_head.weight"} == learning


def gradients(decoder, features, batches):
    """Of the mean loss over all tokens, summed over parts of a batch."""
    decoder.zero_grad()
    for part, images in batches:
        logits, _ = decoder(features[images], part)
        program.cross_entropy(logits, part)[0].backward()
    return [parameter.grad.clone() for parameter in decoder.parameters()]


@every_kind
def test_checkpointed_layers_and_smaller_groups_have_the_same_gradients(kind, monkeypatch):
    decoder, (features, batch) = make_decoder(kind, drop_prob=0.0).train(), make_data()
    saving = make_decoder(kind, drop_prob=0.0, gradient_checkpointing=True).train()
    assert saving.gpt2.transformer.gradient_checkpointing
    whole = [(batch, slice(None))]
    expected, found = (gradients(each, features, whole) for each in (decoder, saving))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(clip_gpt2, "GROUP", 2)
    torch.testing.assert_close(gradients(decoder, features, whole), expected, atol=1e-5, rtol=1e-4)


@every_kind
def test_maps_by_gradients_are_of_any_kind(kind):
    decoder, (features, _) = make_decoder(kind), make_data()
    best = [image[0] for image in generate(decoder, features, WORDS, max_length=5, min_length=3)]
    mapped = gradient_maps.gradient_maps(decoder, features.clone(), best, WORDS, CPU)
    maps = torch.cat([hypothesis.attention for hypothesis in mapped])
    torch.testing.assert_close(maps.sum(1), torch.ones(len(maps)))
    if kind == "cross":
        assert maps.std(1).min() > 0.001
    else:  # the mean is all it reads: every cell counts alike, by what sets it apart
        assert maps.shape[1] == CELLS


# ------------------------------------------------------------------------------------ models by their name


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a tiny GPT-2 with a tokenizer of its own, as the hub would give it."""
    import tokenizers

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = ["a brown dog runs through the grass", "two children play in a café"] * 3
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    torch.manual_seed(5)
    size = tokenizer.get_vocab_size()
    config = transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def values_of(*flags):
    """Every option's value of a run with GPT-2."""
    return caption_options.parse_args(["--decoder", "gpt2", *map(str, flags)]).as_dict()


def test_a_published_models_weights_are_taken_and_cross_attention_begins_anew(published):
    values = GPT2Decoder.settle(values_of("--gpt2_model", published))
    assert [values[f"gpt2_{name}"] for name in ("width", "layers", "heads")] == [16, 2, 2]
    vocabulary = GPT2Decoder.new_vocabulary(values, [])
    decoder = program.build_decoder(values, CHANNELS, len(vocabulary))
    decoder.begin(values)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(published).state_dict()
    ours = decoder.gpt2.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all("cross" in name for name in ours.keys() - theirs.keys())
    assert len(ours) > len(theirs)


def test_a_tokenizers_captions_are_cut_put_together_and_kept_in_a_checkpoint(published):
    vocabulary = clip_gpt2.read_vocabulary(str(published))
    for text in ("a brown dog runs", "two children in a café"):
        ids = vocabulary.encode(text)
        assert vocabulary.decode([*ids, vocabulary.eos, *ids]) == text
        assert "".join(vocabulary.words[index] for index in ids) == text
    assert vocabulary.encode("A brown DOG, runs!") == vocabulary.encode("a brown dog runs")
    assert vocabulary.pad == vocabulary.sos == vocabulary.eos and vocabulary.unk is None
    again = vocabulary_from_plain(vocabulary.to_plain())
    assert isinstance(again, SubwordVocabulary) and again.words == vocabulary.words
    assert len({*vocabulary.words}) == len(vocabulary)
    batches = CaptionBatches([[[7, 8]]], 1, 9, 0, vocabulary.sos, vocabulary.eos)
    assert batches.tokens.tolist() == [vocabulary.eos, 7, 8, vocabulary.eos]
    for damaged in ("{", '{"version": "1.0"}', vocabulary.tokenizer_json.replace("<|end", "<|e")):
        with pytest.raises(ValueError, match="tokenizer: "):
            vocabulary_from_plain({"tokenizer": damaged})


def test_what_a_tokenizer_defaults_to(published):
    captions = ["a dog", "a dog", "a cat"]
    scratch = values_of("--gpt2_model", "scratch", "--freq_threshold", 2)
    assert GPT2Decoder.new_vocabulary(scratch, captions).words[4:] == ["a", "dog"]
    own = values_of("--gpt2_model", published)
    assert isinstance(GPT2Decoder.new_vocabulary(own, captions), SubwordVocabulary)
    named = values_of("--gpt2_model", "scratch", "--gpt2_tokenizer", published)
    assert isinstance(GPT2Decoder.new_vocabulary(named, captions), SubwordVocabulary)


class Runs:
    """What a hostile pickle would do."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def changed_copy(published, folder, **settings):
    """A model's folder whose config.json says something else."""
    config = transformers.GPT2Config.from_pretrained(published)
    for name, value in settings.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"activation_function": "relu"},
            "has activation_function relu, where GPT-2 has gelu_pytorch",
        ),
        ({"n_positions": 64}, "has n_positions 64, where GPT-2 has 1024"),
        ({"n_inner": 99}, "has n_inner 99"),
    ],
)
def test_a_model_that_is_no_plain_gpt2_is_refused(published, tmp_path, settings, fault):
    changed_copy(published, tmp_path, **settings)
    with pytest.raises(ValueError, match=f"--gpt2_model {tmp_path}: {fault}"):
        clip_gpt2.model_sizes(str(tmp_path))


def test_what_cannot_be_had_is_named_with_what_to_give(published, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="--gpt2_model no/such: neither given as files"):
        clip_gpt2.model_sizes("no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: its config\.json cannot be read"):
        clip_gpt2.model_sizes(str(tmp_path / "empty"))
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert: is a bert, not a gpt2"):
        clip_gpt2.model_sizes(str(tmp_path / "bert"))
    with pytest.raises(ValueError, match=r"--gpt2_tokenizer .*empty: has no tokenizer"):
        clip_gpt2.read_vocabulary(str(tmp_path / "empty"))
    pickled = changed_copy(published, tmp_path / "pickled")
    values = GPT2Decoder.settle(values_of("--gpt2_model", pickled))
    decoder = program.build_decoder(values, CHANNELS, 300)
    with pytest.raises(ValueError, match=r"no weights: the folder needs .* model\.safetensors"):
        decoder.begin(values)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), 2))
    with pytest.raises(ValueError, match=r"pickled: its weights cannot be read"):
        decoder.begin(values)
    assert not (tmp_path / "ran").exists()
    values = GPT2Decoder.settle(values_of("--gpt2_model", published))
    decoder = program.build_decoder(values, CHANNELS, 299)
    with pytest.raises(ValueError, match=r"knows \d+ tokens, and the vocabulary has 299"):
        decoder.begin(values)


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    clip_gpt2.import_transformers.cache_clear()
    with pytest.raises(ValueError, match=r"transformers: pip install -r requirements-hub\.txt"):
        GPT2Decoder.settle(values_of("--gpt2_model", "scratch"))
