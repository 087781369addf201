"""What a wheel must hold and may hold: all Python files of the package, the two binaries, metadata. Prints its size."""

import re
import sys
import zipfile
from pathlib import Path

ALLOWED = (
    r"kvcompress/(?:[a-z_]+/)*[A-Za-z_0-9]+\.py",
    r"kvcompress/py\.typed",
    r"kvcompress/libkvcompress\.so",
    r"kvcompress/_C\.[\w-]+\.so",
    r"kvcompress-[\w.]+\.dist-info/(?:METADATA|RECORD|WHEEL|entry_points\.txt|licenses/LICENSE)",
)
PACKAGE = Path(__file__).parent.parent / "python"
NEEDED = [
    "kvcompress/libkvcompress.so",
    "kvcompress/_bench/bench/run.py",  # what `kvcompress bench` runs, and
    "kvcompress/_bench/tests/cases.py",
    "kvcompress/_bench/tests/select/test_topk.py",  # what must pass before it reports
    *(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")),
]

for path in map(Path, sys.argv[1:]):
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        stray = [name for name in names if not any(re.fullmatch(pattern, name) for pattern in ALLOWED)]
        lacking = [name for name in NEEDED if name not in names]
        size = sum(entry.file_size for entry in wheel.infolist())
    print(f"{path.name}: {path.stat().st_size:,} bytes packed, {size:,} unpacked, {len(names)} files")
    if stray or lacking:
        sys.exit(f"stray: {stray}\nlacking: {lacking}")
