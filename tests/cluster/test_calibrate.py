"""Calibration: the fits against known machines, and a short real measurement."""

import pytest

from autopar.cluster import Cluster, calibrate
from autopar.errors import SpecError


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_ring_fit_finds_the_bandwidth_and_latency_it_was_made_from(ranks):
    bandwidth, latency = 2e9, 5e-6
    times = [(n, 2 * (ranks - 1) * (latency + n / ranks / bandwidth)) for n in calibrate.MESSAGES]
    found = calibrate._fit(times, ranks)
    assert found["bandwidth"] == pytest.approx(bandwidth, rel=1e-3)
    assert found["latency"] == pytest.approx(latency, rel=0.02)


def test_shares_never_fall_with_size():
    assert calibrate._rising([(1, 0.2), (2, 0.9), (4, 0.7)]) == [[1, 0.2], [2, 0.9], [4, 0.9]]


def test_one_device_is_measured_as_a_cluster_file_that_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate, "PER_POINT", 0.01)
    monkeypatch.setattr(calibrate, "SIZES", (32, 64))
    monkeypatch.setattr(calibrate, "COPIES", (2**12, 2**16))
    device = calibrate._device("cpu") | {"name": "core", "memory": 2**30}
    assert device["flops_per_second"]["float32"] > 1e6 and device["kernel_latency"] < 1e-2
    measured = {"name": "here", "device": device, "devices_per_host": 1, "hosts": 1}
    file = tmp_path / "here.yaml"
    file.write_text(calibrate.as_yaml(measured))
    cluster = Cluster.load(file)
    assert cluster.device.bandwidth == device["bandwidth"]
    assert 0 < cluster.device.share("matmul", 2.0 * 32**3) <= 1


def test_so_many_devices_as_asked_or_a_word_that_they_cannot_be_measured() -> None:
    assert calibrate._devices(None, 2, accelerated=False) == 2
    assert calibrate._devices(4, 2, accelerated=False) == 4, "processes may share cores"
    with pytest.raises(SpecError, match="--devices 9 cannot be measured here; 1 to 8 can"):
        calibrate._devices(9, 2, accelerated=False)
    with pytest.raises(SpecError, match="--devices 4 cannot be measured here; 1 to 2 can"):
        calibrate._devices(4, 2, accelerated=True)
