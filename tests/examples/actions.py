"""Runs a workflow of GitHub Actions here: each step as the shell it is, with what GitHub gives it.

It knows the keys, expressions and shells that our example uses, and refuses all others. GitHub
takes what is missing for an empty text; here a name that nobody declared is an error.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SHELLS = {  # as GitHub starts them
    "bash": ("bash", "--noprofile", "--norc", "-eo", "pipefail"),
    "python": (sys.executable,),
}
LOOKUP = re.compile(r"(inputs|vars|secrets|needs|steps)\.([\w-]+)(?:\.outputs\.([\w-]+))?")
COMPARISON = re.compile(r"([\w.-]+) (!=|==) '([^']*)'")
KEYS = {
    "workflow": {"name", "run-name", "permissions", "concurrency", "defaults", "env", "jobs", True},
    "job": {
        *("name", "needs", "if", "environment", "runs-on", "timeout-minutes", "env", "outputs"),
        "steps",
    },
    "step": {"name", "id", "if", "env", "shell", "run"},
}


@dataclass
class Job:
    """What became of a job: its result, its outputs, each step's exit code, and what was said."""

    result: str = "skipped"
    outputs: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    said: str = ""
    summary: str = ""


@dataclass
class Runner:
    """A repository with its settings, and a machine.

    Attributes:
        variables: of the repository.
        secrets: environment → its secrets, which only its jobs see.
        root: a folder of the machine; each job works in a new one.
        environ: the machine's own variables.
        before: called with the names of a job and a step, and the job's folder.
        approve: whether the reviewers of an environment approve.
    """

    variables: Mapping[str, str]
    secrets: Mapping[str, Mapping[str, str]]
    root: Path
    environ: Mapping[str, str]
    before: Callable[[str, str, Path], object] = lambda job, step, folder: None
    approve: Callable[[str], bool] = lambda environment: True

    def run(self, workflow: Path, inputs: Mapping[str, str]) -> dict[str, Job]:
        """Run all jobs of a workflow in the order of the file; name → what became of it."""
        content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
        known("workflow", content)
        # YAML 1.1 reads the key `on` as true
        assert set(inputs) == set(content[True]["workflow_dispatch"]["inputs"])
        done: dict[str, Job] = {}
        for name, job in content["jobs"].items():
            done[name] = self._job(name, job, content, inputs, done)
        return done

    def _job(
        self,
        name: str,
        job: Mapping[str, Any],
        content: Mapping[str, Any],
        inputs: Mapping[str, str],
        done: Mapping[str, Job],
    ) -> Job:
        known("job", job)
        its, steps = Job(), job["steps"]
        needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
        scope: dict[str, Any] = {
            "inputs": inputs,
            "vars": self.variables,
            "secrets": self.secrets.get(job.get("environment", ""), {}),
            "needs": {need: done[need].outputs for need in needs},
            "steps": {},
        }
        if any(done[need].result != "success" for need in needs):
            return its
        if not holds(job.get("if", "success()"), scope, failed=False):
            return its
        if "environment" in job and not self.approve(job["environment"]):
            return its
        folder = self.root / name
        folder.mkdir(parents=True)
        for step in steps:
            known("step", step)
            if not holds(step.get("if", "success()"), scope, failed=any(its.codes.values())):
                continue
            self.before(name, step["name"], folder)
            given = [part.get("env", {}) for part in (content, job, step)]
            environ = {k: fill(v, scope) for part in given for k, v in part.items()}
            shell = step.get("shell") or content["defaults"]["run"]["shell"]
            assert "${{" not in step["run"], "what a person types in would be run"
            files = {word: folder.with_suffix(f".{word}") for word in ("output", "summary")}
            for file in files.values():
                file.write_text("")
            script = folder.with_suffix(".script")
            script.write_text(step["run"], encoding="utf-8")
            ended = subprocess.run(
                [*SHELLS[shell], script],
                cwd=folder,
                env={
                    **self.environ,
                    "GITHUB_OUTPUT": str(files["output"]),
                    "GITHUB_STEP_SUMMARY": str(files["summary"]),
                    **environ,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            its.codes[step["name"]] = ended.returncode
            its.said += ended.stdout
            its.summary += files["summary"].read_text()
            if "id" in step:
                lines = files["output"].read_text().splitlines()
                scope["steps"][step["id"]] = dict(line.split("=", 1) for line in lines)
        its.result = "failure" if any(its.codes.values()) else "success"
        its.outputs = {k: fill(v, scope) for k, v in job.get("outputs", {}).items()}
        return its


def known(kind: str, part: Mapping[Any, Any]) -> None:
    assert set(part) <= KEYS[kind], f"{kind}: the tests do not know {set(part) - KEYS[kind]}"


def holds(condition: str, scope: Mapping[str, Any], *, failed: bool) -> bool:
    """Whether an `if` holds; GitHub adds `success()` to what has no such function."""
    condition = condition.removeprefix("${{").removesuffix("}}").strip()
    if condition == "!cancelled()":
        return True
    if failed or condition == "success()":
        return not failed
    compared = COMPARISON.fullmatch(condition)
    assert compared, f"the tests do not know the condition {condition}"
    return (look_up(compared[1], scope) == compared[3]) == (compared[2] == "==")


def fill(text: str, scope: Mapping[str, Any]) -> str:
    """A text with the values of its expressions."""
    return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: look_up(found[1], scope), text)


def look_up(name: str, scope: Mapping[str, Any]) -> str:
    """The value of an expression. Only outputs and secrets may be missing, which are then empty."""
    found = LOOKUP.fullmatch(name)
    assert found, f"the tests do not know the expression {name}"
    where, what, output = found.groups()
    assert (output is not None) == (where in ("needs", "steps")), name
    if where == "secrets":
        return str(scope[where].get(what, ""))
    if where == "steps":
        return str(scope[where].get(what, {}).get(output, ""))
    return str(scope[where][what][output] if output else scope[where][what])
