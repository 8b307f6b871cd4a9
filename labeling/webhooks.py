"""Webhooks: Label Studio notifies the service of changes, so that `relook label sync --watch` pulls at once.

A webhook is a notification only. Label Studio sends each request once and gives up after a second, and its body is
not trusted here: the pull reads what changed, and finds everything without any webhook.
"""

from urllib.parse import urlsplit

from labeling.client import LabelStudioClient
from records.errors import LabelStudioError
from records.home import Home
from records.ids import sha256_hex
from records.keys import key_of
from records.notifications import SECRET_FILE, SECRET_HEADER, WEBHOOK_PATH

ACTIONS = ("ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED", "TASKS_DELETED")

# Label Studio's own list of networks that webhooks may not reach (SSRF protection), without the loopback: the local
# service is there. The default can only be switched off as a whole, so the rest of it is repeated.
_BANNED = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
    "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4",
    "233.252.0.0/24", "240.0.0.0/4", "255.255.255.255/32", "::/128", "::ffff:0:0/96", "::ffff:0:0:0/96",
    "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001:0000::/32", "2001:20::/28", "2001:db8::/32", "2002::/16",
    "fc00::/7", "fe80::/10", "ff00::/8",
)  # fmt: skip


def webhook_fingerprint(home: Home, url: str | None) -> str | None:
    """Return the address and a hash of the secret, which change when the webhook must be set anew; None without one."""
    return None if url is None else f"{url.rstrip('/')} {sha256_hex(key_of(home, SECRET_FILE).encode())[:12]}"


def ensure_webhook(home: Home, client: LabelStudioClient, project_id: int, url: str | None) -> None:
    """Make a project send its webhooks to this address and to no other Relook service.

    Args:
        home: its webhook secret is sent as a header of each request.
        client: connected.
        project_id: of an existing project.
        url: base address of the service as Label Studio reaches it; None removes the webhook.
    Raises:
        LabelStudioError: Label Studio cannot be reached, or may not call this address.
    """
    wanted = None if url is None else url.rstrip("/") + WEBHOOK_PATH
    headers = {SECRET_HEADER: key_of(home, SECRET_FILE)}
    present = client.request("GET", "api/webhooks/", "list webhooks", params={"project": project_id})
    stands = False
    # The project may hold webhooks that people made for other services; only those to Relook's route are replaced.
    for hook in present:
        if not str(hook["url"]).endswith(WEBHOOK_PATH):
            continue
        if hook["url"] == wanted and hook["headers"] == headers and hook["is_active"] and not stands:
            stands = True
        else:
            number = int(hook["id"])
            client.request("DELETE", f"api/webhooks/{number}/", f"remove webhook {number}")
    if wanted is None or stands:
        return
    body = {
        "project": project_id,
        "url": wanted,
        "actions": list(ACTIONS),
        "send_payload": False,
        "send_for_all_actions": False,
        "headers": headers,
        "is_active": True,
    }
    try:
        client.request("POST", "api/webhooks/", f"add a webhook to {url}", body=body, repeat=False)
    except LabelStudioError as error:
        raise LabelStudioError(
            f"{error}; let Label Studio call that address (its SSRF_PROTECTION_ENABLED and "
            "USE_DEFAULT_BANNED_SUBNETS; the local one is allowed to when it is started with labeling.webhook_url "
            "set), or unset labeling.webhook_url: annotations are then read at the next poll"
        ) from error


def webhook_variables(url: str | None) -> dict[str, str]:
    """Return the environment variables that let the local Label Studio send webhooks to an address.

    Args:
        url: base address of the service; None if there is no webhook.
    Returns:
        Variables that allow loopback and keep every other private network closed; empty for an address elsewhere.
    """
    if url is None or urlsplit(url).hostname not in ("127.0.0.1", "localhost"):
        return {}
    return {
        "LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS": "false",
        "LABEL_STUDIO_USER_ADDITIONAL_BANNED_SUBNETS": ",".join(_BANNED),
    }
