import importlib.metadata
import json
import platform
import re
import stat

import yaml

from research.tracking import environment


def install(folder, name, version, origin=None, file="METADATA"):
    """What an installer leaves of a package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / file).write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nVersion: 0\n"
    )
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))


def test_requirements_name_what_is_installed_here():
    lines = environment.requirements().splitlines()
    assert f"torch=={importlib.metadata.version('torch')}" in lines
    assert f"mlflow=={importlib.metadata.version('mlflow')}" in lines
    names = [re.split(r"==| @ ", line.removeprefix("# "))[0] for line in lines]
    canonical = [re.sub(r"[-_.]+", "-", name).lower() for name in names]
    assert canonical == sorted(set(canonical))


def test_every_kind_of_installation_has_its_line(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    install(first, "Plain_Name", "1.0")
    install(second, "plain-name", "2.0")  # hidden by the first
    install(first, "b", "1.0+cpu")
    install(
        first,
        "from_git",
        "0.1",
        {
            "url": "https://token@example.org/x.git",
            "vcs_info": {"vcs": "git", "commit_id": "abc", "requested_revision": "main"},
        },
    )
    install(first, "mine", "0.1", {"url": "file:///home/x", "dir_info": {"editable": True}})
    install(first, "wheel", "0.1", {"url": "https://me:pw@example.org/w.whl", "archive_info": {}})
    install(first, "odd", "0.1", "no mapping")
    (first / "broken-1.0.dist-info").mkdir()
    found = [*importlib.metadata.distributions(path=[str(first), str(second)])]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    assert environment.requirements().splitlines() == [
        "b==1.0+cpu",
        "from_git @ git+https://example.org/x.git@abc",
        "# mine==0.1 from file:///home/x",
        "odd==0.1",
        "Plain_Name==1.0",
        "wheel @ https://example.org/w.whl",
    ]


def test_machine_is_told_as_yaml():
    facts = yaml.safe_load(environment.machine())
    assert facts["host"] == platform.node()
    assert facts["python"].startswith(platform.python_version())
    assert facts["logical_cores"] >= facts.get("usable_cores", 1) >= 1
    assert facts["memory_gib"] > 0.1
    assert facts["cpu"]


def test_gpus_are_what_nvidia_smi_tells(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 143771, 570.86.15'\necho 'NVIDIA GB10, [N/A], 580.1'\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert yaml.safe_load(environment.machine())["gpus"] == [
        {"name": "NVIDIA H200", "memory_gib": 140.4, "driver": "570.86.15"},
        {"name": "NVIDIA GB10", "memory_gib": "[N/A]", "driver": "580.1"},
    ]


def test_broken_driver_leaves_the_gpus_out(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert "gpus" not in yaml.safe_load(environment.machine())


def test_limits_of_a_container_are_told(monkeypatch):
    limits = {"cpu.max": "150000 100000", "memory.max": str(8 * 2**30)}
    monkeypatch.setattr(environment, "_control_group", limits.get)
    facts = yaml.safe_load(environment.machine())
    assert (facts["core_limit"], facts["memory_limit_gib"]) == (1.5, 8.0)
    limits |= {"cpu.max": "max 100000", "memory.max": "max"}
    assert "core_limit" not in yaml.safe_load(environment.machine())
