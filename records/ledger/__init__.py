"""The ledger: every record in one SQL database, SQLite by default and PostgreSQL on a cluster."""

from records.ledger.ledger import (
    FENCES,
    AuditPlaces,
    Fence,
    Ledger,
    Transaction,
    is_expired,
    is_released,
    lost_lease,
    open_ledger,
)

__all__ = [
    "FENCES",
    "AuditPlaces",
    "Fence",
    "Ledger",
    "Transaction",
    "is_expired",
    "is_released",
    "lost_lease",
    "open_ledger",
]
