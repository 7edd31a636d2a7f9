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


class Design(NamedTuple):
    """A closed world (`world.DESIGNS`), and how it is trained on."""

    data: str = "world"
    sft_epochs: int = 2
    rate: float = 1.0  # times the chapter's learning rate of DPO


MAIN = Design()
OTHER_DESIGNS = {
    "true but casual": Design(data="world:register"),
    "wrong but polite": Design(data="world:facts"),
    "a third of the rate": Design(rate=1 / 3),
    "twice the SFT": Design(sft_epochs=4),
}
