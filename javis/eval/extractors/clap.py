"""CLAP (arXiv 2211.06687) by transformers, from a local folder of laion/clap-htsat-unfused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from javis.eval.extractors.base import Extractor, weights_hash
from javis.eval.extractors.library_models import pooled, read_model, read_part
from javis.eval.extractors.sound import mono_at
from javis.eval.extractors.weights import weights_files
from javis.eval.metrics.protocol import MetricProtocol
from javis.model.encoders.tokens import check_captions


class ClapExtractor(Extractor):
    """Unit vectors of sounds [1, D] and texts.

    Of a sound longer than the 10 s that the network hears, the first 10 s count; the library would cut out a random
    part. A shorter one is repeated, as the network was trained.
    """

    name = "clap"
    modalities = frozenset({"audio", "text"})

    def __init__(self, model: Any, weights_hash: str, device: str, features: Any, tokenizer: Any) -> None:
        self.model, self.weights_hash, self.device = model, weights_hash, device
        self.features, self.tokenizer = features, tokenizer

    def embed_audio(self, waveform: np.ndarray, rate: int) -> np.ndarray:
        wave = mono_at(waveform, rate, self.features.sampling_rate)[: self.features.nb_max_samples]
        given = self.features(wave, sampling_rate=self.features.sampling_rate, return_tensors="pt")
        return self._run(self.model.get_audio_features, given)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        check_captions(texts)
        given = self.tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        return self._run(self.model.get_text_features, given)

    def _run(self, function: Any, given: Any) -> np.ndarray:
        with torch.inference_mode():
            found = pooled(function(**{name: value.to(self.device) for name, value in given.items()}))
        return np.asarray(F.normalize(found.float(), dim=-1).cpu().numpy())


def load(folder: Path, device: str, protocol: MetricProtocol) -> ClapExtractor:
    model = read_model("ClapModel", folder, device)
    features, tokenizer = read_part("ClapFeatureExtractor", folder), read_part("AutoTokenizer", folder)
    return ClapExtractor(model, weights_hash(weights_files(folder)), device, features, tokenizer)
