"""A small world with exact truth: coloured shapes that bounce, swing, knock and flash, and the sounds they make.

>>> from javis.world import caption, render_audio, render_video, sample_scene
>>> scene = sample_scene(7)
>>> video, audio, words = render_video(scene), render_audio(scene), caption(scene)
"""

from javis.world.language import clause_text, normalize_prompt, parse_prompt
from javis.world.render import render_video
from javis.world.scene import (
    Event,
    Scene,
    Source,
    WorldConfig,
    caption,
    is_held_out,
    sample_scene,
    scene_from_prompt,
)
from javis.world.synth import render_audio
from javis.world.vocabulary import VOCABULARY, held_out_combinations

__all__ = [
    "VOCABULARY",
    "Event",
    "Scene",
    "Source",
    "WorldConfig",
    "caption",
    "clause_text",
    "held_out_combinations",
    "is_held_out",
    "normalize_prompt",
    "parse_prompt",
    "render_audio",
    "render_video",
    "sample_scene",
    "scene_from_prompt",
]
