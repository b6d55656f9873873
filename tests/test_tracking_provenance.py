import subprocess

import pytest

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
