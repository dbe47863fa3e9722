"""What a result says of where it comes from."""

import shlex
import subprocess
import sys

import pytest
import torch

from adaptive.policy import Policy
from experiment import provenance
from experiment.provenance import ROOT, command_line, commit_of, made, versions


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_the_commit_says_whether_files_differ_from_it(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert len(head) == 40 and commit_of(repository) == head
    (repository / "results.txt").write_text("not part of it")
    assert commit_of(repository) == head
    (repository / "a.py").write_text("2\n")
    assert commit_of(repository) == f"{head} with changes"


def test_the_commit_of_another_repository_is_not_ours(repository, tmp_path_factory):
    inside = repository / "copy"
    inside.mkdir()
    assert commit_of(inside) == ""
    empty = tmp_path_factory.mktemp("empty")
    assert commit_of(empty) == "" and commit_of(empty / "none") == ""
    git(empty, "init", "-q")
    assert commit_of(empty) == ""  # nothing is committed yet


def test_without_git_nothing_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit_of(ROOT) == ""


def test_the_command_can_be_given_to_a_shell():
    words = ["eval_dynamic.py", "--data_path", "my data/c10", "--row", "3"]
    assert command_line(words) == "python eval_dynamic.py --data_path 'my data/c10' --row 3"
    assert shlex.split(command_line()) == ["python", *sys.argv]


def test_absent_packages_are_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert [one.split()[0] for one in versions()] == ["python", "torch"]
    assert versions()[1].split("+")[0] == f"torch {torch.__version__}".split("+")[0]


def test_a_policy_is_stored_with_where_it_comes_from(tmp_path):
    about = {"data_set": "DIGITS", "images": "half", "num_images": 180, "argv": ["a.py"]}
    first, second = (made(torch.device("cpu"), **about) for _ in range(2))
    assert first == second and first.machine
    Policy((0.5, -1e8), made=first).save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json").made == first
