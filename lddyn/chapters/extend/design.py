"""What chapter 7 compares: the arms, and other designs of the closed world."""

from typing import NamedTuple


class Arm(NamedTuple):
    """The SFT before DPO: on which answers, and how many times as many epochs as the baseline."""

    targets: tuple[str, ...]
    epochs: int = 1


ARMS = {
    "baseline": Arm(("chosen",)),
    "extended": Arm(("chosen", "rejected")),
    "equal steps": Arm(("chosen",), epochs=2),  # the baseline with as many steps of SFT as extended
}
WORLD = {  # designs of the closed world beside the main one, and what they change; of lr, a factor
    "true but casual": {"data": "world:register"},
    "wrong but polite": {"data": "world:facts"},
    "a third of the rate": {"lr": 1 / 3},
    "twice the SFT": {"sft_epochs": 4},
}
