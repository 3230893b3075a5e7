"""Several processes of one command fail together: the user reads each thing once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from minitron.cli.failures import failure_of
from minitron.cli.main import command_line
from minitron.cli.ranks import says
from minitron.specs.errors import WorkError

Rank = Callable[[int], None]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """Makes this process one of two that torchrun has started."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    for name, value in {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "here",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def become(number: int) -> None:
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setattr(become, "store", store, raising=False)

    return become


def wrong(tmp_path: Path) -> list[str]:
    (tmp_path / "training.yaml").write_text("format_version: 7\n")
    return ["train", str(tmp_path)]


def test_a_mistake_that_all_see_is_told_once(rank: Rank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for number in (1, 0):
        rank(number)
        assert command_line(wrong(tmp_path)) == 2
        said.append(capsys.readouterr().err)
    assert "training.yaml:1:17: format_version: `7` is not the format that this version reads" in said[0]
    assert said[1] == ""


def test_another_attempt_of_torchrun_tells_it_again(
    rank: Rank, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank(0)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        command_line(wrong(tmp_path))
        assert "format_version: `7`" in capsys.readouterr().err


def test_what_follows_from_the_failure_of_another_is_not_told(rank: Rank) -> None:
    rank(0)
    assert says(failure_of(KeyboardInterrupt())), "the user's own Ctrl-C"
    assert says(failure_of(WorkError("rank 1 has a full disk")))
    assert not says(failure_of(RuntimeError("Connection closed by peer"))) and not says(failure_of(KeyboardInterrupt()))
    assert says(failure_of(WorkError("rank 0 has one too")))


def test_without_a_store_each_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert says(failure_of(KeyboardInterrupt()))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "none")
    assert says(failure_of(KeyboardInterrupt()))
