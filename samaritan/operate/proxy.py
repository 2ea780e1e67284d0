"""The reverse proxy in front of the SuperLink: it shows the world the fleet interface alone.

nginx asks every caller for a certificate of the consortium, turns away revoked ones, and passes on
what nodes need; the control and runtime interfaces of Flower, which share the SuperLink's port, are
not there for anybody outside.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from samaritan.errors import DeploymentError
from samaritan.files import write_atomically
from samaritan.operate.places import RUN
from samaritan.operate.processes import Program

_CALLS = (
    "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages",
    "get-run", "get-fab", "push-object", "pull-object", "confirm-message-received",
)  # fmt: skip
"""What Flower's nodes ask for; they do not register themselves."""

_BODY_MB = 64
"""Flower sends tensors in pieces of 5 MB."""


def proxy_program(kit: Path, listen: str, port: int, link_port: int) -> Program:
    """Nginx for a server's kit; its configuration is written anew.

    Args:
        kit: Folder with ca.crt, crl.pem, server.crt and server.key.
        listen: Address to listen on.
        port: Port to listen on.
        link_port: Of the SuperLink, on this machine.

    Raises:
        DeploymentError: SAM-N405 when nginx is not installed.
    """
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if nginx is None:
        raise DeploymentError(
            "SAM-N405",
            "nginx is not installed; without it the SuperLink would show all of its interfaces",
            "Install it (Debian: apt install nginx-light), version 1.18 or newer.",
        )
    path = kit / RUN / "nginx.conf"
    write_atomically(path, configuration(kit, listen, port, link_port).encode())
    command = (nginx, "-e", "stderr", "-c", str(path), "-g", "daemon off;")
    return Program("proxy", command, before=20)


def configuration(kit: Path, listen: str, port: int, link_port: int) -> str:
    """What nginx reads."""
    temporary = kit / RUN / "nginx"
    temporary.mkdir(0o700, parents=True, exist_ok=True)
    folders = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temp_paths = "\n".join(f'    {n}_temp_path "{temporary / n}";' for n in folders)
    user = "user nobody nogroup;\n" if os.geteuid() == 0 else ""
    return rf"""{user}worker_processes 2;
pid "{kit / RUN / "nginx.pid"}";
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
{temp_paths}
    log_format plain '$time_iso8601 $remote_addr "$ssl_client_s_dn" $ssl_client_verify '
                     '"$request" $status $request_length $bytes_sent';
    access_log /dev/stdout plain;
    server_tokens off;
    client_max_body_size {_BODY_MB}m;
    proxy_request_buffering off;
    proxy_max_temp_file_size 0;
    keepalive_timeout 75s;
    upstream link {{ server 127.0.0.1:{link_port}; keepalive 16; }}
    server {{
        listen {listen}:{port} ssl;
        ssl_certificate "{kit / "server.crt"}";
        ssl_certificate_key "{kit / "server.key"}";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_client_certificate "{kit / "ca.crt"}";
        ssl_crl "{kit / "crl.pem"}";
        ssl_verify_client on;
        # The path that was looked at is passed on, and not the one that was written.
        location ~ ^/v1/fleet/({"|".join(_CALLS)})\z {{
            proxy_pass https://link$uri;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_ssl_trusted_certificate "{kit / "ca.crt"}";
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_session_reuse on;
            proxy_read_timeout 120s;
        }}
        location / {{ return 404; }}
    }}
}}
"""
