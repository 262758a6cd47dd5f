"""What is shipped: one top level, all rooms as real files, and a base install that a worker can take."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_kvd_alone_and_all_of_it(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "-q", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("METADATA"))).decode())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kvd"}
    for module in ("kvd/sidecar/hicache.py", "kvd/storage/arena.py", "kvd/router/__init__.py", "kvd/ctl/__init__.py"):
        assert module in names
    assert metadata["Name"] == "sglang-kvd"
    required = [r.split(">")[0].split(";")[0].strip() for r in metadata.get_all("Requires-Dist") if "extra" not in r]
    assert sorted(required) == ["msgspec", "pyzmq", "xxhash"], "a worker gets nothing else"
