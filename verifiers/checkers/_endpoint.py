"""A minimal client of OpenAI-compatible chat endpoints, on the standard library."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ._grader import GraderError

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_MAX_REPLY = 4_000_000


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nowhere: urllib would take the key along to any other host."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class Endpoint:
    """Asks a chat model.

    Args:
        base_url: Up to and without `/chat/completions`.
        model: The model's name there.
        api_key_env: Environment variable that holds the key; only the key is read
            from there, no setting.
        timeout_s: For one request.
        retries: Further tries after a failed or unusable reply.
        backoff_s: Wait before the first retry; doubled each time.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 60.0,
        retries: int = 2,
        backoff_s: float = 0.5,
    ) -> None:
        """Check the address.

        Raises:
            ValueError: Not a plain http address, or a negative number of retries.
        """
        parts = urlsplit(base_url)
        if parts.username is not None or parts.password is not None or parts.query:
            # Not repeated here: what stands there may be a key.
            raise ValueError(
                f"base_url has a user, password or query beside {parts.hostname!r}; expected the "
                f"plain address, and the key in the environment variable {api_key_env}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base_url is {base_url!r}, expected an http(s) address such as "
                "http://127.0.0.1:8000/v1"
            )
        if retries < 0:
            raise ValueError(f"retries is {retries}, expected at least 0")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.api_key_env = model, api_key_env
        self.timeout_s, self.retries, self.backoff_s = timeout_s, retries, backoff_s

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Mapping[str, Any],
        schema: Mapping[str, Any],
        read: Any,
    ) -> Any:
        """Ask until a reply can be read.

        Args:
            messages: Chat messages.
            sampling: Sampling parameters, passed on.
            schema: JSON schema that the reply should follow.
            read: Function of the reply's text; a ValueError of it means the reply
                is unusable and is retried.

        Returns:
            What `read` returned.

        Raises:
            GraderError: No usable reply after all tries; the message has the last
                reason.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            **sampling,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "grade", "strict": True, "schema": schema},
            },
        }
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            try:
                return read(self._post(body))
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                    reason = self._without_key(reason)
                if error.code not in _RETRIED:
                    break
            except (OSError, ValueError, LookupError, TypeError) as error:
                reason = self._without_key(f"{type(error).__name__}: {error}")
        raise GraderError(f"{self.url}, model {self.model!r}: {reason}")

    def _without_key(self, text: str) -> str:
        """Return a text in which an endpoint may have repeated the key, without it."""
        key = self._key()
        return text.replace(key, "[key]") if key else text

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise GraderError(f"the environment variable {self.api_key_env} holds no key")
        return key

    def _post(self, body: Mapping[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(  # noqa: S310 -- the scheme was checked
            self.url, json.dumps(body).encode(), headers, method="POST"
        )
        with _OPENER.open(request, timeout=self.timeout_s) as reply:
            data = json.loads(reply.read(_MAX_REPLY))
        content = data["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise ValueError(f"the reply's content is {type(content).__name__}, expected text")
        return content


def filled_messages(
    messages: Sequence[Mapping[str, Any]], item: Mapping[str, Any], sample: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Fill in the templates of chat messages.

    Args:
        messages: `role` and `content`, a text or a list of `{type, text}` parts.
        item: The row.
        sample: The sample.

    Returns:
        Messages as the endpoint takes them.
    """
    from ._grader import fill

    out = []
    for message in messages:
        content = message["content"]
        if isinstance(content, Mapping):
            content = [content]
        if not isinstance(content, str):
            content = "\n".join(part["text"] for part in content)
        out.append({"role": message["role"], "content": fill(content, item, sample)})
    return out


def check_messages(messages: Any, where: str) -> None:
    """Refuse what is no list of chat messages.

    Raises:
        ValueError: With the index of the message at fault.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: input is {messages!r:.60}, expected a list of chat messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"{where}: input[{index}] is {message!r:.80}, expected role and content"
            )
