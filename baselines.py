"""What the benchmark compares with: the plain way of each stage, and a tutorial's model.

The plain ways run the program's own model and are tested to equal it (tests/test_benchmark.py); the
tutorial's model is its own, as people train it who follow one. Both are float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import image_loading
from caption_batches import Vocabulary

# ----------------------------------------------------------------------------------- the plain ways


def plain_encoding(encoder, paths):
    """One image at a time through torchvision's own layers, float32 -> [(1, F, h, w)].

    Pictures are decoded in the same process.
    """
    features = []
    with torch.inference_mode():
        for path in paths:
            image = torch.from_numpy(image_loading.load_image(path, encoder.image_size))
            image = image.to(encoder.mean.device).permute(2, 0, 1).unsqueeze(0)
            image = (image / 255 - encoder.mean) / encoder.std
            features.append(encoder.trunk(image.contiguous()))
    return features


class Padded(NamedTuple):
    """B captions as textbooks keep them."""

    captions: object  # (B, T + 1) int64: <SOS>, words, <EOS>, then whatever: lengths tell
    lengths: object  # (B,) int64: words and <EOS>
    image_index: object  # (B,) int64: whose caption it is


def plain_logits(decoder, features, captions):
    """Teacher forcing word by word.

    features (B, P, F), captions (B, T) -> logits (B, T, V), alphas (B, T, P) or None where the
    decoder's own forward gives none.
    """
    logits, alphas, layers = [], [], None
    for tokens in captions.unbind(1):
        per_image, first = decoder.start(features)  # the features are projected anew for every word
        state = per_image, layers or first
        step_logits, (_, layers), step_alphas = decoder.step(tokens.unsqueeze(1), state)
        logits.append(step_logits.squeeze(1))
        alphas.append(step_alphas)
    penalised = alphas[0] is not None and not decoder.beside_cells
    return torch.stack(logits, 1), torch.cat(alphas, 1) if penalised else None


def plain_loss(logits, alphas, batch, training):
    """As `CrossEntropyObjective`: padded logits (B, T, V), alphas (B, T, P) or None -> loss ()."""
    steps = torch.arange(logits.size(1), device=logits.device)
    is_token = steps < batch.lengths.unsqueeze(1)  # (B, T)
    targets = batch.captions[:, 1:][is_token]
    loss = F.cross_entropy(logits[is_token], targets, label_smoothing=training.label_smoothing)
    if alphas is None:
        return loss
    received = (alphas * is_token.unsqueeze(-1)).sum(1)  # (B, P): of each cell, over a caption
    return loss + training.alpha_c * (1 - received).square().mean()


def plain_step(run, features, batch):
    """One update, as textbooks write `flickr_image_caption.train_step`. Returns its loss ()."""
    decoder, optimizer, training = run.captioner.decoder, run.state.optimizer, run.options.training
    features = features[batch.image_index]  # (B, P, F)
    logits, alphas = plain_logits(decoder, features, batch.captions[:, :-1])
    loss = plain_loss(logits, alphas, batch, training)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(decoder.parameters(), training.grad_clip)
    optimizer.step()
    return loss.detach()


def plain_gpt2(decoder):
    """A GPT2Decoder's weights in a model of transformers alone, with attention as it comes."""
    import transformers

    settings = decoder.gpt2.config.to_dict() | {"attn_implementation": "sdpa"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    model.load_state_dict(decoder.gpt2.state_dict())
    vit = transformers.ViTConfig(
        hidden_size=model.config.n_embd, num_hidden_layers=1, intermediate_size=8
    )
    encoder = transformers.ViTModel(vit, add_pooling_layer=False)  # which is not asked
    pair = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=model)
    return pair.to(decoder.feature_mean.device).eval()


def plain_generate(model, decoder, features, beam_size, min_length, max_length):
    """Captions of images (N, P, F), lists of tokens, by transformers' generate with `plain_gpt2`'s model."""
    from transformers.modeling_outputs import BaseModelOutput

    words = Vocabulary
    with torch.inference_mode():
        seen = decoder.project(decoder.standardise(features))
        found = model.generate(
            encoder_outputs=BaseModelOutput(seen),
            decoder_start_token_id=words.sos,
            bos_token_id=words.sos,
            eos_token_id=words.eos,
            pad_token_id=words.pad,
            suppress_tokens=[words.pad, words.sos, words.unk],
            num_beams=beam_size,
            min_new_tokens=min_length,
            max_new_tokens=max_length,
            length_penalty=0.0,
            do_sample=False,
        )
    ends = words.pad, words.eos
    return [[word for word in row[1:].tolist() if word not in ends] for row in found]


class PlainHypothesis(NamedTuple):
    """A caption begun: `layers` is the decoder's state after its last token but one."""

    log_prob: float
    tokens: list[int]  # <SOS> first
    layers: tuple | None  # per layer, hidden and cell (1, 1, H) each


def plain_beam_search(decoder, features, vocabulary, beam_size, min_length, max_length):
    """The best caption of one image (P, F), its features copied for every hypothesis.

    Returns: tokens, log_prob.
    """

    def has_ended(hypothesis):
        return hypothesis.tokens[-1] == vocabulary.eos

    beam = [PlainHypothesis(0.0, [vocabulary.sos], None)]  # best first
    with torch.inference_mode():
        for step in range(1, max_length + 1):
            if has_ended(beam[0]):
                break
            live = [hypothesis for hypothesis in beam if not has_ended(hypothesis)]
            log_probs, layers = plain_next_words(decoder, features, live)
            log_probs[:, [vocabulary.pad, vocabulary.sos, vocabulary.unk]] = -torch.inf
            if step <= min_length:
                log_probs[:, vocabulary.eos] = -torch.inf
            candidates = [hypothesis for hypothesis in beam if has_ended(hypothesis)]
            for row, hypothesis in enumerate(live):
                candidates += plain_extend(hypothesis, log_probs[row], layers, row, beam_size)
            beam = sorted(candidates, key=lambda each: each.log_prob, reverse=True)[:beam_size]
    best = max(filter(has_ended, beam), key=lambda each: each.log_prob, default=beam[0])
    return best.tokens[1 : len(best.tokens) - has_ended(best)], best.log_prob


def plain_next_words(decoder, features, live):
    """Log-probabilities (K, V) of what follows each hypothesis, and the layers that wrote them."""
    per_image, layers = decoder.start(features.expand(len(live), -1, -1))
    if live[0].layers is not None:
        each_layer = zip(*(hypothesis.layers for hypothesis in live), strict=True)
        layers = tuple(tuple(map(torch.cat, zip(*layer, strict=True))) for layer in each_layer)
    tokens = [[hypothesis.tokens[-1]] for hypothesis in live]
    tokens = torch.tensor(tokens, device=features.device)
    logits, (_, layers), _ = decoder.step(tokens, (per_image, layers))
    return logits.squeeze(1).log_softmax(-1), layers


def plain_extend(hypothesis, log_probs, layers, row, beam_size):
    """A hypothesis with each of its best next words; `row` of `layers` is its own."""
    layers = tuple(tuple(part[row : row + 1] for part in layer) for layer in layers)
    best = zip(*log_probs.topk(beam_size), strict=True)
    return [
        PlainHypothesis(hypothesis.log_prob + float(value), [*hypothesis.tokens, int(word)], layers)
        for value, word in best
    ]


# ---------------------------------------------------------------------------- what tutorials have


def tutorial_decoder(channels, width, num_words):
    """The layers of Xu et al. 2015 as tutorials build them: one LSTM cell, context of full width."""
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(num_words, width),
            "project_features": nn.Linear(channels, width),
            "project_hidden": nn.Linear(width, width),
            "score": nn.Linear(width, 1),
            "gate": nn.Linear(width, channels),
            "init_hidden": nn.Linear(channels, width),
            "init_cell": nn.Linear(channels, width),
            "cell": nn.LSTMCell(width + channels, width),
            "dropout": nn.Dropout(0.5),
            "head": nn.Linear(width, num_words),
        }
    )


def tutorial_context(decoder, features, hidden):
    """features (B, P, F), hidden (B, H) -> gated context (B, F), alphas (B, P)."""
    keys = decoder["project_features"](features)  # anew at every step
    energy = (keys + decoder["project_hidden"](hidden).unsqueeze(1)).relu()
    alphas = decoder["score"](energy).squeeze(2).softmax(1)
    context = (features * alphas.unsqueeze(2)).sum(1)
    return decoder["gate"](hidden).sigmoid() * context, alphas


def tutorial_logits(decoder, features, captions, lengths):
    """Teacher forcing of captions (B, T), longest first; captions that have ended leave the batch.

    features (B, P, F), lengths a list -> padded logits (B, T, V), alphas (B, T, P).
    """
    mean, words = features.mean(1), decoder["embed"](captions)
    hidden, cell = decoder["init_hidden"](mean), decoder["init_cell"](mean)
    logits = features.new_zeros(*captions.shape, decoder["head"].out_features)
    alphas = features.new_zeros(*captions.shape, features.size(1))
    for step in range(lengths[0]):
        live = sum(length > step for length in lengths)
        context, attended = tutorial_context(decoder, features[:live], hidden[:live])
        inputs = torch.cat([words[:live, step], context], 1)
        hidden, cell = decoder["cell"](inputs, (hidden[:live], cell[:live]))
        logits[:live, step] = decoder["head"](decoder["dropout"](hidden))
        alphas[:live, step] = attended
    return logits, alphas


def tutorial_step(decoder, optimizer, features, batch):
    """One update from a Padded batch, each caption with a copy of its features. Returns its loss ()."""
    lengths, order = batch.lengths.sort(descending=True)
    captions, features = batch.captions[order], features[batch.image_index[order]]
    lengths = lengths.tolist()
    logits, alphas = tutorial_logits(decoder, features, captions[:, : lengths[0]], lengths)
    logits = pack_padded_sequence(logits, lengths, batch_first=True).data
    targets = pack_padded_sequence(captions[:, 1:], lengths, batch_first=True).data
    loss = F.cross_entropy(logits, targets) + (1 - alphas.sum(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_value_(decoder.parameters(), 5.0)
    optimizer.step()
    return loss.detach()
