"""Who may answer in Label Studio: accounts, and the link under which a new person makes one."""

from urllib.parse import urlsplit

from labeling.client import LabelStudioClient


def users(client: LabelStudioClient) -> dict[int, str]:
    """Return who may answer.

    Args:
        client: connected.
    Returns:
        E-mail address by user id.
    Raises:
        LabelStudioError: it does not answer.
    """
    action = "list users"
    found = client.request("GET", "api/users/", action)
    with client.speaking(action):
        return {int(user["id"]): str(user["email"]) for user in found}


def ensure_user(client: LabelStudioClient, email: str, first_name: str, last_name: str) -> int:
    """Return the id of the user with this address, made without a password if there is none.

    Args:
        client: connected.
        email: address, lower case.
        first_name: shown beside answers.
        last_name: shown beside answers.
    Returns:
        The user id.
    Raises:
        LabelStudioError: it does not answer, or the token may not make users.
    """
    for user_id, known in users(client).items():
        if known.lower() == email.lower():
            return user_id
    action = f"add the user {email}"
    body = {"username": email, "email": email, "first_name": first_name, "last_name": last_name}
    found = client.request("POST", "api/users/", action, body=body, repeat=False)
    with client.speaking(action):
        return int(found["id"])


def invitation(client: LabelStudioClient) -> str:
    """Return the link under which a new person makes an account of their own.

    Args:
        client: connected.
    Returns:
        A URL at this server. Whoever has it can join, so it is for one person to hand on.
    Raises:
        LabelStudioError: it does not answer, or the token may not invite.
    """
    action = "invite a person"
    found = client.request("GET", "api/invite", action)
    with client.speaking(action):
        link = urlsplit(found["invite_url"])
        return f"{client.url}{link.path}?{link.query}"
