"""Elements that come into the sets of a table's file: what is added, and what is left as it was."""

from __future__ import annotations

import pytest

from library import nft_elements as nft

TABLE = "inet gleaner"
TEXT = """\
flush set inet gleaner rpc_peers
add element inet gleaner rpc_peers { 10.0.1.11, 10.0.1.9 }
add element inet gleaner lend_peers { 10.0.0.11 }
add element inet gleaner rpc_ports { 50052 }
"""


def test_only_what_a_set_lacks_is_named() -> None:
    assert nft.lacking(TEXT, TABLE, "rpc_peers", ["10.0.1.14", "10.0.1.11", "10.0.1.1"]) == ["10.0.1.1", "10.0.1.14"]
    assert nft.lacking(TEXT, TABLE, "rpc_peers", ["10.0.1.9"]) == []


def test_elements_stand_in_the_order_in_which_the_role_writes_them() -> None:
    text = nft.with_elements(TEXT, TABLE, "rpc_peers", ["10.0.1.14", "10.0.1.11"])
    assert text == TEXT.replace("{ 10.0.1.11, 10.0.1.9 }", "{ 10.0.1.11, 10.0.1.14, 10.0.1.9 }")


@pytest.mark.parametrize("name", ["peers", "rpc_peer", "rpc.peers"])
def test_a_set_that_the_file_does_not_fill_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="fills no set"):
        nft.lacking(TEXT, TABLE, name, ["10.0.1.14"])


def test_another_table_s_set_is_not_meant() -> None:
    with pytest.raises(ValueError, match="of the table inet other"):
        nft.with_elements(TEXT, "inet other", "rpc_peers", ["10.0.1.14"])
