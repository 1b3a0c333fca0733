"""Webhooks after the rules of Standard Webhooks, so that `openai.webhooks.unwrap` and every other verifier takes them.

Source: standardwebhooks.com specification 1.0 (`webhook-id`, `webhook-timestamp`, `webhook-signature`; HMAC-SHA256 over
`id.timestamp.body`); event objects as in openai-python 3.54, `types/webhooks`.
"""

import base64
import hmac
import secrets as random_source
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from tunewright.clock import wall_s
from tunewright.egress import TIMEOUT_S, Egress
from tunewright.errors import InvalidRequest, TunewrightError
from tunewright.i18n import mark
from tunewright.notifications.records import Delivery, Outcome

SECRET_PREFIX = "whsec_"
_SECRET_BYTES = 32


def new_secret() -> str:
    """A signing secret as receivers are given it."""
    return SECRET_PREFIX + base64.b64encode(random_source.token_bytes(_SECRET_BYTES)).decode("ascii")


def signed_headers(secrets: Sequence[str], event_id: str, at_s: int, body: bytes) -> dict[str, str]:
    """The headers of one try, with a signature for each active secret."""
    text = f"{event_id}.{at_s}.".encode("ascii") + body
    keys = [base64.b64decode(secret.removeprefix(SECRET_PREFIX)) for secret in secrets]
    signatures = [base64.b64encode(hmac.digest(key, text, "sha256")).decode("ascii") for key in keys]
    return {
        "Content-Type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def event_body(delivery: Delivery) -> bytes:
    """The event as it is sent. It names the job or the deployment and nothing else: what happened is asked for with a key."""
    return msgspec.json.encode(
        {
            "id": delivery.event_id,
            "object": "event",
            "created_at": delivery.created_at,
            "type": delivery.type,
            "data": {"id": delivery.subject_id},
        }
    )


def check_address(egress: Egress, url: str) -> str:
    """What may be shown of a webhook's address: the path may hold a secret.

    Raises InvalidRequest (`invalid_url`, `url_not_allowed`) for all but plain https addresses of public hosts.
    """
    if not url.isascii():  # names in other scripts look like names that they are not
        raise InvalidRequest("invalid_url", mark("Write the address in ASCII; a host name as xn--..."), param="url")
    try:
        address = egress.check(url)
    except InvalidRequest as error:
        error.param = "url"
        raise
    if address.scheme != "https":
        raise InvalidRequest("url_not_allowed", mark("Webhooks are sent by https only"), param="url")
    return f"https://{urlsplit(address.url).netloc}/***"


class WebhookSender:
    """Sends to the address itself: no redirects, nothing of the answer but its status."""

    def __init__(self, egress: Egress, timeout_s: float = TIMEOUT_S) -> None:
        self.egress = egress
        self._timeout_s = timeout_s

    def send(self, url: str, secrets: Sequence[str], delivery: Delivery) -> Outcome:
        """One try. Raises nothing that a receiver could cause."""
        body = event_body(delivery)
        headers = signed_headers(secrets, delivery.event_id, wall_s(), body)
        try:
            status = self.egress.post(url, body, headers, timeout_s=self._timeout_s)
        except TunewrightError as error:
            reason = error.values.get("reason")
            return Outcome(error=str(reason) if error.code == "fetch_failed" else error.code)
        return Outcome(None if 200 <= status < 300 else "status", status)
