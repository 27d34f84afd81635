"""Two hosts: two network namespaces with their own addresses, connected by a virtual Ethernet pair; torchrun in each.

The run trains on both. Then one host dies, every process of it at once. The other restarts from the newest checkpoint,
alone, and finishes the run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import PACKAGED, REPOSITORY, environment, overrides
from selfvil import checkpoint

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other at `ADDRESSES`, through the interface eth0 of each."""
    names = [f"selfvil-{os.getpid()}-{number}" for number in range(2)]
    cables = [f"sv{os.getpid() % 100_000}{letter}" for letter in "ab"]
    try:
        if shutil.which("ip") is None:
            raise OSError("there is no command ip")
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES):
            ip("link", "set", cable, "netns", name, "name", "eth0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        warnings.warn(f"two hosts are not tested: no network namespaces here ({reason.strip()})", stacklevel=1)
        pytest.skip("this machine allows no network namespaces")
    try:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def torchrun(host: str, address: str, *arguments: str) -> subprocess.Popen:
    is_first = str(address == ADDRESSES[0]).lower()  # torchrun compares host names, which namespaces share
    command = [
        "ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2",
        "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:29477",
        "--rdzv_id", "test", "--rdzv_conf", f"last_call_timeout=3,is_host={is_first}",
        "--local_addr", address, "--max_restarts", "3",
        "launch/pretrain.py", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(GLOO_SOCKET_IFNAME="eth0"), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_survives_the_death_of_one_of_two_hosts(hosts, digit_shards, tmp_path):
    run: Path = tmp_path / "run"
    arguments = [
        PACKAGED["mae"], *overrides("mae", digit_shards, run, "budget.steps=4000", "run.checkpoint_every=20")
    ]  # fmt: skip
    first, second = (torchrun(host, address, *arguments) for host, address in zip(hosts, ADDRESSES))
    try:
        deadline = time.monotonic() + 120
        while (newest := checkpoint.newest(run / "checkpoints")) is None or newest.step < 40:
            assert time.monotonic() < deadline, "no checkpoint of 40 steps within two minutes"
            assert first.poll() is None, first.communicate()[0]
            time.sleep(1)
        os.killpg(second.pid, signal.SIGKILL)
        while len(launches(run)) < 2:
            assert time.monotonic() < deadline + 120, "the surviving host did not restart"
            assert first.poll() is None, first.communicate()[0]
            time.sleep(1)
        before, after = launches(run)[:2]
        assert (before["processes"], after["processes"]) == (2, 1)
        assert after["first_step"] >= 40
        at_restart = after["first_step"]
        while checkpoint.newest(run / "checkpoints").step <= at_restart:
            assert time.monotonic() < deadline + 180, "the surviving host makes no steps"
            time.sleep(1)
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def launches(run: Path) -> list[dict]:
    path = run / "run.json"
    return json.loads(path.read_text())["launches"] if path.exists() else []
