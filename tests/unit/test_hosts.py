"""Which issuer a request means, by Host and path."""

import pytest

from minter.issuer.hosts import Hosts, endpoint, mounted

ALPEN, BOREAL, FJORD = (
    "https://tokens.alpen.org/",
    "https://tokens.boreal.org:8443/",
    "https://tokens.boreal.org:8443/fjord/",
)
A, B = "tokens.alpen.org", "tokens.boreal.org:8443"


@pytest.mark.parametrize(
    ("host", "path", "placed"),
    [
        (A, "/token", f"/@{A}/token"),
        ("TOKENS.Alpen.org", "/token", f"/@{A}/token"),
        ("tokens.alpen.org.", "/token", f"/@{A}/token"),
        ("tokens.alpen.org:443", "/token", f"/@{A}/token"),
        ("tokens.alpen.org:8443", "/token", "/token"),
        (B, "/token", f"/@{B}/token"),
        (B, "/fjord/token", f"/@{B}/fjord/token"),
        (A, "/fjord/token", f"/@{A}/fjord/token"),  # alpen has no such path: not found
        (None, "/fjord/token", f"/@{B}/fjord/token"),
        ("evil.example", "/fjord/token", f"/@{B}/fjord/token"),
        ("127.0.0.1:8443", "/.well-known/openid-configuration/fjord", f"/@{B}/.well-known/openid-configuration/fjord"),
        ("evil.example", "/token", "/token"),  # it may be meant for either
        (None, "/token", "/token"),
        ("[::1", "/token", "/token"),
        ("a:b:c", "/token", "/token"),
    ],
)  # fmt: skip
def test_the_host_chooses_then_the_path(host: str | None, path: str, placed: str) -> None:
    assert Hosts([ALPEN, BOREAL, FJORD]).place(host, path) == placed


def test_one_host_is_meant_by_every_name() -> None:
    hosts = Hosts(["https://[2001:db8::1]:8443/vo/"])
    assert hosts.place("[2001:DB8:0::1]:8443", "/vo/token") == "/@[2001:db8::1]:8443/vo/token"
    assert hosts.place("localhost", "/vo/token") == "/@[2001:db8::1]:8443/vo/token"


def test_metrics_name_an_endpoint_without_its_host() -> None:
    assert endpoint(f"{mounted(FJORD)}token") == "/fjord/token"
    assert endpoint("/health") == "/health"
    assert endpoint(None) == ""
