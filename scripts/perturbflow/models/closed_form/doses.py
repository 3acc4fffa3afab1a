"""Members that training holds, found by gene or compound and dose."""

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
        """Tell whether the gene or compound is known, at whatever dose."""
        name, _ = without_dose(member)
        return name in self._with or name in self._without

    def nearest(self, member: str) -> str | None:
        """Return the known member of the same gene or compound at the nearest dose by its logarithm; None where it has none.

        Where no dose is asked for, or known, that is the highest one, or the member without a dose.
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
        """Return the known members that a dose lies between, and their weights, see `DoseInterpolation`; none for an unknown compound."""
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
