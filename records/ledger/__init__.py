"""The ledger: every record in one SQL database, SQLite by default and PostgreSQL on a cluster."""

from records.ledger.ledger import Ledger, Transaction, open_ledger

__all__ = ["Ledger", "Transaction", "open_ledger"]
