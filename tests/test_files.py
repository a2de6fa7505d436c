"""Atomic writing: whole or not at all, and one clear line when it cannot be."""

import json
import os
import stat

import pytest

from eqst.files import (
    AudioError,
    check_target,
    result_folder,
    write_atomically,
    write_json,
    write_text,
)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_json_and_text_come_back(tmp_path):
    content = {"name": "Käse", "values": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "a.json", content)
    write_text(tmp_path / "b.txt", "zeile\n")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == content
    assert (tmp_path / "b.txt").read_bytes() == b"zeile\n"
    assert listing(tmp_path) == ["a.json", "b.txt"]


def test_the_writer_sees_a_hidden_file_of_the_same_extension_and_folder(tmp_path):
    seen = []

    def write(temporary):
        seen.append(temporary)
        temporary.write_bytes(b"x")
        return 7

    assert write_atomically(tmp_path / "weights.npz", write) == 7
    assert seen[0].parent == tmp_path and seen[0].suffix == ".npz"
    assert seen[0].name.startswith(".") and listing(tmp_path) == ["weights.npz"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(tmp_path / "a.txt", write)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_line(tmp_path):
    def write(temporary):
        raise OSError(28, "No space left on device")

    with pytest.raises(AudioError, match="cannot be written: No space left") as caught:
        write_atomically(tmp_path / "a.txt", write)
    assert "\n" not in str(caught.value) and listing(tmp_path) == []


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert listing(tmp_path) == []


def test_nothing_is_overwritten_without_leave(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(AudioError, match="exists already"):
        write_text(tmp_path / "a.txt", "new", overwrite=False)
    assert (tmp_path / "a.txt").read_text() == "old"
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_file_that_appears_while_writing_is_kept(tmp_path):
    def write(temporary):
        temporary.write_text("ours")
        (tmp_path / "a.txt").write_text("theirs")

    with pytest.raises(AudioError, match="exists already"):
        write_atomically(tmp_path / "a.txt", write, overwrite=False)
    assert (tmp_path / "a.txt").read_text() == "theirs" and listing(tmp_path) == ["a.txt"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    cases = {
        tmp_path / "missing" / "a.txt": "no folder",
        tmp_path / "file" / "a.txt": "no folder",
        tmp_path: "is a folder",
        "/dev/null": "not a regular file",
    }
    for path, message in cases.items():
        with pytest.raises(AudioError, match=message) as caught:
            write_text(path, "x")
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["file"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder no one can write in")
def test_a_folder_that_takes_no_files_is_one_line():
    # Works for root as well, to whom permissions say nothing.
    with pytest.raises(AudioError, match="does not take files") as caught:
        write_text("/proc/self/a.txt", "x")
    assert "\n" not in str(caught.value)


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "folder" / "real.txt", "old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "folder" / "real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "folder" / "real.txt").read_text() == "new"
    with pytest.raises(AudioError, match="exists already"):
        check_target(tmp_path / "link.txt", overwrite=False)


def test_the_file_has_the_permissions_of_an_ordinary_one(tmp_path):
    (tmp_path / "plain.txt").write_text("x")
    write_text(tmp_path / "a.txt", "x")
    mode = stat.S_IMODE(os.stat(tmp_path / "a.txt").st_mode)
    assert mode == stat.S_IMODE(os.stat(tmp_path / "plain.txt").st_mode)


def test_a_result_folder_is_made_and_its_result_protected(tmp_path):
    with result_folder(tmp_path / "a" / "b", "results.json", "x.txt", overwrite=False) as made:
        (made / "x.txt").write_text("{}")
    with pytest.raises(AudioError, match=r"x\.txt' exists already"):
        with result_folder(made, "results.json", "x.txt", overwrite=False):
            raise AssertionError("entered")
    with result_folder(made, "x.txt", overwrite=True) as again:
        assert again == made == tmp_path / "a" / "b"
    assert listing(made) == ["x.txt"]


def test_work_that_fails_leaves_no_folder_that_was_made_for_it(tmp_path):
    (tmp_path / "old").mkdir()
    for folder in ("a/b/c", "old", "old/d"):
        with pytest.raises(KeyboardInterrupt):
            with result_folder(tmp_path / folder, "x", overwrite=False):
                raise KeyboardInterrupt
    assert listing(tmp_path) == ["old"] and not listing(tmp_path / "old")
    with pytest.raises(KeyboardInterrupt):
        with result_folder(tmp_path / "a" / "b", "x", overwrite=False) as made:
            (made / "half").write_text("kept: it may be worth something")
            raise KeyboardInterrupt
    assert listing(tmp_path / "a" / "b") == ["half"]
