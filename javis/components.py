"""The components of the full-size pipeline: folders on disk, random weights, and whether they fit each other.

A checkpoint is a folder with ``model_index.json`` and a folder per component, as diffusers has it (docs/pipeline.md).
component_files.py reads and writes the weights of one component.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import javis
from javis.batches import component_dtype
from javis.component_files import (
    ComponentError,
    build_empty,
    build_random,
    fill,
    one_line,
    put_in_place,
    read_json,
    weight_files,
    write_json,
    write_weights,
)
from javis.component_specs import SPECS, Spec, check_fit, component_dtypes, configurations
from javis.demo_checkpoint import write_demo
from javis.errors import UsageError
from javis.frame_size import frame_size
from javis.model.ops import ModelOps

if TYPE_CHECKING:
    from javis.clip_stages import Policy
    from javis.condition_cache import CachedTextEncoder
    from javis.pipeline import JavisPipeline
    from javis.residency import Load

INDEX = "model_index.json"
CLIP = {"fps": 24, "resolution": "240p", "ratio": "9:16", "seconds": 2.0, "sample_rate": 16000}
SAMPLING = {"steps": 30, "guidance": 7.0, "order": "together"}
_TOLD = (".json", ".safetensors", ".txt", ".model")  # what a checkpoint consists of
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def choose_device(device: str | torch.device | None) -> torch.device:
    """``device``, or a GPU if there is one. Raises `UsageError` for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {str(device)!r}; expected 'cpu', 'cuda' or 'cuda:1'") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {str(device)!r} is not there ({torch.cuda.device_count()} GPUs); expected 'cpu'")
    return chosen


# -- loading ----------------------------------------------------------------------------------------------------------


def resolve(source: str, revision: str | None = None) -> Path | None:
    """The folder of a checkpoint: ``source`` itself, or the hub's copy of it; None if it is neither.

    Raises:
        UsageError: it looks like a hub id, but there is no such folder and the hub does not give it.
    """
    if source == "demo" or Path(source).exists() or not _HUB_ID.fullmatch(source):
        return None if source == "demo" else Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[f"*{suffix}" for suffix in _TOLD]))
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such id or revision, offline mode
        raise UsageError(
            f"checkpoint {source!r}: there is no such folder here, and the hub does not give it ({one_line(error)}); "
            "expected a folder, a hub id that can be reached, or 'demo'"
        ) from error


def load(
    cls: type[JavisPipeline],
    folder: Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    ops: ModelOps | None = None,
    residency: Policy = "all",
) -> JavisPipeline:
    """The pipeline of a full-size checkpoint folder; arguments as in ``JavisPipeline.from_pretrained``."""
    target = choose_device(device)
    dtypes, ops = component_dtypes(target, dtype), ops or ModelOps.fused()
    try:
        description = _description(read_json(folder / INDEX))
        missing = [spec.name for spec in SPECS if not (folder / spec.name).is_dir()]
        if missing:
            raise UsageError(
                f"component {missing[0]!r}: its folder is missing{_more(missing)}; expected {folder / missing[0]}"
            )
        made: dict[str, Any] = {}
        for spec in SPECS:
            made[spec.attribute] = _build(spec, folder, ops, dtypes[spec.attribute])
        check_fit(made)
        for spec in SPECS:
            for weights in spec.weights:
                weight_files(folder / weights.folder, weights.stem)  # before gigabytes are read in vain
        for spec in SPECS:
            if residency != "staged":
                waiting = torch.device("cpu") if residency == "offload" else target
                _fill(spec, folder, made[spec.attribute], waiting)
    except UsageError as error:
        raise UsageError(f"checkpoint {str(folder)!r}: {error}") from error
    pipe = cls(description=description, folder=folder, device=target, **made)
    if residency != "all":
        pipe.set_residency(residency, target)
    return pipe


def load_some(
    folder: Path,
    attributes: Sequence[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Some components of a full-size checkpoint folder, by attribute, and its description; nothing else is read.

    Raises:
        UsageError: as :func:`load`.
    """
    target = choose_device(device)
    dtypes = component_dtypes(target, dtype)
    made: dict[str, Any] = {}
    try:
        description = _description(read_json(folder / INDEX))
        for spec in (spec for spec in SPECS if spec.attribute in attributes):
            made[spec.attribute] = _build(spec, folder, ModelOps(), dtypes[spec.attribute]).eval()
            _fill(spec, folder, made[spec.attribute], target)
    except UsageError as error:
        raise UsageError(f"checkpoint {str(folder)!r}: {error}") from error
    return made, description


def folder_fingerprint(folder: Path) -> str:
    """Digest of a checkpoint folder: of size, first and last MiB of configurations, vocabularies and weights."""
    digest = hashlib.sha256()
    for path in sorted((folder, *(p for p in folder.iterdir() if p.is_dir()))):
        for file in sorted(f for f in path.iterdir() if f.suffix in _TOLD):
            digest.update(str(file.relative_to(folder)).encode())
            with file.open("rb") as content:
                size = content.seek(0, 2)
                digest.update(str(size).encode())
                for start in (0, max(0, size - (1 << 20))):
                    content.seek(start)
                    digest.update(content.read(1 << 20))
    return digest.hexdigest()[:16]


def loader(folder: Path | None, attribute: str) -> Load | None:
    """A function that fills a component from the folder it came from (:meth:`javis.residency.Residency.add`)."""
    spec = next(spec for spec in SPECS if spec.attribute == attribute)
    return None if folder is None else lambda module, device: _fill(spec, folder, module, device)


def cached_encoders(pipe: JavisPipeline, folder: str | os.PathLike[str]) -> dict[str, CachedTextEncoder]:
    """The text encoders of a pipeline behind a cache on disk, as ``JavisPipeline.cache_conditions`` needs them."""
    from javis.condition_cache import CachedTextEncoder, ConditionCache, component_identity

    if pipe.folder is None:
        raise UsageError("a condition cache needs a full-size checkpoint folder, which tells one encoder from another")
    cache = ConditionCache(folder)
    made: dict[str, CachedTextEncoder] = {}
    told_by = {"text_encoder": ("text_encoder", "tokenizer"), "prior_text_encoder": ("prior_text_encoder",)}
    for name, folders in told_by.items():
        encoder = getattr(pipe, name)
        parts = [pipe.folder / part for part in folders if (pipe.folder / part).is_dir()]
        identity = "-".join(map(component_identity, parts))
        made[name] = CachedTextEncoder(encoder, cache, identity=identity, dtype=component_dtype(encoder))
    return made


def _more(names: list[str]) -> str:
    return f" (so are {', '.join(names[1:])})" if len(names) > 1 else ""


def _description(index: Mapping[str, Any]) -> dict[str, Any]:
    """``model_index.json`` with the official defaults where it says nothing.

    Raises:
        UsageError: other classes than this version has, or settings that make no sense.
    """
    description = dict(index)
    known = {spec.name: spec.class_name for spec in SPECS} | {"vocoder": "SpeechT5HifiGan"}
    for part, defaults in (("clip", CLIP), ("sampling", SAMPLING), ("components", {})):
        given = index.get(part, {})
        if not isinstance(given, Mapping):
            raise UsageError(f"{INDEX}: {part!r} must be an object, got {given!r:.40}")
        description[part] = dict(defaults) | dict(given)
    for name, class_name in description["components"].items():
        if known.get(name) not in (None, class_name):
            raise UsageError(f"component {name!r} is a {class_name!r} in {INDEX}; expected {known[name]!r}")
    clip, sampling = description["clip"], description["sampling"]
    for name, value in (
        *((n, clip[n]) for n in ("fps", "seconds", "sample_rate")), *((n, sampling[n]) for n in ("steps", "guidance"))
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise UsageError(f"{INDEX}: {name} must be a positive number, got {value!r:.40}")
    frame_size(str(clip["resolution"]), str(clip["ratio"]))
    description["random_weights"] = bool(index.get("random_weights", False))
    return description


def _build(spec: Spec, folder: Path, ops: ModelOps, dtype: torch.dtype) -> nn.Module:
    """A component without values, with its tokenizer."""
    config_path = folder / spec.name / "config.json"
    try:
        config = spec.read(folder)
        module: Any = build_empty(lambda: spec.make(config, ops), dtype)
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ComponentError(config_path, f"is not usable ({one_line(error)})", "copy or convert it again") from error
    if spec.name in ("text_encoder", "prior_text_encoder"):
        from javis.model.encoders.tokens import load_tokenizer

        if spec.name == "text_encoder":
            module.tokenizer = load_tokenizer(
                folder / "tokenizer", length=config.max_length, pad_id=config.pad_token_id, kind="T5Tokenizer"
            )
        else:
            module.tokenizer = load_tokenizer(
                folder / spec.name, length=config.context_length, pad_id=0, kind="CLIPTokenizer"
            )
    return module


def _fill(spec: Spec, folder: Path, module: nn.Module, device: torch.device) -> None:
    for weights in spec.weights:
        files = weight_files(folder / weights.folder, weights.stem)
        fill(module, files, device, prefix=weights.prefix, rename=weights.rename)
    module.to(device)  # buffers that no file holds


# -- random weights ---------------------------------------------------------------------------------------------------


def with_random_weights(
    cls: type[JavisPipeline],
    size: str = "full",
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    ops: ModelOps | None = None,
    residency: Policy = "all",
    configs: Mapping[str, Any] | None = None,
) -> JavisPipeline:
    """As ``JavisPipeline.with_random_weights``; ``configs`` replaces configurations of components."""
    target = choose_device(device)
    dtypes, ops = component_dtypes(target, dtype), ops or ModelOps.fused()
    chosen = configurations(size) | dict(configs or {})
    waiting = target if residency == "all" else torch.device("cpu")
    if residency == "staged":
        raise UsageError("random weights cannot be loaded again for every stage: use residency 'offload' or 'all'")
    made: dict[str, Any] = {}
    for number, spec in enumerate(SPECS):
        own = spec.attribute
        made[own] = build_random(lambda s=spec: s.make(chosen[s.attribute], ops), waiting, dtypes[own], seed + number)  # type: ignore[misc]
    check_fit(made)
    toy = {"resolution": "64x64", "seconds": 0.5} if size == "toy" else {}
    description = {
        "clip": CLIP | toy,
        "sampling": SAMPLING | ({"steps": 4} if size == "toy" else {}),
        "components": {spec.name: spec.class_name for spec in SPECS},
        "random_weights": True,
    }
    pipe = cls(description=description, device=target, **made)
    if residency != "all":
        pipe.set_residency(residency, target)
    return pipe


# -- saving -----------------------------------------------------------------------------------------------------------


def save(pipe: JavisPipeline, folder: Path, *, overwrite: bool = False) -> Path:
    """As ``JavisPipeline.save_pretrained``: into a hidden folder beside ``folder``, then renamed."""
    is_full = "components" in pipe.description
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        ours = (folder / INDEX).is_file() or (
            (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
        )
        if not (overwrite and ours):
            hint = "overwrite=True replaces it, or give another" if ours else "give another"
            raise UsageError(f"{folder} is there already and {'a checkpoint' if ours else 'not a checkpoint'}; {hint}")
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and any(p.is_meta for p in component.parameters()):
            raise UsageError(f"component {name!r} is not in memory (residency 'staged'); copy {pipe.folder} instead")
    fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        fresh.mkdir(parents=True)
        if is_full:
            _write_components(pipe, fresh)
        else:
            student = None if pipe.student is None else pipe.student.state(pipe.model)
            write_demo(fresh, pipe.components, pipe.description, student)
        put_in_place({fresh: folder})
    except PermissionError as error:
        raise UsageError(f"cannot write {folder}: {one_line(error)}; choose a place that can be written") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _write_components(pipe: JavisPipeline, root: Path) -> None:
    for spec in SPECS:
        component = getattr(pipe, spec.attribute)
        if type(component).__name__ != spec.class_name:
            raise UsageError(f"component {spec.name!r} is a {type(component).__name__}, which cannot be saved")
        spec.write(component, root)
        state = component.state_dict()
        for weights in spec.weights:
            own = {n.removeprefix(weights.prefix): t for n, t in state.items() if n.startswith(weights.prefix)}
            write_weights(root / weights.folder, weights.stem, own)
    index = {"_class_name": "JavisPipeline", "javis": javis.__version__, **pipe.description}
    write_json(root / INDEX, index)
