"""``javis``, of which rank 1 is killed once, when its first clip is half in its place."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from javis.cli import main


def replace_and_die(source: Path, target: Path, replace: object = os.replace) -> None:
    replace(source, target)  # type: ignore[operator]
    if os.environ["RANK"] == "1" and target.suffix == ".png" and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.replace = replace_and_die  # type: ignore[assignment]
    sys.exit(main())
