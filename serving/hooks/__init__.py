"""Signed outbound requests that tell other programs about events."""
