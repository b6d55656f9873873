import shutil
import subprocess
from pathlib import Path

import pytest

import research
from research.recording.identity import hashes
from research.tracking import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, and a function that runs git in it."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")

    def git(*arguments):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--initial-branch", "trunk")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-m", "Begin")
    return tmp_path, git


def test_clean_checkout_gives_commit_and_branch(checkout):
    folder, git = checkout
    assert provenance.git_tags(folder) == {
        "mlflow.source.git.commit": git("rev-parse", "HEAD"),
        "mlflow.source.git.branch": "trunk",
        "git.clean": "true",
    }


@pytest.mark.parametrize("change", ["edited", "staged", "new file"])
def test_changed_checkout_is_not_clean(checkout, change):
    folder, git = checkout
    (folder / ("new.py" if change == "new file" else "code.py")).write_text("a = 2\n")
    if change == "staged":
        git("add", "code.py")
    tags = provenance.git_tags(folder)
    assert tags["git.clean"] == "false"
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")


def test_ignored_files_leave_a_checkout_clean(checkout):
    folder, git = checkout
    (folder / ".gitignore").write_text("mlflow.db\n")
    git("add", ".gitignore")
    git("commit", "-m", "Ignore")
    (folder / "mlflow.db").touch()
    assert provenance.git_tags(folder)["git.clean"] == "true"


def test_detached_head_has_no_branch(checkout):
    folder, git = checkout
    git("checkout", "--detach")
    assert "mlflow.source.git.branch" not in provenance.git_tags(folder)


def test_repository_without_a_commit_has_no_commit(tmp_path):
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    assert "mlflow.source.git.commit" not in provenance.git_tags(tmp_path)


def test_outside_of_a_checkout_there_are_no_git_tags(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_tags(tmp_path) == {}


def test_without_git_there_are_no_git_tags(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.git_tags(checkout[0]) == {}


def test_git_that_hangs_is_given_up(checkout, monkeypatch):
    folder, _ = checkout
    (folder / "git").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.1)
    assert provenance.git_tags(folder) == {}


def test_tags_tell_command_machine_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package-at-all"))
    command = ["python", "-m", "research.fit", "--run_name", "two words"]
    tags = provenance.collect(command, "research/fit.py", tmp_path)
    assert tags["command"] == "python -m research.fit --run_name 'two words'"
    assert tags["mlflow.source.name"] == "research/fit.py"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert {"host", "os", "python", "torch"} <= tags.keys()
    assert "no-such-package-at-all" not in tags
    assert all(isinstance(value, str) for value in tags.values())


def test_command_hides_passwords_and_survives_odd_bytes(tmp_path):
    command = ["python", "--tracking_uri", "http://me:secret@host", "caf\udce9"]
    shown = provenance.collect(command, "fit.py", tmp_path)["command"]
    assert "secret" not in shown
    assert shown.encode()


# ---- equal runs are found ------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """A package of two modules, and a file beside it."""
    folder = tmp_path / "here" / "package"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.py").write_text("a = 1\nb = 2\n")
    (folder / "inner" / "b.py").write_text("b = 2\n")
    (tmp_path / "mine.py").write_text("c = 3\n")
    return folder


def test_code_has_the_same_hash_in_another_place_and_with_other_line_ends(package, tmp_path):
    mine = tmp_path / "mine.py"
    elsewhere = tmp_path / "there" / "renamed"
    shutil.copytree(package, elsewhere)
    (elsewhere / "a.py").write_bytes(b"a = 1\r\nb = 2\r\n")
    (elsewhere / "notes.txt").write_text("no code")
    (elsewhere / "__pycache__").mkdir()
    (elsewhere / "__pycache__" / "a.pyc").write_bytes(b"\0")
    moved = Path(shutil.copy(mine, elsewhere.parent))
    expected = provenance.hash_code(package, [mine])
    assert provenance.hash_code(elsewhere, [moved]) == expected
    assert len(expected) == 16
    assert int(expected, 16) > 0


def test_every_change_of_code_changes_its_hash(package, tmp_path):
    mine = tmp_path / "mine.py"
    hashes = [provenance.hash_code(package), provenance.hash_code(package, [mine])]
    mine.write_text("c = 4\n")
    hashes.append(provenance.hash_code(package, [mine]))
    (package / "a.py").write_text("a = 2\n")
    hashes.append(provenance.hash_code(package, [mine]))
    (package / "a.py").rename(package / "c.py")
    hashes.append(provenance.hash_code(package, [mine]))
    (package / "c.py").rename(package / "inner" / "c.py")
    hashes.append(provenance.hash_code(package, [mine]))
    (package / "empty.py").touch()
    hashes.append(provenance.hash_code(package, [mine]))
    assert len(set(hashes)) == len(hashes)


def test_the_code_of_this_project_has_a_hash():
    folder = Path(research.__file__).parent
    assert provenance.hash_code(folder) == provenance.hash_code(folder)


def test_what_a_run_hashes_is_all_code_of_this_project(small):
    package = Path(research.__file__).parent
    assert hashes(small(), [])["fingerprint.code"] == provenance.hash_code(package)


def test_fingerprint_tells_configuration_data_and_code_apart():
    data = {"train": "aa", "test": "bb"}
    known = provenance.fingerprint("lr: 1", data, "cc")
    assert known == provenance.fingerprint("lr: 1", dict(reversed(data.items())), "cc")
    others = [
        provenance.fingerprint("lr: 2", data, "cc"),
        provenance.fingerprint("lr: 1", data, "dd"),
        provenance.fingerprint("lr: 1", {"train": "aa"}, "cc"),
        provenance.fingerprint("lr: 1", {"train": "bb", "test": "aa"}, "cc"),
        provenance.fingerprint("lr: 1", {"train": "aa", "val": "bb"}, "cc"),
    ]
    assert len({known, *others}) == 6
    assert len(known) == 16


def test_an_editors_lock_is_no_code(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    before = provenance.hash_code(tmp_path)
    (tmp_path / ".#a.py").symlink_to(tmp_path / "nobody@nowhere")
    assert provenance.hash_code(tmp_path) == before
