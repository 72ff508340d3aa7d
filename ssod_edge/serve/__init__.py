"""Verdicts over HTTP: `ssod-edge serve`. Needs the extra `serve`, and no PyTorch."""
