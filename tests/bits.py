"""The bits of what a run has trained."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from factor_transfer.util.files import state_fingerprint


def bits(folder: Path) -> dict[str, str]:
    """A hash of each file of weights in a run folder, by the file's name."""
    return {path.name: state_fingerprint(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}
