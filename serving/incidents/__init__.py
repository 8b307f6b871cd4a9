"""Incidents and the report over them as the service shows them, from rows of the ledger and a stored report."""
