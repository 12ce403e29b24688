"""AdamW in three makes, on this process's shards; and averaged weights, sharded alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from javis.errors import UsageError
from javis.train.engine_config import EngineConfig

Named = list[tuple[str, nn.Parameter]]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def sharded_like(part: Tensor, parameter: Tensor) -> Tensor:
    """``part``, of the shape of this process's part of ``parameter``, as a tensor sharded like that."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _fused_adam(make: str) -> Callable[..., torch.optim.Optimizer]:
    """``FusedAdam`` of apex or Transformer Engine.

    Raises:
        UsageError: it is not installed, or what is installed under the name is something else.
    """
    try:
        if make == "apex":
            from apex.optimizers import FusedAdam
        else:
            from transformer_engine.pytorch.optimizers import FusedAdam
    except (ImportError, OSError, RuntimeError) as error:  # a library without its compiled half raises any of them
        needs = (
            "NVIDIA apex, built with its CUDA extensions (the package called apex on PyPI is another project)"
            if make == "apex"
            else "Transformer Engine (pip install 'javis[gpu]')"
        )
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"optimizer {make} needs {needs}: {said}; or use --optimizer adamw") from error
    return FusedAdam  # type: ignore[no-any-return]


def make_adamw(groups: list[dict[str, Any]], config: EngineConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names: AdamW with decoupled weight decay in each make.

    Raises:
        UsageError: a make that is not installed, or that needs a GPU and has none.
    """
    arguments: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": 1e-8}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    made = _fused_adam(config.optimizer)
    if device.type != "cuda":
        raise UsageError(f"optimizer {config.optimizer} needs a GPU, training is on {device.type}; use adamw there")
    try:
        return made(groups, adam_w_mode=True, **arguments)
    except RuntimeError as error:  # apex without its CUDA extensions says so only here
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"optimizer {config.optimizer} cannot run here: {said}; use adamw") from error


class ShardedAdamW:
    """AdamW on the local shards of parameters.

    It is elementwise, so each process updates its part as if it were all. The optimizers see plain tensors that share
    the memory of the shards: apex and Transformer Engine know nothing of DTensor.
    """

    def __init__(self, named: Named, config: EngineConfig, device: torch.device) -> None:
        self.named = named
        self._parts = [nn.Parameter(local(p)) for _, p in named]
        several = [p.ndim > 1 for _, p in named]
        self._order = [i for wanted in (True, False) for i, many in enumerate(several) if many is wanted]
        groups = [
            {"params": [self._parts[i] for i in self._order if several[i] is wanted], "weight_decay": decay}
            for wanted, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        self.optimizer = make_adamw([group for group in groups if group["params"]], config, device)

    def step(self, rate: float) -> None:
        """Update the parameters by their gradients, and forget these."""
        for (_, parameter), part in zip(self.named, self._parts, strict=True):
            part.grad = None if parameter.grad is None else local(parameter.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for (_, parameter), part in zip(self.named, self._parts, strict=True):
            part.grad = parameter.grad = None

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Tensors as ``<parameter>.<what>``, moments sharded like their parameters; and the numbers of each group."""
        full = self.optimizer.state_dict()
        tensors = {}
        for place, entry in full["state"].items():
            name, parameter = self.named[self._order[place]]
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    moment = value.shape == self._parts[self._order[place]].shape and parameter.ndim > 0
                    tensors[f"{name}.{key}"] = sharded_like(value, parameter) if moment else value
        groups = [
            {key: value for key, value in group.items() if isinstance(value, (bool, int, float)) or value is None}
            for group in full["param_groups"]
        ]
        return tensors, groups

    def blank(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Zeros to load the tensors of `state` into, given their whole shapes."""
        parameters = dict(self.named)
        made = {}
        for name, shape in shapes.items():
            parameter = parameters.get(name.rpartition(".")[0])
            if parameter is None:
                raise UsageError(f"the checkpoint has optimizer state of {name}, which this run does not train")
            whole = tuple(parameter.shape) == shape and parameter.ndim > 0
            made[name] = (
                sharded_like(torch.zeros_like(local(parameter)), parameter)
                if whole
                else torch.zeros(shape, device=parameter.device)
            )
        return made

    def load(self, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        """Inverse of `state`."""
        place = {self.named[i][0]: at for at, i in enumerate(self._order)}
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            name, _, key = path.rpartition(".")
            state.setdefault(place[name], {})[key] = local(value)
        full = self.optimizer.state_dict()
        full["state"] = state
        for group, numbers in zip(full["param_groups"], groups, strict=True):
            group.update(numbers)
        self.optimizer.load_state_dict(full)


class ShardedEma:
    """Exponential moving average of the trained parameters, each process its part; early weights fade faster."""

    def __init__(self, named: Named, decay: float) -> None:
        self.named, self.decay, self.updates = named, decay, 0
        self._parts = [local(p) for _, p in named]
        self.shadow = [part.clone() for part in self._parts]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self.shadow, self._parts, self.updates)

    def state(self) -> dict[str, Tensor]:
        return {name: sharded_like(shadow, p) for (name, p), shadow in zip(self.named, self.shadow, strict=True)}

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the parameters' place."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for part, shadow in zip(self._parts, self.shadow, strict=True):
            held = part.clone()
            part.copy_(shadow)
            shadow.copy_(held)


__all__ = ["ShardedAdamW", "ShardedEma", "local", "make_adamw", "sharded_like"]
