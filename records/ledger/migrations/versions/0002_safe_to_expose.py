"""What a service that strangers can reach needs: columns and tables added to the first release."""

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns and tables."""
