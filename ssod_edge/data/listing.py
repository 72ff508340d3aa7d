"""The images that a user means, one after the other: files, members of .tar files and objects in buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ssod_edge.data.pixels import Stored
from ssod_edge.data.stored import Shard, bucket_image, is_shard
from ssod_edge.sources import is_address, is_bucket, without_secrets


class Listing:
    """The images of a list of names, in order. A .tar file is read image by image.

    Args:
        names: of `ssod_edge.data.inputs.list_images` with `stored`.
        is_done: tells of a name, as it is shown, whether it is passed over. None passes nothing over.

    Attributes:
        skipped: how many were, so far.
    """

    def __init__(self, names: Sequence[str], is_done: Callable[[str], bool] | None = None):
        self._names, self._is_done = names, is_done
        self._shards = {name: Shard(name) for name in names if is_shard(name)}
        self._bytes = sum(shard.size() for shard in self._shards.values())
        self.skipped = 0

    def __iter__(self) -> Iterator[str | Stored]:
        """Paths of files, and what is stored elsewhere."""
        for name in self._names:
            if name in self._shards:
                yield from self._shards[name].wanted(self._is_wanted)
            elif self._is_wanted(without_secrets(name) if is_address(name) else name):
                yield bucket_image(name) if is_bucket(name) else name

    def _is_wanted(self, name: str) -> bool:
        done = self._is_done is not None and self._is_done(name)
        self.skipped += done
        return not done

    def left(self) -> int | None:
        """About how many images there are but for those that were passed over: of .tar files, as their bytes go.

        None as long as nothing is known of them.
        """
        shards = self._shards.values()
        files, found = len(self._names) - len(shards), sum(shard.images for shard in shards)
        read = sum(shard.at for shard in shards)
        if shards and not (found and read and self._bytes):
            return None
        return files + round(found * max(1.0, self._bytes / read if read else 1.0)) - self.skipped
