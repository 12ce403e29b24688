"""Which networks there are, and which public files each needs."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What to put into the folder of a network; empty where nothing is needed."""

    put: str


TABLE: dict[str, Entry] = {
    "builtin": Entry(""),
    "i3d": Entry("i3d_pretrained_400.pt"),
    "imagebind": Entry("imagebind_huge.pth and bpe_simple_vocab_16e6.txt.gz"),
    "clip": Entry("the folder of openai/clip-vit-base-patch32"),
    "clap": Entry("the folder of laion/clap-htsat-unfused"),
    "synchformer": Entry("synchformer_state_dict.pth"),
    "cavp": Entry("cavp_epoch66.ckpt"),
}
