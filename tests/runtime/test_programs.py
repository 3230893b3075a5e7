"""Programs that models write: what they are kept from, that honest ones are not, and that this process runs none."""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
from pathlib import Path

import pytest

from minitron.runtime.benchmarks import programs
from minitron.runtime.benchmarks.confined import confine, instructions
from minitron.runtime.benchmarks.metrics import pass_at_1, prompt_and_answers
from minitron.runtime.benchmarks.programs import check_confinement, passing
from minitron.specs.errors import UsageError

BENCHMARKS = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"

HONEST = {
    "nothing": "",
    "the usual modules": "import collections, functools, heapq, itertools, math, random, re, string, typing, hashlib",
    "printing": "print('a' * 100000)",
    "a thread": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "reading": f"assert open({__file__!r}).readline()",
    "its own name": "assert __name__ == '__main__'",
    "half a gigabyte": "x = bytearray(1 << 29)",
}
WRONG = {
    "an assertion": "assert 1 == 2",
    "no Python": "def f(:",
    "the end before the tests": "import sys; sys.exit(0)",
    "the end of the process": "import os; os._exit(0)",
    "no end": "while True: pass",
    "no end of memory": "x = bytearray(1 << 31)",
    "endless recursion": "def f(): f()\nf()",
    "lone surrogates": "x = '\ud800'\nassert False",
}


def test_programs_that_end_without_an_error_pass() -> None:
    check_confinement()
    assert dict(zip(HONEST, passing(list(HONEST.values())), strict=True)) == dict.fromkeys(HONEST, True)


def test_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "CPU_SECONDS", 1)
    assert dict(zip(WRONG, passing(list(WRONG.values())), strict=True)) == dict.fromkeys(WRONG, False)


def test_there_is_no_network() -> None:
    """A server of this machine that would answer is not reached by anything that makes or uses a socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        address = server.getsockname()
        attempts = [
            f"import socket; socket.create_connection({address})",
            "import socket; socket.socket(socket.AF_UNIX)",
            "import socket; socket.socketpair()",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{address[1]}', timeout=1)",
        ]
        assert passing(attempts) == [False] * len(attempts)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("as it was")
    (tmp_path / "folder").mkdir()
    attempts = [
        f"open({str(file)!r}, 'w').write('x')",
        f"open({str(file)!r}, 'a').write('x')",
        f"open({str(file)!r}, 'r+').write('x')",
        f"open({str(tmp_path / 'new.txt')!r}, 'x')",
        f"import os; os.truncate({str(file)!r}, 0)",
        f"import os; os.remove({str(file)!r})",
        f"import os; os.rename({str(file)!r}, {str(tmp_path / 'other')!r})",
        f"import os; os.symlink('a', {str(tmp_path / 'link')!r})",
        f"import os; os.link({str(file)!r}, {str(tmp_path / 'link')!r})",
        f"import os; os.mkdir({str(tmp_path / 'made')!r})",
        f"import os; os.rmdir({str(tmp_path / 'folder')!r})",
        f"import os; os.chmod({str(file)!r}, 0)",
        f"import os; os.utime({str(file)!r}, (0, 0))",
        "import tempfile; tempfile.mkdtemp()",
    ]
    before = file.stat()
    assert passing(attempts) == [False] * len(attempts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "mine.txt"]
    assert file.read_text() == "as it was" and file.stat().st_mtime_ns == before.st_mtime_ns


def test_other_processes_are_out_of_reach() -> None:
    here = os.getpid()
    attempts = [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
        f"import os, signal; os.kill({here}, signal.SIGTERM)",
        f"import ctypes; assert ctypes.CDLL(None).syscall(234, {here}, {here}, 15) == 0",  # tgkill on x86-64
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    ]
    assert passing(attempts) == [False] * len(attempts)
    assert passing(["import os; assert os.system('true') == 0"]) == [False]


def test_the_environment_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert passing(["import os; assert 'HF_TOKEN' not in os.environ"]) == [True]


def test_a_program_that_waits_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "WALL_SECONDS", 1)
    assert passing(["import time; time.sleep(60)", "import threading; threading.Event().wait()"]) == [False, False]


def test_nothing_of_it_happens_in_this_process() -> None:
    threads = threading.active_count()
    assert passing(["import builtins; builtins.minitron_was_here = True"]) == [True]
    assert not hasattr(__builtins__, "minitron_was_here") and threading.active_count() == threads


def test_both_machines_have_a_filter_of_their_own() -> None:
    filters = {machine: instructions(machine) for machine in ("x86_64", "aarch64")}
    assert all(len(one) < 4096 for one in filters.values())  # the kernel's own limit
    for one in filters.values():
        for place, (_, yes, no, _) in enumerate(one):
            assert max(yes, no) == 0 or place + 1 + max(yes, no) < len(one), "a jump out of the filter"


def test_a_machine_without_confinement_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    check_confinement.cache_clear()
    monkeypatch.setattr(programs, "_SCRIPT", Path("/nowhere.py"))
    with pytest.raises(UsageError, match=r"cannot be confined on this machine \(the process ended with \d\)"):
        check_confinement()
    check_confinement.cache_clear()


def test_an_unknown_machine_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no confinement for linux on riscv64"):
        confine(1, 1)


def test_pass_at_1_is_the_share_of_answers_that_pass() -> None:
    document = {"prompt": "def add(a, b):\n"}
    (made,) = prompt_and_answers(
        [["    return a + b", "    return a - b", "    return b + a", "    retur"]], [document]
    )
    assert pass_at_1(["assert add(2, 3) == 5"], [made]) == {"pass@1": 0.5}


@pytest.mark.shared
def test_published_solutions_pass() -> None:
    """Every ninth of HumanEval and every fortieth of MBPP; all of them do (benchmarks have been tried with none left out)."""
    if not BENCHMARKS.is_dir():
        pytest.skip("needs ../shared/data/benchmarks")
    humaneval = [json.loads(line) for line in (BENCHMARKS / "humaneval.jsonl").read_text().splitlines()][::9]
    mbpp = [json.loads(line) for line in (BENCHMARKS / "mbpp.jsonl").read_text().splitlines()][::40]
    solutions = [
        f"{one['prompt']}{one['canonical_solution']}\n{one['test']}\ncheck({one['entry_point']})" for one in humaneval
    ]
    solutions += ["\n".join([one["code"], *one["test_list"]]) for one in mbpp]
    assert passing(solutions) == [True] * len(solutions)
