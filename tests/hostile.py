"""Content that wants to run on a page, and a look at a page that shows it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

# Sets an attribute of the document wherever it runs, and asks for a file.
RUN = "document.documentElement.dataset.taken=1"
EVIL = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f"\"><img src=x onerror='{RUN}'>",
    f"' onmouseover='{RUN}' autofocus onfocus='{RUN}' x='",
    f"</title></style></textarea></pre><svg onload={RUN}>",
    f"<!--><script>{RUN}</script>-->",
    f"]]><script>{RUN}</script>",
    f"\u2028\u2029{RUN}\u2028//",
    f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    f'<a href="javascript:{RUN}">x</a><base href=//x.invalid/>',
    "<meta http-equiv=refresh content='0;url=//x.invalid'><link rel=stylesheet href=//x.invalid>",
    "{{ 7*7 }}{% raw %}${7*7}&lt;b&gt;\0",
]
ALL = " ".join(EVIL)
# Opens everything there is to open, then writes what it sees.
PROBE = """
<script>addEventListener('load', async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  for (const d of document.querySelectorAll('details')) d.open = true;
  for (const b of document.querySelectorAll('button')) b.click();
  await wait(1500);
  for (const e of document.querySelectorAll('*')) e.dispatchEvent(new Event('mouseover'));
  await wait(200);
  const seen = {
    taken: document.documentElement.dataset.taken || null,
    made: [...document.querySelectorAll('img, iframe, svg[onload], base, a[href^="javascript"]')]
      .filter((e) => !(e.tagName === 'IMG' && e.src.startsWith('data:image/png')))
      .map((e) => e.outerHTML.slice(0, 200)),
    handlers: [...document.querySelectorAll('*')].filter((e) => [...e.attributes]
      .some((a) => a.name.startsWith('on'))).length,
    fetched: performance.getEntriesByType('resource').map((r) => r.name)
      .filter((name) => !name.startsWith('data:')),
    text: document.body.innerText,
  };
  const out = document.createElement('pre'); out.id = 'seen';
  out.textContent = JSON.stringify(seen); document.body.append(out);
});</script>
"""


def check(page: Path, chromium: Callable[..., str], shown: Sequence[str]) -> None:
    """Open a page without its policy, where escaping alone protects, and as it is.

    Nothing of it may run, become an element or be fetched; what is in `shown` stands on it.
    """
    dom = chromium(page, PROBE)
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    seen = json.loads(html.unescape(found.group(1)))
    assert seen["taken"] is None, "content ran"
    assert seen["made"] == [] and seen["handlers"] == 0 and seen["fetched"] == []
    for text in shown:
        assert text in seen["text"], text
    dom = chromium(page)
    assert not re.search(r"<html[^>]*data-taken", dom)
