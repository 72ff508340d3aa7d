"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from house import MODULES
from locks import holding

from ssod_edge import files
from ssod_edge.cli import main
from ssod_edge.errors import BusyError, OutputError, UsageError
from ssod_edge.files import claim, make_directory, real_path, sha256_file, temporary_folder, write_atomic, write_json


def test_a_file_is_written_with_its_folder_and_nothing_is_left_beside_it(tmp_path):
    path = write_json(tmp_path / "new" / "value.json", {"a": [1, 2.5]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5]} and path.read_bytes().endswith(b"}\n")
    assert os.listdir(path.parent) == ["value.json"]


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022])
def test_files_folders_and_locks_follow_the_umask(tmp_path, umask):
    earlier = os.umask(umask)
    try:
        path = write_json(tmp_path / "new" / "value.json", 1)
        with claim(tmp_path / ".lock", "the work is being done"):
            modes = [place.stat().st_mode & 0o777 for place in (path, tmp_path / ".lock", path.parent)]
    finally:
        os.umask(earlier)
    assert modes == [0o666 & ~umask, 0o666 & ~umask, 0o777 & ~umask]


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    path = write_json(tmp_path / "value.json", 1)
    path.chmod(mode)
    (tmp_path / "link.json").symlink_to("value.json")
    for name in ("value.json", "link.json"):
        write_json(tmp_path / name, name)
        assert json.loads(path.read_text()) == name and path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded. Free some space"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system. Choose a place that you may write to"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied. Choose a place that you may write to"),
        (OSError("odd"), "odd. Choose another place"),
        (KeyboardInterrupt(), ""),
        (ValueError("broken"), "broken"),
    ],
)
def test_a_write_that_fails_keeps_the_earlier_file(tmp_path, error, message):
    path = tmp_path / "value.json"
    path.write_text("earlier")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)) as caught:
        write_atomic(path, write)
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["value.json"]
    assert message in str(caught.value)


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "value.json").write_text("earlier")
    (tmp_path / "link.json").symlink_to("real/value.json")
    (tmp_path / "dangling.json").symlink_to("new/value.json")
    for link in ("link.json", "dangling.json"):
        assert write_json(tmp_path / link, {"a": 1}) == tmp_path / link
        assert (tmp_path / link).is_symlink()
        target = tmp_path / (tmp_path / link).readlink()
        assert json.loads(target.read_text()) == {"a": 1} and os.listdir(target.parent) == ["value.json"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match="cannot write .*loop': Too many levels"):
        write_json(tmp_path / "loop", {})
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_pipe_is_sent_the_bytes_and_stays(tmp_path, through_a_link):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(tmp_path / ("link" if through_a_link else "pipe"), {"a": 1})
        assert json.loads(os.read(reader, 1000)) == {"a": 1}
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.skipif(not os.path.islink("/proc/self/fd/1"), reason="needs /proc")
def test_standard_output_is_a_place_to_write_to(tmp_path):
    """Also where it is a file, which must stay the same file, with what it already holds."""
    # What /dev/stdout leads to; in /proc nothing can be renamed, whatever the code does.
    code = "from ssod_edge.files import write_json; print('first', flush=True); write_json('/proc/self/fd/1', 1)"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
        assert os.fstat(out.fileno()).st_nlink == 1
    assert (tmp_path / "out").read_text() == "first\n1\n"
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b"first\n1\n"


def test_without_a_folder_for_temporary_files_memory_takes_them(tmp_path, monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(files, "SHARED_MEMORY", str(tmp_path))
    with temporary_folder() as folder:
        assert Path(folder).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(files, "SHARED_MEMORY", str(tmp_path / "none"))
    with pytest.raises(OutputError, match=r"no folder for temporary files.*set TMPDIR"):
        temporary_folder()


def test_every_temporary_file_lies_where_there_is_room_for_one():
    allowed = {"ssod_edge.files": 2, "ssod_edge.csv_table": 1}
    found = {name: path.read_text(encoding="utf-8").count("tempfile.Temporary") for name, path in MODULES.items()}
    assert {name: count for name, count in found.items() if count} == allowed


def test_a_dash_is_no_output_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="/dev/stdout writes to standard output"):
        write_json("-", {})
    assert not os.listdir(tmp_path)


def test_values_that_json_has_no_word_for_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert not os.listdir(tmp_path)


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="folder': it is a folder. Give the name of a file"):
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


def test_work_is_claimed_by_one_process_until_it_ends_or_is_killed(tmp_path):
    path = tmp_path / ".lock"
    with holding(path) as process:
        message = "^the work is being done by another process. Wait for it, or stop it$"
        with pytest.raises(BusyError, match=message), claim(path, "the work is being done"):
            pytest.fail("it is held")
        process.kill()
        process.wait()
        assert path.exists(), "a kill leaves the file"
        with claim(path, "the work is being done"):
            with pytest.raises(BusyError, match="by this process already"), claim(path, "the work is being done"):
                pytest.fail("it is held")
            assert path.exists()
    assert not path.exists()


def test_a_claim_can_wait(tmp_path):
    path = tmp_path / ".lock"
    with holding(path, until=tmp_path / "done"):
        timer = threading.Timer(0.5, (tmp_path / "done").touch)
        timer.start()
        with claim(path, "the work is being done", wait=True):
            assert (tmp_path / "done").exists() and path.exists(), "the lock is that of a file that is there"
    assert not path.exists()


def test_where_there_are_no_locks_work_is_not_held_up(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ssod_edge.files.fcntl.lockf", refuse)
    with claim(tmp_path / "new" / ".lock", "the work is being done"):
        assert (tmp_path / "new").is_dir()
    assert not list((tmp_path / "new").iterdir())


def test_links_that_go_round_in_a_circle(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert real_path(loop) == loop and real_path(loop / "a") == loop / "a"
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert real_path(tmp_path / "link" / "a") == tmp_path / "there" / "a"
    for arguments in (["history", loop], ["rollback", loop], ["train", tmp_path, "--out", loop, "--weights", "none"]):
        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert result.exit_code in (1, 2, 4), arguments
        assert "should not happen" not in result.stderr and "loop" in result.stderr, (arguments, result.stderr)


def test_no_module_resolves_a_path_another_way():
    found = [name for name, path in MODULES.items() if ".resolve()" in path.read_text(encoding="utf-8")]
    assert [name for name in found if ".tools." not in name] == []


def test_what_a_kill_in_a_write_left_is_removed_by_a_later_one(tmp_path):
    code = """
import os, signal, sys
from ssod_edge.files import write_atomic
write_atomic(sys.argv[1], lambda path: (path.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL)))
"""
    place = tmp_path / "a+b.json"
    subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    old, new = sorted(tmp_path.iterdir())
    others = [tmp_path / name for name in (".a+b.json.mine.json", ".a+c.json.0123456789abcdef.json", "a+b.json.bak")]
    for path in others:
        path.touch()
    for path in (old, *others):
        os.utime(path, (0, 0))
    write_json(place, 1)
    assert sorted(tmp_path.iterdir()) == sorted([new, place, *others])
