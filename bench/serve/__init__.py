"""Throughput, latency and robustness of a running service, compared with other servers."""
