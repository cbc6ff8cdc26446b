"""p2p/interfaces.py: which addresses others can reach."""

from __future__ import annotations

import pytest

from p2p.interfaces import ADDRESSES_MAX, InterfaceAddress, is_wildcard, multiaddr_text, usable


def at(name: str, address: str, *, up: bool = True) -> InterfaceAddress:
    return InterfaceAddress(name=name, address=address, up=up)


@pytest.mark.parametrize(
    "name", ["docker0", "br-1a2b3c", "veth9f", "virbr0", "tun0", "tap1", "utun3", "wg0", "tailscale0", "cni0", "vmnet8"]
)
def test_bridges_pairs_and_tunnels_are_left_out(name: str) -> None:
    assert usable([at(name, "172.17.0.1"), at("eth0", "192.0.2.7")]) == ("192.0.2.7",)


@pytest.mark.parametrize("name", ["eth0", "enp3s0", "wlan0", "wlp2s0", "en0", "Ethernet", "Wi-Fi", "bond0", "ens5"])
def test_real_interfaces_stay(name: str) -> None:
    assert usable([at(name, "192.0.2.7")]) == ("192.0.2.7",)


def test_loopback_comes_last_and_once() -> None:
    assert usable([at("lo", "127.0.0.1"), at("lo", "::1"), at("eth0", "192.0.2.7"), at("eth0", "2001:db8::1")]) == (
        "192.0.2.7",
        "2001:db8::1",
        "127.0.0.1",
    )


def test_what_cannot_be_dialled_is_left_out() -> None:
    lines = ["0.0.0.0", "::", "fe80::1%eth0", "169.254.3.4", "224.0.0.1", "aa:bb:cc:dd:ee:ff", ""]
    assert usable([at("eth0", line) for line in lines] + [at("eth1", "192.0.2.9", up=False)]) == ()


def test_there_is_a_bound() -> None:
    assert len(usable([at("eth0", f"192.0.2.{n}") for n in range(100)])) == ADDRESSES_MAX


def test_multiaddrs() -> None:
    assert multiaddr_text("192.0.2.7", 4001) == "/ip4/192.0.2.7/tcp/4001"
    assert multiaddr_text("2001:db8::1", 1) == "/ip6/2001:db8::1/tcp/1"
    assert is_wildcard("/ip4/0.0.0.0/tcp/4001")
    assert is_wildcard("/ip6/::/tcp/1")
    assert not is_wildcard("/ip6/::1/tcp/1")
