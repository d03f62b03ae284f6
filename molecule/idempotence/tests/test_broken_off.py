"""A run that was killed in the middle of an installation is followed by one that finishes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import cluster
from tests.lab.ansible import playbook, succeed
from tests.lab.cluster import run

NODE = "vasp-03"
ONLY = ("playbooks/cluster.yml", "--limit", NODE, "--tags", "cluster_base")
# The first kills dpkg in the middle of its work, once; the second lacks a package that it depends on.
MAKE = """
set -eu
for name in killer needy; do
    mkdir -p /root/broken/$name/DEBIAN
    printf 'Package: %s\\nVersion: 1\\nArchitecture: all\\nMaintainer: nobody\\nDescription: test\\n' $name \\
        >/root/broken/$name/DEBIAN/control
done
echo 'Depends: hello' >>/root/broken/needy/DEBIAN/control
printf '#!/bin/sh\\n[ -e /root/broken/killed ] || { : >/root/broken/killed; kill -9 $PPID; }\\n' \\
    >/root/broken/killer/DEBIAN/postinst
chmod 755 /root/broken/killer/DEBIAN/postinst
for name in killer needy; do dpkg-deb --build /root/broken/$name; done
"""


@pytest.fixture
def broken() -> Iterator[None]:
    """A node on which apt refuses all work."""
    run(NODE, MAKE)
    assert cluster.host(NODE).run("dpkg --unpack /root/broken/needy.deb").rc == 0
    assert run(NODE, "dpkg --install /root/broken/killer.deb >/dev/null 2>&1; echo $?") == "137"
    yield
    run(NODE, "dpkg --purge killer needy hello && rm -r /root/broken")


@pytest.mark.usefixtures("broken")
def test_an_installation_that_was_killed_is_finished() -> None:
    refused = cluster.host(NODE).run("apt-get --yes install hello")
    assert refused.rc != 0
    assert "dpkg was interrupted" in refused.stderr

    dry = succeed(*ONLY, "--check", "--diff")
    assert "-killer half-configured" in dry.output
    assert "-needy unpacked" in dry.output
    assert run(NODE, "dpkg-query --show --showformat='${db:Status-Status}' killer") == "half-configured"

    assert succeed(*ONLY).changed == {NODE: 1}
    assert (
        run(NODE, "dpkg-query --show --showformat='${db:Status-Status} ' killer needy hello").split()
        == ["installed"] * 3
    )
    assert run(NODE, "dpkg --audit && apt-get check -qq") == ""
    assert playbook(*ONLY).changed == {NODE: 0}
