"""Components move in and out of the device, and nothing that is computed changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from javis.clip_stages import Policy
from javis.component_files import fill
from javis.errors import FailedError, UsageError
from javis.residency import Residency

POLICIES: tuple[Policy, ...] = ("all", "staged", "offload")


class Part(nn.Module):
    """A tied parameter, a persistent and a non-persistent buffer, and a frozen parameter."""

    table: Tensor
    shift: Tensor

    def __init__(self, seed: int, size: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(size, size)
        self.second = nn.Linear(size, size)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.register_buffer("table", torch.randn(size, generator=generator))
        self.register_buffer("shift", torch.randn(size, generator=generator), persistent=False)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sin() + self.table) + self.shift


class FakeDevice:
    """Copies as a device would have them, and what of them is alive."""

    def __init__(self, room: int | None = None) -> None:
        self.now = self.most = self.copied = 0
        self.room = room

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.room is not None and self.now + tensor.nbytes > self.room:
            raise torch.OutOfMemoryError("no room")
        made = tensor.clone()
        self._count(tensor.nbytes)
        self.copied += tensor.nbytes
        weakref.finalize(made.untyped_storage(), self._count, -tensor.nbytes)
        return made

    def _count(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = max(self.most, self.now)


def nbytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def parts() -> dict[str, Part]:
    return {"text_encoder": Part(0), "model": Part(1, 9), "video_codec": Part(2)}


def loader(module: nn.Module, folder: Path, name: str) -> Callable[[nn.Module, torch.device], None]:
    """Writes the weights once and loads them as often as asked."""
    path = folder / f"{name}.safetensors"
    state = module.state_dict()
    state.pop("second.weight")  # safetensors keeps a tied tensor once
    save_file(state, path)

    def load(target: nn.Module, device: torch.device) -> None:
        fill(target, [path], device)

    return load


def run(residency: Residency, made: dict[str, Part]) -> list[Tensor]:
    """Two clips, stage by stage."""
    out = []
    for seed in range(2):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            with residency.stage("text"):
                x = made["text_encoder"](x)
            with residency.stage("condition"):
                y = made["model"](torch.cat((x, x), dim=1)[:, :9])
            with residency.stage("denoise"):
                y = made["model"](y)
            with residency.stage("video_decode"):
                out.append(made["video_codec"](y[:, :6]))
        with residency.stage("mux"):
            pass
    return out


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_computes_the_same_bits(policy: Policy, tmp_path: Path) -> None:
    made = parts()
    expected = run(Residency("cpu"), made)
    residency = Residency("cpu", policy, copy=FakeDevice())
    for name, part in made.items():
        residency.add(name, part, loader(part, tmp_path, name))
    for actual, right in zip(run(residency, made), expected, strict=True):
        assert torch.equal(actual, right)
    for part in made.values():  # the tie and what needs no gradient survive the moves
        assert part.second.weight is part.first.weight
        assert not part.second.bias.requires_grad and part.first.bias.requires_grad
    assert [r.stage for r in residency.records] == ["text", "condition", "denoise", "video_decode", "mux"] * 2


@pytest.mark.parametrize("policy", ["staged", "offload"])
def test_only_the_components_of_the_stage_are_on_the_device(policy: Policy, tmp_path: Path) -> None:
    made = parts()
    sizes = {name: nbytes(part) for name, part in made.items()}
    residency = Residency("cpu", policy, copy=FakeDevice())
    for name, part in made.items():
        residency.add(name, part, loader(part, tmp_path, name))
    assert residency.resident == frozenset() and residency.resident_bytes() == 0
    with residency.stage("text"):
        assert residency.resident == {"text_encoder"}
        assert residency.resident_bytes() == sizes["text_encoder"]
    with residency.stage("condition"):
        assert residency.resident == {"model"} and residency.resident_bytes() == sizes["model"]
    if policy == "staged":  # what is out has no values anywhere
        assert all(p.is_meta for p in made["text_encoder"].parameters())
    residency.release()
    assert residency.resident == frozenset()
    assert [r.resident_bytes for r in residency.records] == [sizes["text_encoder"], sizes["model"]]


def test_offload_holds_one_stage_on_the_device_and_copies_each_weight_once() -> None:
    made, device = parts(), FakeDevice()
    sizes = {name: nbytes(part) for name, part in made.items()}
    residency = Residency("cpu", "offload", copy=device)
    for name, part in made.items():
        residency.add(name, part)
    run(residency, made)
    residency.release()
    gc.collect()
    assert device.copied == 2 * sum(sizes.values())  # two clips; condition and denoise share one copy of the model
    assert device.most == max(sizes.values())
    assert device.now == 0


def test_all_has_everything_there_all_the_time() -> None:
    made = parts()
    residency = Residency("cpu", "all")
    for name, part in made.items():
        residency.add(name, part)
    residency.add("prior_text_encoder", None)
    residency.add("audio_codec", object())  # no weights
    run(residency, made)
    residency.release()
    assert residency.resident == set(made)
    assert residency.records[0].resident_bytes == sum(map(nbytes, made.values()))


def test_a_buffer_that_changes_on_the_device_keeps_its_value() -> None:
    part = Part(0)
    residency = Residency("cpu", "offload", copy=FakeDevice())
    residency.add("model", part)
    with residency.stage("denoise"):
        part.table.fill_(7.0)
    residency.release()
    assert bool((part.table == 7).all())


def test_an_error_inside_a_stage_leaves_the_residency_usable() -> None:
    made = parts()
    residency = Residency("cpu", "offload", copy=FakeDevice())
    for name, part in made.items():
        residency.add(name, part)
    with pytest.raises(KeyError), residency.stage("text"):
        raise KeyError("x")
    expected = run(Residency("cpu"), parts())
    assert all(torch.equal(a, b) for a, b in zip(run(residency, made), expected, strict=True))


def test_after_running_out_of_memory_half_way_another_try_works() -> None:
    made = parts()
    device = FakeDevice(room=nbytes(made["text_encoder"]) - 4)
    residency = Residency("cpu", "offload", copy=device)
    for name, part in made.items():
        residency.add(name, part)
    with pytest.raises(FailedError, match="out of memory in stage 'text'"), residency.stage("text"):
        pass
    gc.collect()
    assert residency.resident == frozenset() and device.now == 0
    device.room = None
    expected = run(Residency("cpu"), parts())
    assert all(torch.equal(a, b) for a, b in zip(run(residency, made), expected, strict=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_do(error: Exception) -> None:
    residency = Residency("cpu")
    expected = r"out of memory in stage 'denoise'.*offload.*javis plan"
    with pytest.raises(FailedError, match=expected), residency.stage("denoise"):
        raise error
    with pytest.raises(RuntimeError, match="sizes"), residency.stage("denoise"):
        raise RuntimeError("sizes do not fit")


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="all, staged, offload"):
        Residency("cpu", "some")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'model' cannot be loaded again"):
        Residency("cpu", "staged").add("model", Part(0))


def test_a_load_that_leaves_something_out_is_an_error() -> None:
    part = Part(0)

    def half(module: nn.Module, device: torch.device) -> None:
        module.first.weight = nn.Parameter(torch.zeros_like(module.first.weight, device=device))  # type: ignore

    residency = Residency("cpu", "staged")
    residency.add("model", part, half)
    with pytest.raises(FailedError, match="without values"), residency.stage("denoise"):
        pass


def test_a_load_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    part = Part(0)
    whole, fails = loader(part, tmp_path, "model"), True

    def load(module: nn.Module, device: torch.device) -> None:
        whole(module, device)
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory")

    residency = Residency("cpu", "staged")
    expected = {name: value.clone() for name, value in part.state_dict().items()}
    residency.add("model", part, load)
    with pytest.raises(FailedError, match="out of memory in stage 'denoise'"), residency.stage("denoise"):
        pass
    assert all(p.is_meta for p in part.parameters()) and residency.resident == frozenset()
    fails = False
    with residency.stage("denoise"):
        assert all(torch.equal(value, expected[name]) for name, value in part.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["all", "offload"])
def test_on_a_gpu(policy: Policy) -> None:
    made = parts()
    x = torch.randn(3, 6, device="cuda")
    residency = Residency("cuda", policy)
    for name, part in made.items():
        residency.add(name, part)
    found = []
    for _ in range(2):
        with residency.stage("text"), torch.no_grad():
            found.append(made["text_encoder"](x))
        with residency.stage("video_decode"), torch.no_grad():
            found.append(made["video_codec"](x))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert all((r.peak_bytes or 0) >= r.resident_bytes > 0 for r in residency.records)
