"""ROUGE as the shared task scores it: sets of tokens, case kept, sentences cut at full stops.

These are the numbers of the Python package `rouge` 1.0.1, not of `rouge_score`, whose values differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Rouge", "rouge"]

_EPSILON = 1e-8


class Rouge(NamedTuple):
    """F values of one pair, in [0, 1]."""

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815 - the measure's own name


def _pieces(text: str) -> list[list[str]]:
    """Cut at full stops; a piece of white space only leaves one empty token, as in the package."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _f(overlap: int, hypothesis: int, reference: int) -> float:
    precision = overlap / hypothesis if hypothesis else 0.0
    recall = overlap / reference if reference else 0.0
    return 2.0 * ((precision * recall) / (precision + recall + _EPSILON))


def _lcs_tokens(x: Sequence[str], y: Sequence[str], found: set[str]) -> None:
    """Add the tokens of one longest common subsequence of `x` (reference) and `y` to `found`.

    Which one is part of the definition: walking back from the end, an equal pair is taken, else the row above is
    preferred only where it is strictly better. A common ending is therefore always taken, and needs no table.
    """
    m, n = len(x), len(y)
    while m and n and x[m - 1] == y[n - 1]:
        m, n = m - 1, n - 1
        found.add(x[m])
    if not m or not n or set(x[:m]).isdisjoint(y[:n]):
        return
    y = y[:n]
    row = [0] * (n + 1)
    table = [row]
    for i in range(m):
        token, above, left = x[i], row, 0
        row = [0]
        for j, other in enumerate(y):
            if token == other:
                left = above[j] + 1
            elif above[j + 1] > left:
                left = above[j + 1]
            row.append(left)
        table.append(row)
    i, j = m, n
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            found.add(x[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1


def rouge(hypothesis: str, reference: str) -> Rouge:
    """Return ROUGE-1, ROUGE-2 and summary-level ROUGE-L (F) of one pair.

    With token sets H and R and o = |H & R|: p = o / |H|, r = o / |R|, F = 2 p r / (p + r + 1e-8). ROUGE-2 takes the
    sets of neighbouring pairs. ROUGE-L takes for o the union, over all pairs of sentences, of the tokens of their
    longest common subsequence. Tokens are what stands between spaces; full stops separate sentences and vanish.

    Parameters
    ----------
    hypothesis, reference : str

    Returns
    -------
    Rouge
        Zeros when either text has no token (the package raises an error there).

    Examples
    --------
    >>> rouge("The patient is diagnosed with gout.", "The patient is diagnosed with gout.").rougeL == 2 / (2 + 1e-8)
    True
    """
    said, meant = _pieces(hypothesis), _pieces(reference)
    tokens_h = [token for piece in said for token in piece]
    tokens_r = [token for piece in meant for token in piece]
    set_h, set_r = set(tokens_h), set(tokens_r)
    if not set_h or not set_r:
        return Rouge(0.0, 0.0, 0.0)
    pairs_h, pairs_r = (set(itertools.pairwise(tokens)) for tokens in (tokens_h, tokens_r))
    found: set[str] = set()
    for piece in meant:
        for other in said:
            _lcs_tokens(piece, other, found)
    return Rouge(
        _f(len(set_h & set_r), len(set_h), len(set_r)),
        _f(len(pairs_h & pairs_r), len(pairs_h), len(pairs_r)),
        _f(len(found), len(set_h), len(set_r)),
    )
