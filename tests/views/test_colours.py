"The colours of the views are told apart by the colour-blind."

from itertools import combinations

import numpy as np
import pytest

from sae_lab.ground.html import BLUE, ORANGE, SERIES

# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
EYES = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deuteranopia": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
    "tritanopia": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, eye):
    "CIELAB of a colour, (r, g, b) or #rrggbb, as an eye sees it."
    rgb = np.array(list(bytes.fromhex(colour[1:])) if isinstance(colour, str) else colour) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(EYES[eye] @ linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(one, other, eye):
    return float(np.linalg.norm(lab(one, eye) - lab(other, eye)))


@pytest.mark.parametrize("eye", EYES)
def test_colours_are_told_apart(eye):
    "Colour differences far above the 2.3 that is just noticeable; curves differ in their dashes too."
    assert apart(ORANGE, BLUE, eye) > 40
    assert min(apart(*pair, eye) for pair in combinations(SERIES[:6], 2)) > 15
