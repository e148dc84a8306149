"""Published graders' extraction."""

POLICIES: tuple[str, ...] = ()
