"""Filters of the lab's own inventory."""

from __future__ import annotations

from typing import Any


def lab_wire(network: dict[str, Any]) -> dict[str, str]:
    """One host's interface on one of the lab's networks, from the network and the host's last octet."""
    octet = int(network["octet"])
    return {
        "name": str(network["name"]),
        "cable": f"{network['cable']}{octet}",
        "bridge": str(network["bridge"]),
        "address": f"{network['prefix']}.{octet}/24",
    }


def lab_machines(hostvars: dict[str, dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """The hosts to boot, from the lab's inventory; each declared GPU becomes a device file and a card of a stand-in."""
    return [
        {
            "name": str(name),
            "octet": int(hostvars[name]["lab_octet"]),
            "fake_gpus": [
                {
                    "device": f"/dev/nvidia{index}",
                    "pci_bus_id": f"0000:{0x3B + index:02x}:00.0",
                    "memory_mib": int(gpu["memory_mib"]),
                    "numa_node": int(gpu["numa_node"]),
                }
                for index, gpu in enumerate(hostvars[name].get("gpus", []))
            ],
            "binds": [str(bind) for bind in hostvars[name].get("lab_binds", [])],
        }
        for name in names
    ]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"lab_machines": lab_machines, "lab_wire": lab_wire}
