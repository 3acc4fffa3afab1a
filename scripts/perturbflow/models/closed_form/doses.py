"""Doses of training: which members training holds, found by gene or compound and dose."""

from bisect import bisect
from collections.abc import Iterable
from math import log10

from perturbflow.genes.symbols import without_dose


class Doses:
    """The doses at which training holds each gene or compound.

    Parameters
    ----------
    members
        Members of labels, `NAME` or `NAME@dose`.
    """

    def __init__(self, members: Iterable[str]) -> None:
        self._members: set[str] = set()
        self._with: dict[str, list[tuple[float, str]]] = {}  # a dose above zero and its member, rising
        self._without: dict[str, str] = {}  # the member without a dose, or at zero
        for member in members:
            self._members.add(member)
            name, dose = without_dose(member)
            if dose:
                self._with.setdefault(name, []).append((dose, member))
            else:
                self._without[name] = member
        for known in self._with.values():
            known.sort()

    def holds(self, member: str) -> bool:
        """Return whether the gene or compound is known, at any dose."""
        name, _ = without_dose(member)
        return name in self._with or name in self._without

    def nearest(self, member: str) -> str | None:
        """Return the known member of the same gene or compound at the nearest log dose; None for an unknown one.

        A member asked for without a dose gets the highest known dose. Where no dose is known, the member without a dose
        is returned.
        """
        if member in self._members:
            return member
        name, dose = without_dose(member)
        if not (known := self._with.get(name)):
            return self._without.get(name)
        if dose is None:
            return known[-1][1]
        return known[0][1] if dose == 0 else min(known, key=lambda pair: abs(log10(pair[0] / dose)))[1]

    def weights(self, member: str) -> dict[str, float]:
        """Return the known members on both sides of a dose, with their weights; none for an unknown compound.

        The weights are those of `DoseInterpolation`.
        """
        name, dose = without_dose(member)
        known = self._with.get(name, [])
        if member in self._members or dose is None or not known:
            nearest = self.nearest(member)
            return {nearest: 1.0} if nearest else {}
        above = bisect(known, dose, key=lambda pair: pair[0])
        if above == 0:
            return {known[0][1]: dose / known[0][0]}
        if above == len(known):
            return {known[-1][1]: 1.0}
        (low, lower), (high, higher) = known[above - 1], known[above]
        share = log10(dose / low) / log10(high / low)
        return {lower: 1.0 - share, higher: share}
