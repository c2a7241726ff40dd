"""GPT-2 as a decoder: it looks at the picture by cross-attention, or reads it as a prefix.

    values |= model_sizes("gpt2")                  # layers, width and heads of a published model
    decoder = GPT2Decoder(768, 50257, **values)    # untrained
    decoder.begin(values)                          # with that model's weights

The model is transformers' own GPT2LMHeadModel; this room gives it pictures, and the search the two
parts of a state that it asks for. An optional extra: transformers is imported where it is needed.

Shapes: N images, K hypotheses of each, B = N * K, P grid cells, F feature channels, W width, T steps,
V tokens, D = W / heads.
[1] Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
[2] Vaswani et al. 2017, Attention Is All You Need.   [3] Mokady et al. 2021, ClipCap.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from caption_batches import SubwordVocabulary, Vocabulary
from feature_scale import StandardisedFeatures
from hub_encoders import open_folder, read_pretrained

POSITIONS = 1024  # that every published GPT-2 knows
SCRATCH, WORDS = "scratch", "words"  # --gpt2_model, --gpt2_tokenizer
GELU = {"gelu_new": "gelu_pytorch_tanh"}  # one function by two names, the second computed at once
GROUP = 64  # captions of like lengths that are padded together
ATTENTION_NAME = "captions_of_an_image"
NEEDED = "config.json and model.safetensors"


# ------------------------------------------------------------------------------- models by their name


@functools.cache
def import_transformers():
    """The package, with our attention known to it. Raises: ValueError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "--decoder gpt2 needs the package transformers: pip install -r requirements-hub.txt"
        ) from error
    from transformers.masking_utils import sdpa_mask

    transformers.AttentionInterface.register(ATTENTION_NAME, attend_by_image)
    transformers.AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    return transformers


def model_sizes(name):
    """What a published model decides: {option: value}. Raises: ValueError if it is no plain GPT-2."""
    transformers = import_transformers()
    folder = open_folder(name, "--gpt2_model", NEEDED)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--gpt2_model {name}: its config.json cannot be read ({reason})"
        ) from error
    if config.model_type != "gpt2":
        raise ValueError(f"--gpt2_model {name}: is a {config.model_type}, not a gpt2")
    plain = make_config(config.vocab_size, config.n_embd, config.n_layer, config.n_head, 0.0, True)
    for setting in ("n_positions", "n_inner", "activation_function", "scale_attn_weights",
                    "scale_attn_by_inverse_layer_idx", "layer_norm_epsilon"):  # fmt: skip
        actual, expected = getattr(config, setting), getattr(plain, setting)
        if GELU.get(actual, actual) != expected:
            raise ValueError(
                f"--gpt2_model {name}: has {setting} {actual}, where GPT-2 has {expected}"
            )
    return {
        "gpt2_width": config.n_embd,
        "gpt2_layers": config.n_layer,
        "gpt2_heads": config.n_head,
    }


def make_config(vocab_size, width, layers, heads, drop_prob, cross_attention):
    """The configuration of a GPT-2 of [1]."""
    transformers = import_transformers()
    return transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=drop_prob,
        embd_pdrop=drop_prob,
        attn_pdrop=drop_prob,
        activation_function=GELU["gelu_new"],
        add_cross_attention=cross_attention,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=ATTENTION_NAME,
    )


def has_tokenizer(folder):
    """Whether a folder has a tokenizer that transformers reads."""
    return any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json"))


def read_vocabulary(name):
    """The SubwordVocabulary of a model's tokenizer, by hub name or folder. Raises: ValueError."""
    transformers = import_transformers()
    how = {"files": (["tokenizer*.json", "vocab.json", "merges.txt"],), "is_whole": has_tokenizer}
    folder = open_folder(name, "--gpt2_tokenizer", "tokenizer.json", **how)
    if not has_tokenizer(folder):
        raise ValueError(f"--gpt2_tokenizer {name}: has no tokenizer.json, nor a vocab.json")
    try:
        tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder, local_files_only=True)
        return SubwordVocabulary(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--gpt2_tokenizer {name}: cannot be read ({reason})") from error


# ----------------------------------------------------------------------------------------- attention


def attend_by_image(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """transformers' attention function, where hypotheses of an image share its keys and values.

    query (B, heads, T, D), key and value of words (B, heads, t, D), of pictures (N, heads, P, D) ->
    output (B, T, heads, D), and in decoding the weights (B, heads, T, P) of what looks at the picture.
    """
    if module.is_cross_attention:
        watched = query.size(2) == 1 and not module.training
        output, weights = look_at_pictures(query, key, value, scaling, dropout, watched)
    else:
        causal = query.size(2) > 1 and attention_mask is None
        how = {"dropout_p": dropout, "is_causal": causal, "scale": scaling}
        output = F.scaled_dot_product_attention(query, key, value, attention_mask, **how)
        weights = None
    return output.transpose(1, 2), weights


def look_at_pictures(query, key, value, scaling, dropout, watched):
    """query (B, heads, T, D), key and value (N, heads, P, D) -> output, and weights if they are `watched`."""
    steps = query.size(2)
    # an image's hypotheses are as many rows of one query
    query = query.unflatten(0, (len(key), -1)).transpose(1, 2).flatten(2, 3)  # (N, heads, K T, D)

    def by_hypothesis(rows):
        return rows.unflatten(2, (-1, steps)).transpose(1, 2).flatten(0, 1)

    if not watched:
        how = {"dropout_p": dropout, "scale": scaling}
        return by_hypothesis(F.scaled_dot_product_attention(query, key, value, **how)), None
    weights = ((query @ key.transpose(-1, -2)).float() * scaling).softmax(dim=-1)
    return by_hypothesis(weights.type_as(value) @ value), by_hypothesis(weights)


def by_length(batch):
    """Yield a packed batch's captions in groups of like lengths: their numbers, a slice, and tokens (b, T).

    Behind a caption's end stand tokens that no token before them sees, and that nobody reads.
    """
    padded, lengths = pad_packed_sequence(
        PackedSequence(batch.inputs, batch.batch_sizes), batch_first=True
    )
    for first in range(0, len(lengths), GROUP):  # the longest caption of each comes first
        rows = slice(first, first + GROUP)
        yield rows, padded[rows, : int(lengths[first])]


def packed(padded, batch):
    """Values (b, T, ...) of every group of `by_length`, in their order -> of the batch's tokens (tokens, ...)."""
    lengths = [values.size(1) for values in padded]
    longest = torch.tensor(lengths).repeat_interleave(torch.tensor([len(v) for v in padded]))
    first = longest.cumsum(0) - longest  # place of each caption's first token among all
    sizes = batch.batch_sizes.tolist()  # captions that have a step: always the first ones
    places = torch.cat([first[:size] + step for step, size in enumerate(sizes)])
    values = torch.cat([values.flatten(0, 1) for values in padded])
    return values[places.to(values.device)]


# -------------------------------------------------------------------------------------- the decoders


class GPT2Decoder(StandardisedFeatures):
    """GPT-2 whose every layer also attends to the cells. Sources: [1] section 2.3; [2] section 3.1.

    It answers what a Decoder of flickr_image_caption.py does; `settle`, `begin` and `new_vocabulary`
    are what a model that was trained elsewhere has beside that.
    """

    options = (
        "gpt2_width", "gpt2_layers", "gpt2_heads", "drop_prob", "trainable", "gradient_checkpointing",
        "attention_layer",
    )  # fmt: skip
    reads_grid = True
    reads_class_token = True  # as transformers' VisionEncoderDecoderModel does
    beside_cells = ()
    cross_attention = True

    def __init__(
        self,
        feature_dim,
        vocab_size,
        gpt2_width,
        gpt2_layers,
        gpt2_heads,
        drop_prob=0.1,
        trainable="all",
        gradient_checkpointing=False,
        attention_layer=0,
    ):
        """
        Args:
            trainable: cross, decoder or all, as --trainable.
            attention_layer: the layer whose maps are shown, from 1; 0: the mean over all.
        Raises: ValueError when the sizes do not fit each other.
        """
        super().__init__(feature_dim)
        if gpt2_width % gpt2_heads:
            raise ValueError(f"--gpt2_heads {gpt2_heads} does not divide --gpt2_width {gpt2_width}")
        if attention_layer > gpt2_layers:
            raise ValueError(f"--attention_layer {attention_layer}: there are {gpt2_layers} layers")
        config = make_config(
            vocab_size, gpt2_width, gpt2_layers, gpt2_heads, drop_prob, self.cross_attention
        )
        self.gpt2 = import_transformers().GPT2LMHeadModel(config)
        self.attention_layer = attention_layer
        self.make_reader(feature_dim, gpt2_width)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(learns(name, trainable))
        if gradient_checkpointing:
            self.gpt2.activation_checkpointing_enable({"use_reentrant": False})

    def make_reader(self, feature_dim, width):
        """What turns features into something of the model's width."""
        self.project = nn.Linear(feature_dim, width)

    @staticmethod
    def settle(values):
        """Values of all options by name, with the sizes of a --gpt2_model that is published."""
        import_transformers()  # or say now that it is missing
        scratch = values["gpt2_model"] == SCRATCH
        return values if scratch else values | model_sizes(values["gpt2_model"])

    @staticmethod
    def new_vocabulary(values, captions):
        """The vocabulary of a new run: words of the training captions, or a tokenizer's tokens."""
        name = values["gpt2_tokenizer"]
        if name is None:
            name = WORDS if values["gpt2_model"] == SCRATCH else values["gpt2_model"]
        if name == WORDS:
            return Vocabulary.build(captions, values["freq_threshold"])
        return read_vocabulary(name)

    def begin(self, values):
        """Take the weights of the published model that --gpt2_model names; cross-attention begins anew.

        Raises: ValueError when its tokens are others than the vocabulary's, or there are no weights.
        """
        name = values["gpt2_model"]
        if name == SCRATCH:
            return
        folder = open_folder(name, "--gpt2_model", NEEDED)
        published = read_pretrained(
            import_transformers().GPT2LMHeadModel, folder, "--gpt2_model", NEEDED
        )
        tokens, known = self.gpt2.config.vocab_size, published.config.vocab_size
        if tokens != known:
            raise ValueError(
                f"--gpt2_model {name}: knows {known} tokens, and the vocabulary has {tokens}: "
                "give the model's own --gpt2_tokenizer"
            )
        self.gpt2.load_state_dict(published.state_dict(), strict=False)

    def param_groups(self, weight_decay):
        """For the optimizer: what learns. Biases, normalisations and embeddings do not decay."""
        learning = [each for each in self.named_parameters() if each[1].requires_grad]
        decays = [p for name, p in learning if p.ndim > 1 and not is_embedding(name)]
        others = [p for name, p in learning if p.ndim == 1 or is_embedding(name)]
        return [
            {"params": decays, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def forward(self, features, batch):
        """features (N, P, F), batch -> logits (tokens, V), None."""
        transformers = import_transformers()
        seen, pictures = self.look(features)
        hidden = []
        for rows, tokens in by_length(batch):
            images = batch.image_index[rows]
            of_captions = [tuple(part[images] for part in layer) for layer in pictures]
            pair = transformers.DynamicCache(), transformers.DynamicCache(of_captions)
            output = self.gpt2.transformer(
                input_ids=tokens,
                cache=transformers.EncoderDecoderCache(*pair),
                encoder_hidden_states=seen[images],  # looked at where layers are checkpointed
                use_cache=True,
            )
            hidden.append(output.last_hidden_state)
        return self.gpt2.lm_head(packed(hidden, batch)), None

    def look(self, features):
        """features (N, P, F) -> the cells (N, P, W), and each layer's keys and values of them."""
        seen = self.project(self.standardise(features))
        layers = (split_heads(block.crossattention, seen) for block in self.gpt2.transformer.h)
        return seen, tuple(layers)

    def start(self, features):
        """features (N, P, F) -> state: each layer's keys and values of the picture, and of no word yet."""
        seen, per_image = self.look(features)
        _, heads, _, size = per_image[0][0].shape
        none = seen.new_zeros(len(seen), 1, heads, 0, size)  # (N, K, heads, t, D)
        return per_image, tuple((none, none) for _ in per_image)

    def step(self, tokens, state):
        """tokens (N, K), state -> logits (N, K, V), state, alphas (N, K, P): the heads' mean."""
        per_image, own = state
        hidden, own, weights = self.one_step(tokens, own, per_image)
        chosen = weights[self.attention_layer - 1 :][:1] if self.attention_layer else weights
        alphas = torch.stack(chosen).mean((0, 2)).squeeze(1)  # (N * K, P)
        return self.gpt2.lm_head(hidden), (per_image, own), alphas.unflatten(0, tokens.shape)

    def one_step(self, tokens, own, per_image=None):
        """tokens (N, K) -> hidden (N, K, W), every layer's keys and values, its weights on the picture.

        own: each layer's keys and values (N, K, heads, t, D) of the tokens so far.
        """
        transformers = import_transformers()
        before = [tuple(part.flatten(0, 1) for part in layer) for layer in own]
        cache, seen = transformers.DynamicCache(before), None
        if per_image is not None:
            seen = per_image[0][
                0
            ]  # only that there is something to see matters: its keys are known
            pictures = transformers.DynamicCache(list(per_image))
            cache = transformers.EncoderDecoderCache(cache, pictures)
        output = self.gpt2.transformer(
            input_ids=tokens.reshape(-1, 1),
            cache=cache,
            encoder_hidden_states=seen,
            use_cache=True,
            output_attentions=per_image is not None,
        )
        written = getattr(output.cache, "self_attention_cache", output.cache).layers
        own = tuple(
            tuple(part.unflatten(0, tokens.shape) for part in (layer.keys, layer.values))
            for layer in written
        )
        hidden = output.last_hidden_state.view(*tokens.shape, -1)
        return hidden, own, output.get("cross_attentions")


class PrefixGPT2Decoder(GPT2Decoder):
    """GPT-2 that reads the picture as its first words. Source: [3] section 3.1, its MLP.

    Departure: what is read is the mean feature of any encoder.
    """

    options = (*GPT2Decoder.options[:-1], "prefix_length")
    reads_grid = False
    reads_class_token = False
    cross_attention = False

    def __init__(self, feature_dim, vocab_size, *sizes, prefix_length, **more):
        self.prefix_length = prefix_length
        super().__init__(feature_dim, vocab_size, *sizes, **more)

    def make_reader(self, feature_dim, width):
        """The mean feature -> as many words as the prefix is long."""
        size = self.prefix_length * width
        self.project = nn.Sequential(
            nn.Linear(feature_dim, size // 2), nn.Tanh(), nn.Linear(size // 2, size)
        )

    def prefix(self, features):
        """features (N, P, F) -> (N, prefix_length, W)."""
        words = self.project(self.standardise(features).mean(1))
        return words.unflatten(1, (self.prefix_length, -1))

    def forward(self, features, batch):
        """features (N, P, F), batch -> logits (tokens, V), None."""
        prefix, hidden = self.prefix(features), []
        for rows, tokens in by_length(batch):
            words = self.gpt2.transformer.wte(tokens)
            words = torch.cat([prefix[batch.image_index[rows]], words], dim=1)
            output = self.gpt2.transformer(inputs_embeds=words, use_cache=False)
            hidden.append(output.last_hidden_state[:, self.prefix_length :])
        return self.gpt2.lm_head(packed(hidden, batch)), None

    def start(self, features):
        """features (N, P, F) -> state: each layer's keys and values of the prefix."""
        prefix = self.prefix(features)
        output = self.gpt2.transformer(inputs_embeds=prefix, use_cache=True)
        layers = output.cache.layers
        return None, tuple((layer.keys.unsqueeze(1), layer.values.unsqueeze(1)) for layer in layers)

    def step(self, tokens, state):
        """tokens (N, K), state -> logits (N, K, V), state, None."""
        hidden, own, _ = self.one_step(tokens, state[1])
        return self.gpt2.lm_head(hidden), (None, own), None


def learns(name, trainable):
    """Whether --trainable lets a parameter learn; what reads the picture always does."""
    if trainable == "all" or "crossattention" in name or "ln_cross_attn" in name:
        return True
    if not name.startswith("gpt2."):
        return True
    return trainable == "decoder" and not is_embedding(name)


def is_embedding(name):
    """Whether a parameter is GPT-2's token or position embedding."""
    return "transformer.wte." in name or "transformer.wpe." in name


def split_heads(attention, seen):
    """The keys and values (N, heads, P, D) that a layer's cross-attention makes of seen (N, P, W)."""
    keys, values = attention.c_attn(seen).split(attention.split_size, dim=-1)
    return tuple(
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (keys, values)
    )
