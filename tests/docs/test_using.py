"""The guide for clients is what the inventory says. `tests/full/lab` and the scenario tailnet run its examples."""

from __future__ import annotations

from pathlib import Path

from tests.docs.readme import ROOT
from tests.filters.ansible import run


def written(inventory: str, file: Path, *more: str) -> str:
    wanted = ["-i", f"inventories/{inventory}", "-e", f"guide_file={file}", *more]
    done = run("ansible-playbook", "playbooks/guide.yml", *wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    return file.read_text()


def test_docs_have_the_first_clusters(tmp_path: Path) -> None:
    assert (ROOT / "docs/using.md").read_text() == written("beefcake2", tmp_path / "using.md"), (
        "docs/using.md has drifted: run ansible-playbook -i inventories/beefcake2 playbooks/guide.yml "
        "-e guide_file=$PWD/docs/using.md"
    )


def test_a_site_without_a_tailnet_has_the_gateways_own_addresses(tmp_path: Path) -> None:
    guide = written("lab", tmp_path / "using.md")
    assert "tailnet" not in guide
    assert "https://" not in guide.replace("https://platform.openai.com", "")
    assert "curl -sS --fail-with-body http://10.213." in guide


def test_the_address_inside_is_one_on_which_the_gateway_listens(tmp_path: Path) -> None:
    guide = written("lab", tmp_path / "using.md", "-e", '{"gateway_listen": ["127.0.0.1", "10.99.0.7"]}')
    assert "http://10.99.0.7:8080/" in guide
    assert "10.213." not in guide
