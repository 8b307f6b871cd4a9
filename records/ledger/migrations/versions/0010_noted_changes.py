"""Triggers note which images a dataset version has to look at again; see `records.changes`."""

from alembic import op

revision = "0010"
down_revision = "0009"

_ON = "EXISTS (SELECT 1 FROM cursors WHERE name = 'datasets.noted')"
_LABELLED = "EXISTS (SELECT 1 FROM source_labels WHERE image_id = {image})"
# A first split needs no note: no version has an image whose group has none.
_SPLIT = "OLD.split IS NOT NULL AND OLD.split {differs} NEW.split OR OLD.merged_into {differs} NEW.merged_into"
_OF_IMAGE = " OR ".join(f"OLD.{name} {{differs}} NEW.{name}" for name in ("group_id", "consent", "erased_at"))
_GROUP = f"FROM images WHERE group_id = NEW.id AND {_LABELLED.format(image='images.id')}"

# Name of the trigger, event, and when it writes which rows.
_TRIGGERS = (
    ("label_added", "INSERT ON source_labels", _ON, "SELECT {key}, '', NEW.image_id"),
    ("label_changed", "UPDATE ON source_labels", _ON, "SELECT {key}, '', NEW.image_id"),
    ("label_removed", "DELETE ON source_labels", _ON, "SELECT {key}, '', OLD.image_id"),
    (
        "image_changed",
        "UPDATE OF group_id, consent, erased_at ON images",
        f"({_OF_IMAGE}) AND {_ON} AND {_LABELLED.format(image='NEW.id')}",
        "SELECT {key}, '', NEW.id",
    ),
    (
        "group_changed",
        "UPDATE OF split, merged_into ON groups",
        f"({_SPLIT}) AND {_ON}",
        f"SELECT {{key}}, '', images.id {_GROUP}",
    ),
)
_INSERT = "INSERT INTO dataset_changes (id, dataset_id, image_id)"


def upgrade() -> None:
    """Add the triggers; on PostgreSQL a condition cannot hold a query, so their functions have it."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    key = "lower(hex(randomblob(16)))" if sqlite else "md5(random()::text || clock_timestamp()::text)"
    differs = "IS NOT" if sqlite else "IS DISTINCT FROM"
    for name, event, when, rows in _TRIGGERS:
        written = f"{_INSERT} {rows.format(key=key)}"
        condition = when.format(differs=differs)
        if sqlite:
            op.execute(f"CREATE TRIGGER note_{name} AFTER {event} FOR EACH ROW WHEN {condition} BEGIN {written}; END")
            continue
        body = f"BEGIN IF {condition} THEN {written}; END IF; RETURN NULL; END"
        op.execute(f"CREATE FUNCTION note_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
        op.execute(f"CREATE TRIGGER note_{name} AFTER {event} FOR EACH ROW EXECUTE FUNCTION note_{name}()")
