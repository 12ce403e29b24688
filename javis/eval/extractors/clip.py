"""CLIP (arXiv 2103.00020) by transformers, from a local folder of openai/clip-vit-base-patch32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from javis.eval.extractors.base import Extractor, weights_hash
from javis.eval.extractors.library_models import pooled, read_model
from javis.eval.extractors.pictures import as_rgb, clip_frames, spread
from javis.eval.extractors.weights import weights_files
from javis.eval.metrics.protocol import MetricProtocol
from javis.model.encoders.tokens import Tokenizer, check_captions, load_tokenizer

FRAMES = 48  # of a clip, as JavisBench takes them
BATCH = 16


class ClipExtractor(Extractor):
    """Unit vectors of 48 frames spread over the clip [48, D], and of texts."""

    name = "clip"
    modalities = frozenset({"video", "text"})

    def __init__(self, model: Any, weights_hash: str, device: str, tokenizer: Tokenizer) -> None:
        self.model, self.weights_hash, self.device, self.tokenizer = model, weights_hash, device, tokenizer

    def embed_video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        frames = as_rgb(frames)
        chosen = frames[spread(len(frames), FRAMES)]
        size = self.model.config.vision_config.image_size
        found = []
        with torch.inference_mode():
            for start in range(0, len(chosen), BATCH):
                pixels = clip_frames(chosen[start : start + BATCH], size).to(self.device)
                found.append(pooled(self.model.get_image_features(pixel_values=pixels)))
        return _unit(torch.cat(found))

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        check_captions(texts)
        ids, mask = self.tokenizer(texts)
        with torch.inference_mode():
            states = self.model.get_text_features(
                input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device)
            )
        return _unit(pooled(states))


def _unit(vectors: Tensor) -> np.ndarray:
    return np.asarray(F.normalize(vectors.float(), dim=-1).cpu().numpy())


def load(folder: Path, device: str, protocol: MetricProtocol) -> ClipExtractor:
    model = read_model("CLIPModel", folder, device)
    text = model.config.text_config
    tokenizer = load_tokenizer(
        folder, length=text.max_position_embeddings, pad_id=text.vocab_size - 1, kind="CLIPTokenizer"
    )
    return ClipExtractor(model, weights_hash(weights_files(folder)), device, tokenizer)
