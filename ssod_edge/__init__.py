"""ssod-edge: image classifiers that know when to say "unknown", from training to the device."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
