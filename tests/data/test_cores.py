import math
import os

import pytest

from tokenvit_jax.data import cores
from tokenvit_jax.data.cores import Cores, own_cores, share_of_cores


def share(own, *others):
    return share_of_cores(own, [own, *others])


def test_processes_of_a_host_share_its_cores():
    everyone = [Cores("a", frozenset(range(64))) for _ in range(8)]
    assert [share_of_cores(own, everyone) for own in everyone] == [8] * 8
    # A scheduler has given each process its own.
    bound = [Cores("a", frozenset(range(8 * i, 8 * i + 8))) for i in range(8)]
    assert [share_of_cores(own, bound) for own in bound] == [8] * 8
    one, two = Cores("a", frozenset(range(6))), Cores("a", frozenset(range(4, 8)))
    assert (share(one, two), share(two, one)) == (5, 3)
    assert share(one, two._replace(host="b")) == 6
    assert share(Cores("a", frozenset({1})), *[Cores("a", frozenset({1}))] * 9) == 1
    many = [Cores("a", frozenset(range(6)))] * 3
    assert share_of_cores(many[0], many) == 2  # although six thirds may add up to less


def test_a_container_limits_its_processes():
    own = Cores("a", frozenset(range(64)), quota=10.5)
    assert share(own) == 10
    assert share(own, own) == 5
    assert share(own._replace(quota=0.5)) == 1


def test_containers_of_a_machine_share_its_cores_but_not_their_limits():
    pods = [Cores("a", frozenset(range(64)), container=f"pod-{i}") for i in range(8)]
    assert [share_of_cores(own, pods) for own in pods] == [8] * 8
    limited = pods[0]._replace(quota=6)
    assert share_of_cores(limited, pods) == 6
    assert share(limited, limited, pods[1]) == 3


def test_a_machine_has_one_name_in_all_its_containers(monkeypatch, tmp_path):
    found = []
    for name in ("pod-0", "pod-1"):
        monkeypatch.setattr(cores.socket, "gethostname", lambda name=name: name)
        found.append(own_cores())
    assert share(*found) == share(found[0], found[0])
    monkeypatch.setattr(cores, "_BOOT_FILE", tmp_path / "missing")
    assert own_cores().host == "pod-1"


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000\n", math.inf), ("250000 100000\n", 2.5), ("", math.inf), (None, math.inf)],
)
def test_the_limits_of_this_process(monkeypatch, tmp_path, text, quota):
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cores, "_QUOTA_FILE", tmp_path / "cpu.max")
    own = own_cores()
    assert own.quota == quota and own.host
    assert own.numbers == frozenset(os.sched_getaffinity(0))
