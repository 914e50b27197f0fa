"""What the explorer and the playground have in common: their template, and images and maps as text inside the page.

Both pages are single files that work offline. Their style and script begin with `shared.css` and `shared.js`.
"""

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visuals.figures import HEAT

LEVELS = 63  # highest level of a quantized map: at six bits a value, even of maps of noise a page stays small


def fill_template(name: str, title: str, data: Mapping[str, Any]) -> str:
    """Return the page of the template `{name}.html` in this folder.

    Args:
        title: plain text.
        data: what the page's script reads, for JSON.
    """
    folder = Path(__file__).parent
    text = json.dumps({"heat": HEAT.tolist(), "levels": LEVELS, **data}, separators=(",", ":"))
    parts = {
        "title": escape(title),
        "data": text.replace("<", "\\u003c"),  # no "</script>" or "<!--" inside the script tag
        "style": (folder / "shared.css").read_text(encoding="utf-8"),
        "script": (folder / "shared.js").read_text(encoding="utf-8"),
    }
    template = (folder / f"{name}.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # one pass: a title may contain {{data}}


def escape(text: str) -> str:
    """Escape text for HTML; lone surrogates, which a path can have and UTF-8 cannot, become "?"."""
    return html.escape(text.encode("utf-8", "replace").decode())


def quantize(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a map (N, M) to levels (N, M) uint8 in 0 ... 63; return them and each row's maximum, (N,) float32.

    ``(level / 63)**2 * maximum`` approximates the value. The square root is what the page shows as color; its error is
    at most 1/126. The error of the value is at most ``(2 * sqrt(value / maximum) + 1/126) / 126`` of the row's maximum:
    1.6 % at the top, 0.006 % near zero.
    """
    maxima = maps.max(axis=1).astype(np.float32)
    relative = maps / np.where(maxima > 0, maxima, 1)[:, None]
    return np.rint(LEVELS * np.sqrt(relative.clip(0, 1))).astype(np.uint8), maxima


def compress_maps(maps: np.ndarray) -> str:
    """Return a map (N, M), quantized, as the text that `decodeMaps` in shared.js reads."""
    levels, maxima = quantize(maps)
    return compress(maxima.astype("<f4").tobytes() + levels.tobytes())  # in this order the floats are aligned


def compress(data: bytes) -> str:
    """Return bytes as the text that `inflate` in shared.js reads."""
    return base64.b64encode(zlib.compress(data)).decode("ascii")
