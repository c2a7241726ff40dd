"""CLIPScore: the formula by hand, transformers' own cosines, a folder that is no CLIP."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_command_line import refused

import clip_score

transformers = pytest.importorskip("transformers", reason="requirements-hub.txt")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "do", "dog</w>"]
MERGES = "#version: 0.2\nd o\ndo g</w>\n"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def save_clip(folder, seed=3):
    """A folder of a tiny CLIP that reads English letters, as save_pretrained leaves it. Returns the model."""
    folder = Path(folder)
    words = {token: n for n, token in enumerate([*TOKENS, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text(MERGES)
    end = words["<|endoftext|>"]
    text = SIZES | {"vocab_size": len(words), "max_position_embeddings": 32, "pad_token_id": end}
    text |= {"bos_token_id": end - 1, "eos_token_id": end}
    vision = SIZES | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return model


def save_pictures(folder, count):
    paths = []
    for number in range(count):
        pixels = torch.randint(0, 256, (6, 9, 3), generator=torch.Generator().manual_seed(number))
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels.byte().numpy()).resize((60, 40)).save(paths[-1])
    return paths


CAPTIONS = ["a dog runs", "two cats", "a dog runs"]
REFERENCES = [["the dog is running", "a dog"], ["cats sit"], ["a dog runs", "no cat"]]


def test_scores_are_those_of_the_paper_from_transformers_own_cosines(tmp_path, monkeypatch):
    model, paths = save_clip(tmp_path), save_pictures(tmp_path, 3)
    monkeypatch.setattr(clip_score, "BATCH", 2)
    judge = clip_score.ClipJudge(str(tmp_path), torch.device("cpu"))
    means, each = judge.score(paths, CAPTIONS, REFERENCES)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    for number, (path, caption) in enumerate(zip(paths, CAPTIONS, strict=True)):
        texts = ["A photo depicts " + text for text in (caption, *REFERENCES[number])]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        pixels = processor(Image.open(path), return_tensors="pt")
        with torch.inference_mode():
            whole = model(**inputs, **pixels)
        cosine = float(whole.logits_per_image[0, 0] / model.logit_scale.detach().exp())
        words = whole.text_embeds / whole.text_embeds.norm(dim=1, keepdim=True)
        nearest = max(0.0, float((words[1:] @ words[0]).max()))
        clip = 2.5 * max(0.0, cosine)
        assert each[number]["CLIPScore"] == pytest.approx(clip, abs=1e-5)
        both = 2 * clip * nearest / (clip + nearest) if clip + nearest else 0.0
        assert each[number]["RefCLIPScore"] == pytest.approx(both, abs=1e-5)
    assert len({row["CLIPScore"] for row in each}) > 1  # not all cut off at 0
    for name in means:
        assert means[name] == pytest.approx(sum(row[name] for row in each) / 3, abs=1e-6)


def test_the_formula_by_hand(monkeypatch):
    """Cosines of 0.6 with the picture and 0.8 with the nearest reference; below 0 counts as 0."""
    judge = object.__new__(clip_score.ClipJudge)
    vectors = {"a": [1.0, 0.0], "b": [0.8, 0.6], "c": [-1.0, 0.0], "d": [0.0, -1.0]}
    monkeypatch.setattr(
        judge,
        "embed_texts",
        lambda texts: torch.tensor([vectors[text] for text in texts]),
        raising=False,
    )
    monkeypatch.setattr(
        judge, "embed_pictures", lambda paths: torch.tensor([[0.6, 0.8], [0.6, 0.8]]), raising=False
    )
    means, (first, second) = judge.score([1, 2], ["a", "d"], [["c", "b"], ["b", "a"]])
    assert first["CLIPScore"] == pytest.approx(2.5 * 0.6)
    assert first["RefCLIPScore"] == pytest.approx(2 * 1.5 * 0.8 / (1.5 + 0.8))
    assert second == {"CLIPScore": 0.0, "RefCLIPScore": 0.0}
    assert means["CLIPScore"] == pytest.approx(0.75)


def test_a_long_caption_is_cut_and_an_empty_one_is_scored(tmp_path):
    save_clip(tmp_path)
    judge = clip_score.ClipJudge(str(tmp_path), torch.device("cpu"))
    rows = judge.embed_texts(["a dog " * 50, "a dog " * 60, ""])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


def test_what_is_no_clip_is_refused_before_anything_is_captioned(tmp_path_factory, shop):
    folder = tmp_path_factory.mktemp("judge")
    lstm = Path("data").resolve().parent / "lstm/best.pt"

    def check(*said):
        flags = f"--mode test --output_dir out --clip_score {folder} --model_path"
        refused(flags, lstm, naming=said)

    save_clip(folder)
    whole = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(whole) | {"model_type": "siglip"}))
    check("model_type 'siglip' in its config.json, expected clip")
    (folder / "config.json").write_text(whole)
    (folder / "model.safetensors").rename(folder / "elsewhere")
    check(f"--clip_score {folder}: no weights")
    (folder / "elsewhere").rename(folder / "model.safetensors")
    words = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(words | {"zz": len(words)}))
    check("one of the two belongs to another model")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    check("has no tokenizer.json, nor vocab.json and merges.txt")
    (folder / "tokenizer.json").write_text("{")
    check("no tokenizer and image processor of a CLIP")
