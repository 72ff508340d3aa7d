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
        self._shards = sum(map(is_shard, names))
        self._passed = self._images = 0  # .tar files that are done, and the images in them
        self._shard: Shard | None = None
        self.skipped = 0

    def __iter__(self) -> Iterator[str | Stored]:
        """Paths of files, and what is stored elsewhere."""
        for name in self._names:
            if is_shard(name):
                self._shard = Shard(name)
                yield from self._shard.wanted(self._is_wanted)
                self._passed, self._images = self._passed + 1, self._images + self._shard.images
                self._shard = None
            elif self._is_wanted(without_secrets(name) if is_address(name) else name):
                yield bucket_image(name) if is_bucket(name) else name

    def _is_wanted(self, name: str) -> bool:
        done = self._is_done is not None and self._is_done(name)
        self.skipped += done
        return not done

    def left(self) -> int | None:
        """About how many images there are but for those that were passed over.

        .tar files are taken to hold as many as those before them; the one that is read, as its bytes go. None as long
        as nothing is known of them.
        """
        passed, images = float(self._passed), self._images
        if self._shard is not None:
            passed, images = passed + self._shard.share, images + self._shard.images
        if self._shards and not (passed and images):
            return None
        found = images * self._shards / passed if self._shards else 0
        return len(self._names) - self._shards + round(found) - self.skipped
