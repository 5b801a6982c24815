"""Check pages with axe-core in headless Chromium: light and dark, desktop and phone.

    python tools/axe.py AXE_MIN_JS PAGE...

axe.min.js is in the npm package axe-core. Prints violations; 1 if there are any.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """<script>{axe}</script><script>
addEventListener('load', () => {{
  document.querySelectorAll('details').forEach(one => one.open = true);
  axe.run().then(found => {{
    const lines = found.violations.map(v => [v.id, v.impact, v.nodes.map(n => n.html)]);
    document.body.innerHTML = '<pre id="axe"></pre>';
    document.getElementById('axe').textContent = JSON.stringify(lines);
  }});
}});
</script></body>"""
SCHEMES = {"light": 1, "dark": 0}  # blink's numbers
WIDTHS = (1280, 500)


def violations(browser: str, axe: str, page: Path, scheme: str, width: int) -> list[list[str]]:
    """What axe finds in a page, in one scheme and width."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / page.name
        text = page.read_text(encoding="utf-8")
        copy.write_text(
            text.replace("</body>", RUN.format(axe=axe.replace("</script", "<\\/script")))
        )
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            f"--window-size={width},900", "--dump-dom", copy.as_uri(),
        ]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="axe">(.*?)</pre>', shown, re.DOTALL)
    if found is None:
        raise RuntimeError(f"{page}: axe did not finish")
    return json.loads(html.unescape(found[1]))


def main(arguments: list[str]) -> int:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or len(arguments) < 2:
        print(__doc__ if browser else "not found: chromium, google-chrome", file=sys.stderr)
        return 2
    axe, found = Path(arguments[0]).read_text(encoding="utf-8"), 0
    for page in map(Path, arguments[1:]):
        for scheme in SCHEMES:
            for width in WIDTHS:
                lines = violations(browser, axe, page, scheme, width)
                found += len(lines)
                print(f"{page} {scheme} {width}: {lines or 'nothing'}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
