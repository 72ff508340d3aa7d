"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from ssod_edge.errors import OutputError
from ssod_edge.files import make_directory, sha256_file, write_atomic, write_json


def test_a_file_is_written_with_its_folder_and_nothing_is_left_beside_it(tmp_path):
    path = write_json(tmp_path / "new" / "value.json", {"a": [1, 2.5]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5]} and path.read_bytes().endswith(b"}\n")
    assert os.listdir(path.parent) == ["value.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("broken")])
def test_a_write_that_fails_keeps_the_earlier_file(tmp_path, error):
    path = tmp_path / "value.json"
    path.write_text("earlier")

    def write(temporary):
        temporary.write_text("half")
        raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_atomic(path, write)
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["value.json"]
    if expected is OutputError:
        assert "No space left on device. Free some space" in str(caught.value)


def test_values_that_json_has_no_word_for_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert not os.listdir(tmp_path)


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "folder", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create the folder"):
        make_directory(tmp_path / "file" / "below")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_the_hash_is_that_of_all_bytes(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()
