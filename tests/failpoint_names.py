"""The steps at which a tier can be made to fail, from its sources: no test can forget one."""

import re
from pathlib import Path

STORAGE = Path(__file__).parents[1] / "storage"


def failpoint_names(room: str, prefix: str = "") -> list[str]:
    """All that begin with `prefix` in a folder of storage/."""
    sources = [path.read_text() for path in (STORAGE / room).glob("*.py")]
    found = {name for source in sources for name in re.findall(r'\breach\("([^"]+)"\)', source)}
    return sorted(name for name in found if name.startswith(prefix))
