"""Numbers that look random and are the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


def mix(value: int) -> int:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def noise(state: int, count: int) -> npt.NDArray[np.float32]:
    """Float32 [count] in [-4, 4), by chance and always the same for a state."""
    import numpy as np

    bits = mix_array(np.uint64(state) + np.arange(1, count + 1, dtype=np.uint64))
    noise: npt.NDArray[np.float32] = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 21) - np.float32(4)
    return noise


def mix_array(values: Any) -> Any:
    """``mix`` of a uint64 array; unsigned arithmetic wraps around by itself."""
    import numpy as np

    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# ---- plugin ----------------------------------------------------------------------------------------------------------
