"""Models as folders: the same captions from our program, from transformers alone, and by way of a hub's stand-in."""

import base64
import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_command_line import refused
from test_end_to_end import ON_SAMPLE, TINY, listed, load, program, read_json, succeed, train
from test_hub_encoders import save_folder

import caption_options
import checkpoints
import flickr_image_caption as fic
import hub_models
import model_versions
from image_loading import load_batches

transformers = pytest.importorskip("transformers", reason="requirements-hub.txt")
pytest.importorskip("safetensors", reason="requirements-hub.txt")

WIDTHS = {"as the encoder": 16, "other": 24}  # of GPT-2: the encoder has 16 channels
CLIP = "--encoder clip --encoder_weights imagenet --cache_dir own_cache"


def gpt2(width=24):
    """Flags of a decoder that learns fast enough to look at pictures."""
    sizes = f"--gpt2_layers 2 --gpt2_width {width} --gpt2_heads 2"
    return f"--decoder gpt2 --gpt2_model scratch {sizes} --epochs 4 --learning_rate 0.02"


def clip_run(folder, kind="clip", width=24, *more):
    """The folder of a run with a tiny vision model of transformers and GPT-2."""
    save_folder(folder / kind, kind)
    return train(CLIP, f"--clip_model {folder / kind}", gpt2(width), *more, tiny=ON_SAMPLE)


def pictures():
    """Test pictures' files: PNG, because a large JPEG is decoded at a fraction of its size by us alone."""
    Path("png").mkdir(exist_ok=True)
    files = {name: Path("png", name).with_suffix(".png") for name in listed("test")}
    for name, file in files.items():
        Image.open(Path("data/sample/Images", name)).save(file)
    return list(files.values())


def captions(captioner, **decoding):
    """Each picture's best Hypothesis."""
    decoding = caption_options.parse_args([]).decoding._replace(max_length=12, **decoding)
    return [best for best, *_ in captioner.caption(pictures(), decoding)]


def same(first, second):
    """Whether two hypotheses are equal to the last bit."""
    maps = [each.attention for each in (first, second)]
    equal = maps[0] is maps[1] is None or torch.equal(*maps)
    return equal and first[:4] == second[:4]


ways = pytest.mark.parametrize(
    "decoding", [{"algorithm": "greedy"}, {"algorithm": "beam", "beam_size": 3}]
)


@ways
@pytest.mark.parametrize("kind", ["lstm", "attention", "adaptive", "gpt2"])
def test_a_model_of_any_decoder_is_the_same_when_it_is_read_again(kind, decoding, shop, tmp_path):
    best = shop / kind / "best.pt"
    assert hub_models.save_pretrained(best, tmp_path / "saved") == (
        "its encoder is not --encoder clip" if kind == "gpt2" else None
    )
    before, options = fic.load_captioner(best)
    again, same_options = fic.from_pretrained(tmp_path / "saved")
    pairs = zip(captions(before, **decoding), captions(again, **decoding), strict=True)
    assert all(same(*pair) for pair in pairs)
    paths = {"model_path": "best.pt"}
    ours, theirs = options.as_dict() | paths, same_options.as_dict() | paths
    assert ours == theirs
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    expected = {"captioner.json", "captioner.safetensors", "vocabulary.json", "scores.json"}
    assert files == expected | {"README.md"}


def test_a_folder_is_a_model_path_of_every_mode_but_goes_on_with_no_training(shop, tmp_path):
    best, saved = shop / "lstm/best.pt", tmp_path / "saved"
    hub_models.save_pretrained(best, saved)
    shown = [
        succeed("--mode caption --images data/sample/Images --model_path", path)
        for path in (best, saved)
    ]
    assert shown[0].replace(str(best), "") == shown[1].replace(str(saved / "captioner.json"), "")
    for path, folder in ((best, "a"), (saved, "b")):
        succeed(f"--mode test --output_dir {folder} --model_path", path)
    first, second = (read_json(f"{name}/test_metrics.json") for name in "ab")
    assert first["CIDEr"] == second["CIDEr"]
    refused("--model_path", saved, naming=["captioner.json", "--init_from"])
    train("--epochs 1 --init_from", saved)


def exact(folder):
    """Our captioner of a folder, computing as transformers does: not in bfloat16, where a CPU has it."""
    return fic.from_pretrained(folder, precision="float32")[0]


def plain(folder):
    """What transformers alone makes of a folder: (model, tokenizer, processor)."""
    model = transformers.VisionEncoderDecoderModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return model, transformers.AutoTokenizer.from_pretrained(folder), processor


def plain_captions(folder, **search):
    """Captions of the test pictures, and their scores, by transformers alone."""
    model, tokenizer, processor = plain(folder)
    images = [Image.open(path).convert("RGB") for path in pictures()]
    pixels = processor(images, return_tensors="pt").pixel_values
    how = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 12}
    found = model.generate(pixels, **how, **search)
    texts = tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
    return [text.strip() for text in texts], found


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_transformers_alone_gives_the_same_captions(kind, width, shop, tmp_path):
    folder = clip_run(tmp_path, kind, width)
    assert hub_models.save_pretrained(folder / "best.pt", tmp_path / "saved") is None
    captioner = exact(tmp_path / "saved")
    model, _, _ = plain(tmp_path / "saved")
    assert hasattr(model, "enc_to_dec_proj") == (width != 16)
    for beams, shortest in ((1, 0), (3, 12)):  # a beam of ours narrows where a caption ends
        ours = captions(captioner, algorithm="beam", beam_size=beams, min_length=shortest)
        texts, found = plain_captions(
            tmp_path / "saved", num_beams=beams, min_new_tokens=shortest, length_penalty=0.0
        )
        assert texts == [captioner.vocabulary.decode(best.tokens) for best in ours]
        if beams > 1:
            scores = [best.log_prob for best in ours]
            assert found.sequences_scores.tolist() == pytest.approx(scores, abs=1e-4)


def test_what_is_saved_tells_transformers_how_the_options_search(shop, tmp_path):
    """Without a word of how, `generate` gives what caption mode gives."""
    search = "--beam_size 2 --max_length 7 --no_repeat_ngram_size 2"
    folder = clip_run(tmp_path, "clip", 24, search)
    hub_models.save_pretrained(folder / "best.pt", tmp_path / "saved")
    model, tokenizer, processor = plain(tmp_path / "saved")
    images = [Image.open(path).convert("RGB") for path in pictures()]
    found = model.generate(processor(images, return_tensors="pt").pixel_values)
    texts = [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
    precise = "--precision float32 --images png --model_path"
    out = succeed("--mode caption", precise, folder / "best.pt")
    ours = dict(line.split("\t") for line in out.splitlines() if "\t" in line)
    assert texts == [ours[str(path)] for path in pictures()]


def test_at_another_size_of_pictures_the_positions_are_those_that_were_trained_with(shop, tmp_path):
    for kind in ("clip", "siglip"):
        folder = clip_run(tmp_path, kind, 24, "--image_size 48 --epochs 1")
        hub_models.save_pretrained(folder / "best.pt", tmp_path / f"saved_{kind}")
        captioner = exact(tmp_path / f"saved_{kind}")
        model, _, _ = plain(tmp_path / f"saved_{kind}")
        assert model.config.encoder.image_size == 48
        (images,) = load_batches(pictures(), 48, [range(3)], interpolation="bicubic")
        seen = captioner.encoder(images)
        encoder = captioner.encoder
        theirs = model.encoder((images / 255 - encoder.mean) / encoder.std).last_hidden_state
        theirs = theirs.roll(-1, 1) if kind == "clip" else theirs  # our class token is the last
        torch.testing.assert_close(seen, theirs, atol=1e-4, rtol=1e-4)


def test_the_processor_gives_the_pixels_that_we_give(shop, tmp_path):
    """Squashed, not cut; of Pillow as ours, so to the last bit before they are scaled."""
    folder = clip_run(tmp_path, "clip", 24, "--epochs 1")
    hub_models.save_pretrained(folder / "best.pt", tmp_path / "saved")
    encoder = exact(tmp_path / "saved").encoder
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save("wide.png")
    (images,) = load_batches([Path("wide.png")], 32, [range(1)], interpolation="bicubic")
    ours = (images / 255 - encoder.mean) / encoder.std
    _, _, processor = plain(tmp_path / "saved")
    theirs = processor(Image.open("wide.png"), return_tensors="pt").pixel_values
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_a_model_with_subwords_has_their_tokenizer(shop, tmp_path):
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = Path("data/sample/captions.txt").read_text().splitlines()
    tokenizer.train_from_iterator(texts, vocab_size=900, special_tokens=["<|endoftext|>"])
    (tmp_path / "tokens").mkdir()
    tokenizer.save_model(str(tmp_path / "tokens"))
    folder = clip_run(tmp_path, "clip", 24, f"--gpt2_tokenizer {tmp_path / 'tokens'}")
    hub_models.save_pretrained(folder / "best.pt", tmp_path / "saved")
    captioner = exact(tmp_path / "saved")
    ours = [
        captioner.vocabulary.decode(best.tokens)
        for best in captions(captioner, beam_size=3, min_length=3)
    ]
    texts, _ = plain_captions(tmp_path / "saved", num_beams=3, length_penalty=0.0, min_new_tokens=3)
    assert texts == ours and len("".join(ours)) > 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--coarse_size 32 --image_size 48", "it looks at each picture twice (--coarse_size)"),
        ("--prefix_length 2", "its decoder is no GPT-2 with cross-attention"),
    ],
)
def test_what_transformers_cannot_be_is_said_and_saved_for_us_alone(flags, reason, shop, tmp_path):
    folder = clip_run(tmp_path, "clip", 24, f"--epochs 1 {flags}")
    assert hub_models.save_pretrained(folder / "best.pt", tmp_path / "saved") == reason
    assert not (tmp_path / "saved/config.json").exists()
    before, again = (
        fic.load_captioner(folder / "best.pt", precision="float32")[0],
        exact(tmp_path / "saved"),
    )
    assert all(map(same, captions(before), captions(again)))


def test_no_file_of_a_folder_is_a_pickle_and_each_tensor_is_there_once(shop, tmp_path):
    from safetensors import safe_open

    folder = clip_run(tmp_path, "clip", 24, "--epochs 1")
    hub_models.save_pretrained(folder / "best.pt", tmp_path / "saved")
    suffixes = {file.suffix for file in (tmp_path / "saved").iterdir()}
    assert suffixes == {".json", ".safetensors", ".md"}
    with safe_open(tmp_path / "saved/captioner.safetensors", "pt") as file:
        own = [*file.keys()]
    expected = {"feature_mean", "feature_std", "project.weight", "project.bias"}
    expected = {f"decoder.{name}" for name in expected}
    expected |= {f"digests.{split}" for split in ("train", "val", "test")}
    assert {name.removeprefix("captioner.") for name in own} == expected


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "captioner.safetensors").write_bytes(b"x" * 99), "no readable safetensors"),
        (lambda f: (f / "captioner.safetensors").unlink(), "no .safetensors beside it has"),
        (lambda f: (f / "vocabulary.json").unlink(), "vocabulary.json: no such file"),
        (lambda f: (f / "vocabulary.json").write_text("[]"), "expected a JSON object"),
        (lambda f: (f / "captioner.json").write_text("{"), "captioner.json: no readable JSON"),
        (
            lambda f: (f / "captioner.json").write_text("{}"),
            "its tensors or its encoder are missing",
        ),
        (lambda f: change(f, format_version=99), "checkpoint format version 99, expected"),
        (lambda f: change(f, epoch="1"), "its 'epoch' is missing or not of type int"),
        (lambda f: change(f, tensors={"decoder.x": ["y"]}), "no .safetensors beside it has"),
        (lambda f: change(f, tensors={}), "not weights of --encoder shufflenet_v2_x0_5"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage, said, shop, tmp_path):
    hub_models.save_pretrained(shop / "lstm/best.pt", tmp_path / "saved")
    damage(tmp_path / "saved")
    refused(
        "--mode caption --images data/sample/Images --model_path",
        tmp_path / "saved/captioner.json",
        naming=[said],
    )


def change(folder, **values):
    record = read_json(folder / "captioner.json") | values
    (folder / "captioner.json").write_text(json.dumps(record))


def test_a_checkpoint_without_its_encoder_is_not_saved(shop, tmp_path):
    state = load(shop / "lstm/best.pt")
    state["encoder"]["weights"] = None
    checkpoints.save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(ValueError, match=r"last\.pt: it has no encoder weights"):
        hub_models.save_pretrained(tmp_path / "last.pt", tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ------------------------------------------------------------------------------------------- pushing


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload needs: a repository is made, files come in one commit, large ones before."""

    server_version = "standin"

    def log_message(self, *_):
        pass

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer(200, {})

    def do_POST(self):
        hub, body, path = self.server, self.body(), self.path.partition("?")[0]
        token = self.headers.get("Authorization")
        if token != "Bearer hf_right" and token != "Bearer hf_reader":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            if token == "Bearer hf_reader":
                self.answer(403, {"error": "You don't have the rights to create a model"})
                return
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            known, hub.made = hub.made.get(name), hub.made | {name: wanted.get("visibility")}
            if known:
                hub.made[name] = known
            self.answer(409 if known else 200, {"url": f"{hub.address}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            found = [{"path": each["path"], "shouldIgnore": False,
                      "uploadMode": modes[each["path"].endswith(".safetensors")]} for each in files]  # fmt: skip
            self.answer(200, {"files": found})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            found = [{**each, "actions": {"upload": {"href": f"{hub.address}/large/{each['oid']}"}}}
                     for each in objects]  # fmt: skip
            self.answer(200, {"transfer": "basic", "objects": found})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            sha = "0" * 40
            self.answer(200, {"commitUrl": f"{hub.address}/u/n/commit/{sha}", "commitOid": sha})
        else:
            self.answer(404, {"error": f"no {path}"})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, to which huggingface_hub speaks with a token that may write."""
    import huggingface_hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.large, server.made = {}, {}, {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    # large files go by git's LFS, of which the hub's newer way, Xet, is not spoken here
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.delenv("HUGGINGFACE_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_arrives_on_the_hub_is_what_was_saved_and_captions_alike(hub, shop, tmp_path):
    folder = clip_run(tmp_path, "clip", 24, "--epochs 1 --push_to_hub ann/captions --hub_private")
    assert hub.made == {"ann/captions": "private"}
    hub_models.save_pretrained(folder / "best.pt", tmp_path / "saved", name="ann/captions")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert hub.files.keys() == saved.keys() and "model.safetensors" in saved
    dated = {"README.md"}  # it says when it was made
    assert all(hub.files[name] == saved[name] for name in saved.keys() - dated)
    got = tmp_path / "got"
    got.mkdir()
    for name, content in hub.files.items():
        (got / name).write_bytes(content)
    before = fic.load_captioner(folder / "best.pt", precision="float32")[0]
    assert all(map(same, captions(before), captions(exact(got))))
    ours = [before.vocabulary.decode(best.tokens) for best in captions(before, algorithm="greedy")]
    assert plain_captions(got, num_beams=1)[0] == ours
    card = (got / "README.md").read_text()
    assert card.startswith("---\npipeline_tag: image-to-text\n") and "library_name" in card
    assert 'from_pretrained("ann/captions")' in card and "--push_to_hub ann/captions" in card
    everything = [*hub.files.values(), *(f.read_bytes() for f in folder.iterdir() if f.is_file())]
    assert not any(b"hf_right" in content for content in everything)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("hf_wrong", "401"),
        ("hf_reader", "403"),
        ("", "no token: set HF_TOKEN"),
        ("away", "Connection refused"),
    ],
)
def test_where_the_hub_takes_nothing_training_is_kept_and_what_to_run_is_said(
    token, said, hub, shop, monkeypatch
):
    if token == "away":
        hub.shutdown()
        hub.server_close()
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    outcome = program(TINY, "--push_to_hub ann/captions")
    assert outcome.status == 1
    (best,) = Path("saved_models").rglob("best.pt")
    last = outcome.err.splitlines()[-1]
    again = f"to push again: python model_versions.py push {best} ann/captions"
    assert last.startswith("flickr_image_caption.py: error: ann/captions was not pushed (")
    assert said in last and last.endswith(again)
    assert ("will fail: no token" in outcome.err) == (token == "")
    assert "hf_" not in outcome.out + outcome.err.replace("hf auth", "")
    assert succeed("--mode caption --images data/sample/Images --model_path", best)
    assert hub.files == {}


def test_a_version_is_pushed_as_it_was_registered(hub, shop, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODEL_REGISTRY", str(tmp_path / "models"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_right")
    shutil.copytree(shop / "lstm", "run")
    scores = {"CIDEr": 0.6, "checkpoint": "best.pt", "intervals": {"CIDEr": [0.5, 0.7]}}
    Path("run/test_metrics.json").write_text(json.dumps(scores))
    manager = model_versions.ModelVersionManager()
    manager.register_version("1.2.0", "run", description="quantised weights")
    for name in ("1.2.0", "latest"):
        assert model_versions.main(["push", name, "ann/lstm"]) == 0
        assert f"pushed {hub.address}/ann/lstm" in capsys.readouterr().out
    assert hub.made == {"ann/lstm": "public"}
    card = hub.files["README.md"].decode()
    assert "test\\_CIDEr | 0.6 [0.5, 0.7] |" in card and "quantised weights" in card
    assert json.loads(hub.files["scores.json"])["test"]["CIDEr"] == 0.6
    assert model_versions.main(["push", "run", "ann/lstm", "--description", "another"]) == 0
    assert "another" in hub.files["README.md"].decode()
    assert model_versions.main(["push", "nothing", "ann/lstm"]) == 2
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_reader")
    capsys.readouterr()
    assert model_versions.main(["push", "1.2.0", "ann/new"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert model_versions.main(["save", "1.2.0", "saved"]) == 0
    before, again = fic.load_captioner("run")[0], fic.from_pretrained("saved")[0]
    assert all(map(same, captions(before), captions(again)))


def test_what_was_downloaded_is_taken_without_asking_the_hub_and_half_of_it_is_not(
    shop, tmp_path, monkeypatch
):
    """A model that transformers cannot read has no model.safetensors; what is for it alone is no model of ours."""
    import huggingface_hub

    hub_models.save_pretrained(shop / "attention/best.pt", tmp_path / "saved")
    asked = []

    class Hub:
        def model_info(self, name, timeout):
            asked.append(name)
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path / "saved")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert hub_models.find_folder("user/name") == tmp_path / "saved" and asked == []
    (tmp_path / "saved/vocabulary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no network"):
        hub_models.find_folder("user/name")
    assert asked == ["user/name"]


def test_another_models_folder_is_left_as_it_is(shop, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"another model's model\.safetensors: give another"):
        hub_models.save_pretrained(shop / "lstm/best.pt", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"theirs"
    hub_models.save_pretrained(shop / "lstm/best.pt", tmp_path / "own")
    hub_models.save_pretrained(
        shop / "attention/best.pt", tmp_path / "own"
    )  # its own may be replaced
    assert exact(tmp_path / "own").decoder.reads_grid


def test_the_command_that_pushes_again_has_the_description(shop, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(hub_models, "save_pretrained", lambda *_, **__: None)
    with pytest.raises(
        OSError, match=r"push .*best\.pt user/name --hub_private --description 'a b'"
    ):
        hub_models.push(shop / "lstm/best.pt", "user/name", private=True, description="a b")
