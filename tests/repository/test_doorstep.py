"""What a newcomer meets first: the container, the workflow, the schema beside the examples."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import yaml

from .conftest import ROOT

INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "LABEL", "RUN", "USER", "WORKDIR"}


def instructions() -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments; comments left out, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, " ".join(rest.split())


def test_the_dockerfile_is_sound() -> None:
    """What hadolint asks for, as far as these instructions go."""
    found = list(instructions())
    names = [name for name, _ in found]
    assert set(names) <= INSTRUCTIONS
    assert names[0] == "ARG" and found[0][1].startswith("BASE=") and not found[0][1].endswith(":latest")
    assert found[1] == ("FROM", "${BASE}"), "the base is an argument"
    declared = {rest.split("=")[0] for name, rest in found if name == "ARG"}
    used = {one for _, rest in found for one in re.findall(r"\$\{(\w+)\}", rest)}
    assert used <= declared and "BASE" in used
    runs = [rest for name, rest in found if name == "RUN"]
    assert all("--no-cache-dir" in part for run in runs for part in re.split(r"&&|;", run) if "pip install" in part)
    assert not any(re.search(r"\bsudo\b|\bcd /", run) for run in runs), "WORKDIR and USER do that"
    users = [rest for name, rest in found if name == "USER"]
    assert users and users[-1] not in ("root", "0") and names.index("USER") < names.index("ENTRYPOINT")
    assert all(rest.startswith("/") for name, rest in found if name == "WORKDIR")
    assert all(rest.startswith("[") for name, rest in found if name in ("CMD", "ENTRYPOINT")), "no shell in between"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = (rest.partition("=")[2].split(",") for name, rest in found if rest.startswith("EXTRAS="))
    assert set(extras) <= project["optional-dependencies"].keys()


def test_no_file_names_a_package_index() -> None:
    """pip takes packages from where the machine's owner lets it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    hosts = re.compile(
        "|".join(("pypi" + r"\.org", "pytorch" + r"\.org/whl", "python" + "hosted", "index-url " + "http"))
    )
    files = [ROOT / name for name in listed if (ROOT / name).is_file()]
    assert len(files) > 100 and not [file for file in files if hosts.search(file.read_text("utf-8", "replace"))]


def test_the_workflow_runs_on_every_python_that_the_project_names() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    versions = {
        str(version)
        for job in workflow["jobs"].values()
        for version in job.get("strategy", {}).get("matrix", {}).get("python", [])
        or job.get("strategy", {}).get("matrix", {}).get("python-version", [])
    }
    assert {"3.11", "3.12", "3.13"} <= versions


def test_the_schema_accepts_every_example() -> None:
    """With the program that editors and pre-commit run, as users have it."""
    specs = [
        str(path)
        for path in sorted((ROOT / "examples").rglob("*.yaml"))
        if not path.name.endswith(".lock.yaml") and "apiVersion" in path.read_text(encoding="utf-8")
    ]
    specs += [str(path) for path in sorted((ROOT / "specs" / "recipes").rglob("*.yaml"))]
    assert len(specs) > 8
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(ROOT / "specs" / "minitron.schema.json")]
    done = subprocess.run([*command, *specs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
