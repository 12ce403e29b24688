"""Synthetic official checkpoints: official names, any depth and width, small random tensors.

The names come from ``official_names.json``, one template per parameter of a layer with its shape in symbols. The file
follows from the golden cases: ``python -m tests.convert.official GOLDEN_FOLDER`` writes it, a test compares the two.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TEMPLATES = Path(__file__).with_name("official_names.json")

# Official configurations of the golden cases, as far as shapes follow from them; every size has its own number, so that
# a shape in numbers has one reading in symbols.
DIT_SYMBOLS = {
    96: "C", 48: "C/2", 288: "3*C", 192: "2*C", 576: "6*C", 864: "9*C", 384: "4*C", 24: "C/H", 256: "256", 12: "L",
    11: "P", 32: "32", 64: "64",
}  # fmt: skip
GROUPS = {
    "video": ("x_embedder.", "t_embedder.", "fps_embedder.", "t_block.", "y_embedder.", "final_layer."),
    "video_layers": ("spatial_blocks.", "temporal_blocks."),
    "audio": ("ax_embedder.", "audio_y_embedder.", "audio_final_layer."),
    "audio_layers": ("audio_spatial_blocks.", "audio_temporal_blocks."),
    "prior": ("st_t_block.", "st_prior_embedder."),
    "prior_layers": ("video_st_prior_blocks.", "audio_st_prior_blocks."),
    "cross_layers": ("va_cross_blocks.",),
}


def group_of(name: str) -> str:
    return next(group for group, prefixes in GROUPS.items() if name.startswith(prefixes))


def templates(weight_keys: Mapping[str, list[int]]) -> dict[str, list[str]]:
    """Templates of a DiT case: ``spatial_blocks.{i}.attn.qkv.weight`` -> ``["3*C", "C"]``, one for all its layers."""
    found: dict[str, list[str]] = {}
    for key, shape in weight_keys.items():
        name = re.sub(r"blocks\.\d+\.", "blocks.{i}.", key.removeprefix("weights."))
        symbols = [DIT_SYMBOLS.get(n, str(n)) for n in shape]
        if name == "y_embedder.y_embedding" or name == "audio_y_embedder.y_embedding":
            symbols[1] = "Cc"
        if name.endswith("y_proj.fc1.weight"):
            symbols[1] = "Cp" if name.startswith("st_prior") else "Cc"
        if name == "st_prior_embedder.y_embedding":
            symbols[1] = "Cp"
        assert found.setdefault(name, symbols) == symbols, name
    return found


PRIOR_SYMBOLS = {64: "W", 192: "3*W", 256: "4*W", 40: "X", 32: "O", 96: "3*O", 128: "4*O", 8: "O//4"}


def prior_templates(weight_keys: Mapping[str, list[int]]) -> dict[str, list[str]]:
    """Templates of a prior case, one for the layers of each transformer."""
    found: dict[str, list[str]] = {}
    for key, shape in weight_keys.items():
        name = re.sub(r"layers\.\d+\.", "layers.{i}.", key.removeprefix("weights."))
        symbols = [PRIOR_SYMBOLS.get(n, str(n)) for n in shape]
        if name.endswith("_query_emb"):
            symbols[1] = "Ns" if name.startswith("spatial") else "Nt"
        if name.startswith("out_proj."):
            symbols[0] = "2*O"
        if name == "audio_embedder.weight":
            symbols[1] = "8"
        assert found.setdefault(name, symbols) == symbols, name
    return found


def derive(golden: Path) -> dict[str, Any]:
    """What ``official_names.json`` holds, from the golden cases."""
    case = lambda name: json.loads((golden / f"{name}.json").read_text())["weight_keys"]  # noqa: E731
    plain, whole = templates(case("dit_plain")), templates(case("dit"))
    assert plain.items() <= whole.items()
    return {
        "dit": whole,
        "plain": sorted(plain),
        "addition": templates(case("dit_addition")),
        "modulate": templates(case("dit_modulate")),
        "prior": prior_templates(case("prior")),
    }


def names_file() -> dict[str, Any]:
    return json.loads(TEMPLATES.read_text())


def dit_shapes(
    groups: Iterable[str],
    *,
    depth: int = 2,
    width: int = 32,
    heads: int = 2,
    caption: tuple[int, int] = (6, 16),
    prior: tuple[int, int] = (5, 8),
    mode: str = "dit",
) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of the groups of :data:`GROUPS`."""
    values = {"C": width, "H": heads, "L": caption[0], "Cc": caption[1], "P": prior[0], "Cp": prior[1]}
    wanted, shapes = set(groups), {}
    for template, symbols in names_file()[mode].items():
        if group_of(template) not in wanted:
            continue
        shape = tuple(int(eval(symbol, {}, values)) for symbol in symbols)
        for i in range(depth if "{i}" in template else 1):
            shapes[template.replace("{i}", str(i))] = shape
    return shapes


JAV = tuple(GROUPS)
AUDIO = ("video", "audio", "audio_layers")
STDIT3 = ("video", "video_layers")


def random_state(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def rope(head_size: int) -> Tensor:
    return 10000.0 ** -(torch.arange(0, head_size, 2).double() / head_size).float()


def dit_state(groups: Iterable[str] = JAV, *, tied: bool = True, seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
    """Official DiT weights, with the analytic buffer the official files hold, and the null captions tied as there."""
    state = random_state(dit_shapes(groups, **sizes), seed)
    if tied and "audio_y_embedder.y_embedding" in state:
        state["audio_y_embedder.y_embedding"] = state["y_embedder.y_embedding"].clone()
    state["rope.freqs"] = rope(sizes.get("width", 32) // sizes.get("heads", 2))
    return state


def prior_state(
    *,
    layers: int = 1,
    width: int = 16,
    text: int = 16,
    out: int = 8,
    tokens: tuple[int, int] = (3, 2),
    trained: bool = True,
) -> dict[str, Tensor]:
    """An official STPriorExtractor; ``trained``: with the embedding network that only training uses."""
    values = {"W": width, "X": text, "O": out, "Ns": tokens[0], "Nt": tokens[1], "H": 2}
    shapes: dict[str, tuple[int, ...]] = {}
    for template, symbols in names_file()["prior"].items():
        if not trained and template.startswith(("video_embedder", "audio_embedder", "va_", "discriminator")):
            continue
        shape = tuple(int(eval(symbol, {}, values)) for symbol in symbols)
        for i in range(layers if "{i}" in template else 1):
            shapes[template.replace("{i}", str(i))] = shape
    return random_state(shapes)


def imagebind_state(*, width: int = 16, layers: int = 2, text_only: bool = False) -> dict[str, Tensor]:
    """An ImageBind checkpoint in small; the names are those of its public code (imagebind_model.py, transformer.py)."""
    modalities = ("text",) if text_only else ("text", "vision", "audio")
    shapes: dict[str, tuple[int, ...]] = {
        "modality_preprocessors.text.token_embedding.weight": (50, width),
        "modality_preprocessors.text.pos_embed": (1, 12, width),
        "modality_preprocessors.text.mask": (12, 12),
        "modality_postprocessors.text.1.log_logit_scale": (),
    }
    for kind in modalities:
        for i in range(layers):
            block = f"modality_trunks.{kind}.blocks.{i}."
            shapes |= {
                block + "attn.in_proj_weight": (3 * width, width),
                block + "attn.in_proj_bias": (3 * width,),
                block + "attn.out_proj.weight": (width, width),
                block + "attn.out_proj.bias": (width,),
                block + "mlp.fc1.weight": (4 * width, width),
                block + "mlp.fc1.bias": (4 * width,),
                block + "mlp.fc2.weight": (width, 4 * width),
                block + "mlp.fc2.bias": (width,),
            }
            shapes |= {f"{block}norm_{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
        proj = f"modality_heads.{kind}." + ("proj." if kind == "text" else "")
        shapes |= {f"{proj}0.weight": (width,), f"{proj}0.bias": (width,), f"{proj}1.weight": (width, width)}
    if not text_only:
        shapes["modality_preprocessors.vision.cls_token"] = (1, 1, width)
    state = random_state(shapes)
    state["modality_preprocessors.text.mask"] = torch.full((12, 12), float("-inf")).triu(1)
    return state


def write_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    stem: str = "model",
) -> Path:
    """A folder as the hub has it: ``model.safetensors`` or shards with an index, and ``config.json``."""
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(dict(state), folder / f"{stem}.safetensors")
    else:
        where, names = {}, list(state)
        for i in range(shards):
            file = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = names[i::shards]
            save_file({n: state[n] for n in part}, folder / file)
            where |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


if __name__ == "__main__":
    TEMPLATES.write_text(json.dumps(derive(Path(sys.argv[1])), indent=1) + "\n")
