"""Bytes between peers: transports, frames, calls, addresses. No tensor passes here."""
