"""An export folder, opened once and handed on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ssod_edge.config import resolve_backbone
from ssod_edge.detect.sums import FittedScore, load_shipped
from ssod_edge.errors import SsodEdgeError, UsageError
from ssod_edge.files import real_path
from ssod_edge.runtime.runner import Array
from ssod_edge.runtime.verify import load_reference
from ssod_edge.spec import REFERENCE_NAME, SPEC_NAME, Artifact, Spec, check_files, check_hash, load_spec


@dataclass(frozen=True)
class Export:
    """What `ssod-edge export` wrote. Attributes: its folder, and what `ssod.json` in it says."""

    folder: Path
    spec: Spec

    @classmethod
    def at(cls, folder: str | os.PathLike[str]) -> Export:
        """The export that is meant by its folder, or by the run folder that holds it; errors as `load_spec`."""
        place = cls.place(folder)
        return cls(place, load_spec(place))

    @staticmethod
    def place(folder: str | os.PathLike[str]) -> Path:
        """The folder of the export that is meant by it, or by the run folder that holds it."""
        folder = Path(folder)
        inner = folder / "export"
        return inner if not (folder / SPEC_NAME).is_file() and (inner / SPEC_NAME).is_file() else folder

    @classmethod
    def in_place(cls, folder: Path) -> Export | None:
        """The export in this very folder; None if there is none, or it is damaged."""
        try:
            return cls(folder, load_spec(folder))
        except SsodEdgeError:
            return None

    @classmethod
    def newest(cls, root: str | Path = "runs", backbone: str | None = None) -> Export:
        """The export under `root` that was written last, of this backbone if one is given.

        Raises:
            UsageError: there is none.
        """
        wanted = None if backbone is None else resolve_backbone(backbone)
        exports = (cls.in_place(path.parent) for path in Path(root).glob(f"*/export/{SPEC_NAME}"))
        found = [export for export in exports if export is not None and wanted in (None, export.spec.backbone)]
        if not found:
            what = f"export of '{backbone}'" if backbone else "export"
            option = f" --backbone {backbone}" if backbone else ""
            raise UsageError(f"there is no {what} under '{root}'. Make one with: ssod-edge export{option}")
        return max(found, key=lambda export: ((export.folder / SPEC_NAME).stat().st_mtime, export.folder))

    @property
    def run_folder(self) -> Path | None:
        """The run folder that it lies in, where that is here: it says which images were held out."""
        parent = real_path(self.folder).parent
        return parent if (parent / "splits.json").is_file() else None

    def check(self, artifact: Artifact) -> Path:
        """The file that the engine opens, after every hash of the artifact and of the reference was compared.

        Raises:
            ArtifactError: see `check_files`.
        """
        path = check_files(self.folder, artifact)
        check_hash(self.folder / REFERENCE_NAME, self.spec.reference_sha256)
        return path

    def check_all(self) -> None:
        """Compare every file that the spec lists with its hash; errors as `check_files`."""
        for name, expected in self.spec.shared_files.items():
            check_hash(self.folder / name, expected)
        for artifact in self.spec.artifacts:
            check_files(self.folder, artifact)

    def reference(self) -> dict[str, Array]:
        """The arrays of `reference.npz`; see `load_reference`."""
        return load_reference(self.folder, self.spec)

    def score_state(self, width: int) -> FittedScore | None:
        """The state of the score that it ships, for features of this width; see `load_shipped`."""
        return load_shipped(self.spec, self.folder, width)
