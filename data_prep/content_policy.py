"""The Content-Security-Policy of pages that show untrusted text.

Everything on a page is escaped. Should something ever not be, a browser still runs no script but
the page's own, which the policy names by its hash, and fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib


def content_policy(script: str = "") -> str:
    """Return the policy of a page with this inline script, or with none.

    Args:
        script: Exactly what stands between `<script>` and `</script>`.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'sha256-{digest}'" if script else "script-src 'none'",
            "style-src 'unsafe-inline'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
