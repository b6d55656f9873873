"""A patch is taken from a work tree in any state, and applied to a clean checkout of its commit."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from research.tracking import changes, provenance
from research.tracking.changes import uncommitted_patch


class Checkout:
    """A repository with one commit, and a clean one beside it that patches are tried on."""

    def __init__(self, folder):
        self.folder, self.other = folder / "work tree", folder / "clean"
        self.folder.mkdir()
        self.git("init", "-q", "--initial-branch", "trunk")
        self.write("code.py", "a = 1\nb = 2\n")
        self.write("sub/gone.py", "gone = 1\n")
        self.write("windows.txt", b"one\r\ntwo\r\n")
        self.write("latin.txt", b"caf\xe9\n")
        self.write("picture.png", bytes(range(256)) * 4)
        self.write(".gitignore", "*.log\n")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "Begin")
        self.commit = self.git("rev-parse", "HEAD")

    def git(self, *arguments, place=None, check=True):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(place or self.folder), *identity, *arguments]
        answer = subprocess.run(command, check=check, capture_output=True)
        return answer.stdout.decode(errors="replace").strip()

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def tree(self, folder):
        """Content of each file that git does not ignore, by name."""
        return {
            path.relative_to(folder).as_posix(): os.readlink(path).encode()
            if path.is_symlink()
            else path.read_bytes()
            for path in folder.rglob("*")
            if (path.is_file() or path.is_symlink())
            and ".git" not in path.relative_to(folder).parts
            and path.suffix != ".log"
        }

    def after_the_patch(self, patch):
        """What a clean checkout of the commit becomes."""
        shutil.rmtree(self.other, ignore_errors=True)
        self.git("clone", "-q", "--no-local", str(self.folder), str(self.other))
        self.git("checkout", "-q", self.commit, place=self.other)
        file = self.other.with_name("the.patch")
        file.write_bytes(patch)
        self.git("apply", str(file), place=self.other)
        return self.tree(self.other)

    def own_state(self):
        """Every byte of the repository: the index, the objects, all of it."""
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "settings"))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    return Checkout(tmp_path)


def change_all_sorts(checkout):
    checkout.write("code.py", "a = 1\nb = 3\n")
    checkout.write("new folder/ünew '1'.py", "diff --git a/x b/x\n* Unmerged path code.py\n")
    checkout.write(":odd", "no newline at the end")
    checkout.write("empty.py", "")
    checkout.write("windows.txt", b"one\r\nthree\r\n")
    checkout.write("latin.txt", b"na\xefve\n")
    checkout.write("picture.png", bytes(range(255, -1, -1)) * 4)
    checkout.write("new.png", b"\0\1\2" * 50)
    checkout.write("noise.log", "ignored")
    (checkout.folder / "sub" / "gone.py").unlink()
    (checkout.folder / "link").symlink_to("code.py")
    checkout.write("staged.py", "s = 1\n")
    checkout.git("add", "staged.py")
    checkout.write("staged.py", "s = 2\n")


def test_patch_gives_back_the_work_tree(checkout):
    change_all_sorts(checkout)
    patch = uncommitted_patch(checkout.folder, checkout.commit)
    assert patch.startswith(b"# What differs from commit " + checkout.commit.encode())
    assert b"NOT WHOLE" not in patch
    assert checkout.after_the_patch(patch) == checkout.tree(checkout.folder)


def test_taking_the_patch_changes_nothing(checkout):
    change_all_sorts(checkout)
    status = checkout.git("status", "--porcelain")
    before = checkout.own_state()  # after `status`, which refreshes the index
    uncommitted_patch(checkout.folder, checkout.commit)
    assert checkout.own_state() == before
    assert checkout.git("status", "--porcelain") == status


@pytest.mark.parametrize(
    "settings",
    [
        "[diff]\nnoprefix = true\nrenames = copies\ncontext = 0\n",
        "[diff]\nmnemonicPrefix = true\nexternal = false\n[color]\nui = always\n",
        "[core]\nquotePath = false\nautocrlf = input\n[diff]\nsuppressBlankEmpty = true\n",
    ],
)
def test_settings_of_the_user_leave_the_patch_usable(checkout, tmp_path, settings):
    (tmp_path / "settings").write_text(settings)
    checkout.write("code.py", "a = 1\n\nb = 2\n")
    checkout.write("sub/gone.py", "gone = 2\n")
    (checkout.folder / "sub/gone.py").rename(checkout.folder / "sub/moved.py")
    patch = uncommitted_patch(checkout.folder, checkout.commit)
    (tmp_path / "settings").unlink()
    assert checkout.after_the_patch(patch) == checkout.tree(checkout.folder)


def test_patch_is_whole_from_a_folder_inside_the_checkout(checkout):
    checkout.write("code.py", "a = 2\n")
    checkout.write("top.py", "t = 1\n")
    patch = uncommitted_patch(checkout.folder / "sub", checkout.commit)
    assert checkout.after_the_patch(patch) == checkout.tree(checkout.folder)


def test_unfinished_merge_gives_the_files_as_they_lie_there(checkout):
    checkout.git("checkout", "-q", "-b", "side")
    checkout.write("code.py", "a = 3\nb = 2\n")
    checkout.git("commit", "-q", "-a", "-m", "Side")
    checkout.git("checkout", "-q", "trunk")
    checkout.write("code.py", "a = 4\nb = 2\n")
    checkout.git("commit", "-q", "-a", "-m", "Trunk")
    checkout.git("merge", "side", check=False)
    checkout.commit = checkout.git("rev-parse", "HEAD")
    assert b"<<<<<<<" in (checkout.folder / "code.py").read_bytes()
    patch = uncommitted_patch(checkout.folder, checkout.commit)
    assert checkout.after_the_patch(patch) == checkout.tree(checkout.folder)


def test_clean_checkout_has_no_patch(checkout):
    checkout.write("noise.log", "ignored")
    os.utime(checkout.folder / "code.py")
    assert uncommitted_patch(checkout.folder, checkout.commit) is None


def test_what_is_too_large_is_left_out_and_said(checkout, monkeypatch):
    monkeypatch.setattr(changes, "MAX_BYTES", 20_000)
    checkout.write("code.py", "a = 2\n")
    checkout.write("small.py", "s = 1\n")
    checkout.write("large new.bin", os.urandom(30_000))
    checkout.write("latin.txt", os.urandom(40_000))
    for number in range(12):
        checkout.write(f"data/{number}.txt", f"{number}\n" * 1000)
    checkout.git("init", "-q", "another")
    checkout.write("another/file.py", "")
    checkout.git("add", "-A", place=checkout.folder / "another")
    checkout.git("commit", "-q", "-m", "Begin", place=checkout.folder / "another")
    patch = uncommitted_patch(checkout.folder, checkout.commit)
    assert len(patch) < 25_000
    head = patch.partition(b"diff --git")[0].decode()
    assert "NOT WHOLE" in head
    assert "'large new.bin' (30,000 bytes)" in head
    assert "'latin.txt' (40,000 bytes)" in head
    assert "'another/' (a repository of its own)" in head
    assert head.count("data/") > 1
    patched, there = checkout.after_the_patch(patch), checkout.tree(checkout.folder)
    assert patched["small.py"] == b"s = 1\n"
    assert patched["code.py"] == b"a = 2\n"
    assert patched["latin.txt"] == b"caf\xe9\n"  # as committed
    assert all(there[name] == content for name, content in patched.items() if name != "latin.txt")


def test_file_that_left_too_long_a_trace_is_left_out_whole(checkout, monkeypatch):
    checkout.write("long.txt", "x\n" * 10_000)
    checkout.git("add", "-A")
    checkout.git("commit", "-q", "-m", "Longer")
    checkout.commit = checkout.git("rev-parse", "HEAD")
    monkeypatch.setattr(changes, "MAX_BYTES", 10_000)
    (checkout.folder / "long.txt").unlink()
    checkout.write("code.py", "a = 2\n")
    patch = uncommitted_patch(checkout.folder, checkout.commit)
    assert b"bytes of changes)" in patch.partition(b"diff --git")[0]
    assert patch.count(b"diff --git") == 1
    assert checkout.after_the_patch(patch)["code.py"] == b"a = 2\n"


def test_git_that_hangs_is_given_up_and_said(checkout, monkeypatch, tmp_path):
    checkout.write("code.py", "a = 2\n")
    (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(changes, "SECONDS", 0.1)
    patch = uncommitted_patch(checkout.folder, checkout.commit)
    assert b"NOT WHOLE" in patch
    assert b"git failed, or took more than 0.1 s" in patch


def test_no_patch_is_asked_for_where_there_is_no_commit(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    Path(tmp_path, "new.py").write_text("a = 1\n")
    assert "mlflow.source.git.commit" not in provenance.git_tags(tmp_path)
