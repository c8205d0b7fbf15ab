"""SHA256SUMS: coreutils' own format, every changed byte is named, the next command refuses what is not as it was written."""
import shutil
import subprocess

import pytest

from lesion.run import files, sums


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "samples/a b.png", ".cache/x", ".lock", "samples/.a.png.abcd1234.tmp"):
        files.write_bytes(tmp_path / name, name.encode())
    sums.write(tmp_path)
    return tmp_path


def test_what_is_listed(folder):
    """Every artefact, nothing hidden, not itself; the same bytes for the same files."""
    assert list(sums.read(folder)) == ["b.txt", "samples/a b.png"]
    before = (folder / sums.NAME).read_bytes()
    sums.write(folder)
    assert (folder / sums.NAME).read_bytes() == before
    assert sums.problems(folder) == []


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs coreutils")
def test_sha256sum_reads_it(folder):
    """`sha256sum -c` agrees, before and after a change."""
    assert subprocess.run(["sha256sum", "-c", "--strict", sums.NAME], cwd=folder, capture_output=True).returncode == 0
    (folder / "b.txt").write_text("b.txT", encoding="utf-8")
    assert subprocess.run(["sha256sum", "-c", "--strict", sums.NAME], cwd=folder, capture_output=True).returncode == 1


def test_a_changed_or_missing_file_is_named(folder):
    """One line a file; a file that is not asked for does not matter."""
    (folder / "b.txt").write_text("c.txt", encoding="utf-8")
    (folder / "samples" / "a b.png").unlink()
    assert [problem.split(str(folder))[1][:7] for problem in sums.problems(folder)] == ["/b.txt ", "/sample"]
    with pytest.raises(ValueError, match=r"b\.txt is not what was written: its SHA-256 differs from SHA256SUMS \(and 1 more"):
        sums.require(folder)
    sums.require(folder, ["c.txt"])
    with pytest.raises(ValueError, match=r"a b\.png cannot be read"):
        sums.require(folder, ["samples/a b.png"])


def test_a_command_at_work_voids_them(folder):
    """While a command changes a folder there are no hashes; an end by error leaves none, but where nothing had changed yet (a refused
    flag) the same as before; a good end new ones."""
    def fails(change):
        with sums.over(folder):
            assert not (folder / sums.NAME).exists()
            change()
            raise RuntimeError
    before = (folder / sums.NAME).read_bytes()
    with pytest.raises(RuntimeError):
        fails(lambda: None)
    assert (folder / sums.NAME).read_bytes() == before
    with pytest.raises(RuntimeError):
        fails(lambda: files.write_bytes(folder / "d", b"1"))
    (folder / "d").unlink()
    assert not (folder / sums.NAME).exists()
    sums.require(folder)  # a folder without hashes passes
    with sums.over(folder):
        files.write_bytes(folder / "c", b"1")
    assert set(sums.read(folder)) == {"b.txt", "samples/a b.png", "c"}
    (folder / "c").write_text("2", encoding="utf-8")
    with pytest.raises(ValueError, match="c is not what was written"), sums.over(folder):
        pass


def test_one_file_of_a_run(folder):
    """A file is checked by the hashes of its folder, or of the one above it, as a run's checkpoints are; one of no such folder passes."""
    for name in ("b.txt", "samples/a b.png"):
        sums.require_file(folder / name)
        (folder / name).write_text("new", encoding="utf-8")
        with pytest.raises(ValueError, match="is not what was written"):
            sums.require_file(folder / name)
    sums.require_file(folder.parent / "elsewhere.safetensors")


def test_what_is_gone_may_be_gone(folder):
    """Who adds to a folder asks for what is still there: an old checkpoint removed by hand passes, a changed one does not."""
    (folder / "samples" / "a b.png").unlink()
    sums.require_unless_gone(folder)
    (folder / "b.txt").write_text("new", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b\.txt is not what was written"):
        sums.require_unless_gone(folder)
    sums.require_unless_gone(folder, but=("b.txt",))


def test_update(folder):
    """A later command takes over the hash of what it rightly changed, and of nothing else."""
    for name in ("b.txt", "samples/a b.png"):
        (folder / name).write_text("new", encoding="utf-8")
    sums.update(folder, "b.txt")
    assert [problem.split(" ")[0].rsplit("/")[-1] for problem in sums.problems(folder)] == ["a"]


@pytest.mark.parametrize("line", ["x", "0" * 64 + " x", "0" * 63 + "g  x", "0" * 64 + "  ../x", "0" * 64 + "  /etc/passwd"])
def test_a_damaged_table_is_refused(folder, line):
    """A line that is no hash and name, or leads out of the folder, is named by its number."""
    (folder / sums.NAME).write_text((folder / sums.NAME).read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="SHA256SUMS, line 3"):
        sums.read(folder)
