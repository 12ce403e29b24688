"""Official parameter names and ours.

``from_official`` and ``to_official`` rename state dicts of the official VASTDiT3; shapes and values are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# (official, ours) as prefixes or inner parts; {i} is the layer.
_PREFIXES = [
    ("x_embedder.", "embed.video."),
    ("ax_embedder.", "embed.audio."),
    ("t_embedder.mlp.0.", "embed.time.fc1."),
    ("t_embedder.mlp.2.", "embed.time.fc2."),
    ("fps_embedder.mlp.0.", "embed.fps.fc1."),
    ("fps_embedder.mlp.2.", "embed.fps.fc2."),
    ("y_embedder.y_embedding", "embed.video_text.null"),
    ("y_embedder.y_proj.", "embed.video_text.proj."),
    ("audio_y_embedder.y_embedding", "embed.audio_text.null"),
    ("audio_y_embedder.y_proj.", "embed.audio_text.proj."),
    ("st_prior_embedder.y_embedding", "embed.prior.null"),
    ("st_prior_embedder.y_proj.", "embed.prior.proj."),
    ("t_block.1.", "time_block."),
    ("st_t_block.1.", "prior_time_block."),
    ("final_layer.scale_shift_table", "video_final.modulation"),
    ("final_layer.", "video_final."),
    ("audio_final_layer.scale_shift_table", "audio_final.modulation"),
    ("audio_final_layer.", "audio_final."),
    ("spatial_blocks.{i}.", "layers.{i}.video_spatial."),
    ("temporal_blocks.{i}.", "layers.{i}.video_temporal."),
    ("audio_spatial_blocks.{i}.", "layers.{i}.audio_spatial."),
    ("audio_temporal_blocks.{i}.", "layers.{i}.audio_temporal."),
    ("video_st_prior_blocks.{i}.", "layers.{i}.video_prior."),
    ("audio_st_prior_blocks.{i}.", "layers.{i}.audio_prior."),
    ("va_cross_blocks.{i}.", "layers.{i}.bidirectional."),
]
_INNER = [
    ("scale_shift_table", "modulation"),
    ("cross_attn.m1_proj.", "video_q."),
    ("cross_attn.m2_proj.", "audio_q."),
    ("cross_attn.values_m1_proj.", "video_v."),
    ("cross_attn.values_m2_proj.", "audio_v."),
    ("cross_attn.out_m1_proj.", "video_out."),
    ("cross_attn.out_m2_proj.", "audio_out."),
    ("gamma_m1", "video_scale"),
    ("gamma_m2", "audio_scale"),
    ("spatial_cross_attn.q_linear.", "spatial.attn.q."),
    ("spatial_cross_attn.kv_linear.", "spatial.attn.kv."),
    ("temporal_cross_attn.q_linear.", "temporal.attn.q."),
    ("temporal_cross_attn.kv_linear.", "temporal.attn.kv."),
    ("cross_attn.q_linear.", "text.q."),
    ("cross_attn.kv_linear.", "text.kv."),
    ("cross_attn.proj.", "text.proj."),
]
_PRIOR_PROJ = "{axis}_cross_attn.proj."
ANALYTIC = ("rope.freqs", "inv_freq")  # buffers that follow from the sizes


def _rename(name: str, *, official: bool, prior_attention: bool) -> str:
    """Rename one parameter; ``official``: the given name is an official one."""
    source, target = (0, 1) if official else (1, 0)
    for pair in _PREFIXES:
        pattern = re.escape(pair[source]).replace(r"\{i\}", r"(\d+)")
        match = re.match(pattern, name)
        if match is None:
            continue
        layer = match.group(1) if match.groups() else ""
        rest = name[match.end() :]
        if layer:
            rest = _rename_inner(rest, source, target, prior_attention)
        return pair[target].replace("{i}", layer) + rest
    known = "official JavisDiT" if official else "javis"
    raise KeyError(f"parameter {name!r} is not part of a {known} model")


def _rename_inner(rest: str, source: int, target: int, prior_attention: bool) -> str:
    for axis in ("spatial", "temporal"):
        ours = f"{axis}.attn.proj." if prior_attention else f"{axis}.proj."
        pair = (_PRIOR_PROJ.format(axis=axis), ours)
        if rest.startswith(pair[source]):
            return pair[target] + rest[len(pair[source]) :]
    for pair in _INNER:
        if rest.startswith(pair[source]):
            return pair[target] + rest[len(pair[source]) :]
    return rest


def official_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Our name of every official parameter name, and the names that are no part of an official model.

    Analytic buffers (RoPE and position frequencies) are in neither.
    """
    given = [name for name in names if not name.endswith(ANALYTIC)]
    prior_attention = any("prior_blocks" in n and ".q_linear." in n for n in given)
    known, unknown = {}, []
    for name in given:
        try:
            known[name] = _rename(name, official=True, prior_attention=prior_attention)
        except KeyError:
            unknown.append(name)
    return known, unknown


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with official names -> ours. Analytic buffers (RoPE frequencies) are dropped; KeyError on others."""
    prior_attention = any("prior_blocks" in n and ".q_linear." in n for n in state)
    renamed = {}
    for name, value in state.items():
        if name.endswith(ANALYTIC):
            continue
        renamed[_rename(name, official=True, prior_attention=prior_attention)] = value
    return renamed


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with our names -> official ones; the inverse of :func:`from_official`."""
    prior_attention = any(".spatial.attn.q." in n for n in state)
    return {_rename(n, official=False, prior_attention=prior_attention): v for n, v in state.items()}
