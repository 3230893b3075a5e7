"""What a plan can be reckoned for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron.compiler.estimate.devices import DEVICES, read_device
from minitron.compiler.estimate.hardware import ASSUMED_MFU, read_hardware
from minitron.specs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("h200x8", "h200", 8), ("H100", "h100", 1), ("a100", "a100-80", 1), ("a100-40x2", "a100-40", 2)],
)
def test_a_device_and_how_many(text: str, name: str, count: int) -> None:
    cluster = read_device(text)
    assert (cluster.device.name, cluster.count) == (name, count)
    assert cluster.flops == count * DEVICES[name].flops
    assert read_device(cluster.name) == cluster


@pytest.mark.parametrize("text", ["", "h300", "h200x0", "h200x", "x8", "thisx8", "h200x9999999", "8xh200", "h100x-1"])
def test_anything_else_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(UsageError, match="write one of a100-40, a100-80, h100, h200, b200 or this"):
        read_device(text)


def test_this_machine_has_memory_and_a_speed() -> None:
    device = read_device("cpu").device
    assert device.kind == "cpu" and device.memory_bytes > 2**28 and device.flops > 1e8


class TestUtilisation:
    def test_it_is_assumed_given_or_measured(self, tmp_path: Path) -> None:
        assert read_hardware(None, None, None).mfu == ASSUMED_MFU
        assert not read_hardware(None, None, None).named and read_hardware("h100", None, None).named
        assert read_hardware("h100", 0.4, None).mfu == 0.4
        assert read_hardware("cpu", None, None).words.startswith("this machine at 0.17 of its peak")

    @pytest.fixture
    def build(self, tmp_path: Path) -> Path:
        (tmp_path / "train").mkdir()
        phases = [{"name": "distill", "tokens": 100, "flops": 100 * 10**9}]
        (tmp_path / "plan.json").write_text(json.dumps({"phases": phases}))
        # A slow start, a line that was cut off: the later half counts. 98,900 tokens/s x 1 GFLOP are a tenth of an H100.
        rates = [1.0, 2.0, 98_900.0, 98_900.0]
        lines = "\n".join(json.dumps({"tokens_per_second": rate}) for rate in rates)
        (tmp_path / "train" / "metrics.jsonl").write_text(lines + '\n{"tokens_per')
        return tmp_path

    def test_a_training_tells_it(self, build: Path) -> None:
        hardware = read_hardware("h100", None, str(build))
        assert hardware.mfu == pytest.approx(0.1) and "measured" in hardware.words
        assert read_hardware("h200x8", None, f"{build}@h100x2").mfu == pytest.approx(0.05)

    def test_hours_follow_from_it(self) -> None:
        one, eight = read_hardware("h100", 0.5, None), read_hardware("h100x8", 0.5, None)
        assert one.hours(989e12 * 3600) == pytest.approx(2.0) == eight.hours(989e12 * 3600)
        assert eight.seconds(989e12 * 3600) == pytest.approx(2 * 3600 / 8)

    @pytest.mark.parametrize("mfu", [0.0, -1.0, 1.5])
    def test_a_share_is_a_share(self, mfu: float) -> None:
        with pytest.raises(UsageError, match="not a share of a device's peak"):
            read_hardware(None, mfu, None)

    def test_a_build_that_was_not_trained(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="has no training that tells a speed"):
            read_hardware("h100", None, str(tmp_path))
        with pytest.raises(UsageError, match="give one of them"):
            read_hardware("h100", 0.4, str(tmp_path))
