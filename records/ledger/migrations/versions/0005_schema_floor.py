"""From here on a ledger says which programs may use it, so that the previous one goes on while machines are upgraded.

A migration that an older program cannot live with (a column that is dropped, renamed or must be filled) sets
`schema_floor.oldest` to its own revision; one that only adds leaves it alone.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the table with its one row; programs before this one do not read it and refuse by themselves."""
    floor = op.create_table("schema_floor", sa.Column("oldest", sa.Text(), primary_key=True))
    op.bulk_insert(floor, [{"oldest": revision}])
