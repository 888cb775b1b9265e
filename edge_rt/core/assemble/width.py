"""Full-width forms of ASCII, as Chinese and Japanese input methods write them."""

from __future__ import annotations

from collections.abc import Mapping

HALF_WIDTH: Mapping[int, int] = {**{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0x3000: 0x20}
"""Full-width character -> ASCII, the ideographic space included; for ``str.translate``."""
