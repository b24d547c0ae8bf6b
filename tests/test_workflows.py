"""The workflows publish what was tested, without a secret, and only where it may be published."""

from pathlib import Path

import yaml

import lamda

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github/workflows"


def workflow(name):
    return yaml.safe_load((FOLDER / name).read_text("utf-8"))


def test_only_the_job_that_publishes_may_act_in_the_projects_name_and_it_needs_the_tested_build():
    release = workflow("release.yml")
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert release["permissions"] == {"contents": "read"}
    assert "permissions" not in build
    assert publish["needs"] == "build"
    assert publish["environment"]["name"] == "pypi"
    assert publish["permissions"] == {"id-token": "write", "attestations": "write", "contents": "read"}
    assert any("make package-test" in step.get("run", "") for step in build["steps"])
    assert publish["steps"][-1]["with"]["attestations"] is True


def test_no_workflow_holds_or_asks_for_a_secret():
    for path in FOLDER.glob("*.yml"):
        assert "secrets." not in path.read_text("utf-8")
        assert "password" not in path.read_text("utf-8")


def test_make_targets_that_workflows_call_are_there():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    called = [word for path in FOLDER.glob("*.yml") for word in path.read_text("utf-8").split("make ")[1:]]
    assert called
    assert all(f"\n{word.split()[0]}:" in makefile for word in called)


def test_the_version_stands_in_one_place():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text("utf-8")
    holders = [path.name for path in ROOT.rglob("lamda/**/*.py") if f'"{lamda.__version__}"' in path.read_text("utf-8")]
    assert holders == ["__init__.py"]
