"""Files that change: what is new is noticed once, and not while it is being written."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
from musicgen_serving import watched_files
from musicgen_serving.watched_files import WatchedFiles, poll


def looks(files: WatchedFiles, number: int = 4) -> list[bool]:
    return [files.have_changed() for _ in range(number)]


def test_news_are_told_once_after_they_have_settled(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    files = WatchedFiles(first, second)
    assert looks(files) == [False] * 4
    second.write_bytes(b"3")
    assert files.contents == (b"1", b"2"), "only a look learns of it"
    assert looks(files) == [False, True, False, False]
    assert files.contents == (b"1", b"3")


def test_what_is_half_written_is_no_news(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"whole")
    files = WatchedFiles(file)
    for half in (b"", b"an", b"anot", b"another"):
        file.write_bytes(half)
        assert not files.have_changed()
    assert files.contents == (b"whole",)
    assert files.have_changed()
    assert files.contents == (b"another",)


def test_the_same_again_is_no_news(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    files = WatchedFiles(file)
    (tmp_path / "copy").write_bytes(b"1")
    os.replace(tmp_path / "copy", file)
    assert looks(files) == [False] * 4


def test_times_and_sizes_may_stay(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    times = file.stat()
    files = WatchedFiles(file)
    file.write_bytes(b"2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert looks(files) == [False, True, False, False]


def test_a_link_that_is_swapped_is_news(tmp_path: Path) -> None:
    """As Kubernetes does it: FILE → ..data/FILE, ..data → a folder with a name of its own."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "..data").symlink_to("old")
    (tmp_path / "file").symlink_to("..data/file")
    files = WatchedFiles(tmp_path / "file")
    (tmp_path / "..data_tmp").symlink_to("new")
    os.replace(tmp_path / "..data_tmp", tmp_path / "..data")
    assert looks(files) == [False, True, False, False]
    assert files.contents == (b"new",)


def test_a_file_that_goes_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    files = WatchedFiles(file)
    file.unlink()
    assert not files.have_changed(), "it may be about to be replaced"
    file.write_bytes(b"1")
    assert looks(files) == [False] * 4
    file.unlink()
    assert looks(files) == [False, True, False, False]
    with pytest.raises(FileNotFoundError) as caught:
        _ = files.contents
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(file))
    file.write_bytes(b"1")
    assert looks(files) == [False, True, False, False]
    assert files.contents == (b"1",)


def test_looking_goes_on_after_an_error_whose_words_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watched_files, "LOOK_S", 0.01)
    num_looks = 0

    def look() -> None:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 1:
            raise RuntimeError("secret-key")

    async def main() -> None:
        looking = asyncio.create_task(poll(look))
        async with asyncio.timeout(5):
            while num_looks < 3:
                await asyncio.sleep(0.01)
        looking.cancel()

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == ["reloading changed files failed: RuntimeError"]
