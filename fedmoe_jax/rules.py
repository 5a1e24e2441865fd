"""Which processes of the world are on."""

from typing import NamedTuple


class World(NamedTuple):
    """Which processes of the world are on; what is off is not in the program.

    Attributes:
      pressure: whether other apps press on the devices' memory.
      background: whether other work takes compute.
      bandwidth: whether the links' speed varies.
      reach: whether clients can be out of reach.
      dropout: whether clients are lost before or in the middle of training.
      wireless: whether clients share a radio cell.
      busy: whether late clients are busy in the next round.
      labels: whether clients' labels drift.
      images: how clients' images drift, a name of `drift.DISTORTIONS`; "" for not.
    """

    pressure: bool = False
    background: bool = False
    bandwidth: bool = False
    reach: bool = False
    dropout: bool = False
    wireless: bool = False
    busy: bool = False
    labels: bool = False
    images: str = ""
