"""port_released: one port is taken out of the kernel's list, all others stay, and what the host's own files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.port_released import keeper_of, without


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("50052", ""),
        ("", ""),
        ("8080,50052", "8080"),
        ("50050-50052", "50050-50051"),
        ("50052-50053", "50053"),
        ("50000-50100,60000", "50000-50051,50053-50100,60000"),
        ("500521,5005", "500521,5005"),
    ],
)
def test_the_port_alone_is_taken_out(before: str, after: str) -> None:
    assert without(before, 50052) == after


@pytest.mark.parametrize(
    "line",
    [
        "net.ipv4.ip_local_reserved_ports = 8000,50052",
        "-net/ipv4/ip_local_reserved_ports=50000-50100",
    ],
)
def test_a_file_of_the_host_that_reserves_it_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "etc/sysctl.d/90-site.conf"
    file.parent.mkdir(parents=True)
    file.write_text(f"# of the site\nkernel.panic = 5\n{line}\n")
    assert keeper_of(50052, tmp_path) == str(file)
    assert keeper_of(50053 + 100, tmp_path) == ""


@pytest.mark.parametrize("line", ["# net.ipv4.ip_local_reserved_ports = 50052", "net.ipv4.ip_local_port_range = 50052"])
def test_other_lines_reserve_nothing(line: str, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/sysctl.conf").write_text(f"{line}\n")
    assert keeper_of(50052, tmp_path) == ""
