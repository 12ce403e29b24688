"""One of four ranks: computes every case of cases.py and writes its results."""

from __future__ import annotations

import faulthandler
import sys
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from javis.parallel import ParallelJavisDiT, make_mesh
from tests.parallel.cases import CASES, REFUSED, SEEDS


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(150, exit=True)  # nothing may outlive the tests
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, timeout=timedelta(seconds=60), rank=RANK, world_size=WORLD)
    for name, case in CASES.items():
        mesh = make_mesh(case.cfg, case.seq)
        model = case.model()
        result = case.run(ParallelJavisDiT(model, mesh, shard_audio=case.shard_audio))
        alone = case.run(model) if case.alone else None  # with the hooks in place, which must do nothing now
        torch.save({"together": tuple(result), "alone": alone and tuple(alone)}, folder / f"{name}-{RANK}.pt")
    torch.save(interleaved(), folder / f"interleaved-{RANK}.pt")
    torch.save(refusals(), folder / f"refusals-{RANK}.pt")
    dist.destroy_process_group()


def interleaved() -> dict[str, Any]:
    """Two clips in turn on one model, and what is kept of them when they are done."""
    case = CASES["cfg and seq"]
    together = ParallelJavisDiT(case.model(), make_mesh(case.cfg, case.seq))
    clips = [case.inputs(seed) for seed in SEEDS]
    conditions = [together.condition(**told) for _, told in clips]
    found = {}
    for turn in (0, 1, 0):
        found[str(turn)] = tuple(together.denoise(**clips[turn][0], condition=conditions[turn]))
    gone = weakref.ref(conditions[0].layers[0].text[0].k)
    conditions.clear()
    return found | {"kept": gone() is not None or together._last is not None}


def refusals() -> dict[str, str]:
    """What is said about calls that cannot be shared; no rank may be left waiting for another."""
    said = {}
    for name, case in REFUSED.items():
        try:
            case.run(ParallelJavisDiT(case.model(), make_mesh(case.cfg, case.seq)))
        except ValueError as error:
            said[name] = f"{type(error).__name__}: {error}"
    case = CASES["cfg"]
    model, (noisy, told) = case.model(), case.inputs()
    together = ParallelJavisDiT(model, make_mesh(2, 2))
    condition = together.condition(**told)
    together.denoise(**noisy, condition=condition)
    try:
        together.denoise(**noisy | {"video": noisy["video"][:, :, 1:]}, condition=condition)
    except ValueError as error:
        said["other sizes"] = f"{type(error).__name__}: {error}"
    try:
        together.denoise(**noisy, condition=condition, audio_mask=torch.ones(1, 1))
    except ValueError as error:
        said["bad mask"] = f"{len(together._hooks._streams)} streams left: {error}"
    return said


if __name__ == "__main__":
    from javis.parallel import rank_from_env

    RANK, WORLD, _ = rank_from_env()
    main(Path(sys.argv[1]))
