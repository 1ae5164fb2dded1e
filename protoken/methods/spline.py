"""A cubic spline through values at uneven knots, as linear maps of the values: one serves any number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Spline:
    """The not-a-knot cubic spline through values y at n + 1 rising knots, n >= 3.

    On [x_i, x_i+1] of length h, with v = (x - x_i) / h, u = 1 - v and M the second derivatives at the knots:

        s(x) = u y_i + v y_i+1 + h^2 / 6 ((u^3 - u) M_i + (v^3 - v) M_i+1)

    M is linear in y: continuous slopes at the inner knots, continuous third derivatives at the first and last of them.
    Source: de Boor, A Practical Guide to Splines (1978), chapter IV.
    """

    def __init__(self, knots: Sequence[float]) -> None:
        self.knots = np.asarray(knots, dtype=np.float64)
        self.steps: Array = np.diff(self.knots)
        h = self.steps
        size = len(self.knots)
        left, right = np.zeros((size, size)), np.zeros((size, size))
        for i in range(1, size - 1):
            left[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
            right[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
        left[0, :3] = h[1], -h[0] - h[1], h[0]
        left[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]
        self._curvatures: Array = np.asarray(np.linalg.solve(left, right), dtype=np.float64)

    def values(self, at: Array) -> Array:
        """s at these positions as a map of the values at the knots, [positions, knots]."""
        i, v, h = self._where(at)
        u, one = 1 - v, np.eye(len(self.knots))
        m = self._curvatures
        found: Array = u * one[i] + v * one[i + 1] + h * h / 6 * ((u**3 - u) * m[i] + (v**3 - v) * m[i + 1])
        return found

    def slopes(self, at: Array) -> Array:
        """s' at these positions as a map of the values at the knots, [positions, knots]."""
        i, v, h = self._where(at)
        u, one = 1 - v, np.eye(len(self.knots))
        m = self._curvatures
        found: Array = (one[i + 1] - one[i]) / h + h / 6 * ((3 * v * v - 1) * m[i + 1] - (3 * u * u - 1) * m[i])
        return found

    def _where(self, at: Array) -> tuple[NDArray[np.intp], Array, Array]:
        i = np.clip(np.searchsorted(self.knots, at, side="right") - 1, 0, len(self.steps) - 1)
        h = self.steps[i]
        return i, ((at - self.knots[i]) / h)[:, None], h[:, None]
