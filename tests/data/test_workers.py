"""Isolation: what a worker does never stops the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from javis.data.workers import Failure, isolated_map


def act(item: tuple[str, int]) -> int:
    what, value = item
    if what == "raise":
        raise ValueError(f"bad {value}")
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "leave":
        os._exit(7)
    if what == "hang":
        while True:  # also deaf to polite requests
            time.sleep(60)
    return value * value


def test_every_item_has_an_answer_whatever_the_others_do() -> None:
    items = [("square", 3), ("raise", 4), ("crash", 0), ("hang", 0), ("leave", 0), ("square", 5), ("square", 6)]
    found = dict(isolated_map(act, items, processes=2, timeout=3.0))
    assert sorted(found) == list(range(7))
    assert (found[0], found[5], found[6]) == (9, 25, 36)
    reasons = [found[i].reason for i in (1, 2, 3, 4)]
    assert all(isinstance(found[i], Failure) for i in (1, 2, 3, 4))
    assert reasons[0] == "ValueError: bad 4" and "SIGSEGV" in reasons[1] and "code 7" in reasons[3]
    assert reasons[2] == "no answer within 3 s"


def test_no_item_and_early_stop() -> None:
    assert list(isolated_map(act, [], processes=2, timeout=3.0)) == []
    answers = isolated_map(act, [("square", 2), *[("hang", 0)] * 5], processes=2, timeout=60.0)
    assert next(answers) == (0, 4)
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 10


def test_a_function_that_cannot_be_loaded_is_an_error_and_no_loop() -> None:
    code = (
        "from javis.data.workers import isolated_map\n"
        "from javis.errors import FailedError\n"
        "class Breaks:\n"
        "    __module__ = 'javis.data.workers'\n"
        "    def __reduce__(self): return (exec, ('raise SystemExit(3)',))\n"
        "if __name__ == '__main__':\n"
        "    try: list(isolated_map(Breaks(), [1], processes=1, timeout=5))\n"
        "    except FailedError as error: print('said', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "said a worker process cannot start" in done.stdout, done.stderr[-2000:]
