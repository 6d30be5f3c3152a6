import errno
from pathlib import Path

import pytest

from gearshift.files import write_whole, writing


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    write = Path.write_text

    def fail(fresh: Path, text: str, **how: str) -> None:
        write(fresh, text[:3], **how)
        assert path.read_text() == "before"
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, "afterwards")
    monkeypatch.undo()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "before")]
    write_whole(path, "né\n")
    assert path.read_bytes() == b"n\xc3\xa9\n"
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_the_same_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def overtaken(fresh: Path, path: Path) -> None:
        monkeypatch.setattr(Path, "replace", replace)
        write_whole(path, "theirs")
        replace(fresh, path)

    monkeypatch.setattr(Path, "replace", overtaken)
    write_whole(tmp_path / "a.html", "ours")
    assert (tmp_path / "a.html").read_text() == "ours"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OSError(errno.ENOSPC, "full"), "here"),
        (OSError(errno.ENOSPC, "full", "there"), "there"),
        (OSError(errno.EIO, "of what is read, maybe"), None),
    ],
)
def test_a_full_disk_says_what_there_is_no_room_for(error: OSError, name: str | None) -> None:
    with pytest.raises(OSError, match=error.strerror) as caught, writing(Path("here")):
        raise error
    assert caught.value.filename == name
