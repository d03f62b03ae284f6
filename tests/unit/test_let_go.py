"""What nginx serves besides the tiers, by its own words: with anything else it is not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

VARS = Path(__file__).parents[2] / "roles" / "gateway" / "vars" / "main.yml"
MAIN = """\
# configuration file /etc/nginx/nginx.conf:
user www-data;
events {
	worker_connections 8192;
}
http {
	include /etc/nginx/sites-enabled/*;
%s
}
#mail {
#	server {
#		listen localhost:110;
#	}
#}

"""
OURS = """\
# configuration file /etc/nginx/sites-enabled/ai-inference:
map $server_addr $gleaner_from_tailnet {
    default 0;
}
server {
    listen 127.0.0.1:9001;
}

# configuration file /etc/nginx/ai-inference/upstream-fast.conf:
upstream gleaner_fast {
    server 10.0.0.12:8080;
}

"""
OTHER = """\
# configuration file /srv/www/site.conf:
server
{
    listen 80;
}

"""


@pytest.mark.parametrize(
    ("dump", "others"),
    [
        (MAIN % "", False),
        (MAIN % "" + OURS, False),
        (MAIN % "" + OURS + OTHER, True),
        (MAIN % "" + OTHER, True),
        (MAIN % "" + OTHER + OURS, True),
        (MAIN % "\tserver { listen 80; }", True),
        (MAIN % "\tserver { listen 80; }" + OURS, True),
        ("# configuration file /etc/nginx/nginx.conf:\nevents {} http { server { listen 80; } }\n", True),
        ("# configuration file /etc/nginx/nginx.conf:\nevents {}\nstream {\n  server {\n listen 53;\n}\n}\n", True),
    ],
)
def test_what_else_is_served(dump: str, others: bool) -> None:
    variables = yaml.safe_load(VARS.read_text())
    asked = {name: variables[name] for name in ("__gateway_own", "__gateway_server")}
    templar = Templar(DataLoader(), variables={**asked, "__gateway_dump": {"stdout": dump}})
    assert templar.template(trust_as_template(variables["__gateway_serves_others"])) is others
