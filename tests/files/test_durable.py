"""Files and folders that are complete or absent, and the fast writer."""

import errno
import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup.errors import SpecError, StoreError
from mlflow_soup.files import durable
from mlflow_soup.files.durable import check_space, check_writable, staged
from mlflow_soup.files.writer import BLOCK, BUFFER, FileWriter

SMALL = 2 * BLOCK  # a small buffer, so that tests fill many


def content_of(dtype, count, seed):
    """A tensor of random bits."""
    most = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    length = (count * dtype.itemsize,)
    return torch.randint(most, length, dtype=torch.uint8, generator=generator).view(dtype)


def write_all(path, tensors, *, digest=True):
    """Write tensors one after the other; return the file's digest and the bytes of each sink."""
    seen = [bytearray() for _ in tensors]
    with FileWriter(path, digest=digest) as writer:
        for tensor, saw in zip(tensors, seen, strict=True):
            done = 0
            while done < len(tensor):
                sink = saw.extend  # copies the bytes
                room = writer.room(tensor.dtype, len(tensor) - done, sink)
                assert room.dtype == tensor.dtype
                assert 0 < len(room) <= len(tensor) - done
                room.copy_(tensor[done : done + len(room)])
                done += len(room)
    return writer.sha256.hexdigest() if digest else writer.sha256, seen


def raw(tensor):
    return tensor.view(torch.uint8).numpy().tobytes()


def check_written(path, tensors):
    """Write the tensors, and compare the file with their joined bytes."""
    digest, seen = write_all(path, tensors)
    content = b"".join(map(raw, tensors))
    assert path.read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()
    assert [bytes(saw) for saw in seen] == list(map(raw, tensors))


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool)


def mixtures():
    """Tensors of several dtypes, with sizes near multiples of `BLOCK` and `SMALL`."""
    near = st.sampled_from([0, 1, BLOCK, SMALL - 8, SMALL, SMALL + BLOCK, 3 * SMALL, 4 * SMALL])
    sizes = st.tuples(near, st.integers(-9, 9)).map(lambda pair: max(0, sum(pair)))
    one = st.builds(
        lambda dtype, size, seed: content_of(dtype, size // dtype.itemsize, seed),
        st.sampled_from(DTYPES),
        sizes,
        st.integers(0, 99),
    )
    return st.lists(one, max_size=6)


@pytest.mark.parametrize("buffer", [BLOCK, SMALL])
@given(tensors=mixtures())
@s.FEW
def test_a_file_holds_exactly_what_it_was_given(buffer, tensors, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow_soup.files.writer.BUFFER", buffer)
        check_written(tmp_path_factory.mktemp("written") / "file", tensors)


@pytest.mark.parametrize("most", [1, 3, 4095, SMALL])
def test_values_may_cross_the_end_of_any_buffer(tmp_path, monkeypatch, most):
    monkeypatch.setattr("mlflow_soup.files.writer.BUFFER", SMALL)
    ends = content_of(torch.uint8, 1, 0), content_of(torch.float64, 2500, 1)
    with FileWriter(tmp_path / "file") as writer:
        for tensor in ends:
            done = 0
            while done < len(tensor):
                room = writer.room(tensor.dtype, min(most, len(tensor) - done))
                room.copy_(tensor[done : done + len(room)])
                done += len(room)
    assert (tmp_path / "file").read_bytes() == raw(ends[0]) + raw(ends[1])


def test_room_ends_with_the_value_that_crosses_a_buffers_end(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_soup.files.writer.BUFFER", SMALL)
    with FileWriter(tmp_path / "file") as writer:
        writer.put(b"x")
        first = writer.room(torch.float64, 5000)
        assert len(first) == SMALL // 8  # 1 + 8192 bytes: one more than a buffer holds
        first.fill_(1.0)
        second = writer.room(torch.float64, 5000)
        assert len(second) == SMALL // 8  # this buffer begins with that one byte
        second.fill_(2.0)
    written = np.frombuffer((tmp_path / "file").read_bytes()[1:])
    assert written.tolist() == [1.0] * 1024 + [2.0] * 1024


@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("near", [BLOCK, BUFFER, 2 * BUFFER, 4 * BUFFER])
def test_files_near_the_size_of_blocks_and_buffers_have_the_right_length(tmp_path, near, off):
    content = np.random.default_rng(near + off).bytes(near + off)
    with FileWriter(tmp_path / "file", digest=True) as writer:
        writer.put(content)
    assert (tmp_path / "file").read_bytes() == content
    assert writer.sha256.hexdigest() == hashlib.sha256(content).hexdigest()


def test_an_empty_file_is_a_file(tmp_path):
    with FileWriter(tmp_path / "file", digest=True) as writer:
        writer.put(b"")
    assert (tmp_path / "file").read_bytes() == b""
    assert writer.sha256.hexdigest() == hashlib.sha256(b"").hexdigest()


def test_no_digest_is_computed_unless_asked_for(tmp_path):
    assert write_all(tmp_path / "file", [torch.ones(3)], digest=False)[0] is None


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("not ours")
    with pytest.raises(StoreError, match="file cannot be written: File exists"):
        FileWriter(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not ours"


LONG = [content_of(dtype, 9_999, i) for i, dtype in enumerate(DTYPES)]


def test_a_system_without_direct_writes_gives_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_soup.files.writer.BUFFER", SMALL)
    monkeypatch.setattr("mlflow_soup.files.writer._DIRECT", 0)
    check_written(tmp_path / "file", LONG)


def test_a_file_system_that_refuses_direct_files_gives_the_same_file(mount, monkeypatch):
    folder = mount("ramfs")
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    monkeypatch.setattr("mlflow_soup.files.writer.BUFFER", SMALL)
    check_written(folder / "file", LONG)


def test_a_file_system_that_refuses_direct_writes_gives_the_same_file(tmp_path, monkeypatch):
    # with BLOCK = 8, this file system acts like one whose blocks are larger than ours
    descriptor = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        os.pwrite(descriptor, bytes(24), 0)
    except OSError:
        pass
    else:
        pytest.skip("this file system accepts direct writes of any length")
    finally:
        os.close(descriptor)
    monkeypatch.setattr("mlflow_soup.files.writer.BLOCK", 8)
    monkeypatch.setattr("mlflow_soup.files.writer.BUFFER", 24)
    check_written(tmp_path / "file", [content_of(dtype, 99, 7) for dtype in DTYPES])


def test_an_error_of_the_caller_is_raised_and_nothing_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_soup.files.writer.BUFFER", SMALL)
    before = len(os.listdir("/proc/self/fd"))

    def fail():
        with FileWriter(tmp_path / "file") as writer:
            writer.put(bytes(5 * SMALL))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [1 << 20, 64 << 20])
def test_a_full_disk_is_reported_with_the_name_of_the_file(mount, size):
    path = mount("tmpfs", "size=512k") / "model.safetensors"
    with (
        pytest.raises(StoreError, match=r"model\.safetensors cannot be written: No space") as full,
        FileWriter(path, digest=True) as writer,
    ):
        writer.put(bytes(size))
    assert full.value.exit_code == 6
    assert full.value.where == str(path)


def test_a_disk_without_free_inodes_is_reported_with_the_name_of_the_file(mount):
    path = mount("tmpfs", "nr_inodes=1") / "model.safetensors"
    with pytest.raises(StoreError, match=r"model\.safetensors cannot be written: No space"):
        FileWriter(path)


def test_a_full_disk_leaves_no_folder(mount):
    out = mount("tmpfs", "size=512k") / "soup"
    with (
        pytest.raises(StoreError),
        staged(out) as folder,
        FileWriter(folder / "model.safetensors") as writer,
    ):
        writer.put(bytes(1 << 20))
    assert list(out.parent.iterdir()) == []


def test_too_little_space_is_reported_in_advance_with_both_numbers(mount):
    folder = mount("tmpfs", "size=4m")
    check_space(folder, 4 << 20)
    with pytest.raises(StoreError, match=r"5\.2 MB are needed, but only 4\.2 MB are free") as full:
        check_space(folder, 5 << 20)
    assert full.value.exit_code == 6
    assert full.value.where == str(folder)
    (folder / "file").write_bytes(bytes(1 << 20))
    with pytest.raises(StoreError, match=r"4\.2 MB are needed, but only 3\.1 MB are free"):
        check_space(folder, 4 << 20)


def test_a_folder_exists_once_it_is_complete_and_not_before(tmp_path):
    out = tmp_path / "deep" / "soup"
    with staged(out) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("content")
        assert not out.exists()
        (beside,) = out.parent.iterdir()
        assert beside == folder
        assert beside.name.startswith(".soup.partial-")  # hidden
    assert (out / "below" / "file").read_text() == "content"
    assert [path.name for path in out.parent.iterdir()] == ["soup"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_behind(tmp_path, error):
    def fail():
        with staged(tmp_path / "soup") as folder:
            (folder / "file").write_text("content")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "soup").mkdir()
    with staged(tmp_path / "soup") as folder:
        (folder / "file").write_text("content")
    assert [path.name for path in (tmp_path / "soup").iterdir()] == ["file"]


def a_folder(path):
    path.mkdir()
    (path / "file").touch()


def a_file(path):
    path.touch()


@pytest.mark.parametrize("make", [a_folder, a_file])
def test_an_existing_file_or_folder_is_left_alone(tmp_path, make):
    make(tmp_path / "soup")
    with (
        pytest.raises(SpecError, match="soup exists already") as refusal,
        staged(tmp_path / "soup"),
    ):
        pytest.fail("the block must not run")
    assert refusal.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(SpecError, match="soup cannot be written: "),
        staged(tmp_path / "file" / "soup"),
    ):
        pytest.fail("the block must not run")


def test_the_next_call_removes_the_remains_of_killed_processes(tmp_path):
    names = [".soup.partial-0", ".soup.partial-1", ".soup2.partial-0", ".other", "mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with staged(tmp_path / "soup"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"soup", *names[2:]}


def test_a_name_with_brackets_removes_only_its_own_remains(tmp_path):
    for name in (".so[uo]p.partial-0", ".soup.partial-0"):
        (tmp_path / name).mkdir()
    with staged(tmp_path / "so[uo]p"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"so[uo]p", ".soup.partial-0"}


def test_a_folder_in_use_is_not_removed_and_the_first_to_finish_wins(tmp_path):
    out = tmp_path / "soup"

    def race():
        with staged(out) as slow:
            (slow / "file").write_text("slow")
            with staged(out) as quick:
                (quick / "file").write_text("quick")
            assert (slow / "file").read_text() == "slow"

    with pytest.raises(SpecError, match="soup exists already"):
        race()
    assert (out / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]


def test_several_folders_are_written_side_by_side(tmp_path):
    with staged(tmp_path / "one") as one, staged(tmp_path / "two") as two:
        shutil.copy(__file__, one)
        shutil.copy(__file__, two)
    assert len(list(tmp_path.rglob("*.py"))) == 2


def test_buffers_hold_whole_blocks():
    assert BUFFER % BLOCK == 0


def test_the_page_cache_is_bypassed_where_the_file_system_allows_it(tmp_path):
    path = tmp_path / "probe"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    with FileWriter(tmp_path / "file") as writer:
        assert fcntl.fcntl(writer._file, fcntl.F_GETFL) & os.O_DIRECT


def test_the_working_folder_and_links_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", "x/..", "../link", "../dangling"):
        with pytest.raises(SpecError, match="exists already"), staged(Path(out)):
            pytest.fail("the block must not run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "empty", "link"]
    with staged(Path("soup")) as folder:
        (folder / "file").touch()
    assert (tmp_path / "empty" / "soup" / "file").exists()


def test_remains_that_cannot_be_removed_do_no_harm(tmp_path):
    (tmp_path / ".soup.partial-file").touch()  # a file, not a folder of ours
    with staged(tmp_path / "soup") as folder:
        (folder / "file").touch()
    assert (tmp_path / "soup" / "file").exists()


def test_a_writable_folder_is_left_as_it_is(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "deep" / "down")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_made_or_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("gone")
    for name in ("file", "file/below", "nowhere", "/proc/folder"):
        with pytest.raises(SpecError, match="cannot be written: ") as refused:
            check_writable(Path(name), "--there")
        assert refused.value.where == "--there"
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder for temporary files that everybody may write to."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def own(shared):
    return shared / f"mlflow-soup-{os.geteuid()}"


def test_temporary_folders_of_killed_processes_are_removed(shared):
    with durable.scratch():
        (own(shared) / ".scratch.partial-dead").mkdir()
        (own(shared) / "mine").mkdir()
    with durable.scratch() as first, durable.scratch() as second:
        (first / "model").touch()
        assert own(shared).stat().st_mode & 0o777 == 0o700
        assert {p.name for p in own(shared).iterdir()} == {first.name, second.name, "mine"}
    assert [p.name for p in own(shared).iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "squat",
    [
        os.mkfifo,
        Path.touch,
        lambda path: path.symlink_to("gone"),
        lambda path: path.symlink_to(path.parent),
        lambda path: (path.mkdir(), path.chmod(0o777)),
        lambda path: (path.mkdir(), path.chmod(0o750)),
        lambda path: (path.mkdir(0o700), os.chown(path, 12345, -1)),
    ],
    ids=["pipe", "file", "dangling", "link", "open", "readable", "foreign"],
)
def test_a_scratch_folder_that_others_could_use_is_refused_with_its_path(shared, squat):
    try:
        squat(own(shared))
    except PermissionError:
        pytest.skip("only root may give a folder away")
    with pytest.raises(StoreError) as refused, durable.scratch():
        pytest.fail("the block must not run")
    assert refused.value.where == str(own(shared))
    assert "not a folder that only this user can use" in refused.value.what
    assert "TMPDIR" in refused.value.fix


def elsewhere(path):
    """A link to a folder that the sweep must not empty."""
    canary = path.parent.parent / "canary"
    canary.mkdir(exist_ok=True)
    (canary / "file").touch()
    path.symlink_to(canary)


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, elsewhere], ids=["pipe", "file", "link"])
def test_what_lies_beside_a_folder_under_the_name_of_remains_is_not_opened(shared, make):
    for name in (".mlflow-soup.partial-x", ".soup.partial-x"):
        make(shared / name)
    with durable.scratch(), staged(shared / "soup") as folder:
        (folder / "file").touch()
    assert (shared / "soup" / "file").exists()
    assert (shared / ".soup.partial-x").lstat()
    assert make is not elsewhere or (shared.parent / "canary" / "file").exists()


def test_a_foreign_folder_under_the_name_of_remains_is_left_alone(tmp_path):
    foreign = tmp_path / ".soup.partial-x"
    a_folder(foreign)
    try:
        os.chown(foreign, 12345, -1)
    except PermissionError:
        pytest.skip("only root may give a folder away")
    with staged(tmp_path / "soup"):
        pass
    assert (foreign / "file").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_told_and_removes_no_folder(
    shared, monkeypatch, caplog, code
):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with durable.scratch() as first, durable.scratch() as second:
        (first / "file").touch()
        (second / "file").touch()
        with staged(shared / "soup") as folder:
            (folder / "file").touch()
        assert (first / "file").exists()
    assert (shared / "soup" / "file").exists()
    assert [*own(shared).iterdir()] == []
    assert f"cannot be locked: {os.strerror(code)}" in caplog.text


def test_no_descriptor_of_a_lock_stays_open(shared):
    before = os.listdir("/proc/self/fd")
    with durable.scratch(), durable.scratch(), staged(shared / "soup"):
        pass
    assert os.listdir("/proc/self/fd") == before


def test_a_folder_that_another_process_sweeps_before_it_is_locked_is_made_anew(
    tmp_path, monkeypatch
):
    lock, swept = durable.try_lock, []

    def sweep_first(descriptor, folder):
        if not swept:  # another process was quicker: it locked, removed, and let go
            swept.append(folder)
            folder.rmdir()
        return lock(descriptor, folder)

    monkeypatch.setattr(durable, "try_lock", sweep_first)
    with staged(tmp_path / "soup") as partial:
        (partial / "file").write_text("whole")
    assert not swept[0].exists()
    assert (tmp_path / "soup" / "file").read_text() == "whole"
