"""dit*: forward passes of the official VASTDiT3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from javis.model.checkpoint import from_official, to_official
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT

from .harness import GoldenCase

SUB_BLOCKS = ("video_spatial", "video_temporal", "audio_spatial", "audio_temporal", "video_prior", "audio_prior")


def official_model(case: GoldenCase) -> JavisDiT:
    """Our model with the weights of the case, loaded through the key map in both directions."""
    model = JavisDiT(JavisDiTConfig.from_official(case.config)).eval()
    state = from_official(case.weights())
    assert set(to_official(state)) == set(case.weights())
    model.load_state_dict(state, strict=True)
    return model


def condition_arguments(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keyword arguments of ``JavisDiT.condition`` from the inputs of a sub-case."""
    given = {name: inputs[name] for name in ("fps", "height", "width")}
    given |= {name: inputs[name] for name in ("spatial_prior", "temporal_prior") if name in inputs}
    return {"text": inputs["y"][:, 0], **({"text_mask": inputs["mask"]} if "mask" in inputs else {}), **given}


def traced(model: JavisDiT) -> tuple[dict[str, Tensor], list[torch.utils.hooks.RemovableHandle]]:
    """Record the streams after every sub-block under the names of the golden data."""
    seen: dict[str, Tensor] = {}
    handles = []

    def after(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, out: seen.__setitem__(name, out)))

    for i, layer in enumerate(model.layers):
        for name in SUB_BLOCKS:
            if getattr(layer, name) is not None:
                after(getattr(layer, name), f"block{i}.{name}")
        for name in ("video", "audio"):
            first = getattr(layer, f"{name}_spatial")
            key = f"block{i}.{name}_in"
            handles.append(first.register_forward_pre_hook(lambda _m, args, key=key: seen.__setitem__(key, args[0])))
        if layer.bidirectional is not None:
            names = (f"block{i}.va_cross_video", f"block{i}.va_cross_audio")
            handles.append(
                layer.bidirectional.register_forward_hook(
                    lambda _m, _i, out, names=names: seen.update(zip(names, out, strict=True))
                )
            )
    return seen, handles


def replay(case: GoldenCase) -> None:
    model = official_model(case)
    for sub in case.children("in"):
        inputs = case.group(f"in.{sub}")
        seen, handles = traced(model)
        with torch.no_grad():
            out = model(
                inputs["video"],
                inputs["audio"],
                inputs["timestep"],
                video_mask=inputs.get("x_mask"),
                audio_mask=inputs.get("ax_mask"),
                **condition_arguments(inputs),
            )
            seen["t_emb"] = model.embed.time(inputs["timestep"]) + model.embed.fps(inputs["fps"])
        for handle in handles:
            handle.remove()
        seen["video"], seen["audio"] = out.video, out.audio
        for key in case.keys(f"out.{sub}"):
            case.check(key, seen[key.split(".", 2)[2]])
