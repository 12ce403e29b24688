"""Loader and registry of the golden cases (recorded runs of the official JavisDiT code).

A case is ``<name>.json`` (official class, config, statement, tables) with ``<name>.safetensors`` (``weights.*``,
``in.*``, ``out.*``, ``info.*``). Each case belongs to a family, and each family has one replayer
``replay_<family>.py`` in this folder with

    def replay(case: GoldenCase) -> None

which builds the public object from ``case.config``, loads ``case.weights()``, and calls ``case.check(key, actual)`` for
**every** ``out.*`` tensor and ``case.table(name)`` for every table: what a replayer leaves unchecked fails the case.
Sub-cases are discovered from the tensor keys (``case.children("out.encode")``), never written down in a replayer.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ENVIRONMENT_VARIABLE = "JAVIS_GOLDEN_DIR"
REPOSITORY_ROOT = Path(__file__).resolve().parents[2]

# Families that no code replays yet, with the reason. Visible on purpose: the cases show as skipped with this text.
NOT_YET: dict[str, str] = {}

# A fragment of the json's "official" field -> family. The file name is only the fallback: other cases have other names.
OFFICIAL_TO_FAMILY: tuple[tuple[str, str], ...] = (
    ("javisbench", "eval"),
    ("prior_encoder", "prior"),
    ("models.stdit", "dit"),
    ("schedulers.rf", "rflow"),
    ("AudioLDM2MelTransform", "mel"),
    ("datasets.aspect", "shapes"),
    ("apply_va_mask_strategy", "shapes"),
    ("VAMaskGenerator", "shapes"),
    ("vae.vae_temporal", "vae"),
    ("VideoAutoencoderPipeline", "vae"),
)
PREFIX_TO_FAMILY: tuple[tuple[str, str], ...] = tuple(
    (prefix, prefix) for prefix in ("eval", "prior", "dit", "rflow", "mel", "shapes", "vae")
)

MODEL_ATOL = 1e-4  # golden/README.md: models 1e-4 absolute in float32


def golden_dir() -> Path:
    """Folder with the golden cases: ``$JAVIS_GOLDEN_DIR``, or ``../shared/golden`` beside the repository."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else REPOSITORY_ROOT.parent / "shared" / "golden"


def case_names(folder: Path) -> list[str]:
    """Names of the cases in ``folder``, in order; empty if the folder does not exist."""
    return sorted(path.stem for path in folder.glob("*.json") if path.name != "MANIFEST.json")


@dataclass
class GoldenCase:
    """One recorded run: metadata, tensors, and the record of what has been checked."""

    name: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    _checked: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, folder: Path, name: str) -> GoldenCase:
        meta = json.loads((folder / f"{name}.json").read_text())
        path = folder / f"{name}.safetensors"
        return cls(name=name, meta=meta, tensors=load_file(path) if path.exists() else {})

    @property
    def official(self) -> str:
        return str(self.meta.get("official", ""))

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.meta.get("config", {}))

    @property
    def family(self) -> str | None:
        """Family by the official class; the prefix of the name is the fallback; None if neither is known."""
        for fragment, family in OFFICIAL_TO_FAMILY:
            if fragment in self.official:
                return family
        return next((family for prefix, family in PREFIX_TO_FAMILY if self.name.startswith(prefix)), None)

    def weights(self) -> dict[str, Tensor]:
        """Official parameter name -> float32 tensor (stored as float16, exactly representable)."""
        prefix = "weights."
        return {k[len(prefix) :]: v.float() for k, v in self.tensors.items() if k.startswith(prefix)}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.tensors:
            near = [k for k in self.tensors if k.startswith(key.rsplit(".", 1)[0])]
            raise KeyError(f"golden case {self.name!r} has no tensor {key!r}; under that name there are {near[:20]}")
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def get(self, key: str) -> Tensor | None:
        return self.tensors.get(key)

    def keys(self, prefix: str = "") -> list[str]:
        """Full names of the tensors below ``prefix`` (``"out.encode"`` gives ``out.encode.*``), in order."""
        return sorted(k for k in self.tensors if not prefix or k.startswith(prefix + "."))

    def children(self, prefix: str) -> list[str]:
        """Next path components below ``prefix``: ``children("out")`` of ``out.t17.x, out.t6.x`` is ``[t17, t6]``."""
        return sorted({k[len(prefix) + 1 :].split(".", 1)[0] for k in self.keys(prefix)})

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below ``prefix``, by the rest of their names."""
        return {k[len(prefix) + 1 :]: self.tensors[k] for k in self.keys(prefix)}

    def table(self, name: str) -> Any:
        """Table ``name`` of the json. Asking for it marks it as checked, so compare all of it."""
        self._checked.add(f"tables.{name}")
        return self.meta.get("tables", {})[name]

    def check(self, key: str, actual: Tensor | float, *, atol: float = MODEL_ATOL, rtol: float = 0.0) -> None:
        """Assert that ``actual`` equals the recorded ``key`` within ``atol + rtol * |recorded|``, shape included.

        A scalar may stand for a recorded tensor of shape [1]. With ``atol=0, rtol=0`` the comparison is exact.
        """
        expected = self[key]
        got = torch.as_tensor(actual).detach().to("cpu")
        if got.ndim == 0 and expected.shape == (1,):
            got = got[None]
        assert got.shape == expected.shape, (
            f"{self.name}: {key}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        )
        torch.testing.assert_close(
            got.double(),
            expected.double(),
            atol=atol,
            rtol=rtol,
            equal_nan=True,
            msg=lambda text: f"{self.name}: {key}: {text}",
        )
        self._checked.add(key)

    def informative(self, key: str, reason: str) -> None:
        """Leave the recorded ``key`` out of the comparison because the case itself calls it informative; say why."""
        assert key in self and reason, f"{self.name}: {key} needs to exist, and a reason"
        self._checked.add(key)

    def unchecked(self) -> list[str]:
        """Recorded targets (``out.*`` tensors and tables) that nothing has compared yet."""
        targets = {k for k in self.tensors if k.startswith("out.")}
        targets |= {f"tables.{k}" for k in self.meta.get("tables", {})}
        return sorted(targets - self._checked)
