"""Colours and markers of all figures.

Okabe & Ito's palette with grey for black, which dark mode swallows, and without yellow, which white swallows. Names
stand beside colours on every figure; a marker tells models of one colour apart.
"""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = ("o", "s", "D", "^", "v")
