"""CLIPScore and RefCLIPScore: a CLIP judges captions by the picture, without references or with them.

    judge = ClipJudge("openai/clip-vit-base-patch32", device)     # a name on the hub, or a folder
    scores, per_image = judge.score(paths, captions, references)  # {"CLIPScore": ..., "RefCLIPScore": ...}

Of embeddings c of a caption, v of its picture and r of a reference, cos cut off below 0 [1]:
CLIPScore = 2.5 cos(c, v), 0 to 2.5; RefCLIPScore is the harmonic mean of that and of max_r cos(c, r).
As the authors' code has it, every text begins with "A photo depicts", and pictures are prepared as
the CLIP's own processor does, with a square from the centre. transformers is imported by what needs it.

[1] Hessel et al. 2021, CLIPScore: A Reference-free Evaluation Metric for Image Captioning, section 3.
"""

import itertools

import torch
import torch.nn.functional as F

import image_loading
from hub_encoders import open_folder, read_json, read_pretrained
from progress import Progress

WEIGHT = 2.5  # of CLIPScore's cosine [1]
PROMPT = "A photo depicts "
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either will do
BATCH = 32  # pictures, or texts, embedded together


class ClipJudge:
    """A CLIP of transformers with its tokenizer and image processor."""

    def __init__(self, source, device):
        """source: the hub's name of it, or its folder. Raises: ValueError, FileNotFoundError of one line."""
        import transformers

        folder, flag = open_folder(source, "--clip_score"), f"--clip_score {source}"
        kind = read_json(folder / "config.json").get("model_type")
        if kind != "clip":
            raise ValueError(f"{flag}: model_type {kind!r} in its config.json, expected clip")
        if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
            # transformers would make a tokenizer without words, and say nothing
            raise ValueError(
                f"{flag}: {folder} has no tokenizer.json, nor vocab.json and merges.txt"
            )
        how = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, **how)
            self.processor = transformers.CLIPImageProcessor.from_pretrained(folder, **how)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{flag}: no tokenizer and image processor of a CLIP in {folder} ({reason})"
            ) from error
        model = read_pretrained(transformers.CLIPModel, folder, "--clip_score")
        words = model.config.text_config.vocab_size
        if len(self.tokenizer) > words:
            raise ValueError(
                f"{flag}: its tokenizer has {len(self.tokenizer)} words, its weights {words}: "
                "one of the two belongs to another model"
            )
        self.model, self.device = model.to(device).requires_grad_(False), device

    @torch.inference_mode()
    def embed_texts(self, texts):
        """Texts -> (len(texts), D) of length 1; each is computed once. What is too long is cut off."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        longest, rows = self.model.config.text_config.max_position_embeddings, []
        for batch in batches_of(PROMPT + text for text in places):
            tokens = self.tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(self.device)
            rows.append(self.model.get_text_features(**tokens).pooler_output.float())
        rows = F.normalize(torch.cat(rows), dim=1).cpu()
        return rows[[places[text] for text in texts]]

    @torch.inference_mode()
    def embed_pictures(self, paths):
        """Pictures -> (len(paths), D) of length 1."""
        rows, batches = [], batches_of(image_loading.open_images(paths))
        for batch in Progress(batches, "CLIPScore", -(-len(paths) // BATCH), "images", BATCH):
            pixels = self.processor(batch, return_tensors="pt")["pixel_values"]
            pixels = pixels.to(self.device)
            rows.append(self.model.get_image_features(pixels).pooler_output.float())
        return F.normalize(torch.cat(rows), dim=1).cpu()

    def add_scores(self, scores, rows, paths, references):
        """A test's scores and its rows, one of each picture with its `caption`, with what `score` gives."""
        captions = [row["caption"] for row in rows]
        means, by_picture = self.score(paths, captions, references)
        return scores | means, [row | own for row, own in zip(rows, by_picture, strict=True)]

    def score(self, paths, captions, references):
        """Means over all pictures, and each one's own.

        Args:
            paths: of pictures. captions: a text each. references: texts each.
        Returns: ({name: number}, [{name: number} of each picture]).
        """
        pictures, texts = self.embed_pictures(paths), self.embed_texts(captions)
        known = self.embed_texts(list(itertools.chain.from_iterable(references)))
        counts = [len(each) for each in references]
        nearest = torch.stack(
            [(own @ text).max() for own, text in zip(known.split(counts), texts, strict=True)]
        )
        by_picture = WEIGHT * (pictures * texts).sum(1).clamp(min=0)
        by_reference = harmonic_mean(by_picture, nearest.clamp(min=0))
        columns = {"CLIPScore": by_picture, "RefCLIPScore": by_reference}
        means = {name: float(column.double().mean()) for name, column in columns.items()}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return means, [dict(zip(columns, row, strict=True)) for row in rows]


def batches_of(items):
    """Yield lists of BATCH items."""
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


def harmonic_mean(a, b):
    """Of numbers that are 0 or more: 0 where both are."""
    return 2 * a * b / (a + b).clamp(min=torch.finfo(a.dtype).tiny)
