"""Training by flags: several processes, another mesh, and a process that dies."""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from tests.ops.sequence.test_processes import free_port

SCRIPT = pathlib.Path(__file__).parent.parent / "docs/examples/train_sharded.py"


def start(*flags, devices):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, flags)],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(*flags):
    """Two processes of two devices each."""
    shared = "--processes", 2, "--coordinator", f"127.0.0.1:{free_port()}", *flags
    return [start(*shared, "--process", number, devices=2) for number in (0, 1)]


def losses(text):
    return {int(n): float(x) for n, x in re.findall(r"step (\d+): ([\d.]+) nats", text)}


def finish(process):
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 0, text
    return losses(text)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_after_a_process_died(tmp_path):
    wanted = finish(start("--steps", 12, devices=1))
    saving = "--folder", tmp_path, "--every", 2, "--patience", 10
    two = start_two("--data", 2, "--sequence", 2, "--steps", 10_000, *saving)
    try:
        said, lines = "", iter(two[0].stdout or ())
        while 4 not in losses(said):
            said += next(lines)
        two[1].kill()
        died = time.monotonic()
        said += two[0].communicate(timeout=120)[0]
        assert time.monotonic() - died < 60
        assert two[0].returncode != 0
        assert re.search("task died|tasks have crashed|heartbeat timeout", said)
    finally:
        for process in two:
            process.kill()
            process.communicate()
    before = losses(said)
    after = finish(start("--sequence", 2, "--steps", 12, *saving, devices=2))
    # It goes on after the last checkpoint, a few steps before the end of the first run.
    assert 0 < min(after) <= max(before) + 1
    if max(before) < 11:
        assert max(after) == 11
    for found in (before, after):
        for number in found.keys() & wanted.keys():
            assert found[number] == pytest.approx(wanted[number], rel=1e-3), number
