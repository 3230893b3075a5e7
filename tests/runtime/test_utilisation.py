"""Utilisation is the models' own arithmetic over what the devices could do."""

from __future__ import annotations

import torch

from minitron.runtime.utilisation import peak_flops, peak_memory, peak_of, utilisation


def test_the_share_of_all_devices_together() -> None:
    assert utilisation(1000, 50.0, 1e5, 1) == 0.5
    assert utilisation(1000, 50.0, 1e5, 4) == 0.125


def test_what_is_not_known_is_not_guessed() -> None:
    assert utilisation(None, 50.0, 1e5, 1) is None and utilisation(1000, 50.0, None, 1) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert peak_of("A device of next year") is None


def test_devices_by_the_names_that_their_driver_gives() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_of("NVIDIA A10G") == 70e12 and peak_of("NVIDIA RTX A4000") is None
    assert peak_of("NVIDIA L40S") == 362e12 and peak_of("NVIDIA L40") == 181e12 and peak_of("NVIDIA L4") == 121e12


def test_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + (16 << 20))  # fp32: more bytes than ever before
    assert peak_memory(torch.device("cpu")) > before and held.sum() > 0
