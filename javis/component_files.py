"""Weights of one component on disk: safetensors, one file or shards with an index, read tensor by tensor.

Modules are built without memory for their parameters and get them straight from the files, so that nothing is ever held
twice: a component of 10 GB needs 10 GB.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from javis import console
from javis.errors import UsageError

Module = TypeVar("Module", bound=nn.Module)
STEMS = ("diffusion_pytorch_model", "model")
MAX_SHARD_BYTES = 5_000_000_000


class ComponentError(UsageError):
    """A component that cannot be loaded; the message names the component and the file."""

    def __init__(self, path: Path, what: str, todo: str) -> None:
        super().__init__(f"component {path.parent.name!r}: {path.name} {what}; {todo}")


# -- building ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def parameters_as(change: Callable[[nn.Parameter], Tensor | None]) -> Iterator[None]:
    """Every parameter that a module registers inside the block becomes ``change(parameter)``; None leaves it."""

    def replace(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:  # register_parameter(name, None): a bias that is left out
            return None
        made = change(parameter)
        return None if made is None else nn.Parameter(made, requires_grad=parameter.requires_grad)

    hook: Any = replace  # torch's annotation says that hooks return nothing; what they return is taken
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def build_empty(factory: Callable[[], Module], dtype: torch.dtype) -> Module:
    """A module whose parameters are on the meta device, in ``dtype``; its buffers are computed as usual."""

    def empty(parameter: nn.Parameter) -> Tensor | None:
        fits = parameter.is_meta and (parameter.dtype == dtype or not parameter.is_floating_point())
        own = dtype if parameter.is_floating_point() else parameter.dtype
        return None if fits else torch.empty(parameter.shape, dtype=own, device="meta")

    with parameters_as(empty):
        return factory().requires_grad_(False).eval()


def build_random(factory: Callable[[], Module], device: torch.device, dtype: torch.dtype, seed: int) -> Module:
    """A module as its constructor starts it, made on ``device`` in ``dtype``; what would say nothing is random, too.

    That is projections that start as zeros, and convolutions so small that a signal dies in them (the vocoder's). One
    parameter at a time is held in float32 until it is converted.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        with torch.device(device), parameters_as(lambda p: None if p.dtype == dtype else p.detach().to(dtype)):
            module = factory()
        with torch.no_grad():
            for parameter in module.requires_grad_(False).eval().parameters():
                usual = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.0
                smallest = usual / 4 if parameter.ndim > 2 else 0.0
                if usual and float(parameter.float().square().mean().sqrt()) <= smallest:
                    parameter.normal_(std=usual)
    return module


# -- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a json file. Raises `ComponentError` if it is missing or not one."""
    if not path.is_file():
        raise ComponentError(path, "is missing", f"expected it in {path.parent}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ComponentError(path, f"is not usable ({one_line(error)})", "copy or convert it again") from error
    if not isinstance(values, dict):
        raise ComponentError(path, "is not usable (no object)", "copy or convert it again")
    return values


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a component.

    Args:
        folder: of the component. stem: name without suffix; the other usual one will do as well.

    Raises:
        ComponentError: there are none, or a shard of the index is missing.
    """
    for name in (stem, *(other for other in STEMS if other != stem)):
        single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
                raise ComponentError(index, "has no weight_map", "copy or convert it again")
            files = [folder / Path(shard).name for shard in dict.fromkeys(shards.values())]
            for file in files:
                if not file.is_file():
                    raise ComponentError(file, f"is missing, which {index.name} names", "copy all shards")
            return files
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    if pickles:
        todo = f"{pickles[0]} is a pickle, which is never loaded: 'javis convert' makes safetensors of it"
    else:
        todo = f"expected it in {folder}"
    raise ComponentError(folder / f"{stem}.safetensors", "is missing", todo)


def read_tensors(files: Iterable[Path], device: torch.device | str) -> Iterator[tuple[Path, str, Tensor]]:
    """File, name and value of every tensor, one after the other, on ``device``.

    Raises:
        ComponentError: a file that is cut off or no safetensors at all.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt", device=str(device)) as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    yield path, name, opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ComponentError(path, f"is corrupt ({one_line(error)})", "copy or download it again") from error


def fill(
    module: nn.Module,
    files: Iterable[Path],
    device: torch.device,
    *,
    prefix: str = "",
    rename: Callable[[str], str | None] | None = None,
) -> None:
    """Give the parameters and persistent buffers below ``prefix`` of a module their values from files, strictly.

    Values take the dtype that the module has; tied parameters stay tied.

    Args:
        module: may be on the meta device.
        files: safetensors of one component.
        device: where the values go.
        prefix: what the module's names have in front of those of the files.
        rename: name in the file -> name without ``prefix``, or None: not needed.

    Raises:
        ComponentError: tensors that are missing, unexpected, of another shape, tied ones that differ; corrupt files.
    """
    files = list(files)
    wanted, owners = _places(module)
    filled: dict[int, Tensor] = {}
    for path, name, value in read_tensors(files, device):
        own = name if rename is None else rename(name)
        if own is None:
            continue
        place = wanted.get(prefix + own)
        if place is None:
            raise ComponentError(
                path, f"holds {name!r}, which config.json has no place for", "copy or convert it again"
            )
        if place.shape != value.shape:
            raise ComponentError(
                path,
                f"has {name!r} as {list(value.shape)}, but config.json asks for {list(place.shape)}",
                "copy or convert it again",
            )
        made = value.to(device, place.dtype)
        if id(place) in filled:  # a tied tensor may stand there under both names
            if not torch.equal(filled[id(place)], made):
                raise ComponentError(
                    path, f"holds {name!r} with other values than the tensor it is tied to", "copy or convert it again"
                )
            continue
        # On the CPU tensors are pages of the file: badly aligned, and gone if the file changes.
        filled[id(place)] = made.clone() if made is value else made
        _replace(place, filled[id(place)], owners[id(place)])
    missing = [n for n, place in wanted.items() if n.startswith(prefix) and id(place) not in filled]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"lacks {missing[0].removeprefix(prefix)!r}{more}"
        raise ComponentError(files[-1], what, "copy or convert it again")


def _places(module: nn.Module) -> tuple[dict[str, Tensor], dict[int, list[tuple[nn.Module, str]]]]:
    """Name -> tensor of all parameters and persistent buffers, and id of tensor -> where it is registered."""
    wanted: dict[str, Tensor] = {}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        own: dict[str, Tensor | None] = {**owner._parameters}
        own |= {n: b for n, b in owner._buffers.items() if n not in owner._non_persistent_buffers_set}
        for name, tensor in own.items():
            if tensor is not None:
                wanted[f"{path}.{name}" if path else name] = tensor
                owners.setdefault(id(tensor), []).append((owner, name))
    return wanted, owners


def _replace(old: Tensor, value: Tensor, places: list[tuple[nn.Module, str]]) -> None:
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for owner, name in places:
        if name in owner._parameters:
            assert isinstance(new, nn.Parameter)
            owner._parameters[name] = new
        else:
            owner._buffers[name] = new


# -- writing ----------------------------------------------------------------------------------------------------------


def write_weights(folder: Path, stem: str, state: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write ``stem.safetensors``, above ``max_shard_bytes`` as shards with an index; a tied tensor is written once."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {name: value.detach().contiguous() for name, value in state.items()},
        folder,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_bytes,
        metadata={"format": "pt"},
    )


def put_in_place(folders: Mapping[Path, Path]) -> None:
    """Rename folders (new -> place), all or none. What was there is removed last, and comes back if one fails."""
    moved: list[tuple[Path, Path, Path | None]] = []
    try:
        for new, place in folders.items():
            old = place.with_name(f".{place.name}-{secrets.token_hex(4)}.old") if place.exists() else None
            if old is not None:
                place.rename(old)
            moved.append((new, place, old))
            new.rename(place)
    except BaseException:
        for new, place, old in reversed(moved):
            if place.exists():
                place.rename(new)
            if old is not None:
                old.rename(place)
        raise
    for _, _, old in moved:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def one_line(error: BaseException) -> str:
    """What an error says, or its kind if it says nothing."""
    return console.one_line(str(error), 200) or type(error).__name__
