"""Recipes of containers and environments name what the package needs and files that exist."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_PACKAGES = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
_NEEDED = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} | _PACKAGES
_INSTRUCTIONS = {"ARG", "FROM", "SHELL", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile and their arguments, in order."""
    lines = [
        line for line in _read("containers/Dockerfile").splitlines() if line and not line.startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def _sections() -> dict[str, list[str]]:
    """Sections of Apptainer's recipe and their lines; the header is under ""."""
    sections: dict[str, list[str]] = {"": []}
    now = ""
    for line in _read("containers/cnclip.def").splitlines():
        if line.startswith("%"):
            now = line[1:].split()[0]
            sections[now] = []
        elif line.strip() and not line.startswith("#"):
            sections[now].append(line.strip())
    return sections


def _extras(command: str) -> list[str]:
    (found,) = re.findall(r'"\.\[([\w,]+)\]"', command)
    return str(found).split(",")


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [hadolint, str(ROOT / "containers" / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert done.returncode == 0


def test_the_dockerfile_copies_what_the_package_is_built_from() -> None:
    found = _instructions()
    assert {name for name, _ in found} <= _INSTRUCTIONS
    assert [name for name, _ in found][:2] == ["ARG", "FROM"]
    copied = {source for name, rest in found if name == "COPY" for source in rest.split()[:-1]}
    assert copied == _NEEDED
    assert all((ROOT / name).exists() for name in copied)
    ignored = set(_read(".dockerignore").split())
    assert not ignored & copied


def test_apptainers_recipe_does_the_same_as_the_dockerfile() -> None:
    sections, docker = _sections(), _instructions()
    assert set(sections) == {"", "files", "post", "runscript", "labels", "help"}
    base = next(rest for name, rest in docker if name == "ARG").partition("=")[2]
    assert sections[""] == ["Bootstrap: docker", f"From: {base}"]
    copied = {line.split()[0]: line.split()[1] for line in sections["files"]}
    assert copied == {name: f"/opt/cnclip/{name}" for name in _NEEDED}
    (install,) = [rest for name, rest in docker if name == "RUN" and "pip install" in rest]
    (own,) = [line for line in sections["post"] if "pip install" in line]
    assert install.split(" && ")[0].strip() == own
    assert set(_extras(own)) <= set(PROJECT["project"]["optional-dependencies"])
    for script in ("post", "runscript"):
        subprocess.run(["sh", "-n"], input="\n".join(sections[script]), text=True, check=True)


def test_condas_environment_has_the_packages_dependencies() -> None:
    environment = yaml.safe_load(_read("environment.yml"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == PROJECT["project"]["dependencies"]
    assert "python=3.11" in environment["dependencies"]


def test_extras_of_trackers_are_installed_for_tests_and_bound() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    own = next(entry for entry in extras["dev"] if entry.startswith(PROJECT["project"]["name"]))
    assert {"wandb", "mlflow"} <= set(own.partition("[")[2].rstrip("]").split(","))
    bound = {
        line.partition("==")[0].lower().replace("_", "-") for line in _read("constraints.txt").splitlines()
    }
    for name in ("wandb", "mlflow"):
        for entry in extras[name]:
            package = re.match(r"[\w-]+", entry)
            assert package is not None
            assert package[0].lower() in bound


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load(_read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["project"]["name"]
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["preferred-citation"]["year"] == 2022


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_template_has_what_its_host_needs(name: str) -> None:
    form = yaml.safe_load(_read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= set(form)
    ids = [item["id"] for item in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(item["attributes"]["label"] for item in form["body"])


def test_the_workflow_runs_targets_that_the_makefile_has() -> None:
    workflow = yaml.safe_load(_read(".github/workflows/ci.yml"))
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    targets = set(re.findall(r"^([\w-]+):", _read("Makefile"), re.MULTILINE))
    assert [command.split()[1] for command in commands] == ["install", "lint", "test"]
    assert {command.split()[1] for command in commands} <= targets
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.13"
    assert versions == ["3.11", "3.12"]


def test_the_kubernetes_example_is_a_job_that_resumes() -> None:
    page = _read("docs/guides/cluster.md")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "OnFailure"  # a stopped run ends with status 143
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert container["args"][0] == "run"
