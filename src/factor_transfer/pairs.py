"""Teacher and student, for code that imports them from here: see `factor_transfer.networks.pair`."""

from factor_transfer.networks.pair import Pair, Side

__all__ = ["Pair", "Side"]
