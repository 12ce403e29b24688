"""The metrics of JavisBench (JavisDiT, arXiv 2503.23377, section 4) on embeddings, peaks and logits.

Read in this order: protocol.py, distances.py, similarity.py, windows.py, av_align.py, onset_envelope.py, desync.py.
Numpy arrays in, floats out; the networks that make the embeddings are in `javis.eval.extractors`. The default protocol
corrects accidents of the official code, ``protocol="official"`` gives its numbers (docs/metrics.md has the list).
"""

from javis.eval.metrics.av_align import av_align, video_peaks
from javis.eval.metrics.desync import class_grid, desync, desync_scores
from javis.eval.metrics.distances import frechet_audio_distance, frechet_distance, kernel_distance
from javis.eval.metrics.onset_envelope import audio_peaks, onset_strength
from javis.eval.metrics.protocol import MetricProtocol
from javis.eval.metrics.similarity import avh_score, cosine_similarity_mean, javis_score
from javis.eval.metrics.windows import Windows, desync_segments, desync_windows, segment_windows

__all__ = [
    "MetricProtocol",
    "Windows",
    "audio_peaks",
    "av_align",
    "avh_score",
    "class_grid",
    "cosine_similarity_mean",
    "desync",
    "desync_scores",
    "desync_segments",
    "desync_windows",
    "frechet_audio_distance",
    "frechet_distance",
    "javis_score",
    "kernel_distance",
    "onset_strength",
    "segment_windows",
    "video_peaks",
]
