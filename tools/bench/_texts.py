"""What benches of tokens read: a model's folder, and texts as people and agents send them."""

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import router_models
from tools.bench._table import ROOT

AGENT = ROOT / "../shared/data/agentic/miniswe.jsonl.gz"
MODEL = ROOT / ".models/smollm2-135m"


@contextmanager
def model_folder() -> Iterator[Path]:
    """Of a real model where it is installed, else of a small tokenizer, trained on the spot."""
    if MODEL.exists():
        yield MODEL
        return
    with tempfile.TemporaryDirectory() as folder:
        made = router_models.with_special(router_models.byte_level())
        yield router_models.folder(Path(folder) / "trained-here", made)


def texts(count: int) -> list[str]:
    """Prompts of a real software agent, or code of this checkout where those are not there."""
    if AGENT.exists():
        with gzip.open(AGENT, "rt", encoding="utf-8") as lines:
            found = [str(json.loads(line)["input"]) for line in lines]
        return found[:: max(1, len(found) // count)][:count]
    return [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("kvd/**/*.py"))][:count]


def source() -> str:
    """Where `texts` come from."""
    return "prompts of an agent" if AGENT.exists() else "code of this checkout"
